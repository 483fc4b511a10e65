"""How fast training steps are on random tokens, and their share of the device's matrix rate.

    python tests/bench_train.py config/gpt2_124m.py --micro_batch_size=32 --batch_tokens=65536
    python tests/bench_train.py config/gpt2_124m.py ... --peer=FILE.py --profile=True

Takes the settings of train.py. Prints the time of the first step, then of windows of steps the
median (least to most), tokens/s, the share of the rate of a large matrix product, measured here
too, and peak memory. A peer is timed in the same process, by turns: its file has make_step(
settings, vocab_size, device), which returns a function of tokens (micro-steps, sequences,
block_size + 1) that does a whole optimizer step.
"""

import importlib.util
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import config
import hardware
import train
from model import GPT, GPTConfig, ModelShape
from ranks import Ranks

WARMUP_STEPS, WINDOWS = 3, 5
KINDS = {  # of kernels, by what their names hold; the first that fits counts
    "elementwise, norms, loss": "^triton",
    "attention": "fmha|flash|sdpa|attention|cudnn",
    "matrix products": "gemm|nvjet|cutlass|xmma|matmul",
    "optimizer": "multi_tensor|foreach|adam",
    "copies and others": "",
}


@dataclass
class BenchConfig(train.TrainConfig):
    """Time training steps on random tokens."""

    vocab_size: int = 50257  # tokens the model can name
    peer: str = ""  # a Python file whose make_step is timed by turns; "" = off
    window_steps: int = 10  # steps that are timed together
    profile: bool = False  # print what the GPU spends its time on in a step, by kind


@dataclass
class Timed:
    """A function that does a step, and what was measured of it."""

    step: object
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)  # per step, of each window
    own_bytes: int = 0  # of weights and what else stays between steps
    peak_bytes: int = 0  # of a step, without what stays of the others


def main(settings: BenchConfig):
    device = hardware.find_device(settings.device)
    run = start_run(settings, device)
    settings = run.settings
    timed = {"groundup": Timed(lambda tokens: take_step(run, tokens))}
    if settings.peer:
        path = Path(settings.peer)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        peer = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(peer)
        timed[path.stem] = Timed(peer.make_step(settings, settings.vocab_size, device))
    limit = matrix_product_flops(device, run.model.dtype)
    for _ in range(WINDOWS):
        for one in timed.values():
            time_window(one, settings, device)
    report(run, timed, limit)
    for optimizer in run.optimizers:
        time_update(run, optimizer)
    if settings.profile:
        print_profile(timed["groundup"].step, settings, device)


def start_run(settings: BenchConfig, device: torch.device) -> train.Run:
    """A run of these settings without a dataset."""
    ranks = Ranks(0, 1, device)
    hardware.keep_freed_memory()
    shape = {field.name: getattr(settings, field.name) for field in fields(ModelShape)}
    model = GPT(GPTConfig(vocab_size=settings.vocab_size, **shape))
    model.init_weights(settings.seed)
    model.activation_checkpointing = settings.activation_checkpointing
    settings = train.resolve_auto(settings, ranks, model.to(device), {})
    forward = train.parallelize(model, settings, ranks)
    run = train.Run(settings, ranks, None, model, forward, train.make_optimizers(model, settings))
    train.set_learning_rates(run, settings.warmup_steps)  # at a rate of 0 products are faster
    return run


def take_step(run: train.Run, tokens: torch.Tensor):
    """One step of train.py's loop."""
    step_loss = torch.zeros((), device=run.ranks.device)
    for windows in tokens:
        batch = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        loss = run.forward(*batch).mean() / run.micro_steps
        run.scaler.scale(loss).backward()
        step_loss += loss.detach()
    train.update_weights(run, step_loss)


def random_tokens(settings: BenchConfig, device: torch.device) -> torch.Tensor:
    sequences = settings.micro_batch_size
    shape = (settings.step_sequences // sequences, sequences, settings.block_size + 1)
    return torch.randint(settings.vocab_size, shape, device=device)


def time_window(one: Timed, settings: BenchConfig, device: torch.device):
    """Add the mean time of a step, over a window of them after some to warm up."""
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()  # of the peer's activations
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if is_cuda else 0
    for number in range(WARMUP_STEPS):
        started = now(device)
        one.step(random_tokens(settings, device))
        if not number and not one.seconds:
            one.first_seconds = now(device) - started
            one.own_bytes = torch.cuda.memory_allocated() - before if is_cuda else 0
    started = now(device)
    for _ in range(settings.window_steps):
        one.step(random_tokens(settings, device))
    one.seconds.append((now(device) - started) / settings.window_steps)
    if is_cuda:
        one.peak_bytes = torch.cuda.max_memory_allocated()


def time_update(run: train.Run, optimizer):
    """Print the time of an optimizer's update on random gradients."""
    device, seconds = run.ranks.device, []
    for parameter in run.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for _ in range(13):
        started = now(device)
        optimizer.step()
        seconds.append(now(device) - started)
    low, median, high = (f(seconds[3:]) * 1e3 for f in (min, statistics.median, max))
    name = type(optimizer).__name__
    print(f"{name}'s update: {median:.2f} ms ({low:.2f} to {high:.2f})")
    run.model.zero_grad()


def print_profile(step, settings: BenchConfig, device: torch.device):
    """Print the GPU's milliseconds in a step by kind of kernel, and the 40 longest kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            step(random_tokens(settings, device))
        now(device)
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    by_kind, by_name, count = Counter(), Counter(), Counter()
    for kernel in kernels:
        milliseconds, name = kernel.device_time_total / 3e3, kernel.name
        kind = next(kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE))
        by_kind[kind] += milliseconds
        by_name[name] += milliseconds
        count[name] += 1
    for kind, milliseconds in by_kind.most_common():
        print(f"{milliseconds:8.2f} ms  {kind}")
    for name, milliseconds in by_name.most_common(40):
        print(f"{milliseconds:8.2f} ms  {count[name] / 3:4.0f} x  {name[:140]}")


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done all it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on random data, the median of ten."""
    size = 8192 if device.type == "cuda" else 2048
    x, seconds = torch.randn(size, size, device=device).to(dtype), []
    for _ in range(13):
        started = now(device)
        x @ x
        seconds.append(now(device) - started)
    return 2 * size**3 / statistics.median(seconds[3:])


def report(run: train.Run, timed: dict[str, Timed], limit: float):
    """Print what was measured, and on what."""
    settings, device, model = run.settings, run.ranks.device, run.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(
        f"{parameters / 1e6:.0f}M parameters, {settings.micro_batch_size} x {run.micro_steps} "
        f"sequences of {settings.block_size}, {settings.dtype}, compile {settings.compile}, "
        f"torch {torch.__version__}, {name}: a matrix product of {limit / 1e12:,.2f} TFLOP/s"
    )
    ours = statistics.median(timed["groundup"].seconds)
    for label, one in timed.items():
        low, median, high = (f(one.seconds) for f in (min, statistics.median, max))
        speed = settings.batch_tokens / median
        share = speed * model.flops_per_token(settings.block_size) / limit
        others = sum(other.own_bytes for other in timed.values() if other is not one)
        gib = (one.peak_bytes - others) / 2**30
        print(
            f"{label}: first step {one.first_seconds:.1f} s, then {median * 1e3:.1f} ms "
            f"({low * 1e3:.1f} to {high * 1e3:.1f}), {speed:,.0f} tokens/s, {gib:.1f} GiB, "
            f"{share:.1%} of it; groundup / {label} {median / ours:.3f}"
        )


if __name__ == "__main__":
    with config.exit_on_failure():
        main(config.load(BenchConfig, sys.argv[1:]))
