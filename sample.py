"""Let a trained model speak.

    python sample.py                                   continue nothing, from the newest run in out/
    python sample.py --prompt="def " --temperature=0   the likeliest continuation
    python sample.py --checkpoint=out/small/best.pt --num_samples=3

Read from the bottom up: `main`, then `generate`, which asks the model for one token at a time, `choose`, which picks
it, and the cache that keeps the model from reading everything anew.
"""

import codecs
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import config
from config import NO_CHECKPOINT, Failure


@dataclass
class SampleConfig:
    """Let a trained model continue a prompt."""

    checkpoint: str = ""  # a .pt file or a run's folder; "" = the newest run in out_dir
    out_dir: str = "out"  # the folder that runs stand in
    prompt: str = ""  # the text to continue; "" = the start of a document
    num_samples: int = 1  # continuations, one after the other
    max_new_tokens: int = 256  # tokens a continuation has at most; it may end earlier, at an end-of-text
    temperature: float = 0.8  # below 1 the likely becomes likelier; 0 = always the likeliest, greedy
    top_k: int = 200  # choose among the k likeliest tokens only; 0 = off
    top_p: float = 1.0  # then among the fewest whose probabilities reach this share; 1 = off
    seed: int = 1337  # the same seed gives the same text on the same machine
    device: str = "auto"  # cpu, cuda, mps, or auto: cuda, else mps, else cpu

    def check(self):
        """Raise ValueError where a value makes no sense."""
        for name, low in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
            if not low <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} is {getattr(self, name)} and must be at least {low} (and below 2^63)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p} and must be above 0 and at most 1")
        if self.device not in ("auto", "cpu", "cuda", "mps"):
            raise ValueError(f"device is {self.device!r} and must be one of auto, cpu, cuda, mps")


if __name__ == "__main__":  # the settings come first: a mistake in them shows before torch's seconds of loading
    settings = config.load(SampleConfig, sys.argv[1:])

import torch
import torch.nn.functional as F

import checkpoint
import prepare_data
from model import GPT, GPTConfig


class KVCache:
    """The keys and values of the tokens so far, so that each new token is computed alone.

    Its shape is fixed, `length` places of which a mask hides those still empty: a GPU's attention would plan anew for
    each new length. `advance` comes before each forward, `append` once in each layer.
    """

    def __init__(self, config: GPTConfig, batch_size: int, length: int, device: torch.device):
        shape = (config.n_layer, batch_size, config.n_head, length, config.n_embd // config.n_head)
        self.k, self.v = torch.zeros(shape, device=device), torch.zeros(shape, device=device)  # (layer, B, H, S, D)
        self.places = torch.arange(length, device=device)
        self.held = 0

    def advance(self, new: int) -> torch.Tensor:
        """Make room for `new` tokens and return their positions (T)."""
        self.positions = self.places[self.held : self.held + new]
        self.mask = self.places <= self.positions[:, None]  # (T, S): each sees what came before it, and itself
        self.held += new
        return self.positions

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep k and v (B, H, T, D) of the new tokens; return those of all places (B, H, S, D)."""
        self.k[layer][:, :, self.positions] = k
        self.v[layer][:, :, self.positions] = v
        return self.k[layer], self.v[layer]


def choose(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Pick the next token from its logits (V): temperature, then top-k, then top-p.

    top_k: Fan et al. 2018. top_p: Holtzman et al. 2020, the fewest tokens whose probabilities reach it together.
    """
    if temperature == 0:
        return int(logits.argmax())
    logits, tokens = (logits / temperature).sort(descending=True, stable=True)
    probabilities = F.softmax(logits[: top_k or None], dim=-1)
    before = probabilities.cumsum(0) - probabilities  # what the likelier tokens reach together
    probabilities = probabilities[before < top_p]
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


@torch.inference_mode()
def generate(model: GPT, tokens: list[int], max_new_tokens: int, pick, end_of_text: int) -> Iterator[int]:
    """Yield up to max_new_tokens that follow `tokens`, and stop before an end-of-text.

    pick: takes the logits (V) of the next token and returns it. Where the context is full, the model goes on from the
    second half of it, read anew; of longer `tokens` it sees the last block_size.
    """
    device, context = model.wte.weight.device, model.config.block_size
    tokens, cache = tokens[-context:], None
    for _ in range(max_new_tokens):
        if cache is None or cache.held == context:
            if cache:
                tokens = tokens[-(context // 2 or 1) :]
            cache = KVCache(model.config, 1, min(context, len(tokens) + max_new_tokens), device)
            new = tokens
        logits = model(torch.tensor([new], device=device), cache=cache)  # (1, 1, V)
        token = pick(logits[0, -1])
        if token == end_of_text:
            return
        yield token
        tokens, new = [*tokens, token], [token]


def newest_checkpoint(settings: SampleConfig) -> Path:
    """The checkpoint that the settings name: a file, a run's folder, or neither for the newest run."""
    path = Path(settings.checkpoint or settings.out_dir)
    if path.is_file() or path.suffix == ".pt":
        return path
    folders = [path] if settings.checkpoint else path.glob("*/")
    pairs = ([folder / "latest.pt", folder / "best.pt"] for folder in folders)  # a young run has a best.pt only
    found = [next(file for file in pair if file.exists()) for pair in pairs if any(file.exists() for file in pair)]
    if not found:
        hint = "train one: python train.py config/small.py"
        raise Failure(f"{path}: there is no checkpoint in it; {hint}", NO_CHECKPOINT)
    return max(found, key=lambda file: file.stat().st_mtime)


def load_model(path: Path, device: torch.device):
    """Return the model of a checkpoint, its tokenizer, and the whole checkpoint."""
    state = checkpoint.load(path)
    model = GPT(GPTConfig(**state["model_config"]))
    model.load_state_dict(state["model"])
    tokenizer = prepare_data.read_tokenizer(state["tokenizer"]["text"], state["tokenizer"]["name"])
    return model.to(device).eval(), tokenizer, state


def main(settings: SampleConfig):
    """Stream the continuations to standard output; what is not the model's goes to standard error."""
    device = config.find_device(settings.device)
    path = newest_checkpoint(settings)
    model, tokenizer, state = load_model(path, device)
    print(f"{path}: step {state['step']}, validation loss {state['val_loss']:.4f}", file=sys.stderr)  # inf: none yet
    tokens = [tokenizer.eot_token, *tokenizer.encode_ordinary(settings.prompt)]
    context = model.config.block_size
    if len(tokens) > context:
        print(f"of the prompt's {len(tokens)} tokens the model sees the last {context}", file=sys.stderr)
    elif len(tokens) + settings.max_new_tokens > context + 1:
        print(f"past {context} tokens the model goes on from the last {context // 2}", file=sys.stderr)
    for sample in range(settings.num_samples):
        generator = torch.Generator(device).manual_seed(settings.seed + sample)

        def pick(logits):
            return choose(logits, settings.temperature, settings.top_k, settings.top_p, generator)  # noqa: B023

        print(settings.prompt, end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # half a character waits for its other half
        for token in generate(model, tokens, settings.max_new_tokens, pick, tokenizer.eot_token):
            print(decoder.decode(tokenizer.decode_single_token_bytes(token)), end="", flush=True)
        print(decoder.decode(b"", final=True))
        if sample < settings.num_samples - 1:
            print("-" * 20)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # a model may say what a Windows console's own encoding lacks
    with config.exit_codes():
        main(settings)
