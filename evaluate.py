"""Measure how well a model predicts a text: nats per token, perplexity, bits per byte.

    python evaluate.py --text=book.txt                     the newest run in out/
    python evaluate.py --text=books/ --checkpoint=gpt2     a folder of texts, OpenAI's GPT-2
    python evaluate.py --text=data/mine                    a dataset's validation split
    python evaluate.py --text=data/mine:train --json=True

The invariant: each token of a document but the end-of-text before it is scored exactly once.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import checkpoint
import config
import hardware
from config import NOT_FINITE, Failure, Progress
from dataset import SPLITS, Dataset
from model import GPT
from readers import Reader
from tokenizer import Tokenizer


@dataclass
class EvaluateConfig:
    """Measure how well a model predicts a text. Every document is scored by itself."""

    text: str = ""  # files, a folder, globs as for prepare_data.py, or data/NAME, data/NAME:train
    checkpoint: str = ""  # .pt file, run's folder, or model (gpt2, folder, OWNER/NAME); "" = newest
    out_dir: str = "out"  # folder of the runs
    stride: int = 0  # tokens between windows; fewer give more context; 0 = half the context
    json: bool = False  # print one JSON object
    device: str = "auto"  # cpu, cuda, mps, or auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32, bfloat16, or auto: bfloat16 on a GPU that has it
    compile: bool = False  # on a GPU: slow to start, then faster

    def check(self):
        """Raise ValueError where a value makes no sense."""
        if not self.text:
            raise ValueError("name a text: python evaluate.py --text=book.txt (or data/NAME)")
        config.check_bounds(self, 0, "stride")
        config.check_choices(self, device="auto cpu cuda mps", dtype="auto float32 bfloat16")


def main(settings: EvaluateConfig):
    """Score the text and print what its documents come to. Raises Failure."""
    device = hardware.find_device(settings.device)
    model, tokenizer = checkpoint.open_model(settings.checkpoint, settings.out_dir)
    model.to(device).eval()
    started = time.perf_counter()
    scores = score(model, read_documents(settings.text, tokenizer), settings)
    if not scores:
        raise Failure(f"{settings.text}: there is no text to score")
    result = summarize(scores)
    if not math.isfinite(result["nats_per_token"][0]):
        raise Failure("the model's losses are not finite: it was damaged in training", NOT_FINITE)
    seconds = time.perf_counter() - started
    result["tokens_per_second"] = round(result["tokens"] / seconds, 1)
    print(json.dumps(result) if settings.json else result_text(result))


@dataclass
class Score:
    """How well the model predicted a document."""

    where: str
    tokens: int  # without the end-of-text before it
    bytes: int
    nats: float  # the sum of the tokens' losses


def summarize(scores: list[Score]) -> dict:
    """The figures over all documents, each with its standard error over documents."""
    nats = [score.nats for score in scores]
    loss, loss_error = ratio(nats, [score.tokens for score in scores])
    bits, bits_error = ratio([n / math.log(2) for n in nats], [score.bytes for score in scores])
    perplexity = float(np.exp(loss))
    by_loss = sorted(scores, key=lambda score: score.nats / score.tokens, reverse=True)
    return {
        "documents": len(scores),
        "tokens": sum(score.tokens for score in scores),
        "bytes": sum(score.bytes for score in scores),
        "nats_per_token": (loss, loss_error),
        "perplexity": (perplexity, loss_error and perplexity * loss_error),
        "bits_per_byte": (bits, bits_error),
        "worst": [
            {"nats_per_token": s.nats / s.tokens, "tokens": s.tokens, "where": s.where}
            for s in by_loss[:10]
        ],
    }


def ratio(values: list[float], sizes: list[float]) -> tuple[float, float | None]:
    """sum(values) / sum(sizes) and its standard error over documents, None for one document.

    Cochran 1977, section 6.4: error = sqrt(n / (n - 1) * sum((value - mean * size)^2)) / sum(size).
    """
    values, sizes, count = np.array(values), np.array(sizes), len(values)
    mean = values.sum() / sizes.sum()
    if count == 1:
        return float(mean), None
    squares = np.square(values - mean * sizes).sum() * count / (count - 1)
    return float(mean), float(math.sqrt(squares) / sizes.sum())


def result_text(result: dict) -> str:
    """The summary as lines for the screen."""
    head = "{documents:,} documents, {tokens:,} tokens, {bytes:,} bytes; {tokens_per_second:,.0f}"
    lines = [head.format(**result) + " tokens/s"]
    for name in ("nats_per_token", "perplexity", "bits_per_byte"):
        value, error = result[name]
        note = f" ± {error:.4f}" if error is not None else ""
        lines.append(f"{name.replace('_', ' '):<15} {value:9.4f}{note}")
    lines.append("± is the standard error over documents; the worst, in nats per token:")
    for document in result["worst"]:
        loss, tokens = document["nats_per_token"], document["tokens"]
        lines.append(f"{loss:9.4f} {document['where']} ({tokens:,} tokens)")
    return "\n".join(lines)


def read_documents(text: str, tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yield where each document is, its tokens after an end-of-text, and its bytes."""
    name, split = re.fullmatch(r"(.+?)(?::(\w*))?", text).groups()  # not at the colon of C:\data
    folder = Path(os.path.expanduser(name))
    if (folder / "manifest.json").exists():
        yield from dataset_documents(folder, split or "val", tokenizer)
        return
    reader = Reader(text, setting="text")
    with Progress("bytes read", reader.total) as progress:
        for document, where in reader:
            tokens = tokenizer.encode_document(document).astype(np.int64)
            yield where, tokens, len(document.encode())
            progress.update(reader.done)


def dataset_documents(folder: Path, split: str, tokenizer: Tokenizer):
    """As read_documents, from the shards of a split. Raises Failure."""
    if split not in SPLITS:
        raise Failure(f"text {folder}:{split}: a split is one of {', '.join(SPLITS)}")
    dataset = Dataset(folder, block_size=1)
    if not dataset.tokenizer.same_ids(tokenizer):
        names = f"the tokenizer {dataset.tokenizer.name}, the model {tokenizer.name}"
        raise Failure(f"{folder} has {names}: it cannot score these tokens")
    total, done = getattr(dataset, split).count_tokens(), 0
    with Progress("tokens", total) as progress:
        for where, tokens in dataset.documents(split):
            yield where, tokens, len(tokenizer.decode(tokens[1:].tolist()))
            done += len(tokens)
            progress.update(done)


GPU_TOKENS, CPU_TOKENS = 1 << 15, 1 << 11  # of a batch; the logits of each are V numbers
SORTED_BATCHES = 64  # whose windows are sorted by length together


@torch.inference_mode()
def score(model: GPT, documents: Iterable, settings: EvaluateConfig) -> list[Score]:
    """Score each document by itself, in windows of the model's context."""
    context, device = model.config.block_size, model.wte.weight.device
    stride = min(settings.stride or max(1, context // 2), context)
    is_compiled = settings.compile and device.type == "cuda"
    forward = torch.compile(model, dynamic=False) if is_compiled else model
    dtype = hardware.best_dtype(device) if settings.dtype == "auto" else settings.dtype
    batch_tokens = GPU_TOKENS if device.type == "cuda" else CPU_TOKENS
    scores = []
    windows = all_windows(documents, scores, context, stride)
    while chunk := list(islice(windows, max(1, SORTED_BATCHES * batch_tokens // context))):
        chunk.sort(key=lambda window: -len(window[1]))  # little padding in each batch
        start = 0
        while start < len(chunk):
            length = context if is_compiled else len(chunk[start][1])
            rows = max(1, batch_tokens // length)
            batch = chunk[start : start + rows]
            shape = (rows if is_compiled else len(batch), length)  # compiled: one shape for all
            tokens, targets = (torch.from_numpy(x).to(device) for x in padded(batch, shape))
            with hardware.autocast(device.type, dtype):
                sums = forward(tokens, targets).sum(1)
            for (document, _, _), nats in zip(batch, sums.tolist()):
                document.nats += nats
            start += rows
    return scores


def all_windows(documents: Iterable, scores: list[Score], context: int, stride: int):
    """Yield (Score, tokens, targets) for the windows of all documents; add a Score for each."""
    for where, tokens, text_bytes in documents:
        if len(tokens) > 1:
            scores.append(Score(where, len(tokens) - 1, text_bytes, 0.0))
            for window in windows_of(tokens, context, stride):
                yield scores[-1], *window


def windows_of(tokens: np.ndarray, context: int, stride: int) -> Iterator:
    """Windows of a document as tokens (T) and targets (T), -1 where an earlier window scored it.

    Each starts `stride` after the one before; the last is moved back so that it is full. So from
    the second window on, each target has at least context - stride tokens before it.
    """
    count, scored = len(tokens) - 1, 0
    while scored < count:
        start = max(0, min(scored - context + stride, count - context))
        end = min(start + context, count)
        targets = tokens[start + 1 : end + 1].copy()
        targets[: scored - start] = -1
        yield tokens[start:end], targets
        scored = end


def padded(batch: list, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A batch of windows as tokens and targets, int64 of this shape; padding is not scored."""
    tokens, targets = np.zeros(shape, dtype=np.int64), np.full(shape, -1)
    for row, (_, row_tokens, row_targets) in enumerate(batch):
        tokens[row, : len(row_tokens)] = row_tokens
        targets[row, : len(row_targets)] = row_targets
    return tokens, targets


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # whatever the console's encoding
    with config.exit_on_failure():
        main(config.load(EvaluateConfig, sys.argv[1:]))
