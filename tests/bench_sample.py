"""How fast a model speaks and scores, on random prompts and weights, next to what bounds it.

    python tests/bench_sample.py config/gpt2_124m.py                            on a GPU
    python tests/bench_sample.py config/gpt2_1558m.py --rows=1 --cold=False
    python tests/bench_sample.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --vocab_size=300    on a CPU

Takes the settings of train.py for the model, and a few more. Each figure is the median of some runs after warm-up, with
the least and the most. `plain` computes all of the context anew for each token, as nanoGPT's `generate` does.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import config
import prepare_data
import sample
import train
from model import GPT

RUNS = 5


@dataclass
class BenchConfig(train.TrainConfig):
    """How fast a model speaks and scores. Takes the settings of train.py as well."""

    vocab_size: int = 50257  # entries of the tokenizer
    new_tokens: int = 500  # that each row gets, after a prompt of 16
    rows: int = 256  # decoded at once
    cold: bool = True  # time sample.py from its start to its end, too


def wait(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def show(name: str, values: list[float], unit: str):
    print(
        f"{name:<48} {statistics.median(values):12,.4g} {unit} ({min(values):,.4g} to {max(values):,.4g})", flush=True
    )


def seconds(device: torch.device, function: Callable, runs: int = RUNS) -> list[float]:
    """How long each of some runs takes, after one to warm up."""
    taken = []
    for _ in range(runs + 1):
        wait(device)
        started = time.perf_counter()
        function()
        wait(device)
        taken.append(time.perf_counter() - started)
    return taken[1:]


def bandwidth(device: torch.device) -> float:
    """Bytes/s that a copy of much memory reads and writes."""
    data = torch.zeros(2**31 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    other = torch.empty_like(data)
    return 2 * len(data) / statistics.median(seconds(device, lambda: other.copy_(data), 10))


def bench_decoding(model: GPT, settings: BenchConfig, device: torch.device, rows: int, compiled: bool):
    """Tokens/s of many rows at once, and the share of the memory's speed that reading weights and cache makes up."""
    prompts = np.random.default_rng(0).integers(0, settings.vocab_size, (rows, 16)).tolist()
    noise = np.stack([sample.noise_for(1, row, settings.new_tokens) for row in range(rows)])
    options = sample.SampleConfig(max_new_tokens=settings.new_tokens, compile=compiled)

    def speak() -> list[float]:
        """The moments before the first column, after the first ones, and after the last."""
        moments = [time.perf_counter()]
        for _ in sample.generate(model, prompts, noise, settings.vocab_size, options):
            moments.append(time.perf_counter())
        return moments

    first, *runs = (speak() for _ in range(RUNS + 1))
    name = f"{rows} row{'s' if rows > 1 else ''}{', compiled' if compiled else ''}"
    burst = -(-settings.new_tokens // (len(first) - 1))
    show(name, [rows * (settings.new_tokens - burst) / (moments[-1] - moments[1]) for moments in runs], "tokens/s")
    begins = [moments[1] - moments[0] for moments in runs]
    show(f"  until the first {burst} columns (first time {first[1] - first[0]:.1f} s)", begins, "s")
    taken = [(moments[-1] - moments[1]) * settings.new_tokens / (settings.new_tokens - burst) for moments in runs]
    shape, dtype = model.config, model.wte.weight.dtype
    weights = model.flops_per_token(0) // 6  # all but those that are only looked up
    places = sum(min(16 + step, shape.block_size) for step in range(settings.new_tokens)) / settings.new_tokens
    read = (weights + rows * places * 2 * shape.n_layer * shape.n_kv_head * shape.head_size) * dtype.itemsize
    limit = bandwidth(device)
    show(
        f"  of {limit / 1e12:.3f} TB/s, {read / 1e6:,.0f} MB a step",
        [read * settings.new_tokens / value / limit for value in taken],
        "",
    )


@torch.no_grad()
def bench_plain(model: GPT, settings: BenchConfig, device: torch.device):
    """One row as nanoGPT decodes it, the yardstick."""

    def speak():
        tokens = torch.zeros(1, 16, dtype=torch.long, device=device)
        for _ in range(settings.new_tokens):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(tokens[:, -model.config.block_size :])[:, -1] / 0.8
            least = logits.topk(min(200, logits.size(-1))).values[:, -1:]
            probabilities = logits.masked_fill(logits < least, -torch.inf).softmax(-1)
            tokens = torch.cat((tokens, torch.multinomial(probabilities, 1)), dim=1)

    show("1 row, plain", [settings.new_tokens / value for value in seconds(device, speak, 3)], "tokens/s")


def bench_cold(model: GPT, settings: BenchConfig):
    """The whole of sample.py, from its start to its end, as one meets it."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = [bytes([byte]) for byte in range(256)]
        tokens += [f"token {number}".encode() for number in range(settings.vocab_size - 1 - len(tokens))]
        text = prepare_data.write_tokenizer(prepare_data.make_tokenizer(tokens, "bench"))
        state = {"step": 0, "val_loss": 0.0, "model_config": asdict(model.config), "model": model.state_dict()}
        checkpoint.save(Path(folder, "best.pt"), state | {"tokenizer": {"name": "bench", "text": text}})
        options = [f"--checkpoint={folder}", f"--max_new_tokens={settings.new_tokens}", f"--device={settings.device}"]
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            subprocess.run([sys.executable, sample.__file__, *options], capture_output=True, check=True)
            taken.append(time.perf_counter() - started)
    show(f"sample.py from start to end, {settings.new_tokens} tokens", taken, "s")


def bench_scoring(model: GPT, settings: BenchConfig, device: torch.device):
    """Scoring, next to the forward pass of training."""
    context, micro_batch_size = (
        model.config.block_size,
        settings.micro_batch_size or (32 if device.type == "cuda" else 2),
    )
    tokens = torch.randint(settings.vocab_size, (micro_batch_size, context), device=device)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    forward = torch.compile(model) if device.type == "cuda" else model

    def train_forward():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            forward(tokens, tokens)

    forwards = [tokens.numel() / value for value in seconds(device, train_forward, 20)]
    show("forward of training", forwards, "tokens/s")
    documents = [
        ("", np.resize(np.arange(settings.vocab_size), (64 if device.type == "cuda" else 4) * context + 1), 1)
    ] * 8
    count = sum(len(document[1]) - 1 for document in documents)
    for compiled in [False, True] if device.type == "cuda" else [False]:
        options = sample.SampleConfig(dtype=dtype, compile=compiled, stride=context)
        taken = seconds(device, lambda options=options: sample.score(model, documents, options), 3)
        show(f"scoring{', compiled' if compiled else ''}", [count / value for value in taken], "tokens/s")
        show("  of training's forward", [count / value / statistics.median(forwards) for value in taken], "")


def main(settings: BenchConfig):
    device = config.find_device(settings.device)
    model = GPT(train.model_config(settings, settings.vocab_size)).eval()
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.0f}M parameters, {settings.new_tokens} new tokens, torch {torch.__version__}, {name}")
    if settings.cold:
        bench_cold(model, settings)
    model.to(device)
    if settings.cold:
        bench_scoring(model, settings, device)
    bench_plain(model, settings, device)
    sample.prepare_to_decode(model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    for compiled in [False, True] if device.type == "cuda" else [False]:
        for rows in sorted({1, settings.rows}):
            bench_decoding(model, settings, device, rows, compiled)


if __name__ == "__main__":
    with config.exit_codes():
        main(config.load(BenchConfig, sys.argv[1:]))
