"""Train a GPT: one process on a laptop, or one per GPU under torchrun.

    python train.py config/small.py                                    everything from text to a sample, in minutes
    python train.py config/gpt2_124m.py --dataset=mine --max_steps=1000
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py
    python train.py config/small.py --init_from=resume                 go on where a run stopped

Read `main`, at the bottom, for the story of a run, then `train`, the loop, and from there what they call. From the
top the parts are: the settings, which tokens a step sees, the optimizer and its schedule, ranks, what the device
decides, the run and its checkpoints, evaluation, the loop and its log, and the report at the end.
"""

import contextlib
import ctypes
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import config
import prepare_data
from config import NO_CHECKPOINT, NOT_FINITE, Failure


@dataclass
class TrainConfig:
    """Train a GPT on a dataset of data/ and keep it in a folder of out/. The defaults are GPT-2 124M's."""

    out_dir: str = "out/run"  # the run's folder: checkpoints, metrics.jsonl, loss.png
    init_from: str = "scratch"  # scratch, resume, or a model, which brings its shape: gpt2, a folder, OWNER/NAME (Hub)
    overwrite: bool = False  # start anew although out_dir holds a run, and lose that
    seed: int = 1337  # of the first weights, the order of the data, and dropout
    dataset: str = "stdlib"  # a folder in data_dir; stdlib and shakespeare are prepared when missing
    data_dir: str = "data"  # the folder that datasets stand in
    tokenizer: str = ""  # of shards made elsewhere, without a manifest: whatever prepare_data.py takes but bpe:N
    arch: str = "gpt2"  # gpt2 or qwen3
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads a block
    n_embd: int = 768  # width
    block_size: int = 1024  # context, tokens
    dropout: float = 0.0  # share of activations zeroed in training
    bias: bool = True  # gpt2: in linear layers and layer norms
    n_kv_head: int = 0  # qwen3: heads of keys and values a block, each for several of queries; 0 = n_head
    head_size: int = 0  # qwen3: width of a head; 0 = n_embd / n_head
    intermediate_size: int = 0  # qwen3: width of the MLP; 0 = 8/3 of n_embd, up to a multiple of 64
    rope_theta: float = 10000.0  # qwen3: pair i of a head turns by rope_theta ** (-2 i / head_size) a token
    tie_embeddings: bool = True  # the head has the weights of the token embeddings; gpt2 always
    batch_tokens: int = 512 * 1024  # tokens an optimizer step sees, over all ranks
    micro_batch_size: int = 0  # sequences a device holds at once; 0 = as many as fit, found by trying
    max_steps: int = 19073  # optimizer steps; 19,073 of 0.5M tokens are 10B
    learning_rate: float = 6e-4  # its peak, after warm-up
    min_lr: float = 6e-5  # where the decay ends; Muon's rate falls in proportion
    warmup_steps: int = 700  # linear, up to learning_rate
    decay: str = "cosine"  # how the learning rate falls: cosine or linear
    decay_steps: int = 0  # over so many last steps, and before them it stays at its peak; 0 = from warm-up on
    optimizer: str = "adamw"  # adamw, or muon: for the blocks' matrices, with adamw for all the rest
    weight_decay: float = 0.1  # on matrices and embeddings, not on biases and norms
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.95  # and of its square
    muon_learning_rate: float = 0.0  # its peak for Muon's matrices; 0 = learning_rate
    muon_momentum: float = 0.95  # Muon's memory of the gradient
    grad_clip: float = 1.0  # the gradient is shortened to this norm; 0 = off
    eval_interval: int = 250  # steps between evaluations; one more follows the last step
    eval_tokens: int = 10 * 1024 * 1024  # validation tokens an evaluation scores, the same each time
    checkpoint_interval: int = 1000  # steps between checkpoints; one more follows the last step
    log_interval: int = 10  # steps between lines of the log
    sample_prompt: str = ""  # text that the finished model continues; "" = off
    device: str = "auto"  # cpu, cuda, mps, or auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32, bfloat16 (autocast), or auto: bfloat16 where the device is fast in it
    compile: str = "auto"  # on, off, or auto: on for cuda
    activation_checkpointing: bool = False  # saves memory, costs about a third more compute

    def check(self):
        """Raise ValueError where a value, or two together, make no sense."""
        for names, low in (
            ("n_layer n_head n_embd block_size batch_tokens max_steps eval_interval eval_tokens", 1),
            ("checkpoint_interval log_interval", 1),
            ("seed micro_batch_size warmup_steps weight_decay grad_clip dropout learning_rate min_lr beta1 beta2", 0),
            ("decay_steps muon_learning_rate muon_momentum n_kv_head head_size intermediate_size", 0),
        ):
            for name in names.split():
                if not low <= getattr(self, name) < 2**63:
                    raise ValueError(f"{name} is {getattr(self, name)} and must be at least {low} (and below 2^63)")
        for name in ("dropout", "beta1", "beta2", "muon_momentum"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)} and must be below 1")
        for name, choices in (
            ("arch", ("gpt2", "qwen3")),
            ("optimizer", ("adamw", "muon")),
            ("decay", ("cosine", "linear")),
            ("device", ("auto", "cpu", "cuda", "mps")),
            ("dtype", ("auto", "float32", "bfloat16")),
            ("compile", ("auto", "on", "off")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r} and must be one of {', '.join(choices)}")
        if self.fine_tunes() and not prepare_data.names_model(self.init_from):
            known = ", ".join(prepare_data.MODELS)
            raise ValueError(
                f"init_from {self.init_from!r} is not scratch, resume, a folder, {known}, or OWNER/NAME on the Hub"
            )
        self.check_shape()
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr {self.min_lr} must not exceed learning_rate {self.learning_rate}")
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must not exceed max_steps {self.max_steps}")
        if self.warmup_steps + self.decay_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and decay_steps {self.decay_steps} are together more than "
                f"max_steps {self.max_steps}"
            )
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        unit = self.block_size * world_size * max(1, self.micro_batch_size)
        if self.batch_tokens % unit:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} must be a multiple of {unit}: block_size {self.block_size} x "
                f"{world_size} ranks x micro_batch_size {max(1, self.micro_batch_size)}; "
                f"the nearest is {max(1, round(self.batch_tokens / unit)) * unit}"
            )

    def check_shape(self):
        """What GPTConfig also refuses, but before torch is loaded."""
        chosen = (self.n_kv_head, self.head_size, self.intermediate_size, not self.tie_embeddings)
        if self.arch == "gpt2" and any(chosen):
            raise ValueError("n_kv_head, head_size, intermediate_size and tie_embeddings can be chosen for qwen3 only")
        if self.n_embd % self.n_head and not self.head_size:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if self.arch == "qwen3" and (head_size := self.head_size or self.n_embd // self.n_head) % 2:
            raise ValueError(f"head_size {head_size} must be even: rotary positions turn pairs")
        if self.rope_theta < 1:
            raise ValueError(f"rope_theta is {self.rope_theta} and must be at least 1")

    def fine_tunes(self) -> bool:
        """Whether the run starts from a model in Hugging Face's layout."""
        return self.init_from not in ("scratch", "resume")


if __name__ == "__main__":  # the settings come first: a mistake in them shows before torch's seconds of loading
    settings = config.load(TrainConfig, sys.argv[1:])

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from model import GPT, GPTConfig, load_hf

# ---- which tokens a step sees: a pure function of the seed and the step, so resuming needs no state but the step


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble an array of 64-bit integers, modulo 2^64: the finaliser of SplitMix64, Steele et al. 2014."""
    x = np.asarray(x, dtype=np.uint64).reshape(-1) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(*numbers: int) -> int:
    """One 64-bit integer that depends on all of `numbers` and their order."""
    result = np.uint64(0)
    for number in numbers:
        result = mix(result ^ mix(number))[0]
    return int(result)


def shuffled(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """Where a shuffle of 0..count-1 puts `positions`, without ever holding the shuffle.

    A Feistel network (Luby & Rackoff 1988): of a number with an even count of bits, each round scrambles one half by
    the other. A round can be undone, so no two numbers meet and the whole is a permutation, however crude the
    scrambling; four rounds make it look random, and two are for good measure. What lands at or above count is sent
    through again until it lands below (cycle-walking, Black & Rogaway 2002).
    """
    half = np.uint64(max(1, math.ceil((count - 1).bit_length() / 2)))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = mix(np.arange(6, dtype=np.uint64) ^ np.uint64(key))

    def permute(x):
        left, right = x >> half, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        return left << half | right

    result = permute(positions.astype(np.uint64))
    while (outside := result >= count).any():
        result[outside] = permute(result[outside])
    return result.astype(np.int64)


def window_indices(first: int, count: int, windows: int, seed: int) -> np.ndarray:
    """The windows at places first..first+count-1 of the run: each of the `windows` once an epoch, shuffled anew."""
    places = np.arange(first, first + count)
    epochs = places // windows
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        indices[epochs == epoch] = shuffled(places[epochs == epoch] % windows, windows, hashed(seed, int(epoch)))
    return indices


def micro_batch(windows, settings: TrainConfig, ranks: "Ranks", step: int, micro_step: int):
    """This rank's tokens and targets, each (micro_batch_size, block_size), on its device.

    The ranks take turns through the step's sequences, so that any number of ranks sees the same global batch.
    """
    turn = micro_step * ranks.world_size + ranks.rank
    first = step * (settings.batch_tokens // settings.block_size) + turn * settings.micro_batch_size
    indices = window_indices(first, settings.micro_batch_size, len(windows), settings.seed)
    return to_device(windows[indices], ranks.device)


def to_device(windows: np.ndarray, device: torch.device):
    """Split windows (B, T + 1) into tokens and targets (B, T) on the device."""
    batch = torch.from_numpy(windows)
    if device.type == "cuda":  # pinned memory is copied while the GPU works on
        batch = batch.pin_memory()
    batch = batch.to(device, non_blocking=device.type == "cuda")
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


# ---- the optimizer and its schedule


@torch.no_grad()
def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of each of the matrices (N, R, C) near 1 and leave their directions as they are.

    Five steps of a Newton-Schulz iteration, in bfloat16 on a GPU: Jordan et al. 2024, "Muon", with the coefficients
    found there. The values end between 0.68 and 1.2, which does as well as 1; those below 0.0015 of the matrix's norm
    end lower.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x.mT if x.size(1) > x.size(2) else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if matrices.size(1) > matrices.size(2) else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal before it moves the matrices: Jordan et al. 2024.

    An update's root mean square is 0.2 of the learning rate, which is about AdamW's, so that their learning rates and
    weight decay can be the same: Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2. Each rank
    orthogonalises a share.
    """

    def __init__(self, model: GPT, settings: TrainConfig, ranks: "Ranks"):
        weights, self.stacked = zip(*model.matrices())  # and how many matrices each stacks
        self.ranks = ranks
        defaults = dict(lr=0.0, momentum=settings.muon_momentum, weight_decay=settings.weight_decay)  # lr: by the loop
        super().__init__(weights, defaults)

    @torch.no_grad()
    def step(self):
        """Move the matrices by their gradients."""
        [group] = self.param_groups
        weights, lr, momentum = group["params"], group["lr"], group["momentum"]
        gradients = [weight.grad for weight in weights]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        moments = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(moments, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, moments, momentum)  # Nesterov's: a look ahead
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        alike = defaultdict(list)  # matrices by shape; query, key and value are matrices of their own
        for weight, update, count in zip(weights, updates, self.stacked):
            for pair in zip(weight.chunk(count), update.chunk(count)):
                alike[pair[0].shape].append(pair)
        for shape, pairs in alike.items():
            matrices, directions = zip(*pairs)
            turned = self.ranks.share_out(orthogonalize, torch.stack(directions)).to(matrices[0].dtype)
            size = 0.2 * math.sqrt(max(shape))  # the root mean square of an orthogonal matrix is 1 / sqrt(max(shape))
            torch._foreach_add_(matrices, turned.unbind(), alpha=-lr * size)


def make_optimizers(model: GPT, settings: TrainConfig, ranks: "Ranks") -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2019) and, where asked for, Muon for the blocks' matrices. Vectors do not decay."""
    muon = [Muon(model, settings, ranks)] if settings.optimizer == "muon" else []
    taken = {id(weight) for optimizer in muon for weight in optimizer.param_groups[0]["params"]}
    parameters = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return [torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True), *muon]


def schedule(step: int, settings: TrainConfig) -> float:
    """The share of the peak learning rates at a step: linear warm-up, a plateau, and a decay to min_lr.

    Cosine: Loshchilov & Hutter 2017. A plateau and then a linear decay: Hägele et al. 2024.
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    decay_steps = settings.decay_steps or settings.max_steps - settings.warmup_steps
    progress = max(0.0, 1 - (settings.max_steps - step) / max(1, decay_steps))
    height = (1 + math.cos(math.pi * progress)) / 2 if settings.decay == "cosine" else 1 - progress
    lowest = settings.min_lr / (settings.learning_rate or 1.0)  # both may be 0
    return lowest + (1 - lowest) * height


def set_learning_rates(run: "Run", step: int) -> float:
    """Give each optimizer its learning rate for a step; return AdamW's."""
    settings, share = run.settings, schedule(step, run.settings)
    for optimizer in run.optimizers:
        peak = (isinstance(optimizer, Muon) and settings.muon_learning_rate) or settings.learning_rate
        for group in optimizer.param_groups:
            group["lr"] = share * peak
    return share * settings.learning_rate


# ---- ranks: one process a device, each with the whole model and its share of the batch


@dataclass
class Ranks:
    """This process among those that train together."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def least(self, value: int) -> int:
        """The smallest `value` that a rank has, agreed on between the processors without waiting for a GPU."""
        if self.world_size > 1:
            agreed = torch.tensor(int(value))
            dist.all_reduce(agreed, dist.ReduceOp.MIN)
            return int(agreed)
        return int(value)

    def any(self, flag: bool) -> bool:
        """Whether any rank has `flag` set."""
        return self.least(not flag) == 0

    def share_out(self, function, batch: torch.Tensor) -> torch.Tensor:
        """function(batch), of which each rank computes its share of the batch."""
        if self.world_size == 1:
            return function(batch)
        count = math.ceil(len(batch) / self.world_size)
        places = torch.arange(count, device=batch.device) + self.rank * count
        mine = function(batch[places % len(batch)]).contiguous()  # past the end some are computed twice
        whole = mine.new_empty(count * self.world_size, *mine.shape[1:])
        dist.all_gather_into_tensor(whole, mine)
        return whole[: len(batch)]

    def first_alone(self, task):
        """Have rank 0 do `task` while the others wait. Where it fails, all of them end, and rank 0 says why."""
        failure = None
        if self.rank == 0:
            try:
                task()
            except (Failure, OSError) as error:
                failure = error
        if self.any(failure is not None):
            raise failure or Failure("")


@contextlib.contextmanager
def start_ranks(device_name: str):
    """Yield this process's Ranks; torchrun sets RANK, WORLD_SIZE and LOCAL_RANK."""
    rank, world_size, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = config.find_device(device_name)
    if device.type == "cuda":
        wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if wanted > there:
            raise Failure(
                f"{wanted} processes on this machine want a GPU each, and it has {there}: lower --nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size <= 1:
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, world_size, device)
        if device.type == "cpu":
            dist.barrier()  # a process that ends while gloo's threads still free its last message can be aborted
    finally:
        dist.destroy_process_group()


# ---- what the device decides


def resolve_auto(settings: TrainConfig, ranks: Ranks, saved: dict | None) -> TrainConfig:
    """Replace the settings that say auto, with what they were where the run goes on from a checkpoint."""
    device = ranks.device.type
    if device == "cpu":
        keep_freed_memory()
    before = saved["settings"] if saved and saved["settings"]["device"] == device else {}
    dtype, compiled = settings.dtype, settings.compile
    if dtype == "auto":
        dtype = before.get("dtype") or ("float32" if ranks.any(not fast_in_bfloat16(ranks.device)) else "bfloat16")
    if compiled == "auto":
        compiled = before.get("compile") or ("on" if device == "cuda" and can_compile() else "off")
    return replace(settings, device=device, dtype=dtype, compile=compiled)


def can_compile() -> bool:
    """Whether torch.compile has what it needs on an NVIDIA GPU: triton, a C compiler, and a chip not too old."""
    compiler = any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    triton = importlib.util.find_spec("triton") is not None
    return compiler and triton and torch.cuda.get_device_capability() >= (7, 0)


def keep_freed_memory():
    """Have glibc keep freed memory for the next micro-step; asking for the same pages anew costs a small model on a CPU
    a quarter of its speed. Other C libraries do without."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: blocks up to its largest value come from the heap,
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which is never given back


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for bfloat16; a CPU, whether it multiplies in it at twice the rate, timed."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for dtype in [torch.float32, torch.bfloat16] * 3:
        x = torch.ones(512, 512, dtype=dtype)
        started = time.perf_counter()
        x @ x
        best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.bfloat16] < best[torch.float32] / 2


def fitting_micro_batch_size(model: GPT, settings: TrainConfig, ranks: Ranks) -> int:
    """The most sequences, a divisor of this rank's share of a step, whose forward and backward fit the device.

    Tried uncompiled, which needs more memory than compiled, with room kept for the optimizer's two moments and the
    gradients' copy that data parallelism sends. A CPU runs fastest out of its caches: about 1,024 tokens at once.
    """
    share = settings.batch_tokens // settings.block_size // ranks.world_size
    most = max(1, (65536 if ranks.device.type == "cuda" else 1024) // settings.block_size)
    sizes = [size for size in range(min(share, most), 0, -1) if share % size == 0]
    fitting = sizes[0] if ranks.device.type != "cuda" else next((s for s in sizes if fits(model, settings, s)), 0)
    fitting = ranks.least(fitting)
    if not fitting:
        raise Failure("not one sequence fits this device; try --activation_checkpointing=True or a smaller block_size")
    return fitting


def fits(model: GPT, settings: TrainConfig, sequences: int) -> bool:
    """Whether a forward and a backward of so many sequences fit the GPU's memory, beside what comes later."""
    device = model.wte.weight.device
    try:
        reserve = torch.empty(12 * sum(p.numel() for p in model.parameters()), dtype=torch.uint8, device=device)
        tokens = torch.zeros(sequences, settings.block_size, dtype=torch.int64, device=device)
        with autocast(settings):
            loss = model(tokens, tokens)
        loss.backward()
        del reserve
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def autocast(settings: TrainConfig):
    """Matrix products in bfloat16 where dtype says so; weights, norms and the loss stay in float32."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == "bfloat16")


PEAK_TFLOPS = {  # dense bfloat16, by the vendors' datasheets; the first name found in the device's own counts
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165,
}


def peak_flops(settings: TrainConfig) -> float:
    """FLOP/s that the device could do at most; 0 where it isn't known."""
    if settings.device != "cuda" or settings.dtype != "bfloat16":
        return 0.0
    name = torch.cuda.get_device_name()
    return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if key in name), 0.0)


def memory_gib(device: torch.device) -> float:
    """The most memory this process has held, on its GPU or else in all; 0 where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---- the run: what the loop works on


@dataclass
class Run:
    """A run at some step: what `main` puts together and `train` moves on."""

    settings: TrainConfig
    ranks: Ranks
    dataset: prepare_data.Dataset
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    step: int = 0  # optimizer steps done
    best_val_loss: float = math.inf
    val_loss: float = math.inf  # of the newest evaluation

    @property
    def folder(self) -> Path:
        return Path(self.settings.out_dir)

    @property
    def micro_steps(self) -> int:
        """Forward and backward passes of a rank in one optimizer step."""
        settings = self.settings
        return settings.batch_tokens // (settings.block_size * settings.micro_batch_size * self.ranks.world_size)

    @property
    def bits_per_byte(self) -> float:
        """The validation loss for each byte of text, which makes tokenizers comparable; nan where no manifest says."""
        return self.val_loss / math.log(2) * self.dataset.val_tokens_per_byte()

    @property
    def perplexity(self) -> float:
        """How many equally likely tokens the model is, on average, undecided between."""
        return math.exp(min(self.val_loss, 700))  # more is beyond what a float holds

    def say(self, text: str):
        if self.ranks.rank == 0:
            print(text, flush=True)

    def record(self, **values):
        """Append one line to metrics.jsonl."""
        if self.ranks.rank == 0:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


def open_dataset(settings: TrainConfig, ranks: Ranks) -> prepare_data.Dataset:
    """Open the dataset, prepared first where it is a missing one that we know how to make in little time."""
    folder = Path(settings.data_dir) / settings.dataset

    def prepare_if_missing():
        if folder.exists():
            return
        script, named = Path(prepare_data.__file__), prepare_data.NAMED.get(settings.dataset)
        if not named or named.repository:
            source = "" if named else " --source=PATH"
            raise Failure(f"{folder} does not exist; make it: python {script.name} {settings.dataset}{source}")
        command = [sys.executable, str(script), settings.dataset, f"--data_dir={settings.data_dir}"]
        if code := subprocess.run(command).returncode:  # a process of its own: its workers need no torch
            raise Failure(f"the dataset {settings.dataset} could not be made", code)

    ranks.first_alone(prepare_if_missing)
    return prepare_data.Dataset(folder, settings.block_size, settings.tokenizer)


def model_config(settings: TrainConfig, vocab_size: int) -> GPTConfig:
    """The shape of a new model."""
    shape = {field.name: getattr(settings, field.name) for field in fields(GPTConfig) if field.name != "vocab_size"}
    return GPTConfig(vocab_size=vocab_size, **shape)


def build_model(settings: TrainConfig, dataset: prepare_data.Dataset, saved: dict | None) -> GPT:
    """The model as a checkpoint has it, as a Hugging Face folder has it, or new."""
    vocab_size = dataset.encoding.n_vocab
    if saved:
        model = checkpoint.restore_model(saved, Path(settings.out_dir) / "latest.pt")
    elif settings.init_from == "scratch":
        torch.manual_seed(settings.seed)  # the same weights on any device: they are drawn on the CPU
        model = GPT(model_config(settings, vocab_size))
    else:
        model = fetched_model(settings, dataset)
    model.activation_checkpointing = settings.activation_checkpointing
    return model


def fetched_model(settings: TrainConfig, dataset: prepare_data.Dataset) -> GPT:
    """The model to fine-tune. Raises Failure where it or its tokenizer doesn't fit the settings and the dataset."""
    name, encoding = settings.init_from, dataset.encoding
    folder = prepare_data.fetch_model(name)
    if prepare_data.has_tokenizer(folder):
        tokenizer = prepare_data.load_hf_tokenizer(folder, name)
        if not prepare_data.same_tokens(tokenizer, encoding):
            raise Failure(
                f"dataset {settings.dataset} has the tokenizer {encoding.name}, and {name} was trained with another; "
                f"make it anew: python prepare_data.py NAME --source=PATH --tokenizer={name}"
            )
    try:
        model = load_hf(folder, dropout=settings.dropout)
    except (OSError, ValueError) as error:
        raise Failure(f"init_from {name} is no model that can be read: {error}") from None
    if model.config.vocab_size < encoding.n_vocab or model.config.block_size < settings.block_size:
        raise Failure(
            f"{name} has {model.config.vocab_size} tokens and contexts of {model.config.block_size}; "
            f"dataset {settings.dataset} has {encoding.n_vocab} tokens, and block_size is {settings.block_size}"
        )
    return model


def start_run(settings: TrainConfig, ranks: Ranks, dataset: prepare_data.Dataset) -> Run:
    """The run at its first step, or where its checkpoint left it."""
    saved = checkpoint.load(Path(settings.out_dir) / "latest.pt") if settings.init_from == "resume" else None
    if saved and "optimizers" not in saved:
        message = f"{settings.out_dir} was written by an older version, and only sample.py still reads it"
        raise Failure(message, NO_CHECKPOINT)
    if saved:
        check_same_run(saved, settings, dataset)
    settings = resolve_auto(settings, ranks, saved)
    model = build_model(settings, dataset, saved).to(ranks.device)
    if not settings.micro_batch_size:
        alike = ("device", "activation_checkpointing")
        same_share = saved and saved["world_size"] == ranks.world_size
        same_share = same_share and all(saved["settings"][name] == getattr(settings, name) for name in alike)
        found = (
            saved["settings"]["micro_batch_size"] if same_share else fitting_micro_batch_size(model, settings, ranks)
        )
        settings = replace(settings, micro_batch_size=found)
    run = Run(settings, ranks, dataset, model, make_optimizers(model, settings, ranks))
    if saved:
        for optimizer, state in zip(run.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        run.step, run.best_val_loss, run.val_loss = saved["step"], saved["best_val_loss"], saved["val_loss"]
    return run


def check_same_run(saved: dict, settings: TrainConfig, dataset: prepare_data.Dataset):
    """The rules of resume.

    1. The model, the data and their order are the run's own: whatever shapes them must be as it was.
    2. Weights, the optimizers' moments, the step and the best loss come from latest.pt; the order of the data and
       dropout follow from the seed and the step. So on the same machine the run goes on bit for bit as if it never
       stopped.
    3. How fast and how long it goes on is free: max_steps, learning rates and their schedule, micro_batch_size, ranks,
       dtype, intervals.
       Whatever of these is auto, or 0, stays what it was found to be.
    """
    same = "arch n_layer n_head n_embd block_size dropout bias n_kv_head head_size intermediate_size rope_theta "
    same += "tie_embeddings batch_tokens seed optimizer weight_decay beta1 beta2 muon_momentum"
    differing = [
        f"{name} (was {saved['settings'][name]}, now {getattr(settings, name)})"
        for name in same.split()
        if saved["settings"][name] != getattr(settings, name)
    ]
    if saved["tokenizer"]["text"] != prepare_data.write_tokenizer(dataset.encoding):
        differing.append(f"tokenizer (was {saved['tokenizer']['name']}, now {dataset.encoding.name})")
    if saved["dataset"] != dataset.fingerprint():
        differing.append(f"the files of dataset {settings.dataset} (was {saved['settings']['dataset']})")
    if saved["step"] > settings.max_steps:
        raise Failure(f"{settings.out_dir} is at step {saved['step']} already; max_steps is {settings.max_steps}")
    if differing:
        raise Failure(
            f"{settings.out_dir} can't go on with another {', '.join(differing)};\n"
            f"set them as they were, or start a new run with another --out_dir"
        )


def save_checkpoint(run: Run, name: str):
    """Write a checkpoint; best.pt goes without the optimizer, it is for sampling."""
    state = {
        "step": run.step,
        "world_size": run.ranks.world_size,
        "val_loss": run.val_loss,
        "best_val_loss": run.best_val_loss,
        "settings": asdict(run.settings),
        "model_config": asdict(run.model.config),
        "model": run.model.state_dict(),
        "tokenizer": {"name": run.dataset.encoding.name, "text": prepare_data.write_tokenizer(run.dataset.encoding)},
        "dataset": run.dataset.fingerprint(),
    }
    if name == "latest.pt":
        state["optimizers"] = [optimizer.state_dict() for optimizer in run.optimizers]
    run.ranks.first_alone(lambda: checkpoint.save(run.folder / name, state))


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl; one that a killed run left half-written ends them."""
    records = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            records.append(json.loads(line))
    return records


def refuse_to_overwrite(settings: TrainConfig):
    latest, best = ((Path(settings.out_dir) / name).exists() for name in ("latest.pt", "best.pt"))
    if (latest or best) and settings.init_from != "resume" and not settings.overwrite:
        raise Failure(
            f"{settings.out_dir} holds a run already; {'go on with it: --init_from=resume, ' if latest else ''}"
            f"keep it: --out_dir=ANOTHER, lose it: --overwrite=True"
        )


def clear_folder(run: Run):
    """Leave in the run's folder what it goes on from: nothing, or its checkpoint and the log up to there."""
    if run.settings.init_from != "resume":
        for name in ("latest.pt", "best.pt", "metrics.jsonl", "loss.png"):
            (run.folder / name).unlink(missing_ok=True)
    else:
        kept = [record for record in read_metrics(run.folder) if record["step"] <= run.step]
        with checkpoint.atomic_file(run.folder / "metrics.jsonl") as file:
            file.write("".join(json.dumps(record) + "\n" for record in kept).encode())


# ---- evaluation


@torch.no_grad()
def evaluate(run: Run) -> float:
    """The mean loss, in nats per token, on a fixed set of windows, spread evenly over the validation text."""
    settings, ranks, windows = run.settings, run.ranks, run.dataset.val
    count = min(len(windows), max(1, settings.eval_tokens // settings.block_size))
    chosen = np.linspace(0, len(windows) - 1, count).round().astype(np.int64)[ranks.rank :: ranks.world_size]
    total, scored = 0.0, 0
    run.model.eval()
    for start in range(0, len(chosen), settings.micro_batch_size):
        indices = chosen[start : start + settings.micro_batch_size]
        rows = np.resize(indices, settings.micro_batch_size)  # a last batch of full size, so that nothing recompiles
        tokens, targets = to_device(windows[rows], ranks.device)
        targets[len(indices) :] = -1  # what repeats in it does not count
        with autocast(settings):
            loss = run.model(tokens, targets)
        total += loss.item() * len(indices)
        scored += len(indices)
    run.model.train()
    total, scored = ranks.sum(torch.tensor([total, scored], dtype=torch.float64)).tolist()
    return total / scored


def update_val_loss(run: Run):
    """Evaluate, log it, and keep the weights where they are the best yet."""
    run.val_loss = evaluate(run)
    check_finite(run, run.val_loss)
    bits = {"bits_per_byte": run.bits_per_byte} if math.isfinite(run.bits_per_byte) else {}
    run.record(step=run.step, val_loss=run.val_loss, **bits)
    run.say(f"step {run.step:>6,} | validation loss {run.val_loss:.4f}, perplexity {run.perplexity:.2f}")
    if run.val_loss < run.best_val_loss:
        run.best_val_loss = run.val_loss
        save_checkpoint(run, "best.pt")


def check_finite(run: Run, *values: float):
    """Stop before numbers that are lost reach a checkpoint."""
    if not all(math.isfinite(value) for value in values):
        raise Failure(
            f"step {run.step}: loss, or loss and gradient norm, are {', '.join(map(str, values))}: no longer finite;\n"
            f"the checkpoints in {run.folder} are from before. Try a lower --learning_rate or more --warmup_steps",
            NOT_FINITE,
        )


# ---- the loop


@contextlib.contextmanager
def stop_requests():
    """Yield a list that fills when Ctrl-C or a SIGTERM asks for an end; a second Ctrl-C ends at once."""
    requests = []

    def remember(number, frame):
        requests.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Meter:
    """Measures the speed between two lines of the log. Evaluations and checkpoints don't count for it, but do count
    for the time left; the first step, which compiles, counts for neither."""

    def __init__(self, run: Run):
        self.run, self.peak = run, peak_flops(run.settings)
        self.flops_per_token = run.model.flops_per_token(run.settings.block_size)
        self.first_step = self.first_time = self.last_step = self.last_time = None

    def pause(self, seconds: float):
        if self.last_time:
            self.last_time += seconds

    def log(self, loss: float, grad_norm: float, learning_rate: float):
        """Print a line on the step just done and append it to metrics.jsonl."""
        run, max_steps, now = self.run, self.run.settings.max_steps, time.monotonic()
        record = {"step": run.step, "loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        parts = [f"step {run.step:>6,} of {max_steps:,} | loss {loss:.4f}"]
        if self.first_time is None:
            self.first_step, self.first_time = run.step, now
        else:
            speed = (run.step - self.last_step) * run.settings.batch_tokens / (now - self.last_time)
            record["tokens_per_second"] = speed
            parts.append(f"{speed:,.0f} tokens/s")
            if self.peak:
                record["share_of_peak"] = speed * self.flops_per_token / (self.peak * run.ranks.world_size)
                parts.append(f"{record['share_of_peak']:.1%} of peak")
            left = (now - self.first_time) / (run.step - self.first_step) * (max_steps - run.step)
            parts.append(f"{timedelta(seconds=round(left))} left")
        if memory := memory_gib(run.ranks.device):
            record["memory_gib"] = memory
            parts.append(f"{memory:.1f} GiB")
        self.last_step, self.last_time = run.step, now
        run.record(**record)
        run.say(" | ".join(parts))


def train(run: Run) -> bool:
    """Train until max_steps; return False where a request to stop came first. Either way latest.pt is up to date."""
    settings, ranks, windows = run.settings, run.ranks, run.dataset.train
    if settings.compile == "on":
        run.say("compiling: the first step can take a minute")
        run.model.compile()
    parallel = DistributedDataParallel(run.model, broadcast_buffers=False) if ranks.world_size > 1 else run.model
    meter, start_step, grad_norm = Meter(run), run.step, None
    batch = micro_batch(windows, settings, ranks, start_step, 0)
    with stop_requests() as requests:
        for step in range(start_step, settings.max_steps + 1):  # the last pass only evaluates and saves
            stop = ranks.any(bool(requests))
            last = stop or step == settings.max_steps
            if step > start_step:
                paused = time.monotonic()
                if step % settings.eval_interval == 0 or step == settings.max_steps:
                    update_val_loss(run)
                if step % settings.checkpoint_interval == 0 or last:
                    check_finite(run, grad_norm.item())
                    save_checkpoint(run, "latest.pt")
                meter.pause(time.monotonic() - paused)
            if last:
                return not stop

            learning_rate = set_learning_rates(run, step)
            if settings.dropout:
                torch.manual_seed(hashed(settings.seed, step, ranks.rank))
            step_loss = torch.zeros((), device=ranks.device)
            for micro_step in range(run.micro_steps):
                # DistributedDataParallel averages the gradients over the ranks, once, in the last backward
                parallel.require_backward_grad_sync = micro_step == run.micro_steps - 1
                with autocast(settings):
                    loss = parallel(*batch) / run.micro_steps
                # the next batch, fetched while the device is at work; after the last micro-step the next step's first
                batch = micro_batch(windows, settings, ranks, step, micro_step + 1)
                loss.backward()
                step_loss += loss.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), settings.grad_clip or math.inf)
            for optimizer in run.optimizers:
                optimizer.step()
            run.model.zero_grad()
            run.step = step + 1
            if run.step % settings.log_interval == 0 or step == start_step:  # the only wait for the device
                loss_now, norm_now = (ranks.sum(step_loss) / ranks.world_size).item(), grad_norm.item()
                check_finite(run, loss_now, norm_now)
                meter.log(loss_now, norm_now, learning_rate)


def introduce(run: Run):
    settings, dataset = run.settings, run.dataset
    parameters = sum(p.numel() for p in run.model.parameters())
    flops = run.model.flops_per_token(settings.block_size)
    run.say(
        f"model: {parameters / 1e6:.1f}M parameters, {flops / 1e6:,.0f} MFLOP a token\n"
        f"data: {dataset.train.tokens():,} training tokens of {settings.dataset}; "
        f"{settings.max_steps:,} steps of {settings.batch_tokens:,} are "
        f"{settings.max_steps * settings.batch_tokens / dataset.train.tokens():.2f} epochs\n"
        f"batch: {settings.micro_batch_size} sequences of {settings.block_size} x {run.micro_steps} micro-steps x "
        f"{run.ranks.world_size} ranks, on {settings.device} in {settings.dtype}"
    )


def report(run: Run):
    """Say what the run reached, draw its curve, and let the model speak."""
    if run.ranks.rank:
        return
    print(f"\nvalidation loss {run.val_loss:.4f} nats a token, perplexity {run.perplexity:.2f}")
    if math.isfinite(run.bits_per_byte):
        compressors = run.dataset.manifest["splits"]["val"].get("compressed_bits_per_byte", {})
        others = "".join(f"; {name} needs {bits:.3f}" for name, bits in compressors.items())
        print(f"{run.bits_per_byte:.3f} bits per byte of validation text{others}")
    draw_losses(run.folder)
    path = run.folder / "latest.pt"
    print(f"checkpoint: {path}\nto sample from it: python sample.py --checkpoint={path}", flush=True)
    if run.settings.sample_prompt:
        if run.settings.device == "cuda":
            torch.cuda.empty_cache()  # the other process needs some
        script = str(Path(__file__).with_name("sample.py"))
        options = [f"--prompt={run.settings.sample_prompt}", "--max_new_tokens=120", f"--device={run.settings.device}"]
        subprocess.run([sys.executable, script, f"--checkpoint={path}", *options], check=False)


def draw_losses(folder: Path):
    """Draw the curves of metrics.jsonl as loss.png, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("for a picture of the loss: pip install matplotlib, then go on with --init_from=resume")
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a token", title=folder.name)
    records = read_metrics(folder)
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(record["step"], record[key]) for record in records if key in record]
        axes.plot(*zip(*points), style, label=label, linewidth=1)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=120)
    print(f"the loss by step is drawn in {folder / 'loss.png'}")


def main(settings: TrainConfig):
    """A run from its data to its report. Raises Failure."""
    refuse_to_overwrite(settings)
    with start_ranks(settings.device) as ranks, contextlib.ExitStack() as held:
        if settings.fine_tunes():  # before a dataset is made: what it lacks shows at once
            ranks.first_alone(lambda: prepare_data.fetch_model(settings.init_from))
        dataset = open_dataset(settings, ranks)
        lock = Path(settings.out_dir) / "lock"
        in_use = f"{settings.out_dir} is in use by another run; choose another --out_dir"
        ranks.first_alone(lambda: held.enter_context(checkpoint.locked(lock, in_use)))
        ranks.first_alone(lambda: refuse_to_overwrite(settings))  # again, now that no other run can come between
        run = start_run(settings, ranks, dataset)
        ranks.first_alone(lambda: clear_folder(run))
        introduce(run)
        if train(run):
            report(run)
        else:
            run.say(f"stopped at step {run.step}; to go on: the same command with --init_from=resume")


if __name__ == "__main__":
    with config.exit_codes():
        try:
            main(settings)
        except torch.OutOfMemoryError:
            advice = "a smaller --micro_batch_size or --activation_checkpointing=True needs less"
            raise Failure(f"the GPU's memory is full; {advice}") from None
