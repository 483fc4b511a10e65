"""GPT-2 and Qwen3, from tokens to loss or logits.

Read from the top: the configuration, the attention and MLP of GPT-2, then those of Qwen3, the
block, and the model. Names are GPT-2's where GPT-2 has such a part. Radford et al. 2019, "Language
Models are Unsupervised Multitask Learners"; Yang et al. 2025, "Qwen3 Technical Report" (the dense
model).

Shapes: B batch, T tokens now, S tokens attended, C n_embd, H heads of queries, K heads of keys and
values, D head size, V vocabulary. A layer takes and returns x (B, T, C) unless it says otherwise.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
    intermediate_size: int = 0  # qwen3: width of the MLP; 0 = 8/3 n_embd, rounded up to 64s
    rope_theta: float = 10000.0  # qwen3: pair i of a head turns rope_theta ** (-2 i / D) per token
    tie_embeddings: bool = True  # the head has the token embedding's weights; gpt2 always

    def check_shape(self):
        """Raise ValueError where no model can have this shape."""
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch is {self.arch!r} and must be one of {', '.join(ARCHITECTURES)}")
        minimum = dict(n_layer=1, n_head=1, n_embd=1, block_size=1)
        minimum |= dict(n_kv_head=0, head_size=0, intermediate_size=0)
        for name, low in minimum.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)} and must be at least {low}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout} and must be at least 0 and below 1")
        if self.n_embd % self.n_head and not self.head_size:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        if self.n_head % self.kv_heads:
            raise ValueError(
                f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}"
            )
        if not 1 <= self.rope_theta < math.inf:
            raise ValueError(f"rope_theta is {self.rope_theta} and must be at least 1")
        if self.arch == "qwen3" and self.head_width % 2:
            raise ValueError(f"head_size {self.head_width} must be even: RoPE rotates pairs")
        widths = (self.kv_heads, self.n_head * self.head_width, self.mlp_width)
        gpt2_widths = (self.n_head, self.n_embd, 4 * self.n_embd)
        if self.arch == "gpt2" and not (widths == gpt2_widths and self.tie_embeddings):
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
        if self.intermediate_size:
            return self.intermediate_size
        return 4 * self.n_embd if self.arch == "gpt2" else round_up(self.n_embd * 8 / 3, 64)


@dataclass
class GPTConfig(ModelShape):
    """A shape and the size of the vocabulary: all that a model is built from. Raises ValueError."""

    vocab_size: int = 50257  # tokens the model can name

    def __post_init__(self):
        self.check_shape()

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: GPUs multiply multiples of 64 much faster than 50257."""
        return round_up(self.vocab_size, 64)


def round_up(size: float, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


class Linear(nn.Linear):
    """torch's, left uninitialised: GPT.init_weights or a checkpoint fills the weights."""

    def reset_parameters(self):
        pass


class Embedding(nn.Embedding):
    """torch's, left uninitialised."""

    def reset_parameters(self):
        pass


def attend(q, k, v, dropout: float, cache=None):
    """Causal attention of q (B, T, H, D) to k and v (B, T, K, D); returns (B, T, H * D).

    cache: one layer of a KVCache, see GPT.next_logits. Vaswani et al. 2017, section 3.2.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D) and twice (B, K, T, D)
    if cache is not None:
        k, v = cache.append(k, v)  # (B, K, S, D)
    mask = None if cache is None else cache.mask  # without one, token t sees the tokens up to t
    y = F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=mask is None, enable_gqa=k.size(1) != q.size(1)
    )
    return y.transpose(1, 2).flatten(2)  # (B, T, H * D)


# GPT-2: the two halves of a block


class CausalSelfAttention(nn.Module):
    """Multi-head attention. Positions are already in x."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v in one
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, cache=None):  # rope is Qwen3's
        q, k, v = (y.unflatten(2, (self.n_head, -1)) for y in self.c_attn(x).chunk(3, dim=2))
        y = attend(q, k, v, self.dropout if self.training else 0.0, cache)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Feed-forward: four times wider, GELU in its tanh form, and back. Hendrycks & Gimpel 2016."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


# Qwen3: the same two halves


class RMSNorm(nn.Module):
    """Divides x by the root of its mean square, in fp32. Zhang & Sennrich 2019."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-6).type_as(x)


def rope_cache(config: GPTConfig):
    """Rotary position embedding: cosine and sine of each position's angles, (block_size, 1, D).

    At position p pair i turns by the angle p * rope_theta ** (-2 i / D). The tables hold each angle
    twice, for both members of a pair, and the sine is negative for the first.
    """
    positions = torch.arange(config.block_size)[:, None, None]  # (block_size, 1, 1)
    exponents = -torch.arange(0, config.head_width, 2) / config.head_width  # (D / 2)
    angles = positions * config.rope_theta**exponents  # (block_size, 1, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x, rope):
    """Rotate each pair (a, b) = (x[i], x[i + D / 2]) of x (B, T, H, D) by its angle.

    (a, b) becomes (a cos - b sin, b cos + a sin). A query at p times a key at s then depends on
    p - s alone: attention sees distances, not positions. Su et al. 2021.
    """
    cos, sin = rope  # (T, 1, D) or (B, T, 1, D)
    swapped = x.roll(x.size(-1) // 2, -1)  # the other member of each pair
    return (x * cos + swapped * sin).type_as(x)


class GroupedQueryAttention(nn.Module):
    """Several queries share a key and a value (Ainslie et al. 2023); q and k are normalised.

    Three layers, not one as in GPT-2: joining their gradients takes a GPU longer than two more
    matrix products.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_width = config.head_width
        self.dropout = config.dropout
        self.c_q = Linear(config.n_embd, config.n_head * config.head_width, bias=False)
        self.c_k = Linear(config.n_embd, config.kv_heads * config.head_width, bias=False)
        self.c_v = Linear(config.n_embd, config.kv_heads * config.head_width, bias=False)
        self.q_norm = RMSNorm(config.head_width)  # Dehghani et al. 2023
        self.k_norm = RMSNorm(config.head_width)
        self.c_proj = Linear(config.n_head * config.head_width, config.n_embd, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, cache=None):
        layers = (self.c_q, self.c_k, self.c_v)
        q, k, v = (layer(x).unflatten(2, (-1, self.head_width)) for layer in layers)
        q = apply_rope(self.q_norm(q), rope)  # (B, T, H, D)
        k = apply_rope(self.k_norm(k), rope)  # (B, T, K, D)
        y = attend(q, k, v, self.dropout if self.training else 0.0, cache)
        return self.resid_dropout(self.c_proj(y))


class SwiGLU(nn.Module):
    """Feed-forward: one wide layer gates another. Shazeer 2020."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_gate = Linear(config.n_embd, config.mlp_width, bias=False)  # Qwen3's gate_proj
        self.c_fc = Linear(config.n_embd, config.mlp_width, bias=False)  # its up_proj
        self.c_proj = Linear(config.mlp_width, config.n_embd, bias=False)  # its down_proj
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x)))


# The model

ARCHITECTURES = {"gpt2": (CausalSelfAttention, MLP), "qwen3": (GroupedQueryAttention, SwiGLU)}
MAX_LOGITS = 2**31  # computed at once: more need 64-bit indices, which are slower on a GPU


def make_norm(config: GPTConfig) -> nn.Module:
    is_gpt2 = config.arch == "gpt2"
    return nn.LayerNorm(config.n_embd, bias=config.bias) if is_gpt2 else RMSNorm(config.n_embd)


class Block(nn.Module):
    """Attention, then the MLP: each reads the residual stream through a norm and adds to it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        attention, mlp = ARCHITECTURES[config.arch]
        self.ln_1 = make_norm(config)
        self.attn = attention(config)
        self.ln_2 = make_norm(config)
        self.mlp = mlp(config)

    def forward(self, x, rope=None, cache=None):
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Embeddings, n_layer blocks, a last norm and the head. Weights are uninitialised at first.

    model(tokens, targets)            (B, T)     training: each target's loss
    model.logits(tokens)              (B, T, V)  every position's scores for the next token
    model.next_logits(tokens, cache)  (B, V)     decoding: the last position's, with a KV cache
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: recompute all but the blocks' inputs
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)  # of tokens
        self.wpe = Embedding(config.block_size, config.n_embd) if config.arch == "gpt2" else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        if config.arch == "qwen3":  # stored: a compiler would recompute them in each layer
            cos, sin = rope_cache(config)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
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
        """The scores of each next token, (B, T, V) in fp32, for tokens (B, T)."""
        return self.lm_head(self.hidden(tokens)).float()[..., : self.config.vocab_size]

    def next_logits(self, tokens, cache):
        """The scores of the token after the last of tokens (B, T), (B, V) in fp32.

        cache (sample.py's KVCache) keeps the keys and values of earlier tokens. `advance(T)` gives
        the positions of the new tokens, (T) or (B, T). Each of its `layers` has `append(k, v)`,
        which takes the new (B, K, T, D) and returns all to attend to, (B, K, S, D), and `mask`
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
        x = self.wte(tokens)  # (B, T, C)
        if self.wpe is None:
            rope = self.cos[positions], self.sin[positions]  # (T, 1, D) or (B, T, 1, D) each
        else:
            x, rope = x + self.wpe(positions), None
        x = self.drop(x)
        for layer, block in enumerate(self.h):
            if self.activation_checkpointing and self.training:  # Chen et al. 2016
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache.layers[layer] if cache else None)
        return self.ln_f(x)

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Draw the initial weights on the CPU, each parameter's from (seed, its name).

        So they do not depend on other parameters, the device or the rank.

        GPT-2's scheme: normal with standard deviation 0.02, and 0.02 / sqrt(2 n_layer) for the
        projections into the residual stream. Qwen3's c_proj weights, and lm_head where it is not
        tied, start at zero, so that each block begins as the identity.
        """
        is_gpt2 = self.config.arch == "gpt2"
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight") and is_gpt2:
                draw_normal(parameter, 0.02 / math.sqrt(2 * self.config.n_layer), seed, name)
            elif name.endswith((".bias", "c_proj.weight", "lm_head.weight")):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                draw_normal(parameter, 0.02, seed, name)
            elif "ln_" in name or "_norm." in name:
                nn.init.ones_(parameter)
            else:
                raise ValueError(f"{name} has no initialiser")

    def matrices(self) -> list[tuple[nn.Parameter, int]]:
        """The blocks' 2-D weights, for Muon, with how many matrices each stacks: c_attn q, k, v."""
        weights = self.h.named_parameters()
        return [(w, 3 if "c_attn" in name else 1) for name, w in weights if w.dim() == 2]

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations to train on one of T tokens: 6 N + 12 n_layer H D T.

        Chowdhery et al. 2022, appendix B. The N parameters leave out embeddings that are only
        looked up. The second forward of activation checkpointing is not counted.
        """
        config = self.config
        count = sum(parameter.numel() for parameter in self.parameters())
        count -= self.wpe.weight.numel() if self.wpe is not None else 0
        count -= 0 if config.tie_embeddings else self.wte.weight.numel()
        return 6 * count + 12 * config.n_layer * config.n_head * config.head_width * T


def draw_normal(parameter, std: float, seed: int, name: str):
    """Fill a parameter with normal numbers that follow from (seed, name)."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))
