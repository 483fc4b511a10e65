"""Let a trained model continue prompts, or export it for other tools.

    python sample.py                                     from the newest run in out/
    python sample.py --prompt="def " --temperature=0     the most likely continuation
    python sample.py --interactive=True                  a prompt loop
    python sample.py --prompts=many.txt --json=True      many prompts at once, one JSON object each
    python sample.py --export_hf=hf                      a folder in Hugging Face's layout

The invariant: a row of a batch gets the same tokens as it would alone. Its random numbers follow
from (seed, number of the sample), and padding never takes part in its attention. (Up to rounding:
in bfloat16 another batch size can change the last bit of a probability.)
"""

import codecs
import contextlib
import importlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import config
import hardware
import hf
from config import Failure, Progress
from model import GPT, GPTConfig, round_up
from tokenizer import Tokenizer
from tokenizer_files import save_hf_tokenizer


@dataclass
class SampleConfig:
    """Let a trained model continue prompts, or export it.

    The next token is drawn from the model's probabilities after, in this order: repetition_penalty,
    temperature, top_k, top_p, min_p.
    """

    checkpoint: str = ""  # .pt file, run's folder, or model (gpt2, folder, OWNER/NAME); "" = newest
    out_dir: str = "out"  # folder of the runs
    prompt: str = ""  # text to continue; "" = the start of a document
    prompts: str = ""  # file of prompts: one per line, or .jsonl with "prompt" and optionally "id"
    interactive: bool = False  # prompt loop: continues all text so far; an empty line starts anew
    json: bool = False  # print each sample as a JSON object: text, why it ended, log-probability
    num_samples: int = 1  # continuations of each prompt
    max_new_tokens: int = 256  # longest continuation; an end-of-text can end it earlier
    batch_size: int = 32  # continuations decoded at once
    temperature: float = 0.8  # below 1 favours likely tokens; 0 = always the most likely (greedy)
    top_k: int = 200  # choose among the k most likely tokens; 0 = off
    top_p: float = 1.0  # then among the fewest whose probabilities sum to this; 1 = off
    min_p: float = 0.0  # then among those at least this share as likely as the first; 0 = off
    repetition_penalty: float = 1.0  # above 1 makes tokens already in the text less likely; 1 = off
    stop: str = ""  # texts that end a continuation and are not shown, separated by |; \n = newline
    seed: int = 1337  # the same seed gives the same text on the same machine
    device: str = "auto"  # cpu, cuda, mps, or auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32, bfloat16, or auto: bfloat16 on a GPU that has it
    compile: bool = False  # on a GPU: fuse each step's kernels; slow to start, then faster
    export_hf: str = ""  # write model and tokenizer to this folder in Hugging Face's layout instead

    def check(self):
        """Raise ValueError where a value, or two together, make no sense."""
        config.check_bounds(self, 1, "num_samples max_new_tokens batch_size")
        config.check_bounds(self, 0, "temperature top_k seed")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p} and must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p} and must be from 0 to 1")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}, must be above 0")
        config.check_choices(self, device="auto cpu cuda mps", dtype="auto float32 bfloat16")
        if self.export_hf and (self.interactive or self.prompt or self.prompts):
            raise ValueError("export_hf takes no prompt: leave out interactive, prompt, prompts")
        if self.interactive and (self.prompts or self.prompt or self.json or self.num_samples > 1):
            names = "prompt, prompts, json, num_samples"
            raise ValueError(f"interactive asks for one prompt after another: leave out {names}")
        if self.prompts and self.prompt:
            raise ValueError(f"prompt {self.prompt!r} and prompts {self.prompts}: name one of them")


def main(settings: SampleConfig):
    """Do what the settings ask for. All but the samples goes to standard error. Raises Failure."""
    device, prompts = hardware.find_device(settings.device), read_prompts(settings)
    folder = Path(os.path.expanduser(settings.export_hf))
    if settings.export_hf and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Failure(f"export_hf: {folder} exists; name another folder, or empty it")
    model, tokenizer = checkpoint.open_model(settings.checkpoint, settings.out_dir)
    if settings.export_hf:
        export(model, tokenizer, folder, settings.dtype)
        return
    dtype = hardware.best_dtype(device) if settings.dtype == "auto" else settings.dtype
    prepare_to_decode(model, device, getattr(torch, dtype))
    if settings.interactive:
        prompt_loop(model, tokenizer, settings)
    else:
        print_samples(model, tokenizer, prompts, settings)


def continue_prompt(model: GPT, tokenizer: Tokenizer, prompt: str):
    """Print how a model that was just trained continues a prompt. Changes the model's dtype."""
    device = model.wte.weight.device
    prepare_to_decode(model, device, getattr(torch, hardware.best_dtype(device)))
    settings = SampleConfig(prompt=prompt, max_new_tokens=120)
    print_samples(model, tokenizer, read_prompts(settings), settings)


def export(model: GPT, tokenizer: Tokenizer, folder: Path, dtype: str):
    """Write the model and its tokenizer as transformers and others load them."""
    hf.require_safetensors()  # before anything is written
    save_hf_tokenizer(tokenizer, folder)
    dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    hf.save(model, folder, tokenizer.end_of_text, dtype)
    print(f"{folder}: AutoModelForCausalLM and AutoTokenizer load it", file=sys.stderr)


# Prompts and what is printed


def read_prompts(settings: SampleConfig) -> list[dict]:
    """The prompts, each {"prompt": text} and whatever else its line of JSON has. Raises Failure."""
    if not settings.prompts:
        return [{"prompt": settings.prompt}]
    path, prompts = Path(os.path.expanduser(settings.prompts)), []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except ValueError as error:
        raise Failure(f"{path} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip() and path.suffix in (".jsonl", ".ndjson"):
            prompts.append({"id": number} | parse_prompt(line, f"{path}:{number}"))
        elif line.strip():
            prompts.append({"prompt": line})
    if not prompts:
        raise Failure(f"{path} has no prompt")
    return prompts


def parse_prompt(line: str, where: str) -> dict:
    """The JSON object of a line, with a text under "prompt". Raises Failure."""
    try:
        record = json.loads(line)
        record["prompt"].encode()  # fails for half a character, which JSON can name
        return record
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        form = '{"prompt": "text"}, other entries allowed'
        raise Failure(f"{where}: a line is {form}, not {line[:60]}") from None


def print_samples(model: GPT, tokenizer: Tokenizer, prompts: list[dict], settings: SampleConfig):
    """Print the continuations in order: one as it is generated, while the later ones wait."""
    rows = [(prompt, sample) for prompt in prompts for sample in range(settings.num_samples)]
    with Progress("samples", len(rows)) as progress:
        for first in range(0, len(rows), settings.batch_size):
            batch = rows[first : first + settings.batch_size]
            number = 0  # of the row that is printed now
            tokens = [(encode_prompt(tokenizer, p["prompt"]), sample) for p, sample in batch]
            warn_of_length(max(len(row) for row, _ in tokens), model.config.block_size, settings)
            for completions in complete(model, tokenizer, tokens, settings):
                for completion, (prompt, sample) in zip(completions[number:], batch[number:]):
                    separator = "-" * 20 + "\n" if first + number else ""
                    print_new(completion, prompt, sample, separator, settings.json)
                    if not completion.ended:
                        break
                    number += 1
                if not sys.stdout.isatty():
                    progress.update(first + sum(bool(row.ended) for row in completions))


def print_new(completion: "Completion", prompt: dict, sample: int, separator: str, as_json: bool):
    """Print what is new of a continuation; as JSON, all of it when it has ended."""
    if not as_json:
        start = "" if completion.is_begun else separator + prompt["prompt"]
        completion.is_begun = True
        print(start + completion.new_text(), end="\n" if completion.ended else "", flush=True)
    elif completion.ended:
        record = prompt | {"sample": sample} | completion.to_dict()
        print(json.dumps(record, ensure_ascii=False), flush=True)


def warn_of_length(longest: int, context: int, settings: SampleConfig):
    """Say on standard error where a prompt or its continuation exceeds the model's context."""
    if longest > context:
        message = f"of the prompt's {longest} tokens the model sees the last {context}"
        print(message, file=sys.stderr)
    elif longest + settings.max_new_tokens > context + 1:
        half = f"continues from the last {context // 2}"
        print(f"after {context} tokens the model {half}", file=sys.stderr)


def prompt_loop(model: GPT, tokenizer: Tokenizer, settings: SampleConfig):
    """Ask for a line, continue all text so far, and so on. Ctrl-C stops an answer, Ctrl-D ends."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # makes lines editable, with a history
    print("an empty line starts anew, Ctrl-C stops an answer, Ctrl-D ends", file=sys.stderr)
    text = ""
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            text = ""
            continue
        text = f"{text}\n{line}" if text else line
        completion, tokens = None, encode_prompt(tokenizer, text)
        with contextlib.suppress(KeyboardInterrupt):
            for [completion] in complete(model, tokenizer, [(tokens, 0)], settings):
                print(completion.new_text(), end="", flush=True)
        print()
        text += completion.text if completion else ""


# From tokens to text


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a document that begins with `text`; bytes that are not UTF-8 become U+FFFD."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return tokenizer.encode_document(text).tolist()


def complete(model: GPT, tokenizer: Tokenizer, rows: list, settings: SampleConfig) -> Iterator:
    """Decode rows at once, each (prompt's tokens, number of the sample), until all have ended.

    Yields a Completion for each row, every time that they have grown.
    """
    completions = [Completion(tokenizer, settings) for _ in rows]
    prompts, count = [prompt for prompt, _ in rows], settings.max_new_tokens
    seeds = [[settings.seed, sample] for _, sample in rows]
    noise = [np.random.default_rng(seed).random(count, dtype=np.float32) for seed in seeds]
    vocab_size = tokenizer.vocab_size
    for tokens, logprobs in generate(model, prompts, np.stack(noise), vocab_size, settings):
        for completion, *row in zip(completions, tokens, logprobs):
            for token, logprob in zip(*row):
                if not completion.ended:
                    completion.add(token, logprob)
        yield completions
        if all(completion.ended for completion in completions):
            return


class Completion:
    """The text generated in one row, up to an end-of-text, a stop text or the longest length."""

    def __init__(self, tokenizer: Tokenizer, settings: SampleConfig):
        self.tokenizer = tokenizer
        self.max_tokens = settings.max_new_tokens
        self.stops = [stop.replace("\\n", "\n") for stop in settings.stop.split("|") if stop]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # for whole characters
        self.tokens, self.logprobs = [], []
        self.text = ""
        self.shown = 0  # characters that new_text has returned
        self.ended = ""  # why: "end of text", "stop" or "length"
        self.is_begun = False  # whether print_new has printed the prompt
        self.started = time.perf_counter()

    def add(self, token: int, logprob: float):
        """Take one more token; set `ended` where it ends the row."""
        data = b""
        if token == self.tokenizer.end_of_text:
            self.ended = "end of text"
        else:
            self.tokens.append(token)
            self.logprobs.append(logprob)
            data = self.tokenizer.token_bytes(token)
            self.ended = "length" if len(self.tokens) == self.max_tokens else ""
        self.text += self.decoder.decode(data, final=bool(self.ended))
        positions = [self.text.find(stop, self.shown) for stop in self.stops]
        positions = [position for position in positions if position >= 0]
        if positions:
            self.text, self.ended = self.text[: min(positions)], "stop"
        self.seconds = time.perf_counter() - self.started

    def new_text(self) -> str:
        """The text since the last call, without an end that could begin a stop text."""
        text = self.text[self.shown :]
        stops = [] if self.ended else self.stops
        starts = [stop[:size] for stop in stops for size in range(len(stop))]
        withheld = max((len(start) for start in starts if text.endswith(start)), default=0)
        self.shown += len(text) - withheld
        return text[: len(text) - withheld]

    def to_dict(self) -> dict:
        """The record for --json; tokens and mean_logprob include those of a stop text."""
        count = len(self.tokens)
        return {
            "text": self.text,
            "tokens": count,
            "mean_logprob": sum(self.logprobs) / count if count else None,
            "ended": self.ended,
            "tokens_per_second": round(count / self.seconds, 1),
        }


# Decoding: prefilling reads a prompt into the cache at once; each step then adds one token

PREFILL_TOKENS = 1 << 16  # of prompts, read at once
GPU_STEPS = 32  # between two copies of tokens from a GPU
INDUCTOR_OPTIONS = {
    "coordinate_descent_tuning": True,  # a product with one row becomes a sum, tuned by search
    "realize_opcount_threshold": 4,  # compute GELU before such a sum, not anew for each term
}


@torch.inference_mode()
def generate(model: GPT, prompts: list, noise: np.ndarray, vocab_size: int, settings: SampleConfig):
    """Yield what follows the prompts, some columns at a time: tokens and log-probabilities (B, n).

    noise: a random number in [0, 1) for each new token, (B, max_new_tokens). Of a longer prompt the
    model sees the last block_size tokens. A row that fills the context continues from the second
    half of it, prefilled anew. vocab_size: entries of the tokenizer; the model can have more.
    """
    batch = Batch(model, prompts, noise, vocab_size, settings)
    max_steps = GPU_STEPS if batch.tokens.is_cuda else 1
    column, last = batch.start, batch.tokens.size(1)
    while column < last:
        room = batch.context - batch.lengths.max()
        if not room:
            batch.shorten_full_rows()
            continue
        count = min(max_steps, room, last - column)
        for _ in range(count):
            batch.run_step()
        batch.lengths += count
        columns = slice(column, column + count)
        column += count
        yield batch.tokens[:, columns].tolist(), batch.logprobs[:, columns].tolist()


class Batch:
    """Rows that are decoded together: here prompts of 2, 4 and 3 tokens, and two steps, each a g.

        tokens (B, columns)     cache (B, S) after prefilling     and after two steps
        .  .  a  b  g  g        a  ?  ?  .  .                     a  b  g  .  .
        c  d  e  f  g  g        c  d  e  .  .                     c  d  e  f  g
        .  h  i  j  g  g        h  i  ?  .  .                     h  i  j  g  .

    Tokens are aligned at the right end of the prompts, so that a step computes one column. The
    cache is aligned at the left: the slot of a token is its position. Prefilling reads all but each
    prompt's last token, padded, and leaves garbage (?) behind a short prompt. A step writes the
    last column into each row's first free slot, attends up to that slot (a mask hides the rest) and
    computes the next column, so the newest token is never in the cache yet.
    """

    def __init__(self, model: GPT, prompts, noise, vocab_size: int, settings: SampleConfig):
        device, self.context = model.wte.weight.device, model.config.block_size
        self.model, self.vocab_size, self.settings = model, vocab_size, settings
        visible = [prompt[-self.context :] for prompt in prompts]  # by the model
        rows, new = noise.shape
        self.start = max(map(len, visible))  # the first column that is generated
        self.tokens = torch.zeros(rows, self.start + new, dtype=torch.long, device=device)
        self.noise = torch.zeros(self.tokens.shape, device=device)
        self.logprobs = torch.zeros_like(self.noise)
        self.is_in_text = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        self.column = torch.full((1,), self.start, device=device)  # that the next step computes
        slots = min(self.context, round_up(self.start + new, 128))  # few shapes to plan for
        self.cache = KVCache(model.config, rows, slots, model.wte.weight)
        # before the rows are filled: capturing runs a step, which writes into all of the above
        self.run_step = self.capture_step() if device.type == "cuda" else self.step
        self.noise[:, self.start :] = torch.from_numpy(noise)
        for row, (prompt, end) in enumerate(zip(prompts, visible)):
            self.tokens[row, self.start - len(end) : self.start] = torch.tensor(end)
            self.is_in_text[row, prompt[1:]] = True  # [0] is the end-of-text before a document
        self.lengths = np.zeros(rows, dtype=int)  # the cache's, without asking the device
        self.prefill(range(rows), visible)

    def prefill(self, rows: Iterable[int], prompts: list[list[int]]):
        """Read the prompts of rows into the cache, but their last tokens; equal prompts once."""
        rows_of = defaultdict(list)
        for row, prompt in zip(rows, prompts):
            rows_of[tuple(prompt[:-1])].append(row)
            self.lengths[row] = len(prompt) - 1
        self.cache.lengths.copy_(torch.from_numpy(self.lengths))
        unique = sorted(filter(None, rows_of), key=len, reverse=True)  # the longest first
        count = max(1, PREFILL_TOKENS // self.context)
        for chunk in (unique[first : first + count] for first in range(0, len(unique), count)):
            tokens = torch.zeros(len(chunk), len(chunk[0]), dtype=torch.long)
            for number, prompt in enumerate(chunk):
                tokens[number, : len(prompt)] = torch.tensor(prompt)
            pairs = [(row, n) for n, prompt in enumerate(chunk) for row in rows_of[prompt]]
            with self.cache.prefill(*torch.tensor(pairs, device=self.tokens.device).T):
                self.model.hidden(tokens.to(self.tokens.device), self.cache)  # fills the cache

    def step(self):
        """Compute the next column of tokens."""
        last = self.tokens.index_select(1, self.column - 1)  # (B, 1)
        uniform = self.noise.index_select(1, self.column)[:, 0]  # (B)
        tokens, logits = self.next_tokens(last, uniform)
        self.tokens.index_copy_(1, self.column, tokens)
        if self.settings.repetition_penalty != 1:
            self.is_in_text.scatter_(1, tokens, True)
        if self.settings.json:
            logprobs = logits.gather(1, tokens) - logits.logsumexp(1, keepdim=True)
            self.logprobs.index_copy_(1, self.column, logprobs)
        self.column += 1

    def next_tokens(self, tokens, uniform):
        """The tokens (B, 1) after tokens (B, 1), by random numbers (B), and the logits (B, V)."""
        logits = self.model.next_logits(tokens, self.cache)[:, : self.vocab_size]
        penalty, penalized = self.settings.repetition_penalty, logits
        if penalty != 1:
            penalized = penalize(logits, self.is_in_text, penalty)
        return choose(penalized, uniform, self.settings)[:, None], logits

    def capture_step(self) -> Callable:
        """The step as a CUDA graph: the GPU runs its kernels without waiting for Python."""
        if self.settings.compile:
            options = dict(dynamic=False, options=INDUCTOR_OPTIONS)
            self.next_tokens = torch.compile(self.next_tokens, **options)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()  # libraries initialise themselves in the first
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            self.step()
        self.column.fill_(self.start)
        self.is_in_text.zero_()
        return graph.replay

    def shorten_full_rows(self):
        """Prefill rows whose context is full with the second half of it."""
        rows, now = np.flatnonzero(self.lengths == self.context), int(self.column)
        half = self.context // 2 or 1
        self.prefill(rows, self.tokens[rows, now - half : now].tolist())


class KVCache:
    """The keys and values of a batch of rows, so that each new token is computed alone.

    It has a fixed number of slots (a GPU would choose a new kernel for each length), of which a
    mask hides those that are empty. Inside `prefill` a forward pass reads prompts; otherwise it
    adds one token to each row.
    """

    def __init__(self, config: GPTConfig, batch_size: int, slots: int, weight: torch.Tensor):
        shape = (batch_size, config.kv_heads, slots, config.head_width)  # (B, K, S, D)
        self.layers = [LayerCache(self, weight.new_zeros(2, *shape)) for _ in range(config.n_layer)]
        self.slots = torch.arange(slots, device=weight.device)
        self.rows = torch.arange(batch_size, device=weight.device)
        self.lengths = torch.zeros_like(self.rows)  # tokens in each row
        self.prefilling = None  # while prompts are read: (rows, prompt_of)
        self.positions = None  # of the tokens that are added, (B)
        self.mask = None  # added to their attention scores, 0 or -inf, (B, 1, 1, S)

    @contextlib.contextmanager
    def prefill(self, rows: torch.Tensor, prompt_of: torch.Tensor):
        """Inside, a forward pass reads prompts (P, T); rows[i] gets prompt prompt_of[i]."""
        self.prefilling, self.mask = (rows, prompt_of), None
        yield
        self.prefilling = None

    def advance(self, T: int) -> torch.Tensor:
        """The positions of the new tokens: (T) in prefilling, else (B, 1), with the mask set."""
        if self.prefilling:
            return self.slots[:T]
        self.positions = self.lengths.clone()
        is_empty = self.slots > self.positions[:, None, None, None]
        zeros = torch.zeros_like(is_empty, dtype=self.layers[0].k.dtype)
        self.mask = zeros.masked_fill_(is_empty, -torch.inf)
        self.lengths += 1
        return self.positions[:, None]


class LayerCache:
    """One layer's keys and values in a KVCache."""

    def __init__(self, cache: KVCache, zeros: torch.Tensor):
        self.cache = cache
        self.k, self.v = zeros  # (B, K, S, D) each

    @property
    def mask(self) -> torch.Tensor | None:
        return self.cache.mask

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep k and v (B, K, T, D) of the new tokens; return all to attend to."""
        cache = self.cache
        if cache.prefilling:
            rows, prompt_of = cache.prefilling
            self.k[rows, :, : k.size(2)] = k[prompt_of]
            self.v[rows, :, : v.size(2)] = v[prompt_of]
            return k, v
        self.k[cache.rows, :, cache.positions] = k[:, :, 0]
        self.v[cache.rows, :, cache.positions] = v[:, :, 0]
        return self.k, self.v


def prepare_to_decode(model: GPT, device: torch.device, dtype: torch.dtype):
    """Move the model, in eval mode. On a CPU, wide weights are stored transposed: one row is
    multiplied faster.
    """
    model.to(device, dtype).eval()
    for layer in model.modules() if device.type == "cpu" else []:
        if isinstance(layer, torch.nn.Linear) and layer.out_features > layer.in_features:
            layer.weight.data = layer.weight.data.T.contiguous().T


# Choosing a token


def penalize(logits: torch.Tensor, is_in_text: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (B, V), lower where is_in_text (B, V). Keskar et al. 2019 (CTRL), section 4.1."""
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(is_in_text, lower, logits)


def choose(logits: torch.Tensor, uniform: torch.Tensor, settings: SampleConfig) -> torch.Tensor:
    """Draw tokens (B) from logits (B, V) by random numbers in [0, 1), uniform (B).

    top_k: Fan et al. 2018. top_p: Holtzman et al. 2020. min_p: Nguyen et al. 2024. The token is the
    first whose cumulative probability exceeds the random number.
    """
    V = logits.size(-1)
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits, tokens = logits / settings.temperature, None
    if settings.top_k or settings.top_p < 1:  # sorted, the most likely first
        k = min(settings.top_k or V, V)
        logits, tokens = logits.topk(k, sorted=settings.top_p < 1)
    probabilities = F.softmax(logits, dim=-1)
    if settings.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # the sum of the more likely tokens
        probabilities = probabilities * (before < settings.top_p)
    if settings.min_p:
        threshold = settings.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities * (probabilities >= threshold)
    cumulative = probabilities.cumsum(-1)
    indices = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return (indices if tokens is None else tokens.gather(-1, indices))[:, 0]


if __name__ == "__main__":
    if sys.stdin:
        sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # whatever the console's encoding
    with config.exit_on_failure():
        try:
            main(config.load(SampleConfig, sys.argv[1:]))
        except (torch.OutOfMemoryError, MemoryError):
            hint = "a smaller --batch_size or --max_new_tokens needs less"
            raise Failure(f"memory is full; {hint}") from None
