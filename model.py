"""GPT-2 and Qwen3, from tokens to loss or logits.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Yang et al. 2025, "Qwen3
Technical Report" (the dense model). Names are GPT-2's where GPT-2 has such a part.

Shapes: B batch, T new tokens (all, without a cache), S keys (T, or the slots of a cache), C n_embd,
H heads of queries, K heads of keys and values, D head size, V vocabulary. A layer takes and returns
x (B, T, C) unless it says otherwise.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from config import check_bounds, check_choices


@dataclass
class ModelShape:
    """What a user chooses of a model's shape. The defaults are GPT-2 124M's."""

    arch: str = "gpt2"  # gpt2 or qwen3
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads of a block
    n_embd: int = 768  # width of the residual stream
    block_size: int = 1024  # longest context, in tokens
    dropout: float = 0.0  # share of activations set to zero in training
    bias: bool = True  # gpt2 (else ignored): biases in linear layers and layer norms
    n_kv_head: int = 0  # qwen3: heads of keys and values, each for several queries; 0 = n_head
    head_size: int = 0  # qwen3: width of a head; 0 = n_embd / n_head
    intermediate_size: int = 0  # qwen3: width of the MLP; 0 = 8/3 n_embd, up to a multiple of 64
    rope_theta: float = 10000.0  # qwen3 (else ignored): base of RoPE; larger for longer contexts
    tie_embeddings: bool = True  # the head has the token embedding's weights; gpt2 always

    def check_shape(self):
        """Raise ValueError where no model can have this shape."""
        check_choices(self, arch="gpt2 qwen3")
        check_bounds(self, 1, "n_layer n_head n_embd block_size rope_theta")
        check_bounds(self, 0, "n_kv_head head_size intermediate_size")
        check_bounds(self, 0, "dropout", below=1)
        if self.n_embd % self.n_head and not self.head_size:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        if self.n_head % self.kv_heads:
            hint = f"a multiple of n_kv_head {self.n_kv_head}"
            raise ValueError(f"n_head {self.n_head} must be {hint}")
        if self.arch == "qwen3" and self.head_width % 2:
            raise ValueError(f"head_size {self.head_width} must be even: RoPE rotates pairs")
        widths = (self.kv_heads, self.n_head * self.head_width, self.mlp_width)
        is_gpt2s = widths == (self.n_head, self.n_embd, 4 * self.n_embd) and self.tie_embeddings
        if self.arch == "gpt2" and not is_gpt2s:
            names = "n_kv_head, head_size, intermediate_size and tie_embeddings"
            raise ValueError(f"{names} can be chosen for qwen3 only")

    @property
    def kv_heads(self) -> int:
        """K: heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """D: the size of a head."""
        return self.head_size or self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Width of the MLP. Qwen3's has three matrices; 8/3 gives it as many weights as GPT-2's."""
        default = 4 * self.n_embd if self.arch == "gpt2" else round_up(self.n_embd * 8 / 3, 64)
        return self.intermediate_size or default


@dataclass
class GPTConfig(ModelShape):
    """A shape and the size of the vocabulary: all that a model is built from. Raises ValueError."""

    vocab_size: int = 50257  # tokens in the vocabulary

    def __post_init__(self):
        self.check_shape()

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: GPUs multiply multiples of 64 much faster than 50257."""
        return round_up(self.vocab_size, 64)


def round_up(size: float, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


class Linear(nn.Linear):
    """Computes in its input's type, which can have 16 bits while the weights are in fp32."""

    def reset_parameters(self):
        pass  # uninitialised: GPT.init_weights or a checkpoint fills the weights

    def forward(self, x):
        bias = None if self.bias is None else self.bias.type_as(x)
        return F.linear(x, self.weight.type_as(x), bias)


class Embedding(nn.Embedding):
    """torch's, uninitialised as well."""

    reset_parameters = Linear.reset_parameters


class LayerNorm(nn.LayerNorm):
    """torch's, in the type of its weights. Ba et al. 2016."""

    def forward(self, x):
        return super().forward(x.type_as(self.weight)).type_as(x)


def attend(q, k, v, dropout: float, cache=None):
    """Causal attention of q (B, T, H, D) to k and v (B, T, K, D); returns (B, T, H * D).

    cache: one layer of a KVCache, see GPT.next_logits. Vaswani et al. 2017, section 3.2.
    """
    dtype = q.dtype
    if cache is None and q.is_cpu and q.size(1) < 512:  # the CPU's kernel is slower in bfloat16
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D) and twice (B, K, T, D)
    mask = None  # without one, token t sees the tokens up to t
    if cache is not None:
        k, v, mask = cache.append(k, v)  # (B, K, S, D)
    y = F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=mask is None, enable_gqa=k.size(1) != q.size(1)
    )
    return y.transpose(1, 2).flatten(2).to(dtype)  # (B, T, H * D)


# GPT-2: the two halves of a block


class CausalSelfAttention(nn.Module):
    """Multi-head attention. Positions are already in x."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v in one
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rope=None, cache=None):  # rope is Qwen3's
        q, k, v = (y.unflatten(2, (self.config.n_head, -1)) for y in self.c_attn(x).chunk(3, dim=2))
        return self.c_proj(attend(q, k, v, self.config.dropout if self.training else 0.0, cache))


class MLP(nn.Module):
    """Feed-forward: four times wider, GELU in its tanh form, and back. Hendrycks & Gimpel 2016."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


# Qwen3: the same two halves


class RMSNorm(nn.RMSNorm):
    """Divides x by the root of its mean square; torch's, in fp32. Zhang & Sennrich 2019."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-6).type_as(x)


def rope_cache(config: GPTConfig):
    """Rotary position embedding: each position's cosines and sines, (2, block_size, 1, D).

    At position p pair i turns by the angle p * rope_theta ** (-2 i / D). The tables hold each angle
    twice, for both members of a pair, and the sine is negative for the first.
    """
    positions = torch.arange(config.block_size)[:, None, None]  # (block_size, 1, 1)
    exponents = -torch.arange(0, config.head_width, 2) / config.head_width  # (D / 2)
    angles = positions * config.rope_theta**exponents  # (block_size, 1, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


def apply_rope(x, rope):
    """Rotate each pair (a, b) = (x[i], x[i + D / 2]) of x (B, T, H, D) by its angle.

    (a, b) becomes (a cos - b sin, b cos + a sin). A query at p times a key at s then depends on
    p - s alone: attention sees distances, not positions. Su et al. 2021.
    """
    cos, sin = rope  # (T, 1, D) or (B, T, 1, D)
    swapped = x.roll(x.size(-1) // 2, -1)  # the other member of each pair
    return (x * cos + swapped * sin).type_as(x)


class GroupedQueryAttention(nn.Module):
    """Several queries share a key and a value (Ainslie et al. 2023); q and k are normalised."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # Not one layer, as in GPT-2: joining gradients takes a GPU longer than two more products
        self.c_q = Linear(config.n_embd, config.n_head * config.head_width, bias=False)
        self.c_k = Linear(config.n_embd, config.kv_heads * config.head_width, bias=False)
        self.c_v = Linear(config.n_embd, config.kv_heads * config.head_width, bias=False)
        self.q_norm = RMSNorm(config.head_width)  # Dehghani et al. 2023
        self.k_norm = RMSNorm(config.head_width)
        self.c_proj = Linear(config.n_head * config.head_width, config.n_embd, bias=False)

    def forward(self, x, rope, cache=None):
        layers = (self.c_q, self.c_k, self.c_v)
        q, k, v = (layer(x).unflatten(2, (-1, self.config.head_width)) for layer in layers)
        q = apply_rope(self.q_norm(q), rope)  # (B, T, H, D)
        k = apply_rope(self.k_norm(k), rope)  # (B, T, K, D)
        return self.c_proj(attend(q, k, v, self.config.dropout if self.training else 0.0, cache))


class SwiGLU(nn.Module):
    """Feed-forward: one wide layer gates another. Shazeer 2020."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_gate = Linear(config.n_embd, config.mlp_width, bias=False)  # Qwen3's gate_proj
        self.c_fc = Linear(config.n_embd, config.mlp_width, bias=False)  # its up_proj
        self.c_proj = Linear(config.mlp_width, config.n_embd, bias=False)  # its down_proj

    def forward(self, x):
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


# The model

MAX_LOGITS = 2**31  # at once: more would need 64-bit indices, which are slower on a GPU


def make_norm(config: GPTConfig) -> nn.Module:
    is_gpt2 = config.arch == "gpt2"
    return LayerNorm(config.n_embd, bias=config.bias) if is_gpt2 else RMSNorm(config.n_embd)


class Block(nn.Module):
    """Attention, then the MLP: each reads the residual stream through a norm and adds to it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        is_gpt2 = config.arch == "gpt2"
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config) if is_gpt2 else GroupedQueryAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config) if is_gpt2 else SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, cache=None, recompute_mlp=False):
        x = x + self.dropout(self.attn(self.ln_1(x), rope, cache))
        if recompute_mlp:
            return checkpoint(self.feed_forward, x, use_reentrant=False)
        return self.feed_forward(x)

    def feed_forward(self, x):
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Embeddings, n_layer blocks, a last norm and the head. Weights are uninitialised at first.

    model(tokens, targets)            (B, T)     training: each target's loss
    model.logits(tokens)              (B, T, V)  every position's scores of the next token, in fp32
    model.next_logits(tokens, cache)  (B, V)     decoding: the last position's, with a KV cache
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # What the backward pass recomputes: off, nothing; selective, the MLPs, which have over half
        # of the activations, for about a ninth more operations; full, all but the blocks' inputs
        self.activation_checkpointing = "off"
        self.dtype = None  # of the residual stream and all products; None: that of the weights
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)  # of tokens
        if config.arch == "gpt2":
            self.wpe = Embedding(config.block_size, config.n_embd)  # of positions
        else:  # stored: a compiler would recompute it in each layer
            self.register_buffer("rope", rope_cache(config), persistent=False)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight  # Press & Wolf 2017

    def forward(self, tokens, targets):
        """The cross-entropy of each target in nats (natural logarithm), (B, T) in fp32.

        tokens, targets: integers (B, T); targets[:, t] follows tokens[:, t], -1 is not scored (0).
        No logits are returned, so a compiler need not keep them.
        """
        x = self.hidden(tokens).flatten(0, 1)  # (B * T, C)
        parts = 1 + targets.numel() * self.config.padded_vocab_size // MAX_LOGITS
        pairs = zip(x.chunk(parts), targets.flatten().chunk(parts))
        return torch.cat([self.cross_entropy(*pair) for pair in pairs]).view_as(targets)

    def cross_entropy(self, x, targets):
        """The loss of targets (N) given x (N, C), in nats, (N)."""
        logits = self.lm_head(x).float()  # (N, padded V)
        if self.config.vocab_size < logits.size(-1):  # masking the padding beats cutting it off
            is_padding = torch.arange(logits.size(-1), device=x.device) >= self.config.vocab_size
            logits = logits.masked_fill(is_padding, -math.inf)
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")

    def logits(self, tokens):
        return self.lm_head(self.hidden(tokens)).float()[..., : self.config.vocab_size]

    def next_logits(self, tokens, cache):
        """The scores of the token after the last of tokens (B, T), (B, V) in fp32.

        cache (sample.py's KVCache) keeps the keys and values of earlier tokens. `advance(T)` gives
        the positions of the new tokens, (T) or (B, T). Each of its `layers` has `append(k, v)`,
        which takes the new (B, K, T, D) and returns all to attend to, (B, K, S, D), and a mask
        (B, 1, T, S), added to the scores, or None where T = S and attention is simply causal.
        """
        x = self.hidden(tokens, cache)[:, -1]  # (B, C)
        return self.lm_head(x).float()[:, : self.config.vocab_size]

    def hidden(self, tokens, cache=None):
        """What the head reads, (B, T, C), for tokens (B, T)."""
        T = tokens.size(1)
        if cache is None and self.config.block_size < T:
            raise ValueError(f"{T} tokens exceed the block_size of {self.config.block_size}")
        positions = cache.advance(T) if cache else torch.arange(T, device=tokens.device)
        x, rope = self.wte(tokens), None  # (B, T, C)
        if self.config.arch == "gpt2":
            x = x + self.wpe(positions)
        else:
            rope = self.rope[:, positions]  # (2, T, 1, D) or (2, B, T, 1, D)
        x = self.drop(x if self.dtype is None else x.to(self.dtype))
        recompute = self.activation_checkpointing if self.training else "off"  # Chen et al. 2016
        for layer, block in enumerate(self.h):
            if recompute == "full":
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                layer_cache = cache.layers[layer] if cache else None
                x = block(x, rope, layer_cache, recompute == "selective")
        return self.ln_f(x)

    @torch.no_grad()
    def init_weights(self, seed: int, part=lambda parameter, values: values, embedding_std=0.02):
        """Draw the initial weights on the CPU, each parameter's from (seed, its name) alone.

        GPT-2's scheme: normal with standard deviation 0.02 (wte: embedding_std), and
        0.02 / sqrt(2 n_layer) for the projections into the residual stream. Qwen3's c_proj weights
        start at zero, so that each block begins as the identity, and an untied lm_head, so that all
        tokens are equally likely.
        part(parameter, values): what this rank keeps of the values.
        """
        stds = {"c_proj": 0.02 / math.sqrt(2 * self.config.n_layer), "wte": embedding_std}
        zeros = ".bias" if self.config.arch == "gpt2" else ("c_proj.weight", "lm_head.weight")
        for name, parameter in self.named_parameters():
            if name.endswith(zeros):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                std = stds.get(name.split(".")[-2], 0.02)
                digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                values = torch.empty(parameter.shape).normal_(0, std, generator=generator)
                parameter.copy_(part(parameter, values))
            elif "ln_" in name or "_norm." in name:
                nn.init.ones_(parameter)
            else:
                raise ValueError(f"{name} has no initialiser")

    def matrices(self) -> list[tuple[nn.Parameter, int]]:
        """The blocks' 2-D weights, for Muon, and how many matrices each stacks: q, k, v by head."""
        H, K = self.config.n_head, self.config.kv_heads
        stacked = {"c_attn": 3 * H, "c_q": H, "c_k": K, "c_v": K}
        weights = self.h.named_parameters()
        return [(w, stacked.get(name.split(".")[-2], 1)) for name, w in weights if w.dim() == 2]

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations to train on one of T tokens: 6 N + 12 n_layer H D T.

        Chowdhery et al. 2022, appendix B. The N parameters leave out embeddings that are only
        looked up. The second forward of activation checkpointing is not counted.
        """
        config = self.config
        looked_up = ["wpe.weight"] if config.tie_embeddings else ["wpe.weight", "wte.weight"]
        count = sum(p.numel() for name, p in self.named_parameters() if name not in looked_up)
        return 6 * count + 12 * config.n_layer * config.n_head * config.head_width * T
