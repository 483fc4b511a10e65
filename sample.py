"""Let a trained model speak, score a text with it, or hand it to other tools.

    python sample.py                                     continue nothing, from the newest run in out/
    python sample.py --prompt="def " --temperature=0     the likeliest continuation
    python sample.py --interactive=True                  a prompt loop
    python sample.py --prompts=many.txt --json=True      many prompts at once, an object a sample
    python sample.py --score=book.txt                    how well it foretells a text
    python sample.py --export_hf=hf                      a folder that other tools load

Read from the bottom up: `main`, then `speak`, where the tokens of each row become a `Reply`. `generate` asks a `Batch`
for a column of tokens at a time, `choose` picks them, and the cache keeps the model from reading everything anew.
"""

import codecs
import contextlib
import importlib
import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import config
from config import NO_CHECKPOINT, NOT_FINITE, Failure


@dataclass
class SampleConfig:
    """Let a trained model continue prompts, score texts, or become a folder that other tools load.

    The next token is drawn from the model's probabilities after, in this order: repetition_penalty, temperature, top_k,
    top_p, min_p.
    """

    checkpoint: str = ""  # a .pt file, a run's folder, a model (gpt2, a folder, OWNER/NAME); "" = the newest run
    out_dir: str = "out"  # the folder that runs stand in
    prompt: str = ""  # the text to continue; "" = the start of a document
    prompts: str = ""  # a file of prompts instead: a line each, or .jsonl with "prompt" and, if you like, "id"
    interactive: bool = False  # a loop: type, and the model goes on from all that was said; an empty line starts anew
    json: bool = False  # print each sample as a JSON object: what it is, why it stopped, how likely, how fast
    num_samples: int = 1  # continuations of each prompt
    max_new_tokens: int = 256  # tokens a continuation has at most; it may end earlier, at an end-of-text
    batch_size: int = 32  # continuations that are decoded at once
    temperature: float = 0.8  # below 1 the likely becomes likelier; 0 = always the likeliest, greedy
    top_k: int = 200  # choose among the k likeliest tokens only; 0 = off
    top_p: float = 1.0  # then among the fewest whose probabilities reach this share; 1 = off
    min_p: float = 0.0  # then among those at least this share as likely as the likeliest; 0 = off
    repetition_penalty: float = 1.0  # above 1, what the text holds already becomes less likely; 1 = off
    stop: str = ""  # texts that end a continuation, and are not shown, parted by |; \n is a line's end
    seed: int = 1337  # the same seed gives the same text on the same machine, whatever else is in the batch
    device: str = "auto"  # cpu, cuda, mps, or auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32, bfloat16, or auto: bfloat16 on a GPU that has it
    compile: bool = False  # on a GPU: fuse each step's kernels, which takes a while at first and then is faster
    score: str = ""  # do not speak, but score the texts in a file or folder, or a dataset: data/NAME or data/NAME:train
    stride: int = 0  # tokens from one scored window to the next, fewer for more context; 0 = half the context
    export_hf: str = ""  # do not speak, but write the model and its tokenizer to this folder in Hugging Face's layout

    def check(self):
        """Raise ValueError where a value makes no sense."""
        at_least = dict(num_samples=1, max_new_tokens=1, batch_size=1, temperature=0, stride=0, top_k=0, seed=0)
        for name, low in at_least.items():
            if not low <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} is {getattr(self, name)} and must be at least {low} (and below 2^63)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p} and must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p} and must be from 0 to 1")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty} and must be above 0")
        if self.device not in ("auto", "cpu", "cuda", "mps"):
            raise ValueError(f"device is {self.device!r} and must be one of auto, cpu, cuda, mps")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r} and must be one of auto, float32, bfloat16")
        if sum(map(bool, (self.interactive, self.score, self.export_hf))) > 1:
            raise ValueError("interactive, score and export_hf are three things to do: name one of them")
        if self.interactive and (self.prompts or self.prompt or self.json or self.num_samples > 1):
            raise ValueError("interactive has one prompt after another: leave out prompt, prompts, json, num_samples")
        if self.prompts and self.prompt:
            raise ValueError(f"prompt is {self.prompt!r} and prompts is {self.prompts}: name one of them")


if __name__ == "__main__":  # the settings come first: a mistake in them shows before torch's seconds of loading
    settings = config.load(SampleConfig, sys.argv[1:])

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

import checkpoint
import prepare_data
from model import GPT, GPTConfig, import_safetensors, load_hf, save_hf

# ---- the cache


class KVCache:
    """The keys and values of the tokens so far, for a batch of rows, so that each new token is computed alone.

    Its shape is fixed, `length` places a row, of which a mask hides those still empty: a GPU's attention would plan
    anew for each new length. Within `fill` a forward reads prompts; otherwise it brings one more token to each row.
    """

    def __init__(self, config: GPTConfig, batch_size: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (batch_size, config.n_kv_head, length, config.head_size)  # (B, K, S, D)
        self.layers = [LayerCache(self, shape, device, dtype) for _ in range(config.n_layer)]
        self.places, self.rows = torch.arange(length, device=device), torch.arange(batch_size, device=device)
        self.held = torch.zeros_like(self.rows)  # tokens in each row
        self.filled = None  # while prompts are read: which rows they go to, and which prompt goes to each of these
        self.positions = None  # of the token that each row gets, (B)
        self.mask = None  # added to its attention scores: 0 for the places that it sees, otherwise -inf, (B, 1, 1, S)

    @contextlib.contextmanager
    def fill(self, rows: torch.Tensor, prompt_of: torch.Tensor):
        """Within this a forward reads prompts (P, T) from their beginning; rows[i] gets prompt prompt_of[i]."""
        self.filled, self.mask = (rows, prompt_of), None
        yield
        self.filled = None

    def advance(self, new: int) -> torch.Tensor:
        """The positions of the next tokens: (T) in prompts, otherwise (B, 1), and room is made for these."""
        if self.filled:
            return self.places[:new]
        self.positions = self.held.clone()
        is_empty = self.places > self.positions[:, None, None, None]
        self.mask = torch.zeros_like(is_empty, dtype=self.layers[0].k.dtype).masked_fill_(is_empty, -torch.inf)
        self.held += 1
        return self.positions[:, None]


class LayerCache:
    """One layer's share of a KVCache."""

    def __init__(self, cache: KVCache, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype):
        self.cache = cache
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))  # (B, K, S, D)

    @property
    def mask(self) -> torch.Tensor | None:
        return self.cache.mask

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep k and v (B, K, T, D) of the new tokens; return those to attend to."""
        cache = self.cache
        if cache.filled:
            rows, prompt_of = cache.filled
            self.k[rows, :, : k.size(2)], self.v[rows, :, : v.size(2)] = k[prompt_of], v[prompt_of]
            return k, v
        self.k[cache.rows, :, cache.positions] = k[:, :, 0]
        self.v[cache.rows, :, cache.positions] = v[:, :, 0]
        return self.k, self.v


# ---- decoding

PREFILL_TOKENS = 1 << 16  # of prompts that are read at once
BURST = 32  # columns that a GPU computes before they are looked at
INDUCTOR = {
    "coordinate_descent_tuning": True,  # a product with one row becomes a sum, and its block sizes are searched for
    "realize_opcount_threshold": 4,  # GELU is computed before such a sum, not anew for each of its terms
}


def penalize(logits: torch.Tensor, is_there: torch.Tensor, penalty: float) -> torch.Tensor:
    """The logits (B, V), lower where is_there (B, V). Keskar et al. 2019 (CTRL), section 4.1."""
    return torch.where(is_there, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits: torch.Tensor, uniform: torch.Tensor, settings: SampleConfig) -> torch.Tensor:
    """Pick a token in each row of logits (B, V) by a random number in [0, 1) a row, uniform (B); return tokens (B).

    temperature; top_k: Fan et al. 2018; top_p: Holtzman et al. 2020, the fewest tokens whose probabilities reach it
    together; min_p: Nguyen et al. 2024, a share of the likeliest token's probability.
    """
    V = logits.size(-1)
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits, tokens = logits / settings.temperature, None
    if settings.top_k or settings.top_p < 1:
        logits, tokens = logits.topk(min(settings.top_k or V, V), sorted=settings.top_p < 1)  # the likeliest first
    probabilities = F.softmax(logits, dim=-1)
    if settings.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # what the likelier tokens reach together
        probabilities = probabilities * (before < settings.top_p)
    if settings.min_p:
        probabilities = probabilities * (probabilities >= settings.min_p * probabilities.amax(-1, keepdim=True))
    reached = probabilities.cumsum(-1)
    places = (reached <= uniform[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
    return (places if tokens is None else tokens.gather(-1, places))[:, 0]


def prepare_to_decode(model: GPT, device: torch.device, dtype: torch.dtype) -> GPT:
    """The model as decoding wants it. A CPU multiplies one row faster by a wide matrix if that lies transposed."""
    model.to(device, dtype).eval()
    for layer in model.modules() if device.type == "cpu" else []:
        if isinstance(layer, torch.nn.Linear) and layer.out_features > layer.in_features:
            layer.weight.data = layer.weight.data.T.contiguous().T
    return model


def noise_for(seed: int, sample: int, count: int) -> np.ndarray:
    """The random numbers of a sample's tokens, float32 (count,): whatever the prompt, the batch, or the device."""
    return np.random.default_rng([seed, sample]).random(count, dtype=np.float32)


class Batch:
    """Rows that are decoded together, each as it would be alone: `tokens` (B, columns) holds prompts and answers.

    Prompts end at one column, `start`, so that a step adds a column. Rows of the same prompt share its reading.
    """

    def __init__(
        self, model: GPT, prompts: list[list[int]], noise: np.ndarray, vocab_size: int, settings: SampleConfig
    ):
        device, self.context = model.wte.weight.device, model.config.block_size
        self.model, self.vocab_size, self.settings = model, vocab_size, settings
        seen = [prompt[-self.context :] for prompt in prompts]
        self.start, (rows, new) = max(map(len, seen)), noise.shape
        self.tokens = torch.zeros(rows, self.start + new, dtype=torch.long, device=device)
        self.noise, self.logprobs = (torch.zeros(self.tokens.shape, device=device) for _ in range(2))
        self.is_there = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        self.column = torch.full((1,), self.start, device=device)  # which the next step computes
        length = min(self.context, -(-(self.start + new) // 128) * 128)  # few lengths are few plans for attention
        self.cache = KVCache(model.config, rows, length, device, model.wte.weight.dtype)
        self.advance = self.captured() if device.type == "cuda" else self.step  # before the prompts: it tries a step
        self.noise[:, self.start :] = torch.from_numpy(noise)
        for row, (prompt, end) in enumerate(zip(prompts, seen)):
            self.tokens[row, self.start - len(end) : self.start] = torch.tensor(end)
            self.is_there[row, prompt[1:]] = True  # the first is the end-of-text before each document
        self.held = np.zeros(rows, dtype=int)  # as cache.held, known here without asking the device
        self.read(range(rows), seen)

    def read(self, rows: Iterable[int], prompts: list[list[int]]):
        """Fill rows with their prompts but for the last tokens, which the next step takes; equal ones are read once."""
        rows_of = defaultdict(list)
        for row, prompt in zip(rows, prompts):
            rows_of[tuple(prompt[:-1])].append(row)
            self.held[row] = len(prompt) - 1
        self.cache.held.copy_(torch.from_numpy(self.held))
        longest_first = sorted(filter(None, rows_of), key=len, reverse=True)  # nothing to read of one-token prompts
        count = max(1, PREFILL_TOKENS // self.context)
        for some in (longest_first[first : first + count] for first in range(0, len(longest_first), count)):
            tokens = torch.zeros(len(some), len(some[0]), dtype=torch.long)
            for number, prompt in enumerate(some):
                tokens[number, : len(prompt)] = torch.tensor(prompt)
            pairs = [(row, number) for number, prompt in enumerate(some) for row in rows_of[prompt]]
            with self.cache.fill(*torch.tensor(pairs, device=self.tokens.device).T):
                self.model(tokens.to(self.tokens.device), cache=self.cache)

    def pick(self, tokens: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens (B, 1) that follow tokens (B, 1), by random numbers (B), and the logits (B, V)."""
        logits = self.model(tokens, cache=self.cache)[:, 0, : self.vocab_size]
        penalty = self.settings.repetition_penalty
        penalized = penalize(logits, self.is_there, penalty) if penalty != 1 else logits
        return choose(penalized, uniform, self.settings)[:, None], logits

    def step(self):
        """Compute the next column of tokens."""
        last, uniform = self.tokens.index_select(1, self.column - 1), self.noise.index_select(1, self.column)
        tokens, logits = self.pick(last, uniform[:, 0])
        self.tokens.index_copy_(1, self.column, tokens)
        if self.settings.repetition_penalty != 1:
            self.is_there.scatter_(1, tokens, True)
        if self.settings.json:
            self.logprobs.index_copy_(1, self.column, logits.gather(1, tokens) - logits.logsumexp(1, keepdim=True))
        self.column += 1

    def captured(self) -> Callable:
        """The step as a CUDA graph: the GPU runs all its kernels in a row, without waiting for Python."""
        if self.settings.compile:
            self.pick = torch.compile(self.pick, dynamic=False, options=INDUCTOR)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()  # libraries set themselves up in the first
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            self.step()
        self.column.fill_(self.start)
        self.is_there.zero_()
        return graph.replay

    def restart(self):
        """Let the rows whose context is full go on from the second half of it, read anew."""
        rows, now = np.flatnonzero(self.held == self.context), int(self.column)
        self.read(rows, self.tokens[rows, now - (self.context // 2 or 1) : now].tolist())


@torch.inference_mode()
def generate(
    model: GPT, prompts: list[list[int]], noise: np.ndarray, vocab_size: int, settings: SampleConfig
) -> Iterator[tuple[list, list]]:
    """Yield what follows the prompts, some columns at a time: their tokens (B, n) and log-probabilities (B, n).

    noise: a random number in [0, 1) for each new token, (B, max_new_tokens). Of longer prompts the model sees the last
    block_size tokens. Where a row's context is full, the model goes on from the second half of it, read anew.
    vocab_size: entries of the tokenizer, of which a model may have more.
    """
    batch, done = Batch(model, prompts, noise, vocab_size, settings), 0
    burst = BURST if batch.tokens.is_cuda else 1
    while done < noise.shape[1]:
        room = batch.context - batch.held.max()
        if not room:
            batch.restart()
            continue
        count = min(burst, room, noise.shape[1] - done)
        for _ in range(count):
            batch.advance()
        columns = slice(batch.start + done, batch.start + done + count)
        batch.held += count
        done += count
        yield batch.tokens[:, columns].tolist(), batch.logprobs[:, columns].tolist()


# ---- text


class Reply:
    """What the model says in one row: the characters that are whole, up to an end-of-text or a text to stop at."""

    def __init__(self, tokenizer: tiktoken.Encoding, settings: SampleConfig):
        self.tokenizer, self.most = tokenizer, settings.max_new_tokens
        self.stops = [stop.replace("\\n", "\n") for stop in settings.stop.split("|") if stop]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # half a character waits for its other half
        self.tokens, self.logprobs, self.text, self.shown = [], [], "", 0
        self.ended, self.started = "", time.perf_counter()  # ended: by "end of text", "stop" or "length"

    def add(self, token: int, logprob: float):
        """Take one more token, and note where it ends the reply."""
        data = b""
        if token == self.tokenizer.eot_token:
            self.ended = "end of text"
        else:
            self.tokens.append(token)
            self.logprobs.append(logprob)
            with contextlib.suppress(KeyError):  # an id that the tokenizer gives no meaning says nothing
                data = self.tokenizer.decode_single_token_bytes(token)
            self.ended = "length" if len(self.tokens) == self.most else ""
        self.text += self.decoder.decode(data, final=bool(self.ended))
        found = [place for stop in self.stops if (place := self.text.find(stop, self.shown)) >= 0]
        if found:
            self.text, self.ended = self.text[: min(found)], "stop"
        self.seconds = time.perf_counter() - self.started

    def news(self) -> str:
        """The text since the last call, but for an end that may be the beginning of a text to stop at."""
        text = self.text[self.shown :]
        starts = [stop[:size] for stop in self.stops for size in range(len(stop))] if not self.ended else []
        held = max((len(start) for start in starts if text.endswith(start)), default=0)
        self.shown += len(text) - held
        return text[: len(text) - held]

    def facts(self) -> dict:
        return {
            "text": self.text,
            "tokens": len(self.tokens),
            "mean_logprob": sum(self.logprobs) / len(self.tokens) if self.tokens else None,
            "ended": self.ended,
            "tokens_per_second": round(len(self.tokens) / self.seconds, 1),
        }


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """The tokens of a document that begins with `text`; bytes of a shell's argument that are no UTF-8 become U+FFFD."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return [tokenizer.eot_token, *prepare_data.encode(tokenizer, text).tolist()]


def answer(
    model: GPT, tokenizer: tiktoken.Encoding, prompts: list[list[int]], samples: list[int], settings: SampleConfig
) -> Iterator[list[Reply]]:
    """Decode rows at once; yield their replies each time that they have grown, until all have ended."""
    replies = [Reply(tokenizer, settings) for _ in prompts]
    noise = np.stack([noise_for(settings.seed, sample, settings.max_new_tokens) for sample in samples])
    for tokens, logprobs in generate(model, prompts, noise, tokenizer.n_vocab, settings):
        for reply, *row in zip(replies, tokens, logprobs):
            for token, logprob in zip(*row):
                if not reply.ended:
                    reply.add(token, logprob)
        yield replies
        if all(reply.ended for reply in replies):
            return


def read_prompts(settings: SampleConfig) -> list[dict]:
    """The prompts that the settings give, each {"prompt": text} and what else its line of JSON holds."""
    if not settings.prompts:
        return [{"prompt": settings.prompt}]
    path, prompts = Path(settings.prompts).expanduser(), []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except ValueError as error:
        raise Failure(f"{path} is no UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip() and path.suffix in (".jsonl", ".ndjson"):
            prompts.append({"id": number} | prompt_of(line, f"{path}:{number}"))
        elif line.strip():
            prompts.append({"prompt": line})
    if not prompts:
        raise Failure(f"{path} holds no prompt")
    return prompts


def prompt_of(line: str, where: str) -> dict:
    try:
        found = json.loads(line)
        found["prompt"].encode()  # a string, and without half a character, which JSON can name
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Failure(f'{where}: a line is {{"prompt": "text"}}, and what else you like, not {line[:60]}') from None


def speak(model: GPT, tokenizer: tiktoken.Encoding, prompts: list[dict], settings: SampleConfig):
    """Print the continuations to standard output, the first one as it comes and the others when it is their turn."""
    rows = [(prompt, sample) for prompt in prompts for sample in range(settings.num_samples)]
    progress = prepare_data.Progress("samples", len(rows))
    for first in range(0, len(rows), settings.batch_size):
        some, turn = rows[first : first + settings.batch_size], 0
        heads = [("-" * 20 + "\n" if first + row else "") + prompt["prompt"] for row, (prompt, _) in enumerate(some)]
        tokens = [encode(tokenizer, prompt["prompt"]) for prompt, _ in some]
        warn_of_length(max(map(len, tokens)), model.config.block_size, settings)
        for replies in answer(model, tokenizer, tokens, [sample for _, sample in some], settings):
            for reply, (prompt, sample) in zip(replies[turn:], some[turn:]):
                if not settings.json:
                    print(heads[turn] + reply.news(), end="\n" if reply.ended else "", flush=True)
                    heads[turn] = ""
                elif reply.ended:
                    print(json.dumps(prompt | {"sample": sample} | reply.facts(), ensure_ascii=False), flush=True)
                if not reply.ended:
                    break
                turn += 1
            if not sys.stdout.isatty():
                progress.update(first + sum(bool(reply.ended) for reply in replies))
    progress.close()


def warn_of_length(longest: int, context: int, settings: SampleConfig):
    if longest > context:
        print(f"of the prompt's {longest} tokens the model sees the last {context}", file=sys.stderr)
    elif longest + settings.max_new_tokens > context + 1:
        print(f"past {context} tokens the model goes on from the last {context // 2}", file=sys.stderr)


def converse(model: GPT, tokenizer: tiktoken.Encoding, settings: SampleConfig):
    """A prompt loop: the model goes on from all that was said. Ctrl-C stops an answer, Ctrl-D or Ctrl-C here ends."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # lines can be edited then, and the arrow keys bring earlier ones back
    print("an empty line starts anew, Ctrl-C stops an answer, Ctrl-D ends", file=sys.stderr)
    said = ""
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            said = ""
            continue
        said, reply = f"{said}\n{line}" if said else line, None
        with contextlib.suppress(KeyboardInterrupt):
            for [reply] in answer(model, tokenizer, [encode(tokenizer, said)], [0], settings):
                print(reply.news(), end="", flush=True)
        print()
        said += reply.text if reply else ""


# ---- scoring

SCORED_TOKENS = {"cuda": 1 << 15}  # in a batch; elsewhere 1 << 11, as the logits of each take V numbers


@dataclass
class Score:
    """How well the model foretold a document."""

    where: str
    tokens: int  # all but the end-of-text that leads it
    bytes: int
    nats: float  # the sum of the tokens' cross-entropy


def read_documents(settings: SampleConfig, tokenizer: tiktoken.Encoding) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yield where each document to score stands, its tokens, led by end-of-text, and its bytes. Raises Failure."""
    name, split = re.fullmatch(r"(.+?)(?::(\w*))?", settings.score).groups()  # not at the colon of C:\data
    if (folder := Path(name).expanduser()).joinpath("manifest.json").exists():
        yield from dataset_documents(folder, split or "val", tokenizer)
        return
    reader = prepare_data.Reader(prepare_data.PrepareConfig(name="score"), settings.score, "score")
    progress = prepare_data.Progress("bytes read", reader.total)
    for text, where in reader:
        yield where, np.array(encode(tokenizer, text)), len(text.encode())
        progress.update(reader.done)
    progress.close()


def dataset_documents(folder: Path, split: str, tokenizer: tiktoken.Encoding) -> Iterator[tuple[str, np.ndarray, int]]:
    """As read_documents, from the shards of a split."""
    dataset = prepare_data.Dataset(folder, block_size=1)
    if not prepare_data.same_tokens(dataset.encoding, tokenizer):
        raise Failure(f"{folder} has another tokenizer ({dataset.encoding.name}) than the model ({tokenizer.name})")
    if split not in prepare_data.SPLITS:
        raise Failure(f"score {folder}:{split}: a split is one of {', '.join(prepare_data.SPLITS)}")
    windows = getattr(dataset, split)
    progress, done = prepare_data.Progress("tokens", windows.tokens()), 0
    for path, shard in zip(windows.paths, windows.shards):
        starts = np.union1d(0, np.flatnonzero(np.asarray(shard) == tokenizer.eot_token))  # one may go on from before
        for start, end in zip(starts, [*starts[1:], len(shard)]):
            tokens = np.asarray(shard[start:end], dtype=np.int64)
            tokens = tokens if tokens[0] == tokenizer.eot_token else np.insert(tokens, 0, tokenizer.eot_token)
            yield f"{path}, token {start}", tokens, len(tokenizer.decode_bytes(tokens[1:].tolist()))
            done += end - start
            progress.update(done)
    progress.close()


def windows_of(tokens: np.ndarray, context: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows of a document, as tokens (T) and targets (T), -1 where an earlier window had more of the text to score.

    Each but the first starts `stride` after the one before, the last so that it is full: so every target is scored
    once, and from the second window on after context - stride tokens at least.
    """
    count, scored = len(tokens) - 1, 0
    while scored < count:
        start = max(0, min(scored - context + stride, count - context))
        end = min(start + context, count)
        targets = tokens[start + 1 : end + 1].copy()
        targets[: scored - start] = -1
        yield tokens[start:end], targets
        scored = end


@torch.inference_mode()
def score(model: GPT, documents: Iterable[tuple[str, np.ndarray, int]], settings: SampleConfig) -> list[Score]:
    """Score each document by itself, in windows of the model's context."""
    context, device = model.config.block_size, model.wte.weight.device
    stride = min(settings.stride or max(1, context // 2), context)
    is_compiled = settings.compile and device.type == "cuda"
    forward = torch.compile(model, dynamic=False) if is_compiled else model
    batch_tokens = SCORED_TOKENS.get(device.type, 1 << 11)
    scores = []

    def windows() -> Iterator[tuple[Score, np.ndarray, np.ndarray]]:
        for where, tokens, size in documents:
            if len(tokens) > 1:
                scores.append(Score(where, len(tokens) - 1, size, 0.0))
                yield from ((scores[-1], *window) for window in windows_of(tokens, context, stride))

    stream = windows()
    while waiting := list(islice(stream, max(1, 64 * batch_tokens // context))):
        waiting.sort(key=lambda window: -len(window[1]))  # so that those of a batch are about as long
        sums, done = [], 0
        while done < len(waiting):
            length = context if is_compiled else len(waiting[done][1])
            rows = max(1, batch_tokens // length)
            some = waiting[done : done + rows]
            tokens = np.zeros((rows if is_compiled else len(some), length), dtype=np.int64)
            targets = np.full(tokens.shape, -1)
            for row, (_, row_tokens, row_targets) in enumerate(some):
                tokens[row, : len(row_tokens)], targets[row, : len(row_targets)] = row_tokens, row_targets
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
                losses = forward(*(torch.from_numpy(x).to(device) for x in (tokens, targets)), reduction="none")
            sums.append(losses[: len(some)].sum(1))
            done += len(some)
        for (one, _, _), nats in zip(waiting, torch.cat(sums).tolist()):
            one.nats += nats
    return scores


def ratio(values: list[float], sizes: list[float]) -> tuple[float, float | None]:
    """sum(values) / sum(sizes) and its standard error over documents (Cochran 1977, section 6.4), None for one."""
    values, sizes, count = np.array(values), np.array(sizes), len(values)
    mean = values.sum() / sizes.sum()
    spread = np.square(values - mean * sizes).sum() * count / max(count - 1, 1)
    return float(mean), float(math.sqrt(spread) / sizes.sum()) if count > 1 else None


def summarize(scores: list[Score]) -> dict:
    """What the scores of all documents come to, each figure with its standard error over documents."""
    nats = [score.nats for score in scores]
    loss, loss_error = ratio(nats, [score.tokens for score in scores])
    bits, bits_error = ratio([value / math.log(2) for value in nats], [score.bytes for score in scores])
    worst = sorted(scores, key=lambda score: score.nats / score.tokens, reverse=True)[:10]
    return {
        "documents": len(scores),
        "tokens": sum(score.tokens for score in scores),
        "bytes": sum(score.bytes for score in scores),
        "nats_per_token": (loss, loss_error),
        "perplexity": (perplexity := float(np.exp(loss)), loss_error and perplexity * loss_error),
        "bits_per_byte": (bits, bits_error),
        "worst": [{"nats_per_token": one.nats / one.tokens, "tokens": one.tokens, "where": one.where} for one in worst],
    }


def print_score(model: GPT, tokenizer: tiktoken.Encoding, settings: SampleConfig):
    """Score what the settings name, and say how well the model foretells it."""
    started = time.perf_counter()
    scores = score(model, read_documents(settings, tokenizer), settings)
    if not scores:
        raise Failure(f"{settings.score}: there is no text to score")
    found = summarize(scores)
    if not math.isfinite(found["nats_per_token"][0]):
        raise Failure("the model's numbers are not finite: its training was lost before this checkpoint", NOT_FINITE)
    found["tokens_per_second"] = round(found["tokens"] / (time.perf_counter() - started), 1)
    if settings.json:
        print(json.dumps(found))
        return
    print(
        "{documents:,} documents, {tokens:,} tokens, {bytes:,} bytes; {tokens_per_second:,.0f} tokens/s".format(**found)
    )
    for name in ("nats_per_token", "perplexity", "bits_per_byte"):
        value, error = found[name]
        print(f"{name.replace('_', ' '):<15} {value:9.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    print("± is the standard error over documents; those foretold worst, in nats per token:")
    for one in found["worst"]:
        print(f"{one['nats_per_token']:9.4f} {one['where']} ({one['tokens']:,} tokens)")


# ---- the command line


def newest_checkpoint(settings: SampleConfig) -> Path:
    """The checkpoint that the settings name: a file, a run's folder, or neither for the newest run."""
    path = Path(settings.checkpoint or settings.out_dir).expanduser()
    if path.is_file() or path.suffix == ".pt":
        return path
    found = []
    for folder in [path] if settings.checkpoint else path.glob("*/"):
        both = [file for file in (folder / "latest.pt", folder / "best.pt") if file.exists()]
        found += both[:1]  # a young run has a best.pt only
    if not found:
        hint = "train one: python train.py config/small.py"
        raise Failure(f"{path}: there is no checkpoint in it; {hint}", NO_CHECKPOINT)
    return max(found, key=lambda file: file.stat().st_mtime)


def load_model(path: Path) -> tuple[GPT, tiktoken.Encoding]:
    """The model of a checkpoint, and its tokenizer."""
    state = checkpoint.load(path)
    model = checkpoint.restore_model(state, path)
    print(f"{path}: step {state['step']}, validation loss {state['val_loss']:.4f}", file=sys.stderr)  # inf: none yet
    return model, prepare_data.read_tokenizer(state["tokenizer"]["text"], state["tokenizer"]["name"])


def open_model(settings: SampleConfig) -> tuple[GPT, tiktoken.Encoding]:
    """The model that the settings name, and its tokenizer; what it is goes to standard error. Raises Failure."""
    name, path = settings.checkpoint, Path(settings.checkpoint).expanduser()
    is_named = name in prepare_data.MODELS or prepare_data.hub_name(name) and not path.parent.is_dir()
    if not (path / "config.json").exists() and (path.exists() or not is_named):
        return load_model(newest_checkpoint(settings))
    with contextlib.redirect_stdout(sys.stderr):
        folder = prepare_data.fetch_model(name)
    if not prepare_data.has_tokenizer(folder):
        raise Failure(f"{folder} holds no tokenizer.json, nor vocab.json with merges.txt; put the model's own there")
    try:
        model = load_hf(folder)
    except (OSError, ValueError) as error:
        raise Failure(f"{name} is no model that can be read: {error}") from None
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters", file=sys.stderr)
    return model, prepare_data.load_hf_tokenizer(folder, name)


def export(model: GPT, tokenizer: tiktoken.Encoding, settings: SampleConfig):
    """Write the model and its tokenizer as transformers and others load them."""
    folder = Path(settings.export_hf).expanduser()
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    try:
        import_safetensors()  # what is missing shows before anything is written
        prepare_data.save_hf_tokenizer(tokenizer, folder)
        save_hf(model, folder, tokenizer.eot_token, dtype)
    except ValueError as error:
        raise Failure(str(error)) from None
    print(f"{folder}: AutoModelForCausalLM and AutoTokenizer load it", file=sys.stderr)


def main(settings: SampleConfig):
    """Do what the settings ask for; what is not the model's own goes to standard error."""
    device, prompts = config.find_device(settings.device), read_prompts(settings)
    folder = Path(settings.export_hf).expanduser()
    if settings.export_hf and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Failure(f"export_hf: {folder} is there already; name another folder, or empty it")
    model, tokenizer = open_model(settings)
    if tokenizer.n_vocab > (known := model.config.vocab_size):
        raise Failure(f"the tokenizer has {tokenizer.n_vocab} entries, but the model knows {known}: they are no pair")
    if settings.export_hf:
        export(model, tokenizer, settings)
        return
    if settings.dtype == "auto":
        is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        settings = replace(settings, dtype="bfloat16" if is_fast else "float32")
    if settings.score:
        print_score(model.to(device).eval(), tokenizer, settings)
        return
    prepare_to_decode(model, device, getattr(torch, settings.dtype))
    if settings.interactive:
        converse(model, tokenizer, settings)
    else:
        speak(model, tokenizer, prompts, settings)


if __name__ == "__main__":
    if sys.stdin:
        sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # a model may say what a console's own encoding lacks
    with config.exit_codes():
        try:
            main(settings)
            sys.stdout.flush()  # here, where what goes wrong in it still counts
        except (torch.OutOfMemoryError, MemoryError):
            raise Failure("memory is full; a smaller --batch_size or --max_new_tokens needs less") from None
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python writes once more at its end
            if not isinstance(error, BrokenPipeError):  # `| head` has seen enough
                raise
