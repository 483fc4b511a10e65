"""Checkpoints: files that prove their own integrity, and hold a model with its tokenizer.

A checkpoint holds nested dicts and lists of tensors and plain types only, so nothing in it can run
code. A run's folder has `latest.pt`, with the optimizers' state, and `best.pt`, without.
"""

import hashlib
import os
import pickle
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import files
import hf
from config import NO_CHECKPOINT, Failure
from model import GPT, GPTConfig
from tokenizer import Tokenizer
from tokenizer_files import HF_FILES, load_hf_tokenizer

FORMAT_VERSION = 1  # a checkpoint without one is older; this version reads these, too


def save(path: Path, state: dict):
    """Write `state` with its checksum. Raises OSError, and then leaves the file that was there."""
    with files.atomic_file(path) as file:
        try:
            torch.save(state | {"checksum": checksum(state)}, file)
        except RuntimeError as error:  # torch hides the system's reason, mostly a full disk
            raise OSError(f"{path} was not written; is the disk full? ({error!r:.200})") from None


def load(path: Path) -> dict:
    """Read what `save` wrote, tensors on the CPU. Raises Failure where it is missing or damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Failure(f"there is no checkpoint {path}", NO_CHECKPOINT) from None
    except pickle.UnpicklingError:  # its text says how to run the code inside
        raise Failure(f"{path} is damaged or holds more than plain data", NO_CHECKPOINT) from None
    except Exception as error:  # torch raises many types for a cut, changed or foreign file
        reason = f"is damaged or no checkpoint: {error!r:.200}"
        raise Failure(f"{path} {reason}", NO_CHECKPOINT) from None
    if not isinstance(state, dict) or state.pop("checksum", "none") != checksum(state):
        raise Failure(f"{path} is damaged: it does not match its checksum", NO_CHECKPOINT)
    version = state.get("format_version", 0)
    if version not in range(FORMAT_VERSION + 1):
        message = f"{path} has format_version {version}; this version reads {FORMAT_VERSION}"
        raise Failure(message, NO_CHECKPOINT)
    return state


def checksum(state) -> str:
    """SHA-256 over every name and value in `state`, tensors by type, shape and bytes."""
    digest = hashlib.sha256()

    def visit(value):
        if isinstance(value, dict):
            for key in value:
                digest.update(f"{key!r}:".encode())
                visit(value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)} items:".encode())
            for item in value:
                visit(item)
        elif isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}:".encode())
            data = value.detach().cpu().contiguous().reshape(-1)
            digest.update(data.view(torch.uint8).numpy())
        else:
            digest.update(f"{value!r};".encode())

    visit(state)
    return digest.hexdigest()


def model_state(model: GPT, tokenizer: Tokenizer) -> dict:
    """The part of a checkpoint from which `restore_model` and `restore_tokenizer` rebuild both."""
    return {
        "format_version": FORMAT_VERSION,
        "model_config": asdict(model.config),
        "model": model.state_dict(),
        "tokenizer": tokenizer.record() | {"text": tokenizer.to_text()},
    }


def restore_model(state: dict, path: Path) -> GPT:
    """The model of a loaded checkpoint; `path` is for the message of a Failure."""
    try:
        model = GPT(GPTConfig(**state["model_config"]))
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise Failure(f"{path} does not fit this version: {error!r:.200}", NO_CHECKPOINT) from None
    return model


def restore_tokenizer(state: dict) -> Tokenizer:
    """The tokenizer of a loaded checkpoint."""
    return Tokenizer.from_record(state["tokenizer"], state["tokenizer"]["text"])


def open_model(name: str, out_dir: str) -> tuple[GPT, Tokenizer]:
    """The model that `name` means, and its tokenizer. Raises Failure.

    name: a .pt file, a run's folder, "" for the newest run in out_dir, a folder in Hugging Face's
    layout, or a model on the Hub. What was opened is printed to standard error.
    """
    path = Path(os.path.expanduser(name))
    is_on_hub = name in files.HUB_NAMES or (files.hub_repo(name) and not path.parent.is_dir())
    if name and ((path / "config.json").exists() or (is_on_hub and not path.exists())):
        return open_hf(name)
    if not path.is_file() and path.suffix != ".pt":
        path = newest_checkpoint(path if name else None, out_dir)
    state = load(path)
    model, tokenizer = restore_model(state, path), restore_tokenizer(state)
    loss = f", validation loss {state['val_loss']:.4f} at step {state.get('val_step', '?')}"
    print(f"{path}: step {state['step']}{loss}", file=sys.stderr)
    return model, tokenizer


def hf_folder(name: str) -> Path:
    """The folder of a model in Hugging Face's layout, downloaded where it is on the Hub."""
    return files.model_folder(name, hf.FILES + HF_FILES, hf.is_complete)


def open_hf(name: str, dropout: float = 0.0) -> tuple[GPT, Tokenizer]:
    """A model in Hugging Face's layout and its tokenizer. Raises Failure."""
    folder = hf_folder(name)
    model, tokenizer = hf.load(folder, dropout), load_hf_tokenizer(folder, name)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {count / 1e6:.0f}M parameters", file=sys.stderr)
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} entries, the model {model.config.vocab_size}"
        raise Failure(f"{folder}: the tokenizer has {sizes}: they do not belong together")
    return model, tokenizer


def newest_checkpoint(run: Path | None, out_dir: str) -> Path:
    """The latest.pt of a run, or else its best.pt; without `run` the newest of all in out_dir."""
    checkpoints = []
    for folder in [run] if run else Path(os.path.expanduser(out_dir)).glob("*/"):
        checkpoints += list(folder.glob("latest.pt")) or list(folder.glob("best.pt"))
    if not checkpoints:
        hint = "train a model first: python train.py config/small.py"
        raise Failure(f"{run or out_dir}: there is no checkpoint in it; {hint}", NO_CHECKPOINT)
    return max(checkpoints, key=lambda file: file.stat().st_mtime)
