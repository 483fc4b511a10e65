"""What this machine can do: its device, number types, compiler, peak speed and memory."""

import contextlib
import ctypes
import importlib.util
import math
import re
import sys

import torch

from config import FULL, Failure

# Dense bfloat16 products (NO_BFLOAT16: float16) with sums in fp32, by the vendor's datasheets and
# white papers. The first that is a whole word of the device's name counts.
PEAK_TFLOPS = {"B200": 2250, "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756}
PEAK_TFLOPS |= {"H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "T4": 65}
PEAK_TFLOPS |= {"V100-SXM2": 125, "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71}
TWICE_IN_FLOAT8 = "B200 H200 H100 L40S L4"  # GeForce's rate depends on how products are summed
NO_BFLOAT16 = r"\b(T4|V100)\b"
SHARE_OF_PEAK = 0.4  # that hours are estimated with; docs/results.md has measured ones
SLOWER_KINDS = r"Laptop|Max-Q|MIG|-\d+[QC]"  # half the card's name, or a part of a card


def find_device(name: str) -> torch.device:
    """The device of a `device` setting: auto is cuda, else mps, else cpu. Raises Failure."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    is_available = {"cuda": cuda, "mps": mps, "cpu": True}
    if name == "auto":
        name = next(device for device in is_available if is_available[device])
    if not is_available[name]:
        hint = "--device=auto takes what there is"
        raise Failure(f"device {name}: torch {torch.__version__} finds none here; {hint}")
    return torch.device(name)


def best_dtype(device: torch.device) -> str:
    """bfloat16 on a GPU that has units for it, float16 on one from before, float32 elsewhere."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0):
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def best_training_dtype(device: torch.device) -> str:
    """The same, but bfloat16 also on a CPU with AVX512-BF16: products are twice as fast there."""
    has_units = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # private in torch
    return "bfloat16" if device.type == "cpu" and has_units() else best_dtype(device)


def check_dtype(dtype: str, device: torch.device, block_size: int):
    """Raise Failure where float8 cannot be had: it needs a card, a package and multiples of 16."""
    if dtype != "float8":
        return
    capability = torch.cuda.get_device_capability() if device.type == "cuda" else (0, 0)
    if capability < (8, 9):
        name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        raise Failure(f"dtype float8 needs an NVIDIA GPU like L4, H100 or newer; this is {name}")
    try:
        importlib.import_module("torchao.float8")
    except ImportError as error:
        raise Failure(f"dtype float8 needs a package: pip install torchao ({error})") from None
    if block_size % 16:
        raise Failure(f"dtype float8 needs a block_size that is a multiple of 16, not {block_size}")


def set_dtype(model, dtype: str, device: torch.device):
    """Have a model compute in a `dtype` of `train.py`; its weights stay in fp32. Raises Failure.

    float8 (Micikevicius et al. 2022) is bfloat16 but for the products of the blocks' matrices: each
    operand has one scale, from its largest value. The head stays in bfloat16.
    """
    model.dtype = torch.bfloat16 if dtype == "float8" else getattr(torch, dtype)
    if dtype == "float8":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        for name, weight in model.h.named_parameters():
            if weight.dim() == 2 and (weight.size(0) % 16 or weight.size(1) % 16):
                widths = f"{name} is {weight.size(0)} x {weight.size(1)}"
                raise Failure(f"dtype float8 needs widths that are multiples of 16; {widths}")
        settings = Float8LinearConfig(emulate=device.type != "cuda")  # which is slow
        convert_to_float8_training(model, module_filter_fn=is_for_float8, config=settings)


def is_for_float8(_, name: str) -> bool:
    return name.startswith("h.")


def choose_compile(device: torch.device, dtype: str, flops: float) -> str:
    """What to compile for a run of so many FLOPs: model, blocks or off.

    The whole model is faster than its blocks, but takes longer to compile: it pays in runs of more
    than about 20 minutes. Without an NVIDIA GPU that triton knows nothing is compiled.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if device.type != "cuda" or not has_triton or torch.cuda.get_device_capability() < (7, 0):
        return "off"
    seconds = flops / (SHARE_OF_PEAK * peak_flops(device, dtype) or math.inf)
    return "model" if seconds > 1200 else "blocks"


def keep_freed_memory():
    """Have glibc keep freed memory: asking again costs a small model a quarter of its speed."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, its maximum: blocks come from the heap,
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which is never given back


def peak_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s that the device reaches at most; 0 where the table does not have it."""
    return named_peak_flops(torch.cuda.get_device_name(), dtype) if device.type == "cuda" else 0.0


def named_peak_flops(name: str, dtype: str) -> float:
    """The same for a card's name, as in "H100" or "NVIDIA A100-SXM4-80GB"."""
    found = (key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b(?! Ti| D)", name))
    card = next(found, None)
    if card is None or dtype == "float32" or re.search(SLOWER_KINDS, name):
        return 0.0
    if dtype == "float8":
        return 2e12 * PEAK_TFLOPS[card] if card.split()[0] in TWICE_IN_FLOAT8.split() else 0.0
    return 1e12 * PEAK_TFLOPS[card]


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB, on its GPU or else in all."""
    import resource  # not on native Windows

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes, or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def fitting_micro_batch_size(model, sequences: int, block_size: int) -> int:
    """The largest of `micro_batch_sizes` whose forward and backward fit; 0 where not even 1 does.

    Tried uncompiled, which needs more memory than compiled.
    """
    is_cuda = model.wte.weight.is_cuda
    sizes = micro_batch_sizes(sequences, block_size, is_cuda)
    return next((size for size in sizes if not is_cuda or fits(model, size, block_size)), 0)


def micro_batch_sizes(sequences: int, block_size: int, is_gpu: bool) -> list[int]:
    """The divisors of a rank's sequences in a step that are worth trying, the largest first.

    A GPU gets at most 65,536 tokens. A CPU is fastest within its caches: at about 1,024 tokens.
    """
    max_size = min(sequences, max(1, (65536 if is_gpu else 1024) // block_size))
    return [size for size in range(max_size, 0, -1) if sequences % size == 0] or [1]


@contextlib.contextmanager
def naming_less_memory(settings: dict):
    """Where memory is full inside, raise Failure with the settings that need less, and values."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if re.search(FULL, repr(error)):
            raise Failure(f"memory is full; {less_memory(settings)}") from None
        raise


def less_memory(settings: dict) -> str:
    """What to set where these settings of train.py need more memory than there is."""
    size, recompute = settings["micro_batch_size"], settings["activation_checkpointing"]
    changes = [f"--micro_batch_size={n}" for n in range(size // 2, 0, -1) if size % n == 0][:1]
    if recompute != "full":
        more = "selective" if recompute == "off" else "full"
        changes.append(f"--activation_checkpointing={more}")
    now = f"micro_batch_size is {size}, activation_checkpointing {recompute}"
    return f"{' or '.join(changes or ['a smaller --block_size'])} needs less ({now})"


def fits(model, sequences: int, block_size: int) -> bool:
    """Whether a forward and a backward fit the GPU, beside the optimizer's two moments."""
    device = model.wte.weight.device
    try:
        bytes_kept = 8 * sum(parameter.numel() for parameter in model.parameters())
        reserve = torch.empty(bytes_kept, dtype=torch.uint8, device=device)
        tokens = torch.zeros(sequences, block_size, dtype=torch.int64, device=device)
        model(tokens, tokens).mean().backward()
        del reserve
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
