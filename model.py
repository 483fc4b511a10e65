"""GPT-2 and Qwen3, whole: tokens in, the loss or the logits out.

Read from the top: the configuration, attention and MLP of GPT-2 and then of Qwen3, the block, the model, and last the
door to the Hugging Face layout. Names are GPT-2's own, where it has the part. Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners"; Yang et al. 2025, "Qwen3 Technical Report", of which this is the dense model.

Shapes: B batch, T tokens now, S tokens attended, C n_embd, H heads, K heads of keys and values, D head size,
V vocabulary. Layers take and return x (B, T, C) unless they say otherwise.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M's. The fields after bias are for qwen3 alone."""

    arch: str = "gpt2"  # or qwen3
    vocab_size: int = 50257  # tokens a model can name
    block_size: int = 1024  # the longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # share of activations zeroed in training
    bias: bool = True  # in gpt2's linear layers and layer norms
    n_kv_head: int = 0  # heads of keys and values, each for n_head / n_kv_head queries; 0 = n_head
    head_size: int = 0  # 0 = n_embd / n_head
    intermediate_size: int = 0  # width of the MLP; 0 = 8/3 n_embd, up to a multiple of 64: as many weights as in gpt2
    rope_theta: float = 10000.0  # pair i of a head turns by rope_theta ** (-2 i / head_size) a token
    tie_embeddings: bool = True  # the head has the weights of wte, as in gpt2

    def __post_init__(self):
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch is {self.arch!r} and must be one of {', '.join(ARCHITECTURES)}")
        if self.n_embd % self.n_head and not self.head_size:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        wide = 4 * self.n_embd if self.arch == "gpt2" else math.ceil(self.n_embd * 8 / 3 / 64) * 64
        self.intermediate_size = self.intermediate_size or wide
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        chosen = (self.n_kv_head, self.head_size * self.n_head, self.intermediate_size, self.tie_embeddings)
        if self.arch == "gpt2" and chosen != (self.n_head, self.n_embd, 4 * self.n_embd, True):
            raise ValueError("n_kv_head, head_size, intermediate_size and tie_embeddings can be chosen for qwen3 only")
        if self.head_size % 2 and self.arch == "qwen3":
            raise ValueError(f"head_size {self.head_size} is odd, and rotary positions turn pairs")
        if not 1 <= self.rope_theta < math.inf:
            raise ValueError(f"rope_theta is {self.rope_theta} and must be at least 1")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: a multiple of 64, which matrix units multiply much faster than 50257."""
        return math.ceil(self.vocab_size / 64) * 64


def attend(q, k, v, dropout, cache=None):
    """Each token gathers from itself and those before it: q (B, T, H, D), k and v (B, T, K, D) to (B, T, H * D).

    cache: that of one layer, as GPT.forward says. Vaswani et al. 2017, section 3.2.
    """
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, D), and (B, K, T, D) twice
    if cache is not None:
        k, v = cache.append(k, v)  # (B, K, S, D)
    mask = None if cache is None else cache.mask  # None: each token sees itself and what comes before it, and T = S
    is_grouped = k.size(1) != q.size(1)
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, enable_gqa=is_grouped)
    return y.transpose(1, 2).flatten(2)  # the heads side by side again


# ---- GPT-2's halves of a block


class CausalSelfAttention(nn.Module):
    """Multi-head attention; the positions are in x already."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key and value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotation=None, cache=None):  # rotation: only GroupedQueryAttention has one
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head) for y in self.c_attn(x).split(C, dim=2))
        y = attend(q, k, v, self.dropout if self.training else 0.0, cache)
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


# ---- Qwen3's


class RMSNorm(nn.Module):
    """Divides by the root of the mean square, in fp32. Zhang & Sennrich 2019."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-6).type_as(x)


def rotation_tables(config: GPTConfig):
    """Cosines and sines of the angle by which each position turns each pair of a head, both (block_size, 1, D).

    The sine is negative for the first of a pair.
    """
    positions, even = torch.arange(config.block_size)[:, None, None], torch.arange(0, config.head_size, 2)
    angles = positions * config.rope_theta ** (-even / config.head_size)
    return torch.cat((angles.cos(), angles.cos()), dim=-1), torch.cat((-angles.sin(), angles.sin()), dim=-1)


def rotate(x, rotation):
    """Turn the pairs (i, i + D / 2) of x (B, T, H, D): a query times a key then depends on how far apart they are.

    Su et al. 2021.
    """
    cos, sin = rotation
    return (x * cos + x.roll(x.size(-1) // 2, -1) * sin).type_as(x)  # (a, b) to (a cos - b sin, b cos + a sin)


class GroupedQueryAttention(nn.Module):
    """Groups of queries share a key and a value (Ainslie et al. 2023); queries and keys are normalised and rotated."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_size, self.dropout = config.head_size, config.dropout
        queries, keys = config.n_head * config.head_size, config.n_kv_head * config.head_size
        # not one layer as in gpt2: to join the gradients for it would take a GPU longer than two more products do
        self.c_q = nn.Linear(config.n_embd, queries, bias=False)
        self.c_k = nn.Linear(config.n_embd, keys, bias=False)
        self.c_v = nn.Linear(config.n_embd, keys, bias=False)
        self.q_norm, self.k_norm = RMSNorm(config.head_size), RMSNorm(config.head_size)  # Dehghani et al. 2023
        self.c_proj = nn.Linear(queries, config.n_embd, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotation, cache=None):
        q, k, v = (layer(x).unflatten(2, (-1, self.head_size)) for layer in (self.c_q, self.c_k, self.c_v))
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        y = attend(q, k, v, self.dropout if self.training else 0.0, cache)
        return self.resid_dropout(self.c_proj(y))


class SwiGLU(nn.Module):
    """The feed-forward half: one wide layer opens and shuts the gates of another. Shazeer 2020."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.intermediate_size, bias=False)  # Qwen3's gate_proj
        self.c_fc = nn.Linear(config.n_embd, config.intermediate_size, bias=False)  # its up_proj
        self.c_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x)))


# ---- the model

ARCHITECTURES = {"gpt2": (CausalSelfAttention, MLP), "qwen3": (GroupedQueryAttention, SwiGLU)}


def make_norm(config: GPTConfig) -> nn.Module:
    return nn.LayerNorm(config.n_embd, bias=config.bias) if config.arch == "gpt2" else RMSNorm(config.n_embd)


class Block(nn.Module):
    """Attention, then the MLP, each added to the stream that it reads through a norm."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        attention, mlp = ARCHITECTURES[config.arch]
        self.ln_1 = make_norm(config)
        self.attn = attention(config)
        self.ln_2 = make_norm(config)
        self.mlp = mlp(config)

    def forward(self, x, rotation=None, cache=None):
        x = x + self.attn(self.ln_1(x), rotation, cache)
        return x + self.mlp(self.ln_2(x))


LOGITS_AT_ONCE = 2**31  # more need indices of 64 bits, slower on a GPU; parts do not save memory


class GPT(nn.Module):
    """The whole model: embeddings, n_layer blocks, a last norm, and the head. Only gpt2 embeds positions."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: keep each block's input only and compute the rest again
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)  # token embeddings
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.arch == "gpt2" else None  # positions
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        if config.arch == "qwen3":  # tables, as a compiler would compute every angle again in each layer
            for name, table in zip(("cos", "sin"), rotation_tables(config)):
                self.register_buffer(name, table, persistent=False)
        self.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight  # Press & Wolf 2017
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation, as nanoGPT has it; projections that end in the stream get 1 / sqrt(how many) of it.

        In qwen3 these, and a head of its own, start at zero: each block begins as the identity.
        """
        is_gpt2 = self.config.arch == "gpt2"
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight") and is_gpt2:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif name.endswith((".bias", "c_proj.weight", "lm_head.weight")):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif "ln_" in name or "_norm." in name:
                nn.init.ones_(parameter)
            else:
                raise ValueError(f"{name} has no initialiser")

    def matrices(self) -> list[tuple[nn.Parameter, int]]:
        """The blocks' two-dimensional weights, each with how many matrices it stacks: c_attn three."""
        weights = [(name, weight) for name, weight in self.h.named_parameters() if weight.dim() == 2]
        return [(weight, 3 if "c_attn" in name else 1) for name, weight in weights]

    def forward(self, tokens, targets=None, cache=None, reduction="mean"):
        """Score each next token.

        tokens: (B, T) integers. Without targets the result is the logits (B, T, V) in fp32. targets: (B, T) integers,
        the tokens that follow, -1 where nothing is asked. With them it is their mean cross-entropy in nats, or with
        reduction="none" that of each, (B, T); no logits are returned, so a compiler need not keep them.
        cache: what sample.py's KVCache does. `advance(T)` gives the positions (T) or (B, T) of the new tokens; each of
        its `layers` has `append(k, v)`, which takes the new keys and values (B, K, T, D) and gives all to attend to,
        (B, K, S, D), and in `mask` (B, 1, T, S) what is added to the scores, or None where T = S: each sees all up to
        itself. The logits are then the last token's alone, (B, 1, V).
        """
        T = tokens.size(1)
        if cache is None and T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than the block_size of {self.config.block_size}")
        positions = torch.arange(T, device=tokens.device) if cache is None else cache.advance(T)
        x, rotation = self.wte(tokens), None  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        else:
            rotation = self.cos[positions], self.sin[positions]  # (T, 1, D), or (B, T, 1, D)
        x = self.drop(x)
        for layer, block in enumerate(self.h):
            if self.activation_checkpointing and self.training:  # Chen et al. 2016
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation, None if cache is None else cache.layers[layer])
        if cache is not None:
            x = x[:, -1:]
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x).float()[..., : self.config.vocab_size]  # the padding cut off
        parts = 1 + targets.numel() * self.config.padded_vocab_size // LOGITS_AT_ONCE
        inputs = x.flatten(0, 1).chunk(parts), targets.flatten().chunk(parts)
        losses = torch.cat([self.cross_entropy(*part) for part in zip(*inputs)])
        return losses.sum() / (targets >= 0).sum() if reduction == "mean" else losses.view_as(targets)

    def cross_entropy(self, x, targets):
        """How well the head finds targets (N) from x (N, C): the cross-entropy of each in nats, 0 where one is -1."""
        logits = self.lm_head(x).float()
        if self.config.vocab_size < logits.size(-1):  # the padding is made impossible; cut off, it would cost more
            padding = torch.arange(logits.size(-1), device=x.device) >= self.config.vocab_size
            logits = logits.masked_fill(padding, -math.inf)
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations to train on one of T tokens: 6 N + 12 L H D T, Chowdhery et al. 2022, appendix B.

        L is n_layer; the N parameters leave out embeddings that are only looked up. Activation checkpointing's second
        forward is not counted: it is the price, not the work.
        """
        config = self.config
        looked_up = ([self.wpe] if self.wpe is not None else []) + ([] if config.tie_embeddings else [self.wte])
        parameters = sum(p.numel() for p in self.parameters()) - sum(table.weight.numel() for table in looked_up)
        return 6 * parameters + 12 * config.n_layer * config.n_head * config.head_size * T


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


# ---- Hugging Face: a folder with config.json and safetensors in the layout of transformers' GPT2LMHeadModel or
# Qwen3ForCausalLM. Neither has the padding of the vocabulary, and a tied head is stored once. GPT-2's has the four
# linear layers of a block as (in, out), where ours are (out, in), and always has biases.

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
QWEN3_NAMES = {  # ours and theirs
    "wte": "model.embed_tokens",
    "ln_1": "input_layernorm",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
    "ln_f": "model.norm",
    "lm_head": "lm_head",
}
SHAPE = {  # how config.json calls the fields of a GPTConfig
    "gpt2": {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")} | {"block_size": "n_positions"},
    "qwen3": {
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "n_kv_head": "num_key_value_heads",
        "head_size": "head_dim",
        "intermediate_size": "intermediate_size",
    },
}
FIXED = {  # what it says of every model that is known here
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_scaling": None,
    },
}
MOST_JSON_BYTES = 64 * 2**20


@torch.no_grad()
def load_hf(folder: Path, dropout: float = 0.0) -> GPT:
    """The model in a Hugging Face folder, in fp32 whatever the file has, read a tensor at a time.

    Raises OSError or ValueError where it isn't whole, or is neither a GPT-2 nor a Qwen3.
    """
    safetensors = import_safetensors()
    model = empty_model(read_config(folder, dropout))
    model.wte.weight[model.config.vocab_size :] = 0  # the padding
    missing = in_hf_layout(model)
    for path in weight_files(folder):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in file.keys():
                    place = missing.pop(name, None)
                    if place is None:  # older files of GPT-2 lack the prefix
                        place = missing.pop(f"transformer.{name}", None)
                    if place is not None:  # they also hold the mask (attn.bias), and some files a tied head
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
    for name in ("wte.weight", "lm_head.weight"):
        if name in weights:  # a tied head has no name of its own
            weights[name] = weights[name][: model.config.vocab_size]  # the rest is padding
    if model.config.arch == "gpt2":
        return {f"transformer.{name}": w.T if name.endswith(TRANSPOSED) else w for name, w in weights.items()}
    layout = {}
    for name, weight in weights.items():
        layer, part = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.weight", name).groups()
        layout[f"{f'model.layers.{layer}.' if layer else ''}{QWEN3_NAMES[part]}.weight"] = weight
    return layout


def read_config(folder: Path, dropout: float) -> GPTConfig:
    """The shape in a folder's config.json. Raises ValueError where it is of another architecture."""
    facts = read_json(folder / "config.json")
    arch = str(facts.get("model_type", "gpt2"))
    if arch not in ARCHITECTURES:
        raise ValueError(f"model_type is {arch!r}, and only {' and '.join(ARCHITECTURES)} are known here")
    for name, value in FIXED[arch].items():
        if name != "architectures" and facts.get(name, value) != value:
            raise ValueError(f"{name} is {facts[name]!r}, and only {arch}'s {value!r} is known here")
    shape = {name: facts.get(theirs) for name, theirs in SHAPE[arch].items()}
    if not all(type(value) is int and value > 0 for value in shape.values()):
        raise ValueError(f"config.json gives no whole shape: {shape}")
    if arch == "qwen3":
        rope = facts.get("rope_parameters") or {"rope_theta": facts.get("rope_theta")}  # of transformers 5; before
        theta = rope.get("rope_theta") if isinstance(rope, dict) else None
        if rope not in ({"rope_theta": theta}, {"rope_theta": theta, "rope_type": "default"}):
            raise ValueError(f"the rotary positions are {rope}, and only those of rope_type 'default' are known here")
        if type(theta) not in (int, float) or type(facts.get("tie_word_embeddings", False)) is not bool:
            raise ValueError(f"rope_theta is {theta!r}, tie_word_embeddings {facts.get('tie_word_embeddings')!r}")
        shape |= {"rope_theta": theta, "tie_embeddings": facts.get("tie_word_embeddings", False)}
    return GPTConfig(arch=arch, dropout=dropout, **shape)


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
    if config.arch == "gpt2" and not config.bias:
        biased = [name.removesuffix(".weight") for name in state if "wte" not in name and "wpe" not in name]
        state |= {f"{name}.bias": torch.zeros(state[f"{name}.weight"].size(-1)) for name in biased}  # (in, out) there
    state = {name: weight.to("cpu", dtype).contiguous() for name, weight in state.items()}
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    facts = {"model_type": config.arch, **FIXED[config.arch], **ends, "torch_dtype": str(dtype).removeprefix("torch.")}
    facts |= {theirs: getattr(config, name) for name, theirs in SHAPE[config.arch].items()}
    if config.arch == "qwen3":
        facts |= {"rope_theta": config.rope_theta, "tie_word_embeddings": config.tie_embeddings}
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
