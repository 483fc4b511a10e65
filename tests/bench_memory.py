"""Time and memory of a training step by what is recomputed or in float8, against `--plan=True`.

    python tests/bench_memory.py config/gpt2_1558m.py --micro_batch_size=8 --batch_tokens=16384

Takes the settings of train.py. Each row is a process of its own and a line of the table: off,
selective, full (activation checkpointing), products (recompute all but matrix products and
attention, by torch's selective checkpointing), budget=0.5 (the compiler's memory budget), float8,
float8_head (the head, too), float8_mlp (only the MLPs). Random tokens; time as in bench_train.py.
The memory of weights, gradients and moments, and what a further micro-step adds at its peak, are
the allocator's, each with the plan's figure behind it.
"""

import functools
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import bench_train
import torch
import torch._functorch.config
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import config
import hardware
import model
import plan
import train

aten = torch.ops.aten
ATTENTION = "cudnn_attention efficient_attention flash_attention fused_attention_overrideable"
PRODUCTS = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_mm.default]


@dataclass
class MemoryConfig(bench_train.BenchConfig):
    """bench_train.py's settings, and what to compare."""

    rows: str = "off,selective,full,products,budget=0.5"  # also float8, float8_head, float8_mlp
    turns: int = 2  # how often each row is measured, by turns


def main(settings: MemoryConfig):
    rows = settings.rows.split(",")
    if len(rows) == 1:
        print(measure(rows[0], settings), flush=True)
        return
    print("row | ms per step | tokens/s | peak GiB | state, plan | activations, plan", flush=True)
    for row in rows * settings.turns:
        command = [sys.executable, __file__, *sys.argv[1:], f"--rows={row}"]
        if subprocess.run(command).returncode:
            print(f"{row} | failed", flush=True)


def measure(row: str, settings: MemoryConfig) -> str:
    """A row of the table."""
    device = hardware.find_device(settings.device)
    run = bench_train.start_run(chosen(row, settings), device)
    timed = bench_train.Timed(lambda tokens: bench_train.take_step(run, tokens))
    for _ in range(3):
        bench_train.time_window(timed, run.settings, device)
    low, median, high = (f(timed.seconds) for f in (min, statistics.median, max))
    memory = hardware.memory_gib(run.ranks.device)
    return (
        f"{row} | {median * 1e3:.1f} ({low * 1e3:.1f} to {high * 1e3:.1f}) | "
        f"{settings.batch_tokens / median:,.0f} | {memory:.2f} | {against_plan(row, run)}"
    )


def chosen(row: str, settings: MemoryConfig) -> MemoryConfig:
    """The settings of a row, and torch as it needs it."""
    if row in ("off", "selective", "full"):
        return replace(settings, activation_checkpointing=row)
    if row == "products":
        names = [f"_scaled_dot_product_{name}" for name in ATTENTION.split()]
        kept = PRODUCTS + [getattr(aten, name).default for name in names]
        contexts = functools.partial(create_selective_checkpoint_contexts, kept)
        model.checkpoint = functools.partial(checkpoint, context_fn=contexts)
        return replace(settings, activation_checkpointing="full")
    if row.startswith("budget="):
        torch._functorch.config.activation_memory_budget = float(row.removeprefix("budget="))
    elif row == "float8_head":
        hardware.is_for_float8 = lambda layer, name: True
    elif row == "float8_mlp":
        hardware.is_for_float8 = lambda layer, name: ".mlp." in name
    return replace(settings, dtype="float8") if row.startswith("float8") else settings


def against_plan(row: str, run: train.Run) -> str:
    """Bytes of the state, and of a micro-step beside it, each as measured and as planned."""
    if run.ranks.device.type != "cuda":
        return "no GPU"
    shape = run.settings.micro_batch_size, run.settings.block_size
    tokens = torch.randint(run.settings.vocab_size, shape, device=run.ranks.device)
    run.forward(tokens, tokens).mean().backward()
    state = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run.forward(tokens, tokens).mean().backward()
    activations = torch.cuda.max_memory_allocated() - state
    planned = plan.memory(run.model, asdict(run.settings), 1)
    planned_activations = planned.pop("activations and logits")
    words = []
    for measured, expected in ((state, sum(planned.values())), (activations, planned_activations)):
        error = f"{expected / measured - 1:+.1%}"
        words.append(f"{measured / 2**30:.2f} GiB, {expected / 2**30:.2f} ({error})")
    return " | ".join(words)


if __name__ == "__main__":
    with config.exit_on_failure():
        main(config.load(MemoryConfig, sys.argv[1:]))
