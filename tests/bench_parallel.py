"""Training steps on several GPUs: each way beside the others, on tokens of a skewed distribution.

    NCCL_NVLS_ENABLE=0 python tests/bench_parallel.py --row=ddp --gpus=2
    torchrun --standalone --nproc_per_node=2 tests/bench_parallel.py config/gpt2_124m.py \\
        --micro_batch_size=32 --parallel=fsdp --compile=blocks

The first form measures a table: it starts the second form for each line, in turn. Other settings of
train.py at the end of either replace the table's. A line has the tokens/s of windows of five steps
after a warm-up (median, least to most), the share of peak, GiB per GPU of weights, gradients and
moments, and at the peak, and the largest difference of the first losses from the first line's.
The batches are the same on any number of GPUs.
"""

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import config
import hardware
import parallel
import train
from ranks import start_ranks

RESULT = "RESULT "  # before the JSON of a line
WINDOW = 5  # steps between two waits for the device
SMALL = "config/gpt2_124m.py --micro_batch_size=64"
LARGE = "config/gpt2_1558m.py --micro_batch_size=8 --batch_tokens=131072 --compile=blocks"
TINY = "--n_layer=6 --n_embd=384 --n_head=6 --block_size=256 --batch_tokens=16384 --compile=off"
TINY += " --micro_batch_size=8 --steps=50 --learning_rate=1e-3 --warmup_steps=10"
FSDP, ZERO = "--parallel=fsdp", "--parallel=deepspeed --deepspeed_config="
TABLES = {  # of each: the settings of all lines; then name, GPUs (0: those asked for), settings
    "ddp": (
        SMALL + " --batches=per_gpu,524288",
        [(f"{c}, {g or 'all'}", g, f"--compile={c}") for c in ("model", "blocks") for g in (1, 0)],
    ),
    "buckets": (
        SMALL + " --batches=per_gpu,524288 --compile=model",
        [(f"buckets of {size} MB", 0, f"--bucket_mb={size}") for size in (25, 100, 400, 1000)],
    ),
    "fsdp": (
        LARGE,
        [
            ("ddp", 0, ""),
            ("fsdp", 0, FSDP),
            ("fsdp, not resharding", 0, f"{FSDP} --reshard_after_forward=False"),
        ],
    ),
    "large": (
        "config/gpt3_7b.py --block_size=1024 --batch_tokens=65536 --micro_batch_size=4 "
        "--activation_checkpointing=full --compile=blocks",
        [("fsdp", 0, FSDP)],
    ),
    "deepspeed": (
        LARGE,
        [
            ("fsdp", 0, FSDP),
            ("ZeRO 2", 0, f"{ZERO}2"),
            ("ZeRO 3", 0, f"{ZERO}3"),
            ("ZeRO 3, uncompiled", 0, f"{ZERO}3 --compile=off"),
            ("fsdp, uncompiled", 0, f"{FSDP} --compile=off"),
        ],
    ),
    "losses": (
        TINY,
        [
            (f"{dtype}, {name}", gpus, f"--dtype={dtype} {options}")
            for dtype, (name, gpus, options) in itertools.product(
                ("float32", "bfloat16"),
                [
                    ("ddp, 1 GPU", 1, ""),
                    ("ddp", 0, ""),
                    ("fsdp", 0, FSDP),
                    ("ZeRO 2", 0, f"{ZERO}2"),
                    ("ZeRO 3", 0, f"{ZERO}3"),
                    ("ddp, another seed", 0, "--seed=7"),
                ],
            )
        ],
    ),
}


@dataclass
class BenchConfig(train.TrainConfig):
    """Measure training steps of one way of parallelism, or a table of several."""

    row: str = ""  # table: ddp, buckets, fsdp, large, deepspeed or losses; "" = these settings
    gpus: int = 2  # GPUs of a table's lines
    turns: int = 2  # how often a table is measured
    batches: str = ""  # tokens per step, or per_gpu (65,536 each), by commas; "" = batch_tokens
    steps: int = 30  # of which the first five are warm-up
    bucket_mb: int = train.BUCKET_MB  # of gradients that DDP sums at once


def main(settings: BenchConfig):
    if settings.row:
        own = ("--row=", "--gpus=", "--turns=")
        measure_table(settings, [a for a in sys.argv[1:] if not a.startswith(own)])
    else:
        measure(settings)


def measure_table(settings: BenchConfig, others: list[str]):
    """Print a table in Markdown, line by line."""
    common, lines = TABLES[settings.row]
    print(
        "| what | tokens per step | tokens/s | ratio | share of peak | state, peak GiB | losses |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for _ in range(settings.turns):
        firsts = {}
        for name, gpus, options in lines:
            arguments = [*common.split(), *options.split(), *others]
            for result in run_line(arguments, gpus or settings.gpus):
                key = name.split(",")[0] if settings.row in ("ddp", "losses") else ""
                first = firsts.setdefault((key, result["kind"]), result)
                print_line(name, result, first)
    print(f"\n{result['device']}, torch {torch.__version__}, {settings.gpus} processes")


def run_line(arguments: list[str], gpus: int) -> list[dict]:
    """The results of the second form with these settings."""
    with tempfile.TemporaryDirectory() as folder:
        for number, argument in enumerate(arguments):
            name, _, stage = argument.partition("=")
            if name == "--deepspeed_config" and stage.isdigit():
                path = Path(folder, f"zero{stage}.json")
                path.write_text(json.dumps({"zero_optimization": {"stage": int(stage)}}))
                arguments[number] = f"{name}={path}"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        command = [sys.executable, *launcher, __file__, *arguments, f"--out_dir={folder}/run"]
        environment = {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "8"} | os.environ
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith(RESULT)]
    if result.returncode or not lines:
        text = result.stderr.split("torch/distributed/elastic")[0][-2000:]
        print(f"failed: {' '.join(arguments)}\n{text}", flush=True)
    return [json.loads(line.removeprefix(RESULT)) for line in lines]


def print_line(name: str, result: dict, first: dict):
    """A line of the table; first: the result that it is compared with."""
    low, median, high = (f(result["speeds"]) for f in (min, statistics.median, max))
    ratio = median / statistics.median(first["speeds"])
    pairs = zip(result["losses"], first["losses"])
    difference = max(abs(left - right) for left, right in pairs)
    difference = f", {difference:.1e}" if result["tokens"] == first["tokens"] else ""
    state = f"{result['state_gib']:.2f} ({result['state_gib'] / (first['state_gib'] or 1):.3f})"
    cells = [name, f"{result['tokens']:,}", f"{median:,.0f} ({low:,.0f} to {high:,.0f})"]
    cells += [f"{ratio:.3f}", f"{result['share']:.1%}", f"{state}, {result['peak_gib']:.1f}"]
    print(f"| {' | '.join(cells)} | {result['losses'][-1]:.4f}{difference} |", flush=True)


def measure(settings: BenchConfig):
    """Measure steps of these settings on the processes of torchrun; rank 0 prints JSON."""
    train.BUCKET_MB = settings.bucket_mb
    device = hardware.find_device(settings.device)
    with start_ranks(device, settings.distributed_timeout, "a smaller micro-batch") as ranks:
        tokenizer = SimpleNamespace(vocab_size=50257)
        dataset = SimpleNamespace(tokenizer=tokenizer, verify=lambda *_, **options: None)
        run = train.start_run(settings, ranks, dataset)
        for kind in settings.batches.split(",") if settings.batches else ["batch_tokens"]:
            per_gpu = {"per_gpu": 65536 * ranks.world_size, "batch_tokens": settings.batch_tokens}
            run.settings = replace(run.settings, batch_tokens=per_gpu.get(kind) or int(kind))
            result = measure_steps(run) | {"kind": kind}
            if ranks.rank == 0:
                print(RESULT + json.dumps(result), flush=True)


def measure_steps(run: train.Run) -> dict:
    """Speeds, memory and losses of steps."""
    device, tokens, steps = run.ranks.device, run.settings.batch_tokens, run.settings.steps
    losses, times = [], []
    for number in range(steps):
        if number % WINDOW == 0:
            times.append(now(device))
        losses.append(take_step(run, number))
    times.append(now(device))
    seconds = [right - left for left, right in itertools.pairwise(times)][1:]
    speeds = [WINDOW * tokens / second for second in seconds]
    flops = run.model.flops_per_token(run.settings.block_size) * statistics.median(speeds)
    peak = hardware.peak_flops(device, run.settings.dtype) * run.ranks.world_size
    losses = run.ranks.sum(torch.stack(losses)) / run.ranks.world_size
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "tokens": tokens,
        "speeds": speeds,
        "share": flops / (peak or math.inf),
        "state_gib": state_gib(run),
        "peak_gib": hardware.memory_gib(device),
        "losses": losses.tolist(),
    }


def take_step(run: train.Run, number: int, update: bool = True) -> torch.Tensor:
    """A step as train.train makes it; its loss on this rank. update: False stops before."""
    train.set_learning_rates(run, number)
    step_loss = torch.zeros((), device=run.ranks.device)
    for micro_step in range(run.micro_steps):
        parallel.announce(run.forward, is_last=micro_step == run.micro_steps - 1)
        loss = run.forward(*random_batch(run, number, micro_step)).mean() / run.micro_steps
        loss.backward()
        step_loss += loss.detach()
    if update:
        train.update_weights(run, step_loss)
    return step_loss


def random_batch(run: train.Run, number: int, micro_step: int):
    """Tokens and targets by the step and the place in the batch alone; small ids are frequent."""
    settings, ranks = run.settings, run.ranks
    turn = micro_step * ranks.world_size + ranks.rank
    generator = torch.Generator(ranks.device).manual_seed(number * 10**6 + turn)
    shape = settings.micro_batch_size, settings.block_size + 1
    numbers = torch.rand(shape, generator=generator, device=ranks.device)
    tokens = (50257 * numbers**6).long()
    return tokens[:, :-1].contiguous(), tokens[:, 1:].clone()


def state_gib(run: train.Run) -> float:
    """GiB of this GPU that hold weights, gradients and moments, after one more backward."""
    if run.ranks.device.type != "cuda":
        return 0.0
    take_step(run, run.settings.steps, update=False)
    used = torch.cuda.memory_allocated() / 2**30
    parallel.clip_grad_norm(run.forward, math.inf)  # DeepSpeed ends its step here
    run.model.zero_grad(set_to_none=run.forward is run.model)
    return used


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done all it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    config.run(main, BenchConfig, "a smaller --micro_batch_size needs less")
