"""`train.py --plan=True`: what a run will need, before it starts. Makes no file, uses no GPU.

Parameters, operations, weights, gradients and moments are counted; activations and the time are
estimates. `settings` are train.py's, by name.
"""

import math
import os
import re
from pathlib import Path

import torch

import hardware
from config import RANK, Failure
from dataset import find_folder, read_manifest, read_tokenizer
from mixture import parse_mixture
from model import GPT, MAX_LOGITS, GPTConfig, ModelShape

COMPUTED_AGAIN = {"off": 1, "selective": 10 / 9, "full": 4 / 3}  # operations, by checkpointing
GIB = 2**30
# What a block keeps for the backward pass, by architecture and whether it is compiled, counted: how
# often a norm's input and output, in each half; queries, keys, values, outputs; the MLP's width.
# GPT-2 compiled: x, its norm; two of (H + K) * D; before and after GELU. Uncompiled x is in fp32.
KEPT = {("gpt2", True): (2, 2, 2), ("gpt2", False): (3, 2, 2)}
KEPT |= {("qwen3", True): (2, 3, 3), ("qwen3", False): (5, 6, 4)}


def print_plan(settings: dict):
    """Print the plan, on rank 0. Raises Failure."""
    weights = parse_mixture(settings["dataset"])
    folders = [find_folder(name, settings["data_dir"]) for name in weights]
    manifests = [read_manifest(f) if (f / "manifest.json").exists() else {} for f in folders]
    sizes = (read_tokenizer(f, m["tokenizer"]).vocab_size for f, m in zip(folders, manifests) if m)
    vocab_size = next(sizes, 50257)
    shape = {name: settings[name] for name in ModelShape.__dataclass_fields__}
    with torch.device("meta"):  # shapes without memory
        model = GPT(GPTConfig(**shape, vocab_size=vocab_size))
    count, card, card_bytes = find_gpus(settings["plan_gpus"], settings["device"])
    settings = resolve_auto(model, settings, count, card, card_bytes)
    tokens = settings["max_steps"] * settings["batch_tokens"]
    flops = model.flops_per_token(settings["block_size"])
    sizes = f"{size(model) / 1e6:,.1f}M parameters, {size(model.h) / 1e6:,.1f}M of them in blocks"
    shares = [tokens * weight / sum(weights.values()) for weight in weights.values()]
    lines = [
        f"model: {sizes}, vocabulary of {vocab_size:,}{'' if any(manifests) else ' (assumed)'}",
        f"training: {settings['max_steps']:,} steps of {settings['batch_tokens']:,} tokens, "
        f"{tokens:.3g} in all; {flops / 1e6:,.0f} MFLOP per token, {flops * tokens:.3g} FLOP",
        *map(data_text, manifests, folders, shares),
        *memory_lines(model, settings, count, card, card_bytes),
        time_line(settings, count, card, flops * tokens),
        *rule_lines(model, settings, tokens),
    ]
    if RANK == 0:
        print("\n".join(lines), flush=True)


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def find_gpus(text: str, device: str) -> tuple[int, str, float]:
    """The number, name ("" = CPU) and bytes of plan_gpus, or of this machine's. Raises Failure."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if not text and device in ("auto", "cuda") and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return ranks, card.name, card.total_memory
    if not (found := re.fullmatch(r"(?:([1-9]\d*) *x *)?(\D.*|)", text.strip())):
        raise Failure(f'plan_gpus {text!r} is not like "8 x H100 80GB"')
    number, card = found.groups()
    gigabytes = re.search(r"(\d+) ?GB", card)
    return int(number or ranks), card, int(gigabytes[1]) * GIB if gigabytes else math.inf


def resolve_auto(model: GPT, settings: dict, count: int, card: str, card_bytes: float) -> dict:
    """The settings with `auto` and 0 as a run on that hardware would have them."""
    best = "float16" if re.search(hardware.NO_BFLOAT16, card) else "bfloat16"
    best = best if card else hardware.best_training_dtype(torch.device("cpu"))
    whole = "model" if settings["parallel"] == "ddp" else "blocks"
    auto = dict(dtype=best, compile=whole if card else "off")
    settings = settings | {name: value for name, value in auto.items() if settings[name] == "auto"}
    if not settings["micro_batch_size"]:
        T = settings["block_size"]
        for B in hardware.micro_batch_sizes(settings["batch_tokens"] // T // count, T, card != ""):
            settings["micro_batch_size"] = B
            if sum(memory(model, settings, count).values()) < card_bytes:
                break
    return settings


def data_text(manifest: dict, folder: Path, tokens: float) -> str:
    if not manifest:
        return f"data: {folder} has no manifest.json, so its size is not known"
    available = manifest["splits"]["train"]["tokens"]
    text = f"data: {tokens / available:.2f} epochs of {available:,} training tokens in {folder}"
    reason = "from the fifth epoch on text is worth less than new text (Muennighoff et al. 2023)"
    return f"{text}\nwarning: {reason}" if tokens > 4 * available else text


def memory_lines(model: GPT, settings: dict, count: int, card: str, card_bytes: float) -> list[str]:
    """The micro-batch, and the memory of each device with what it is for."""
    T, B, batch_tokens = (settings[n] for n in ("block_size", "micro_batch_size", "batch_tokens"))
    needed, unit = memory(model, settings, count), T * B * count
    total = sum(needed.values())
    parts = " + ".join(f"{name} {number / GIB:.2f}" for name, number in needed.items())
    lines = [
        f"batch: {B} sequences of {T} x {batch_tokens / unit:g} micro-steps x {count} "
        f"{card or 'CPU'}; {settings['dtype']}, compile {settings['compile']}, "
        f"activation checkpointing {settings['activation_checkpointing']}",
        f"memory of each: {total / GIB:.2f} GiB = {parts} (an estimate)",
    ]
    if batch_tokens % unit:
        product = f"block_size x micro_batch_size x {count} = {unit:,}"
        lines.append(f"warning: batch_tokens must be a multiple of {product}")
    if total > card_bytes:
        room = f"{card} has {card_bytes / GIB:.2f} GiB"
        lines.append(f"warning: {room}; {hardware.less_memory(settings)}")
    return lines


def memory(model: GPT, settings: dict, count: int) -> dict[str, float]:
    """Bytes per device by what they are for. deepspeed: as of ZeRO 3, without its copies."""
    share = 1 if settings["parallel"] == "ddp" else count
    by_muon = sum(w.numel() for w, _ in model.matrices()) * (settings["optimizer"] == "muon")
    parts = {"weights": 4 * size(model), "gradients": 4 * size(model)}
    parts["moments"] = 8 * size(model) - 4 * by_muon  # AdamW has two, Muon one
    parts = {name: number / share for name, number in parts.items()}
    return parts | {"activations and logits": activation_bytes(model, settings)}


def activation_bytes(model: GPT, settings: dict) -> float:
    """What a forward pass keeps for the backward pass of a micro-batch: an estimate.

    KEPT says what both halves of a block keep per token; the matrices in use are there in the
    activations' type, too. The head keeps the logits; uncompiled it keeps their logarithms in fp32,
    beside which two more are needed for one part at a time.
    """
    shape, tokens = model.config, settings["block_size"] * settings["micro_batch_size"]
    x, compiled = shape.n_embd, settings["compile"] != "off"
    of_norm, of_heads, of_wide = KEPT[shape.arch, compiled]
    block, attention_weights, head = size(model.h[0]), size(model.h[0].attn), model.lm_head.weight
    if compiled and settings["dtype"] == "float8":  # the products' operands are made again
        of_norm, of_wide, block, attention_weights = of_norm - 1, of_wide - 1, 0, 0
    attention = of_norm * x + of_heads * (shape.n_head + shape.kv_heads) * shape.head_width
    mlp = of_norm * x + of_wide * shape.mlp_width
    (values, weights), (once, weights_once) = {  # of each layer, and of one layer at a time
        "off": ((attention + mlp, block), (0, 0)),
        "selective": ((attention + x, attention_weights), (mlp, block)),
        "full": ((x, 0), (attention + mlp, block)),
    }[settings["activation_checkpointing"]]
    values = shape.n_layer * values + once
    entries, bytes_each = len(head), 4 if settings["dtype"] == "float32" else 2
    logits = bytes_each if compiled else 4 + 8 / (1 + tokens * entries // MAX_LOGITS)
    weights = (shape.n_layer * weights + weights_once + head.numel()) * (bytes_each == 2)
    return tokens * (bytes_each * values + logits * entries) + 2 * weights


def time_line(settings: dict, count: int, card: str, flops: float) -> str:
    peak = count * hardware.named_peak_flops(card, settings["dtype"])
    if not peak:
        return f"time: no estimate, as {card or 'a CPU'} has no known peak in {settings['dtype']}"
    again = COMPUTED_AGAIN[settings["activation_checkpointing"]]
    hours = again * flops / (hardware.SHARE_OF_PEAK * peak) / 3600
    return f"time: {hours:,.1f} hours at {hardware.SHARE_OF_PEAK:.0%} of {peak / 1e12:,.0f} TFLOP/s"


def rule_lines(model: GPT, settings: dict, tokens: int) -> list[str]:
    """What published rules say of this size, and from which sizes they were fitted.

    Hoffmann et al. 2022 (Chinchilla); Bi et al. 2024 (DeepSeek LLM), section 3.1: powers of the
    operations without embeddings; Li et al. 2025 (Step Law): of parameters in blocks, and tokens.
    """
    blocks, flops = size(model.h), model.flops_per_token(settings["block_size"])
    flops = tokens * (flops - 6 * model.lm_head.weight.numel())
    bi = 0.2920 * flops**0.3271, 0.3118 * flops**-0.1250
    li = 0.58 * tokens**0.571, 1.79 * blocks**-0.713 * tokens**0.307
    outside = " (this run is outside)"
    outside_bi = outside * (not 1e17 <= flops <= 2e19)
    outside_li = outside * (not (215e6 <= blocks <= 1.1e9 and 4e9 <= tokens <= 100e9))
    return [
        f"tokens per parameter: {tokens / size(model):.1f}; compute is used best at about 20: "
        "Hoffmann et al. 2022, from 70M to 16B parameters",
        f"batch and learning rate: {settings['batch_tokens']:,} tokens and "
        f"{settings['learning_rate']:.2g}; for AdamW two rules would choose",
        f"  {bi[0]:,.0f} and {bi[1]:.2g}: Bi et al. 2024, from 1e17 to 2e19 FLOP{outside_bi}",
        f"  {li[0]:,.0f} and {li[1]:.2g}: Li et al. 2025, from 215M to 1.1B parameters in blocks "
        f"and 4B to 100B tokens{outside_li}",
    ]
