"""How fast training steps are on random tokens, and their share of the device's matrix rate.

    python tests/bench_train.py config/gpt2_124m.py --micro_batch_size=32 --batch_tokens=65536

Takes the settings of train.py. Prints the time of the first step, then of the later ones the median
(least to most), tokens/s, and the share of the rate of a large matrix product, measured here too.
It waits for the device before and after each optimizer, which training does not.
"""

import math
import statistics
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import config
import hardware
import train
from model import GPT, GPTConfig, ModelShape
from ranks import Ranks

VOCAB_SIZE = 50257
WARMUP_STEPS, STEPS = 5, 20


def main(settings: train.TrainConfig):
    run = start_run(settings)
    limit = matrix_product_flops(run.ranks.device, run.model.dtype)
    seconds, updates = [], []
    for step in range(WARMUP_STEPS + STEPS):
        train.set_learning_rates(run, step)  # at a rate of 0 weights stay 0 and multiply faster
        taken, by_optimizer = time_step(run)
        seconds.append(taken)
        updates.append(by_optimizer)
    report(run, seconds, limit)
    median = statistics.median(seconds[WARMUP_STEPS:])
    for optimizer, times in zip(run.optimizers, zip(*updates[WARMUP_STEPS:])):
        update = statistics.median(times)
        name = type(optimizer).__name__
        print(f"{name}'s update: {update * 1e3:.2f} ms, {update / median:.2%} of the step")


def start_run(settings: train.TrainConfig) -> train.Run:
    """A run of these settings without a dataset."""
    ranks = Ranks(0, 1, hardware.find_device(settings.device))
    hardware.keep_freed_memory()
    shape = {field.name: getattr(settings, field.name) for field in fields(ModelShape)}
    model = GPT(GPTConfig(vocab_size=VOCAB_SIZE, **shape))
    model.init_weights(settings.seed)
    model.activation_checkpointing = settings.activation_checkpointing
    settings = train.resolve_auto(settings, ranks, model.to(ranks.device), {})
    optimizers = train.make_optimizers(model, settings)
    return train.Run(
        settings, ranks, None, model, train.parallelize(model, settings, ranks), optimizers
    )


def time_step(run: train.Run) -> tuple[float, list[float]]:
    """The seconds of one step on random tokens, and of each optimizer's update in it."""
    settings, device, updates = run.settings, run.ranks.device, []
    shape = (run.micro_steps, settings.micro_batch_size, settings.block_size + 1)
    tokens = torch.randint(VOCAB_SIZE, shape, device=device)
    started = now(device)
    for windows in tokens:
        losses = run.forward(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
        (losses.mean() / run.micro_steps).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), settings.grad_clip or math.inf)
    for optimizer in run.optimizers:
        update_started = now(device)
        optimizer.step()
        updates.append(now(device) - update_started)
    run.model.zero_grad()
    return now(device) - started, updates


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


def report(run: train.Run, seconds: list[float], limit: float):
    """Print what was measured, and on what."""
    settings, device, model = run.settings, run.ranks.device, run.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    timed = seconds[WARMUP_STEPS:]
    speed = settings.batch_tokens / statistics.median(timed)
    share = speed * model.flops_per_token(settings.block_size) / limit
    low, median, high = (f(timed) * 1e3 for f in (min, statistics.median, max))
    print(
        f"{parameters / 1e6:.0f}M parameters, {settings.micro_batch_size} x {run.micro_steps} "
        f"sequences of {settings.block_size}, {settings.dtype}, compile {settings.compile}, "
        f"torch {torch.__version__}, {name}\n"
        f"first step {seconds[0]:.1f} s, then {median:.1f} ms ({low:.1f} to {high:.1f}), "
        f"{speed:,.0f} tokens/s, {hardware.memory_gib(device):.1f} GiB, "
        f"{share:.1%} of a matrix product's {limit / 1e12:,.2f} TFLOP/s"
    )


if __name__ == "__main__":
    with config.exit_on_failure():
        main(config.load(train.TrainConfig, sys.argv[1:]))
