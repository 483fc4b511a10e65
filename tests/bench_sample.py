"""How fast a model generates and scores, on random prompts and weights, and what bounds it.

    python tests/bench_sample.py config/gpt2_124m.py                                     on a GPU
    python tests/bench_sample.py config/gpt2_1558m.py --rows=1 --cold=False
    python tests/bench_sample.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 \\
        --vocab_size=300 --bias=False                                                    on a CPU

Takes the settings of train.py for the model, and a few more. Each figure is the median of several
runs after a warm-up (least to most). `plain` computes the whole context for each token, as in
nanoGPT's `generate`.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import config
import evaluate
import hardware
import sample
import train
from model import GPT, GPTConfig, ModelShape
from tokenizer import BYTES, Tokenizer

RUNS = 5
PROMPT_TOKENS = 16


@dataclass
class BenchConfig(train.TrainConfig):
    """How fast a model generates and scores. Takes the settings of train.py as well."""

    vocab_size: int = 50257  # entries of the tokenizer
    new_tokens: int = 500  # generated in each row, after a prompt of 16
    rows: int = 256  # decoded at once
    cold: bool = True  # also time scoring, and sample.py from start to end


def main(settings: BenchConfig):
    device = hardware.find_device(settings.device)
    shape = {field.name: getattr(settings, field.name) for field in fields(ModelShape)}
    model = GPT(GPTConfig(vocab_size=settings.vocab_size, **shape)).eval()
    model.init_weights(settings.seed)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    parameters = sum(parameter.numel() for parameter in model.parameters())
    new_tokens = f"{settings.new_tokens} new tokens"
    print(f"{parameters / 1e6:.0f}M parameters, {new_tokens}, torch {torch.__version__}, {name}")
    if settings.cold:
        bench_cold(model, settings)
    model.to(device)
    if settings.cold:
        bench_scoring(model, settings, device)
    bench_plain(model, settings, device)
    model.dtype = None  # that of the weights, not of training
    sample.prepare_to_decode(model, device, "auto")
    for compiled in compile_choices(device):
        for rows in sorted({1, settings.rows}):
            bench_decoding(model, settings, rows, compiled)


def bench_cold(model: GPT, settings: BenchConfig):
    """The whole of sample.py, as a user runs it."""
    count = settings.vocab_size - 1 - len(BYTES)
    tokens = BYTES + [f"token {number}".encode() for number in range(count)]
    tokenizer = Tokenizer.from_tokens(tokens, "bench", "gpt2")
    state = {"step": 0, "val_step": 0, "val_loss": 0.0, "best_val_loss": 0.0}
    state |= {"settings": {}, "dataset": "", "world_size": 1}
    state |= checkpoint.model_state(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder, "best.pt"), state)
        options = [f"--checkpoint={folder}", f"--max_new_tokens={settings.new_tokens}"]
        command = [sys.executable, sample.__file__, *options, f"--device={settings.device}"]
        run = partial(subprocess.run, command, capture_output=True, check=True)
        taken = seconds(torch.device("cpu"), run, 3)
    show(f"sample.py from start to end, {settings.new_tokens} tokens", taken, "s")


def bench_scoring(model: GPT, settings: BenchConfig, device: torch.device):
    """evaluate.score, and its share of the speed of training's forward pass."""
    context, is_cuda = model.config.block_size, device.type == "cuda"
    size = settings.micro_batch_size or (32 if is_cuda else 2)
    tokens = torch.randint(settings.vocab_size, (size, context), device=device)
    dtype = hardware.best_dtype(device)
    forward = torch.compile(model) if is_cuda else model

    model.dtype = getattr(torch, dtype)

    def train_forward():
        forward(tokens, tokens)

    forwards = [tokens.numel() / value for value in seconds(device, train_forward, 20)]
    show("forward of training", forwards, "tokens/s")
    document = np.resize(np.arange(settings.vocab_size), (64 if is_cuda else 4) * context + 1)
    documents, count = [("", document, 1)] * 8, 8 * (len(document) - 1)
    for compiled in compile_choices(device):
        options = evaluate.EvaluateConfig(dtype=dtype, compile=compiled, stride=context)
        score = partial(evaluate.score, model, documents, options)
        speeds = [count / value for value in seconds(device, score, 3)]
        show(f"scoring{', compiled' if compiled else ''}", speeds, "tokens/s")
        share = [speed / statistics.median(forwards) for speed in speeds]
        show("  as a share of training's forward", share, "")


@torch.no_grad()
def bench_plain(model: GPT, settings: BenchConfig, device: torch.device):
    """One row decoded as in nanoGPT, to compare with."""

    def generate():
        tokens = torch.zeros(1, PROMPT_TOKENS, dtype=torch.long, device=device)
        for _ in range(settings.new_tokens):
            logits = model.logits(tokens[:, -model.config.block_size :])[:, -1] / 0.8
            lowest = logits.topk(min(200, logits.size(-1))).values[:, -1:]
            probabilities = logits.masked_fill(logits < lowest, -torch.inf).softmax(-1)
            tokens = torch.cat((tokens, torch.multinomial(probabilities, 1)), dim=1)

    taken = seconds(device, generate, 3)
    show("1 row, plain", [settings.new_tokens / value for value in taken], "tokens/s")


def bench_decoding(model: GPT, settings: BenchConfig, rows: int, compiled: bool):
    """Tokens/s of a batch, and the share of the memory's speed that weights and cache take."""
    generator, new_tokens = np.random.default_rng(0), settings.new_tokens
    prompts = generator.integers(0, settings.vocab_size, (rows, PROMPT_TOKENS)).tolist()
    noise = generator.random((rows, new_tokens), dtype=np.float32)
    options = sample.SampleConfig(max_new_tokens=new_tokens, compile=compiled)
    rest = (settings.vocab_size, options)

    def generate() -> list[float]:
        """The times before the first columns, after each few columns, and so after the last."""
        started, columns = time.perf_counter(), sample.generate(model, prompts, noise, *rest)
        return [started, *(time.perf_counter() for _ in columns)]

    first, *runs = (generate() for _ in range(RUNS + 1))
    columns = -(-new_tokens // (len(first) - 1))  # that come at once
    rates = [(new_tokens - columns) / (times[-1] - times[1]) for times in runs]  # columns/s
    name = f"{rows} row{'s' if rows > 1 else ''}{', compiled' if compiled else ''}"
    show(name, [rows * rate for rate in rates], "tokens/s")
    name = f"  until the first {columns} columns (first time {first[1] - first[0]:.1f} s)"
    show(name, [times[1] - times[0] for times in runs], "s")
    limit, read = bandwidth(model.wte.weight.device), bytes_per_step(model, rows, new_tokens)
    name = f"  share of {limit / 1e12:.3f} TB/s, {read / 1e6:,.0f} MB per step"
    show(name, [read * rate / limit for rate in rates], "")


def bytes_per_step(model: GPT, rows: int, new_tokens: int) -> float:
    """The bytes of weights and cache that a decoding step reads, on average."""
    shape = model.config
    weights = model.flops_per_token(0) // 6  # all but embeddings that are only looked up
    lengths = [min(PROMPT_TOKENS + step, shape.block_size) for step in range(new_tokens)]
    cached = rows * statistics.mean(lengths) * 2 * shape.n_layer * shape.kv_heads * shape.head_width
    return (weights + cached) * model.wte.weight.dtype.itemsize


def bandwidth(device: torch.device) -> float:
    """Bytes/s that a copy of much memory reads and writes."""
    size = 2**31 if device.type == "cuda" else 2**28
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(seconds(device, lambda: target.copy_(source), 10))


def compile_choices(device: torch.device) -> list[bool]:
    return [False, True] if device.type == "cuda" else [False]


def seconds(device: torch.device, function: Callable, runs: int) -> list[float]:
    """The seconds of each of several runs, after one to warm up."""
    taken = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return taken[1:]


def show(name: str, values: list[float], unit: str):
    low, median, high = min(values), statistics.median(values), max(values)
    print(f"{name:<48} {median:12,.4g} {unit} ({low:,.4g} to {high:,.4g})", flush=True)


if __name__ == "__main__":
    with config.exit_on_failure():
        main(config.load(BenchConfig, sys.argv[1:]))
