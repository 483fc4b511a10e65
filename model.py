"""GPT-2, whole: tokens in, the loss or the logits out.

Read from the top: the configuration, the two halves of a block, the block, the model, and last the door to the
Hugging Face layout. Names are GPT-2's own. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

Shapes: B batch, T tokens now, S tokens attended, C n_embd, H heads, D head size (C / H), V vocabulary.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M's."""

    vocab_size: int = 50257  # tokens a model can name
    block_size: int = 1024  # the longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # share of activations zeroed in training
    bias: bool = True  # in linear layers and layer norms, as in GPT-2

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: a multiple of 64, which matrix units multiply much faster than 50257."""
        return math.ceil(self.vocab_size / 64) * 64


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and the tokens before it. Vaswani et al. 2017, section 3.2."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key and value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for y in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        mask = None if cache is None else cache.mask  # None: each token sees itself and what comes before it
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """The feed-forward half: four times wider, GELU in its tanh form, and back. Hendrycks & Gimpel 2016."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Attention, then the MLP, each added to the stream that it reads through a layer norm."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The whole model: embeddings, n_layer blocks, a last layer norm, and the head, which has the weights of wte."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: keep each block's input only and compute the rest again
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)  # token embeddings
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # position embeddings
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # tied: Press & Wolf 2017
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation; the projections that end in the stream get 1 / sqrt(their number) of it."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif ".ln_" in f".{name}":
                nn.init.ones_(parameter)
            else:
                raise ValueError(f"{name} has no initialiser")

    def forward(self, tokens, targets=None, cache=None, reduction="mean"):
        """Score each next token.

        tokens: (B, T) integers. targets: (B, T) integers, the tokens that follow, -1 where nothing is asked; then the
        result is their mean cross-entropy in nats and nothing else: the logits are then the compiler's to keep or not.
        With reduction="none" it is that of each target, (B, T). Without targets it is the logits (B, T, V) in fp32.
        cache: what sample.py's KVCache does. `advance(T)` gives the positions (T) or (B, T) of the new tokens; each of
        its `layers` has `append(k, v)` for the keys and values (B, H, S, D) to attend to, and in `mask` (B, 1, T, S)
        which of them, None for all up to the token itself. The logits are then the last token's alone, (B, 1, V).
        """
        T = tokens.size(1)
        if cache is None and T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than the block_size of {self.config.block_size}")
        positions = torch.arange(T, device=tokens.device) if cache is None else cache.advance(T)
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T, C)
        for layer, block in enumerate(self.h):
            if self.activation_checkpointing and self.training:  # Chen et al. 2016
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, None if cache is None else cache.layers[layer])
        if cache is not None:
            x = x[:, -1:]
        logits = self.lm_head(self.ln_f(x))[..., : self.config.vocab_size].float()  # (B, T, V), the padding cut off
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)
        return loss if reduction == "mean" else loss.view_as(targets)

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token: 6 N + 12 L C T, Chowdhery et al. 2022 (PaLM), appendix B.

        N leaves out the position embeddings, which are only looked up. Activation checkpointing's second forward is
        not counted: it is the price, not the work.
        """
        parameters = sum(p.numel() for p in self.parameters()) - self.wpe.weight.numel()
        return 6 * parameters + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size


class WithoutInit(TorchFunctionMode):
    """Within this, torch.nn.init draws no random numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def empty_model(config: GPTConfig) -> GPT:
    """A model whose weights are yet to be filled in; drawing random ones first would take seconds."""
    with WithoutInit():
        return GPT(config)


# ---- Hugging Face: a folder with config.json and safetensors in the layout of transformers' GPT2LMHeadModel.
# It stores the four linear layers of a block as (in, out), where ours are (out, in); it always has biases, never the
# padding of the vocabulary, and the tied head once.

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
ARCHITECTURE = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
MOST_JSON_BYTES = 64 * 2**20


@torch.no_grad()
def load_hf(folder: Path, dropout: float = 0.0) -> GPT:
    """The model in a Hugging Face folder, in fp32 whatever the file has, read a tensor at a time.

    Raises OSError or ValueError where it isn't whole, or isn't a GPT-2.
    """
    safetensors = import_safetensors()
    model = empty_model(read_config(folder, dropout))
    model.wte.weight[model.config.vocab_size :] = 0  # the padding
    missing = in_hf_layout(model)
    for path in weight_files(folder):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in file.keys():
                    place = missing.pop(name.removeprefix("transformer."), None)
                    if place is not None:  # older files also hold the mask (attn.bias), and some the tied head
                        fill(place, file.get_tensor(name), name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path.name} is damaged: {error}") from None
    if missing:
        raise ValueError(f"the files of weights lack {next(iter(missing))}, and {len(missing) - 1} more of the model's")
    return model


def fill(place: torch.Tensor, tensor: torch.Tensor, name: str):
    """Copy a tensor of a file into a weight. Raises ValueError where it doesn't fit."""
    if tensor.shape != place.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, and config.json wants {tuple(place.shape)}")
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} is of type {tensor.dtype}, and only float32, bfloat16 and float16 are known here")
    place.copy_(tensor)


def in_hf_layout(model: GPT) -> dict[str, torch.Tensor]:
    """The model's weights under their names in a file and in the shapes they have there: views, to read or to fill."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    weights["wte.weight"] = weights["wte.weight"][: model.config.vocab_size]  # the rest is padding
    return {name: weight.T if name.endswith(TRANSPOSED) else weight for name, weight in weights.items()}


def read_config(folder: Path, dropout: float) -> GPTConfig:
    """The shape in a folder's config.json. Raises ValueError where it is of another architecture."""
    facts = read_json(folder / "config.json")
    for name, value in ARCHITECTURE.items():
        if facts.get(name, value) != value:
            raise ValueError(f"{name} is {facts[name]!r}, and only GPT-2's {value!r} is known here")
    facts["block_size"] = facts.get("n_positions")
    shape = {name: facts.get(name) for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")}
    if not all(isinstance(value, int) and value > 0 for value in shape.values()):
        raise ValueError(f"config.json gives no whole shape: {shape}")
    return GPTConfig(**shape, dropout=dropout)


def weight_files(folder: Path) -> list[Path]:
    """The folder's file of weights, or the several that its index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole]
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {name!r}, which is no file of weights beside it")
    return [folder / name for name in sorted(set(names))]


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises OSError, or ValueError where it is something else."""
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes; more than {MOST_JSON_BYTES:,} are not read")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return facts


@torch.no_grad()
def save_hf(model: GPT, folder: Path, end_of_text: int, dtype: torch.dtype = torch.float32):
    """Write `model` as a Hugging Face folder, each file whole or not at all.

    end_of_text: the tokenizer's, with which texts begin and end. dtype: of the weights, torch.float32 or bfloat16.
    """
    safetensors, config = import_safetensors(), model.config
    state = in_hf_layout(model)
    if not config.bias:
        biased = [name.removesuffix(".weight") for name in state if name not in ("wte.weight", "wpe.weight")]
        outputs = {name: state[f"{name}.weight"].size(-1) for name in biased}  # the last dimension there
        state |= {f"{name}.bias": torch.zeros(size) for name, size in outputs.items()}
    state = {f"transformer.{name}": weight.to("cpu", dtype).contiguous() for name, weight in state.items()}
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    facts = ARCHITECTURE | {"architectures": ["GPT2LMHeadModel"], "n_layer": config.n_layer, "n_head": config.n_head}
    facts |= {"n_embd": config.n_embd, "n_positions": config.block_size, "vocab_size": config.vocab_size}
    facts |= ends | {"torch_dtype": str(dtype).removeprefix("torch.")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", facts), ("generation_config.json", ends)):
        text = json.dumps(content, indent=2) + "\n"
        replace_file(folder / name, lambda partial: partial.write_text(text, encoding="utf-8"))  # noqa: B023
    save = safetensors.torch.save_file
    replace_file(folder / "model.safetensors", lambda partial: save(state, partial, metadata={"format": "pt"}))


def replace_file(path: Path, write):
    """Have write(partial) make a file, which then takes the place of `path`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("Hugging Face folders need the package safetensors: pip install safetensors") from None
    return safetensors
