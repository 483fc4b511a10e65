"""How fast training steps are, on random tokens, next to what the device multiplies at most.

    python tests/bench_train.py config/gpt2_124m.py --micro_batch_size=32 --batch_tokens=65536

Takes the settings of train.py. Prints the time to the first step, then the median of the steps after five for warming
up with the fastest and slowest, tokens/s, and the share of a large matrix product's rate, measured here too. It waits
for the device before and after the update, which training does not.
"""

import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import config
import train
from model import GPT

STEPS = 20


def wait(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on random data, the median of ten."""
    size = 8192 if device.type == "cuda" else 2048
    x = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(13):
        wait(device)
        started = time.perf_counter()
        x @ x
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[3:])


def main(settings: train.TrainConfig):
    ranks = train.Ranks(0, 1, config.find_device(settings.device))
    settings, device = train.resolve_auto(settings, ranks, None), ranks.device
    dtype = getattr(torch, settings.dtype)
    limit = matrix_product_flops(device, dtype)
    model = GPT(train.model_config(settings, 50257)).to(device)
    model.activation_checkpointing = settings.activation_checkpointing
    if not settings.micro_batch_size:
        settings = replace(settings, micro_batch_size=train.fitting_micro_batch_size(model, settings, ranks))
    if settings.compile == "on":
        model.compile()
    optimizers = train.make_optimizers(model, settings, ranks)
    run = train.Run(settings, ranks, None, model, optimizers)
    tokens = torch.randint(50257, (run.micro_steps, settings.micro_batch_size, settings.block_size + 1), device=device)
    seconds, updates = [], {type(optimizer).__name__: [] for optimizer in optimizers}
    for step in range(STEPS + 5):
        train.set_learning_rates(run, step)  # Muon's is 0 at first, and weights that stay zero multiply faster
        wait(device)
        started = time.perf_counter()
        for windows in tokens:
            with train.autocast(settings):
                loss = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()) / run.micro_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
        wait(device)
        for optimizer in optimizers:
            update_started = time.perf_counter()
            optimizer.step()
            wait(device)
            updates[type(optimizer).__name__].append(time.perf_counter() - update_started)
        model.zero_grad()
        seconds.append(time.perf_counter() - started)
    flops = model.flops_per_token(settings.block_size)
    median = statistics.median(seconds[5:])
    speed = settings.batch_tokens / median
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, {settings.micro_batch_size} x "
        f"{run.micro_steps} sequences of {settings.block_size}, {settings.dtype}, compile {settings.compile}, "
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else device.type}\n"
        f"first step {seconds[0]:.1f} s, then {median * 1e3:.1f} ms ({min(seconds[5:]) * 1e3:.1f} to "
        f"{max(seconds[5:]) * 1e3:.1f}), {speed:,.0f} tokens/s, {train.memory_gib(device):.1f} GiB, "
        f"{speed * flops / limit:.1%} of a matrix product's {limit / 1e12:,.2f} TFLOP/s"
    )
    for name, times in updates.items():
        update = statistics.median(times[5:])
        print(f"{name}'s update: {update * 1e3:.2f} ms, {update / median:.2%} of the step")


if __name__ == "__main__":
    with config.exit_codes():
        main(config.load(train.TrainConfig, sys.argv[1:]))
