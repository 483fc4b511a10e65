"""Measure how well a model predicts a text, or answers multiple-choice questions.

    python evaluate.py --text=book.txt                     the newest run in out/
    python evaluate.py --text=books/ --checkpoint=gpt2     a folder of texts, OpenAI's GPT-2
    python evaluate.py --text=data/mine                    a dataset's validation split
    python evaluate.py --text=data/mine:train --json=True
    python evaluate.py --choices=questions.jsonl           which answer has the highest probability?

The invariant: each token of a document but the end-of-text before it is scored exactly once. So is
each token of an answer, after the question.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import checkpoint
import config
import hardware
from config import NOT_FINITE, Failure, Progress
from dataset import SPLITS, Dataset
from files import has_layout, read_file
from model import GPT
from readers import Reader
from tokenizer import Tokenizer

GPU_TOKENS, CPU_TOKENS = 1 << 15, 1 << 11  # of a batch; the logits of each are V numbers
SORTED_BATCHES = 64  # whose windows are sorted by length together
QUESTION = {"prompt": str, "choices": [str], "answer": int}  # a line of a file of questions


@dataclass
class EvaluateConfig:
    """Measure how well a model predicts a text, each document by itself, or answers questions."""

    text: str = ""  # files, a folder, globs as for prepare_data.py, or data/NAME, data/NAME:train
    choices: str = ""  # .jsonl of questions: {"prompt": TEXT, "choices": [TEXTS], "answer": 0}
    checkpoint: str = ""  # .pt file, run's folder, or model (gpt2, folder, OWNER/NAME); "" = newest
    out_dir: str = "out"  # folder of the runs
    stride: int = 0  # tokens between windows; fewer give more context; 0 = half the context
    json: bool = False  # print one JSON object
    device: str = "auto"  # cpu, cuda, mps, or auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32, bfloat16, float16; auto: the best that a GPU is fast in
    compile: bool = False  # on a GPU: slow to start, then faster

    def check(self):
        """Raise ValueError where a value makes no sense."""
        if bool(self.text) == bool(self.choices):
            example = "python evaluate.py --text=book.txt (or data/NAME), or --choices=FILE.jsonl"
            raise ValueError(f"name a text or a file of questions, one of the two: {example}")
        if self.choices and self.stride:
            raise ValueError("stride has no effect with choices: each is scored in one window")
        config.check_bounds(self, 0, "stride")
        config.check_choices(
            self, device="auto cpu cuda mps", dtype="auto float32 bfloat16 float16"
        )


def main(settings: EvaluateConfig):
    """Score the text or the choices and print what they come to. Raises Failure."""
    questions = read_questions(Path(settings.choices)) if settings.choices else []
    device = hardware.find_device(settings.device)
    model, tokenizer = checkpoint.open_model(settings.checkpoint, settings.out_dir)
    model.to(device).eval()
    if questions:
        add_nats(model, windows_of_choices(questions, tokenizer, model.config.block_size), settings)
        result = summarize_choices(questions)
    else:
        scores = score(model, read_documents(settings.text, tokenizer), settings)
        if not scores:
            raise Failure(f"{settings.text}: there is no text to score")
        result = summarize(scores)
    if not math.isfinite(result["bits_per_byte"][0]):
        raise Failure("the model's losses are not finite: it was damaged in training", NOT_FINITE)
    print(json.dumps(result) if settings.json else result_text(result))


@dataclass
class Score:
    """How well the model predicted a document, or a choice."""

    where: str
    tokens: int  # without the end-of-text before it, or the prompt
    bytes: int
    nats: float = 0.0  # the sum of the tokens' losses


def summarize(scores: list[Score]) -> dict:
    """The figures over all documents, each with its standard error over documents."""
    nats, tokens, sizes = np.array([(score.nats, score.tokens, score.bytes) for score in scores]).T
    loss, loss_error = ratio(nats, tokens)
    perplexity = float(np.exp(loss))
    losses = [(score.nats / score.tokens, score.tokens, score.where) for score in scores]
    names = ("nats_per_token", "tokens", "where")
    return {
        "documents": len(scores),
        "tokens": int(tokens.sum()),
        "bytes": int(sizes.sum()),
        "nats_per_token": (loss, loss_error),
        "perplexity": (perplexity, loss_error and perplexity * loss_error),
        "bits_per_byte": ratio(nats / math.log(2), sizes),
        "worst": [dict(zip(names, values)) for values in sorted(losses, reverse=True)[:10]],
    }


def ratio(values: np.ndarray, sizes: np.ndarray) -> tuple[float, float | None]:
    """sum(values) / sum(sizes) and its standard error over documents, None for one document.

    Cochran 1977, section 6.4: error = sqrt(n / (n - 1) * sum((value - mean * size)^2)) / sum(size).
    """
    count, mean = len(values), values.sum() / sizes.sum()
    if count == 1:
        return float(mean), None
    squares = np.square(values - mean * sizes).sum() * count / (count - 1)
    return float(mean), float(math.sqrt(squares) / sizes.sum())


def result_text(result: dict) -> str:
    """The summary as lines for the screen."""
    figures = {name: value for name, value in result.items() if isinstance(value, tuple)}
    lines, width = [], max(map(len, figures)) + 1
    for name, (value, error) in figures.items():
        note = f" ± {error:.4f}" if error is not None else ""
        lines.append(f"{name.replace('_', ' '):<{width}} {value:9.4f}{note}")
    if "questions" in result:
        first = "{questions:,} questions; accuracy by chance {chance:.4f}".format(**result)
        return "\n".join([first, *lines, "± is the standard error over questions"])
    lines.insert(0, "{documents:,} documents, {tokens:,} tokens, {bytes:,} bytes".format(**result))
    lines.append("± is the standard error over documents; the worst, in nats per token:")
    worst = "{nats_per_token:9.4f} {where} ({tokens:,} tokens)"
    return "\n".join(lines + [worst.format(**document) for document in result["worst"]])


def read_documents(text: str, tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yield where each document is, its tokens after an end-of-text, and its bytes."""
    name, _, split = text.partition(":")
    folder = Path(name)
    if (folder / "manifest.json").exists():
        yield from dataset_documents(folder, split or "val", tokenizer)
        return
    advice = "python prepare_data.py has settings for such files: score what it makes, data/NAME"
    reader = Reader(text, setting="text", advice=advice)
    with Progress("bytes read", reader.total) as progress:
        for document, where in reader:
            tokens = tokenizer.encode_document(document).astype(np.int64)
            yield where, tokens, len(document.encode())
            progress.update(reader.done)
    if reader.tally.documents:
        print(f"skipped: {reader.tally}", file=sys.stderr)


def dataset_documents(folder: Path, split: str, tokenizer: Tokenizer) -> Iterator:
    """As read_documents, from the shards of a split. Raises Failure."""
    if split not in SPLITS:
        raise Failure(f"text {folder}:{split}: a split is one of {', '.join(SPLITS)}")
    dataset = Dataset(folder, block_size=1)
    if not dataset.tokenizer.same_ids(tokenizer):
        names = f"the tokenizer {dataset.tokenizer.name}, the model {tokenizer.name}"
        raise Failure(f"{folder} has {names}: it cannot score these tokens")
    dataset.verify(hash_all=False, is_known=False)
    with Progress("documents", dataset.manifest["splits"][split]["documents"]) as progress:
        for done, (where, tokens) in enumerate(dataset.documents(split)):
            progress.update(done)
            yield where, tokens, len(tokenizer.decode(tokens[1:].tolist()))


def score(model: GPT, documents: Iterable, settings: EvaluateConfig) -> list[Score]:
    """Score each document by itself, in windows of the model's context."""
    context, scores = model.config.block_size, []
    stride = min(settings.stride or max(1, context // 2), context)
    add_nats(model, windows_of(documents, scores, context, stride), settings)
    return scores


@torch.inference_mode()
def add_nats(model: GPT, windows: Iterator, settings: EvaluateConfig):
    """Add the losses in each window to its Score. windows: as `windows_of` yields them."""
    context, device = model.config.block_size, model.wte.weight.device
    is_compiled = settings.compile and device.type == "cuda"
    forward = torch.compile(model, dynamic=False) if is_compiled else model
    dtype = hardware.best_dtype(device) if settings.dtype == "auto" else settings.dtype
    model.dtype = getattr(torch, dtype)
    batch_tokens = GPU_TOKENS if device.type == "cuda" else CPU_TOKENS
    while chunk := list(islice(windows, max(1, SORTED_BATCHES * batch_tokens // context))):
        chunk.sort(key=lambda window: len(window[1]), reverse=True)  # little padding in each batch
        while chunk:
            length = context if is_compiled else len(chunk[0][1])
            rows = max(1, batch_tokens // length)
            batch, chunk = chunk[:rows], chunk[rows:]
            shape = (rows if is_compiled else len(batch), length)  # compiled: one shape for all
            tokens, targets = (torch.from_numpy(x).to(device) for x in padded(batch, shape))
            sums = forward(tokens, targets).sum(1)
            for (scored, _, _), nats in zip(batch, sums.tolist()):
                scored.nats += nats


def windows_of(documents: Iterable, scores: list[Score], context: int, stride: int) -> Iterator:
    """Add a Score for each document, and yield it with each window's tokens (T) and targets (T).

    A target is -1 where an earlier window scored it. Windows start `stride` apart, the last is
    moved back to be full: after the first, each target has context - stride or more tokens before.
    """
    for where, tokens, text_bytes in documents:
        count, scored = len(tokens) - 1, 0
        if count:
            scores.append(Score(where, count, text_bytes))
        while scored < count:
            start = max(0, min(scored - context + stride, count - context))
            end = min(start + context, count)
            targets = tokens[start + 1 : end + 1].copy()
            targets[: scored - start] = -1
            yield scores[-1], tokens[start:end], targets
            scored = end


def padded(batch: list, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A batch of windows as tokens and targets, int64 of this shape; padding is not scored."""
    tokens, targets = np.zeros(shape, dtype=np.int64), np.full(shape, -1)
    for row, (_, row_tokens, row_targets) in enumerate(batch):
        tokens[row, : len(row_tokens)] = row_tokens
        targets[row, : len(row_targets)] = row_targets
    return tokens, targets


# Multiple-choice questions


@dataclass
class Question:
    """A line of a file of questions."""

    where: str
    prompt: str
    choices: list[str]
    answer: int  # index of the right choice
    scores: list[Score] = field(default_factory=list)  # of the choices


def read_questions(path: Path) -> list[Question]:
    """The questions of a .jsonl file, other entries ignored. Raises Failure."""
    questions = []
    for number, line in enumerate(read_file(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entries = json.loads(line)
            is_good = has_layout(entries, QUESTION) and type(entries["answer"]) is int
            is_good = is_good and all(entries["choices"])
            question = Question(f"{path}:{number}", *(entries[name] for name in QUESTION))
            "".join([question.prompt, *question.choices]).encode()  # fails for half a character
        except (ValueError, KeyError, TypeError, RecursionError):
            is_good = False
        if not is_good or not 0 <= question.answer < len(question.choices):
            form = '{"prompt": "text", "choices": ["text", "text"], "answer": 0}, the first is 0'
            raise Failure(f"{path}:{number}: a question is {form}, not {line[:60]}")
        questions.append(question)
    if not questions:
        raise Failure(f"{path} has no question")
    return questions


def windows_of_choices(questions: list[Question], tokenizer: Tokenizer, context: int) -> Iterator:
    """Add a Score for each choice, and yield it with its window's tokens (T) and targets (T)."""
    with Progress("questions", len(questions)) as progress:
        for done, question in enumerate(questions):
            progress.update(done)
            yield from windows_of_question(question, tokenizer, context)


def windows_of_question(question: Question, tokenizer: Tokenizer, context: int) -> Iterator:
    """As windows_of_choices. A window is the end of the prompt, whose targets are -1, and a choice.

    White space between the two is scored with the choice, since tokenizers join it to a word.
    """
    start = len(tokenizer.encode_document(question.prompt.rstrip()))
    for choice in question.choices:
        tokens = tokenizer.encode_document(question.prompt + choice).astype(np.int64)
        first = min(start, len(tokens) - 1)  # of the choice's tokens: one at least is scored
        count = len(tokens) - first
        if count > context:
            sizes = f"a choice has {count} tokens, the model's context {context}"
            raise Failure(f"{question.where}: {sizes}")
        question.scores.append(Score(question.where, count, len(choice.encode())))
        targets = tokens[1:].copy()
        targets[: first - 1] = -1
        yield question.scores[-1], tokens[:-1][-context:], targets[-context:]


def summarize_choices(questions: list[Question]) -> dict:
    """The figures over all questions, each with its standard error over questions."""
    chosen, chosen_by_bytes = [], []
    for question in questions:
        nats, sizes = np.array([(score.nats, score.bytes) for score in question.scores]).T
        chosen.append(np.argmin(nats) == question.answer)
        chosen_by_bytes.append(np.argmin(nats / sizes) == question.answer)
    right = [question.scores[question.answer] for question in questions]
    nats, sizes = np.array([(score.nats, score.bytes) for score in right]).T
    return {
        "questions": len(questions),
        "chance": float(np.mean([1 / len(question.choices) for question in questions])),
        "accuracy": share(chosen),  # of the choices as they are
        "accuracy_by_bytes": share(chosen_by_bytes),  # of nats per byte of each choice
        "bits_per_byte": ratio(nats / math.log(2), sizes),  # of the right choices
    }


def share(values: list[bool]) -> tuple[float, float | None]:
    """The share p of true values and its standard error, sqrt(p * (1 - p) / (n - 1)); None for one.

    That is `ratio` of values of size 1.
    """
    return ratio(np.array(values, dtype=float), np.ones(len(values)))


if __name__ == "__main__":
    config.run(main, EvaluateConfig, "--device=cpu or --dtype=bfloat16 can need less")
