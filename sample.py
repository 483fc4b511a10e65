"""Let a trained model continue prompts, or export it for other tools.

    python sample.py --prompt="def "                     from the newest run in out/
    python sample.py --interactive=True                  a prompt loop
    python sample.py --prompts=many.txt --json=True      many prompts at once, one JSON object each
    python sample.py --export_hf=hf                      a folder in Hugging Face's layout

The invariant: a row of a batch gets the same tokens as it would alone. Its random numbers follow
from (seed, number among the samples of its prompt), and padding never takes part in its attention.
(Up to rounding: in bfloat16 another batch size can change the last bit of a probability.)
"""

import codecs
import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, tee
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import checkpoint
import config
import hardware
import hf
from config import Failure, Progress
from model import GPT, GPTConfig, round_up
from tokenizer import Tokenizer
from tokenizer_files import save_hf_tokenizer

OWN_ENTRIES = {"sample", "text", "tokens", "mean_logprob", "ended"}  # of each object of --json


@dataclass
class SampleConfig:
    """Let a trained model continue prompts, or export it."""

    checkpoint: str = ""  # .pt file, run's folder, or model (gpt2, folder, OWNER/NAME); "" = newest
    out_dir: str = "out"  # folder of the runs
    prompt: str = ""  # text to continue; "" = the start of a document
    prompts: str = ""  # file of prompts: one per line, or .jsonl with "prompt" and optionally "id"
    interactive: bool = False  # prompt loop: continues all text so far; an empty line starts anew
    json: bool = False  # print each sample as a JSON object: text, why it ended, log-probability
    num_samples: int = 1  # continuations of each prompt
    max_new_tokens: int = 256  # longest continuation; an end-of-text can end it earlier
    batch_size: int = 32  # continuations decoded at once
    repetition_penalty: float = 1.0  # above 1 makes tokens already in the text less likely; 1 = off
    temperature: float = 0.8  # then: below 1 favours likely tokens; 0 = the most likely (greedy)
    top_k: int = 200  # then choose among the k most likely tokens; 0 = off
    top_p: float = 1.0  # then among the fewest whose probabilities sum to this; 1 = off
    min_p: float = 0.0  # then among those at least this share as likely as the first; 0 = off
    stop: str = ""  # texts that end a continuation and are not shown, separated by |; \n = newline
    seed: int = 1337  # the same seed gives the same text on the same machine
    device: str = "auto"  # cpu, cuda, mps, or auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32, bfloat16, float16; auto: the best that a GPU is fast in
    compile: bool = False  # on a GPU: fuse each step's kernels; slow to start, then faster
    export_hf: str = ""  # write model and tokenizer to this folder in Hugging Face's layout instead

    def check(self):
        """Raise ValueError where a value, or two together, make no sense."""
        config.check_bounds(self, 1, "num_samples max_new_tokens batch_size")
        config.check_bounds(self, 0, "temperature top_k min_p seed")
        config.check_bounds(self, 1e-9, "top_p repetition_penalty", below=1e9)
        if max(self.top_p, self.min_p) > 1:
            raise ValueError(f"top_p is {self.top_p}, min_p {self.min_p}: both must be at most 1")
        config.check_choices(self, device="auto cpu cuda mps")
        config.check_choices(self, dtype="auto float32 bfloat16 float16")
        names = ["prompt", "prompts", "interactive", "export_hf"]
        given = [name for name in names if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: name one of them")


def main(settings: SampleConfig):
    """Print samples, or export. All else goes to standard error. Raises Failure."""
    if settings.export_hf:
        export(settings)
        return
    device, prompts = hardware.find_device(settings.device), read_prompts(settings)
    model, tokenizer = checkpoint.open_model(settings.checkpoint, settings.out_dir)
    prepare_to_decode(model, device, settings.dtype)
    if settings.interactive:
        prompt_loop(model, tokenizer, settings)
    else:
        print_samples(model, tokenizer, prompts, settings)


def export(settings: SampleConfig):
    """Write the model and its tokenizer as transformers and others load them."""
    folder = Path(settings.export_hf)
    if folder.exists() and any(folder.iterdir()):
        raise Failure(f"export_hf: {folder} exists; name another folder, or empty it")
    hf.require_safetensors()  # before anything is written
    model, tokenizer = checkpoint.open_model(settings.checkpoint, settings.out_dir)
    save_hf_tokenizer(tokenizer, folder)
    dtype = torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    hf.save(model, folder, tokenizer.end_of_text, dtype)
    print(f"{folder}: AutoModelForCausalLM and AutoTokenizer load it", file=sys.stderr)


def read_prompts(settings: SampleConfig) -> list[dict]:
    """The prompts, each {"prompt": text} and whatever else its line of JSON has. Raises Failure."""
    if not settings.prompts:
        data = settings.prompt.encode("utf-8", "surrogateescape")  # as in the shell
        return [{"prompt": data.decode("utf-8", "replace")}]
    path, prompts = Path(settings.prompts), []
    is_json = path.suffix in (".jsonl", ".ndjson")
    lines = [(n, line) for n, line in enumerate(path.read_bytes().splitlines(), 1) if line.strip()]
    for number, line in lines:
        try:
            text = line.decode("utf-8-sig")
            prompt = {"id": number} | (json.loads(text) if is_json else {"prompt": text})
            prompt["prompt"].encode()  # fails for half a character, which JSON can name
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            form = '{"prompt": "text"}, other entries allowed' if is_json else "text in UTF-8"
            raise Failure(f"{path}:{number}: a line is {form}, not {line[:60]}") from None
        taken = OWN_ENTRIES & prompt.keys()
        if settings.json and taken:
            raise Failure(f"{path}:{number}: --json has its own {min(taken)!r}; rename this one")
        prompts.append(prompt)
    if not lines:
        raise Failure(f"{path} has no prompt")
    return prompts


def print_samples(model: GPT, tokenizer: Tokenizer, prompts: list[dict], settings: SampleConfig):
    """Print the continuations in order: one as it is generated, while the later ones wait."""
    records = [prompt | {"sample": n} for prompt in prompts for n in range(settings.num_samples)]
    with Progress("samples", len(records)) as progress:
        for first in range(0, len(records), settings.batch_size):
            batch = records[first : first + settings.batch_size]
            for number, row in enumerate(complete(model, tokenizer, batch, settings), first):
                if number and not settings.json:
                    print("-" * 20)
                print_sample(row, settings.json)
                if not sys.stdout.isatty():
                    progress.update(number + 1)


def print_sample(completion: "Completion", as_json: bool):
    """Print a prompt and its continuation as it is generated; as JSON, when it has ended."""
    print("" if as_json else completion.record["prompt"], end="")
    for text in completion.stream():
        print("" if as_json else text, end="", flush=True)
    print(json.dumps(completion.to_dict(), ensure_ascii=False) if as_json else "", flush=True)


def prompt_loop(model: GPT, tokenizer: Tokenizer, settings: SampleConfig):
    """Ask for a line, continue all text so far, and so on. Ctrl-C stops an answer, Ctrl-D ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  makes lines editable, with a history
    print("an empty line starts anew, Ctrl-C stops an answer, Ctrl-D ends", file=sys.stderr)
    text = ""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("> ")
            text = f"{text}\n{line}" if text and line else line
            if line:
                [row] = complete(model, tokenizer, [{"prompt": text, "sample": 0}], settings)
                with contextlib.suppress(KeyboardInterrupt):
                    for new_text in row.stream():
                        print(new_text, end="", flush=True)
                print()
                text += row.text
    print()


def complete(model: GPT, tokenizer: Tokenizer, records: list[dict], settings: SampleConfig) -> list:
    """The Completions of records, {"prompt": text, "sample": number}, to be decoded together."""
    prompts = [tokenizer.encode_document(record["prompt"]).tolist() for record in records]
    longest, new, context = max(map(len, prompts)), settings.max_new_tokens, model.config.block_size
    if longest + new > context + 1 and not settings.interactive:
        excess = f"{longest} tokens of a prompt and up to {new} new ones exceed its context"
        print(f"the model sees the last {context // 2} to {context}: {excess}", file=sys.stderr)
    generators = [np.random.default_rng([settings.seed, record["sample"]]) for record in records]
    noise = np.stack([generator.random(new, dtype=np.float32) for generator in generators])
    columns = generate(model, prompts, noise, tokenizer.vocab_size, settings)
    copies = tee(columns, len(prompts))  # each row reads on its own, what is generated once
    return [Completion(tokenizer, settings, records[n], n, copy) for n, copy in enumerate(copies)]


class Completion:
    """The text generated in one row, up to an end-of-text, a stop text or the longest length.

    columns: what `generate` yields for all rows; `row` is the one to take.
    """

    def __init__(self, tokenizer: Tokenizer, settings: SampleConfig, record, row: int, columns):
        self.tokenizer, self.max_tokens = tokenizer, settings.max_new_tokens
        self.record, self.row, self.columns = record, row, columns
        self.stops = [stop.replace("\\n", "\n") for stop in settings.stop.split("|") if stop]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # for whole characters
        self.text, self.logprobs = "", []  # logprobs: one for each of the text's tokens
        self.shown = 0  # characters that new_text has returned
        self.ended = ""  # why: "end of text", "stop" or "length"

    def stream(self) -> Iterator[str]:
        """Yield the text as it is generated, up to the end."""
        while not self.ended:
            tokens, logprobs = next(self.columns)
            for pair in zip(tokens[self.row], logprobs[self.row]):
                if not self.ended:
                    self.add(*pair)
            yield self.new_text()

    def add(self, token: int, logprob: float):
        """Take one more token; set `ended` where it ends the row."""
        if token == self.tokenizer.end_of_text:
            self.ended = "end of text"
        else:
            self.logprobs.append(logprob)
            self.ended = "length" if len(self.logprobs) == self.max_tokens else ""
        data = self.tokenizer.token_bytes(token)
        self.text += self.decoder.decode(data, final=bool(self.ended))
        before = [self.text.partition(stop)[0] for stop in self.stops]
        shortest = min([*before, self.text], key=len)
        if shortest != self.text:
            self.text, self.ended = shortest, "stop"

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
        count = len(self.logprobs)
        mean = sum(self.logprobs) / count if count else None
        return self.record | dict(text=self.text, tokens=count, mean_logprob=mean, ended=self.ended)


PREFILL_TOKENS = 1 << 16  # of prompts, read at once
GPU_STEPS = 32  # between two copies of tokens from a GPU
# The first tunes kernels by search. The second computes GELU once, not again for each of the sums
# that read it, into which the products of a single row are turned.
INDUCTOR = {"coordinate_descent_tuning": True, "realize_opcount_threshold": 4}


@torch.inference_mode()
def generate(model: GPT, prompts: list, noise: np.ndarray, vocab_size: int, settings: SampleConfig):
    """Yield what follows the prompts, some columns at a time: tokens and log-probabilities (B, n).

    noise: a random number in [0, 1) for each new token, (B, max_new_tokens). vocab_size: entries of
    the tokenizer; the model can have more.
    """
    batch = Batch(model, prompts, noise, vocab_size, settings)
    column, last = 0, noise.shape[1]
    while column < last:
        count = min(GPU_STEPS if batch.tokens.is_cuda else 1, batch.make_room(), last - column)
        for _ in range(count):
            batch.run_step()
        columns = slice(column, column + count)
        tokens, logprobs = batch.tokens[:, columns].tolist(), batch.logprobs[:, columns].tolist()
        for visible, new in zip(batch.visible, tokens):
            visible += new
        column += count
        yield tokens, logprobs


class Batch:
    """Rows that are decoded together: here prompts of 2, 4 and 3 tokens, and two steps, each a g.

        prompts           cache (B, S) after prefilling     and after two steps
        a  b              a  ?  ?  .  .                     a  b  g  .  .
        c  d  e  f        c  d  e  .  .                     c  d  e  f  g
        h  i  j           h  i  ?  .  .                     h  i  j  g  .

    The slot of a token is its position. Prefilling reads all but each prompt's last token, padded,
    and leaves garbage (?) behind a short prompt. A step writes each row's newest token into the
    first free slot, attends up to that slot (a mask hides the rest) and computes the next token, so
    the newest is never in the cache yet.
    """

    def __init__(self, model: GPT, prompts, noise, vocab_size: int, settings: SampleConfig):
        device, self.context = model.wte.weight.device, model.config.block_size
        self.model, self.vocab_size, self.settings = model, vocab_size, settings
        self.visible = [prompt[-self.context :] for prompt in prompts]  # grows with each step
        self.noise = torch.from_numpy(noise).to(device)  # (B, new tokens), as the next two
        self.logprobs = torch.zeros_like(self.noise)
        self.tokens = torch.zeros_like(self.noise, dtype=torch.long)
        self.newest = torch.zeros_like(self.tokens[:, :1])  # each row's, not in the cache
        self.column = torch.zeros_like(self.tokens[0, :1])  # the column that the next step computes
        B, new = noise.shape
        self.is_in_text = torch.zeros(B, vocab_size, dtype=torch.bool, device=device)
        slots = round_up(max(map(len, self.visible)) + new, 128)  # few shapes to plan for
        self.cache = KVCache(model.config, B, min(self.context, slots), model.wte.weight)
        # before the rows are filled: capturing runs a step, which writes into all of the above
        self.run_step = self.capture_step() if device.type == "cuda" else self.step
        for row, prompt in enumerate(prompts):
            self.is_in_text[row, prompt[1:]] = True  # [0] is the end-of-text before a document
        self.prefill(range(B))

    def prefill(self, rows: Iterable[int]):
        """Fill the cache with all but the newest token of rows; equal rows are computed once."""
        rows_of = defaultdict(list)
        for row in rows:
            rows_of[tuple(self.visible[row][:-1])].append(row)
        unique = iter(sorted(filter(None, rows_of), key=len, reverse=True))  # the longest first
        while chunk := list(islice(unique, max(1, PREFILL_TOKENS // self.context))):
            tokens = pad_sequence([torch.tensor(prompt) for prompt in chunk], batch_first=True)
            pairs = [(row, n) for n, prompt in enumerate(chunk) for row in rows_of[prompt]]
            self.cache.prefilling = torch.tensor(pairs, device=self.tokens.device).T
            self.model.hidden(tokens.to(self.tokens.device), self.cache)  # fills the cache
        self.cache.prefilling = None
        self.newest.copy_(torch.tensor([[row[-1]] for row in self.visible]))
        self.cache.positions.copy_(torch.tensor([len(row) - 2 for row in self.visible]))

    def make_room(self) -> int:
        """Cut rows that fill the context to its second half; return for how many steps all fit."""
        full = [row for row, visible in enumerate(self.visible) if len(visible) > self.context]
        for row in full:
            self.visible[row] = self.visible[row][-(self.context // 2 or 1) :]
        if full:
            self.prefill(full)
        return self.context + 1 - max(map(len, self.visible))

    def step(self):
        """Compute the next column of tokens."""
        uniform = self.noise.index_select(1, self.column)[:, 0]  # (B)
        tokens, logits = self.next_tokens(self.newest, uniform)
        self.newest.copy_(tokens)
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
        penalty = self.settings.repetition_penalty
        penalized = penalize(logits, self.is_in_text, penalty) if penalty != 1 else logits
        return choose(penalized, uniform, self.settings)[:, None], logits

    def capture_step(self) -> Callable:
        """The step as a CUDA graph: the GPU runs its kernels without waiting for Python."""
        if self.settings.compile:
            self.next_tokens = torch.compile(self.next_tokens, dynamic=False, options=INDUCTOR)
        graph = torch.cuda.CUDAGraph()
        self.step()  # libraries initialise themselves in the first
        with torch.cuda.graph(graph):
            self.step()
        self.column.zero_()
        self.is_in_text.zero_()
        return graph.replay


class KVCache:
    """The keys and values of a batch of rows, so that each new token is computed alone.

    It has a fixed number of slots (a GPU would choose a new kernel for each length); a mask hides
    the empty ones. A forward pass adds a token to each row or, with `prefilling`, reads prompts.
    """

    def __init__(self, config: GPTConfig, batch_size: int, slots: int, weight: torch.Tensor):
        shape = (batch_size, config.kv_heads, slots, config.head_width)  # (B, K, S, D)
        self.layers = [LayerCache(self, weight.new_zeros(2, *shape)) for _ in range(config.n_layer)]
        self.slots = torch.arange(slots, device=weight.device)
        self.rows = torch.arange(batch_size, device=weight.device)
        self.positions = torch.full_like(self.rows, -1)  # of each row's last token; -1 = none
        self.mask = None  # added to the attention scores, 0 or -inf, (B, 1, 1, S)
        self.prefilling = None  # rows, and for each the index of its prompt, (2, rows)

    def advance(self, T: int) -> torch.Tensor:
        """The positions of the new tokens: (T) in prefilling, else (B, 1), with the mask set."""
        if self.prefilling is not None:
            return self.slots[:T]
        self.positions += 1
        is_empty = self.slots > self.positions[:, None, None, None]
        self.mask = self.layers[0].k.new_zeros(is_empty.shape).masked_fill_(is_empty, -torch.inf)
        return self.positions[:, None]


class LayerCache:
    """One layer's keys and values in a KVCache."""

    def __init__(self, cache: KVCache, zeros: torch.Tensor):
        self.cache = cache
        self.k, self.v = zeros  # (B, K, S, D) each

    def append(self, k: torch.Tensor, v: torch.Tensor):
        """Keep k and v (B, K, T, D) of the new tokens; return all to attend to, and the mask."""
        if self.cache.prefilling is not None:
            rows, prompt_of = self.cache.prefilling
            self.k[rows, :, : k.size(2)] = k[prompt_of]
            self.v[rows, :, : v.size(2)] = v[prompt_of]
            return k, v, None
        self.k[self.cache.rows, :, self.cache.positions] = k[:, :, 0]
        self.v[self.cache.rows, :, self.cache.positions] = v[:, :, 0]
        return self.k, self.v, self.cache.mask


def prepare_to_decode(model: GPT, device: torch.device, dtype: str):
    """Move the model, in eval mode. On a CPU, wide weights are stored transposed: faster."""
    name = hardware.best_dtype(device) if dtype == "auto" else dtype
    model.to(device, getattr(torch, name)).eval()
    for layer in model.modules() if device.type == "cpu" else []:
        if isinstance(layer, torch.nn.Linear) and layer.out_features > layer.in_features:
            layer.weight.data = layer.weight.data.T.contiguous().T


def penalize(logits: torch.Tensor, is_in_text: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (B, V), lower where is_in_text (B, V). Keskar et al. 2019 (CTRL), section 4.1."""
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(is_in_text, lower, logits)


def choose(logits: torch.Tensor, uniform: torch.Tensor, settings: SampleConfig) -> torch.Tensor:
    """Draw tokens (B) from logits (B, V) by random numbers in [0, 1), uniform (B).

    top_k: Fan et al. 2018. top_p: Holtzman et al. 2020. min_p: Nguyen et al. 2024. The token is the
    first whose cumulative probability exceeds the random number.
    """
    if settings.temperature < 1e-6:  # in float32 logits divided by less can overflow
        return logits.argmax(dim=-1)
    logits, tokens = logits / settings.temperature, None
    if settings.top_k or settings.top_p < 1:  # sorted, the most likely first
        V = logits.size(-1)
        logits, tokens = logits.topk(min(settings.top_k or V, V))
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
    config.run(main, SampleConfig, "lower --batch_size or --max_new_tokens")
