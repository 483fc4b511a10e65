"""Checkpoints: files that prove their own integrity, and hold a model with its tokenizer.

A checkpoint holds nested dicts and lists of tensors and plain types only, so nothing in it can run
code. A run's folder has `latest.pt`, with the optimizers' state, `previous.pt`, the latest.pt
before it, and `best.pt`, without the optimizers' state.
"""

import contextlib
import hashlib
import math
import pickle
import secrets
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import torch

import config
import files
import hf
from config import NO_CHECKPOINT, Failure
from model import GPT, GPTConfig
from tokenizer import Tokenizer
from tokenizer_files import HF_FILES, load_hf_tokenizer

FORMAT_VERSION = 1  # a checkpoint without one is older; this version reads these, too
MOMENTS = {"AdamW": ("exp_avg", "exp_avg_sq"), "Muon": ("momentum",)}
MOMENTS["ShardedMuon"] = MOMENTS["Muon"]
CHECKPOINT = {  # what each has at least, and of which type
    "model_config": dict,
    "model": dict,
    "tokenizer": {"name": str, "text": str},
    "step": int,
    "val_step": int,
    "val_loss": float,
    "best_val_loss": float,
    "settings": dict,
    "dataset": str,  # its fingerprint
    "world_size": int,
}


def save(path: Path, state: dict, backup: Path | None = None):
    """Write `state` with its checksum. Raises OSError, and then leaves the file that was there.

    backup: the new name of that file.
    """
    with files.atomic_file(path, backup) as file:
        try:
            torch.save(state | {"checksum": checksum(state)}, file)
        except RuntimeError as error:  # torch hides the system's reason, mostly a full disk
            raise OSError(f"{path} was not written; is the disk full? ({error!r:.200})") from None


def load(path: Path) -> dict:
    """Read what `save` wrote. Raises Failure where it is missing or damaged.

    Tensors are views of the file, which must not change; ranks of a host share its memory.
    """
    if not path.is_file():  # opening a pipe would wait
        raise Failure(f"there is no checkpoint {path}", NO_CHECKPOINT)
    try:
        state = read(path)
    except pickle.UnpicklingError:  # its text says how to run the code inside
        raise Failure(f"{path} is damaged or holds more than plain data", NO_CHECKPOINT) from None
    except Exception as error:  # torch raises many types for a cut, changed or foreign file
        reason = f"is damaged or no checkpoint: {error!r:.200}"
        raise Failure(f"{path} {reason}", NO_CHECKPOINT) from None
    files.check_version(path, state, FORMAT_VERSION, NO_CHECKPOINT)
    state.setdefault("val_step", state.get("step"))  # 0.1 had none
    if not files.has_layout(state, CHECKPOINT) or state["step"] < 0:
        raise Failure(f"{path} lacks an entry of a checkpoint", NO_CHECKPOINT)
    if isinstance(was := state["settings"].get("activation_checkpointing"), bool):  # in 0.1
        state["settings"]["activation_checkpointing"] = "full" if was else "off"
    return state


def read(path: Path) -> dict:
    """What `save` wrote, as views of the file. Raises errors of many types."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("it is compressed, or parts of it overlap")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if state.pop("checksum") != checksum(state):
        raise ValueError("it does not match its checksum")
    return state


def load_newest(folder: Path) -> dict:
    """The newest sound checkpoint of a run, as views of the file. Raises Failure if there is none.

    A newer, damaged one is renamed, so that the next save does not overwrite it.
    """
    damaged = []
    for path in saved(folder):
        try:
            state = load(path)
        except Failure as failure:
            damaged.append((path, failure))
            continue
        for bad, failure in damaged:
            aside = bad.with_name(f"{bad.name}.damaged.{secrets.token_hex(4)}")
            bad.rename(aside)
            hint = f"it is {aside.name} now, and the run continues from step {state['step']}"
            print(f"warning: {failure}; {hint}", file=sys.stderr, flush=True)
        return state
    reasons = "; ".join(str(failure) for _, failure in damaged)
    raise Failure(reasons or f"there is no checkpoint in {folder}", NO_CHECKPOINT)


def saved(folder: Path) -> list[Path]:
    """The checkpoints from which a run can continue, sound or not, the newest first."""
    return [path for path in (folder / "latest.pt", folder / "previous.pt") if path.exists()]


def checksum(state) -> str:
    """SHA-256 over every name and value in `state`, tensors by type, shape and bytes.

    Raises ValueError for a tensor that could take more memory than its file.
    """
    digest, items = hashlib.sha256(), iter(range(1_000_000))

    def visit(value):
        """Add a value, and all that it holds, to the digest."""
        next(items)  # fails at too many: lists that hold each other can be large in little space
        if isinstance(value, dict):
            for key in value:
                digest.update(f"{key!r}:".encode())
                visit(value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)} items:".encode())
            for item in value:
                visit(item)
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or not value.is_contiguous():
                raise ValueError("a tensor is not dense")
            digest.update(f"{value.dtype} {tuple(value.shape)}:".encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(f"{value!r};".encode())

    visit(state)
    return digest.hexdigest()


class Writer:
    """Writes checkpoints in the background, one after the other, while training changes the state.

    With "latest.pt" the one before becomes previous.pt; any other name is not needed to continue,
    so that a failure to write it is a warning.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.pool = ThreadPoolExecutor(1)
        self.futures = []
        config.BEFORE_EXIT.append(self.pool.shutdown)

    def reserve(self, tensors: list):
        """Allocate pinned memory for copies of GPU tensors in the background, a second per GB.

        The tensors made here are freed at once, and torch keeps their memory for the copies.
        """
        options = dict(device="cpu", pin_memory=True)
        self.pool.submit(lambda: len([torch.empty(t.shape, **options) for t in tensors]))

    def start(self, name: str, state: dict, started: float):
        """Copy the state, for which alone the caller waits, and write it. Two at most are held.

        started: when training began to wait for this.
        """
        wait(self.futures[:-1])
        state, copied = snapshot(state, {}), None
        if torch.cuda.is_initialized():
            copied = torch.cuda.Event()
            copied.record()
        waited = time.monotonic() - started
        self.futures.append(self.pool.submit(self.write, name, state, waited, copied))

    def write(self, name: str, state: dict, waited: float, copied):
        """Write a copied state and say how long it took. copied: the GPU's event after the copies.

        Raises OSError where latest.pt cannot be written.
        """
        started = time.monotonic()
        if copied:  # not all of the GPU's work, which can wait for a rank that has ended
            copied.synchronize()
        backup = self.folder / "previous.pt" if name == "latest.pt" else None
        try:
            save(self.folder / name, state, backup)
        except OSError as error:
            if name == "latest.pt":
                raise
            config.say(f"warning: {error}")
            return
        seconds = f"{time.monotonic() - started:.1f} s, training waited {waited:.1f} s"
        config.say(f"step {state['step']:>6,} | {name} written in {seconds}")

    def is_done(self) -> bool:
        return all(future.done() for future in self.futures)

    def has_failed(self) -> bool:
        return any(future.done() and future.exception() for future in self.futures)

    def finish(self):
        """Wait until all is written. Raises OSError where latest.pt could not be."""
        while self.futures:
            self.futures.pop().result()


def snapshot(value, copies: dict):
    """A copy of a state on the CPU. On a GPU the copies are queued before later updates.

    copies: by address. Tensors that share memory, as tied embeddings do, share it in the copy.
    """
    if isinstance(value, dict):
        return {key: snapshot(item, copies) for key, item in value.items()}
    if isinstance(value, list):
        return [snapshot(item, copies) for item in value]
    is_sharded = hasattr(value, "full_tensor")
    if not isinstance(value, torch.Tensor) and not is_sharded:
        return value
    key = ((value.to_local() if is_sharded else value).data_ptr(), value.shape)
    value = value.full_tensor() if is_sharded else value  # all ranks gather it
    if key not in copies:
        copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        copies[key] = copy.copy_(value, non_blocking=value.is_cuda)
    return copies[key]


def model_state(model: GPT, tokenizer: Tokenizer) -> dict:
    """The part of a checkpoint from which `restore_model` and `restore_tokenizer` rebuild both."""
    return {
        "format_version": FORMAT_VERSION,
        "model_config": asdict(model.config),
        "model": model.state_dict(),
        "tokenizer": tokenizer.record() | {"text": tokenizer.to_text()},
    }


# What may change on resume: a list of these, so that a new setting is refused until someone decides
MAY_CHANGE = (
    "out_dir init_from overwrite data_dir dataset tokenizer split_pattern sample_prompt max_steps "
    "learning_rate min_lr warmup_steps decay decay_steps muon_learning_rate grad_clip "
    "embedding_learning_rate head_learning_rate eval_interval eval_tokens checkpoint_interval "
    "log_interval micro_batch_size device dtype compile activation_checkpointing verify_data "
    "distributed_timeout log_to plan plan_gpus parallel reshard_after_forward deepspeed_config"
)


def check_same_run(saved: dict, settings: dict, dataset):
    """Raise Failure where a run with these settings would not continue that of a checkpoint."""
    out_dir, max_steps, differing = settings["out_dir"], settings["max_steps"], []
    if "optimizers" not in saved:
        raise Failure(f"{out_dir} has no optimizers' state (is it a best.pt?)", NO_CHECKPOINT)
    if saved["step"] > max_steps:
        raise Failure(f"{out_dir} is at step {saved['step']}, and max_steps is {max_steps}")
    for name, new in settings.items():
        old = saved["settings"][name]
        if type(old) is not type(new) or (name not in MAY_CHANGE.split() and old != new):
            differing.append(f"{name} was {old}, is {new}")
    tokenizer = restore_tokenizer(saved)
    if not tokenizer.same_ids(dataset.tokenizer):
        differing.append(f"tokenizer was {tokenizer.name}, is {dataset.tokenizer.name}")
    if saved["dataset"] not in (dataset.fingerprint, dataset.old_fingerprint()):
        what = "weights or files" if ":" in settings["dataset"] else "files"
        differing.append(f"the {what} of dataset {settings['dataset']} have changed")
    if differing:
        hint = "set them as they were, or start a new run with another --out_dir"
        raise Failure(f"{out_dir} cannot be continued: {', '.join(differing)};\n{hint}")


@contextlib.contextmanager
def fitting(path: Path):
    """What is odd in a checkpoint that is used inside, with a checksum that fits, is a Failure."""
    try:
        yield
    except Exception as error:
        if config.explain(error, ""):  # expected, as that memory is full
            raise
        raise Failure(f"{path} does not fit this version: {error!r:.200}", NO_CHECKPOINT) from None


def new_model(state: dict, **changes) -> GPT:
    """The model of a loaded checkpoint, not yet with its weights, used in `fitting`.

    changes: for its config.
    """
    shape, weights = GPTConfig(**state["model_config"] | changes), state["model"]
    if shape.n_layer > len(weights):
        raise ValueError(f"{shape.n_layer} layers of {len(weights)} tensors")
    if any(weight.dtype != torch.float32 for weight in weights.values()):
        raise ValueError("weights are not in float32")
    return GPT(shape)


def restore_model(state: dict, **changes) -> GPT:
    """The model of a loaded checkpoint, used in `fitting`; `changes` are for its config."""
    model = new_model(state, **changes)
    model.load_state_dict(state["model"])
    return model


def restore_optimizers(optimizers: list, saved: dict):
    """Give optimizers the moments of a loaded checkpoint, used in `fitting`."""
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        groups = optimizer.state_dict()["param_groups"]  # the settings decide these
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters if saved["step"] else []):
            moments = state["state"][number]
            for name in MOMENTS[type(optimizer).__name__]:
                found = moments[name].dtype, moments[name].shape
                if found != (torch.float32, parameter.shape):
                    raise ValueError(f"{name} is {found}")
            if not 0 <= float(moments.get("step", 0)) < math.inf:
                raise ValueError(f"a moment's step is {moments['step']}")
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def restore_tokenizer(state: dict) -> Tokenizer:
    """The tokenizer of a loaded checkpoint."""
    return Tokenizer.from_record(state["tokenizer"], state["tokenizer"]["text"])


def open_model(name: str, out_dir: str, dropout: float = 0.0) -> tuple[GPT, Tokenizer]:
    """The model that `name` means, and its tokenizer. Raises Failure.

    name: a .pt file, a run's folder, "" for the newest run in out_dir, a folder in Hugging Face's
    layout, or a model on the Hub. What was opened is printed to standard error.
    """
    path = find_model(name, out_dir)
    if path.is_dir():
        return open_hf(path, name, dropout)
    state = load(path)
    with fitting(path):
        model, tokenizer = restore_model(state, dropout=dropout), restore_tokenizer(state)
    loss = f", validation loss {state['val_loss']:.4f} at step {state['val_step']}"
    print(f"{path}: step {state['step']}{loss}", file=sys.stderr)
    return model, tokenizer


def find_model(name: str, out_dir: str = "") -> Path:
    """The .pt file that `name` means, or the folder, which is downloaded where it is on the Hub."""
    path = Path(name)
    is_on_hub = files.hub_repo(name) and not path.exists()
    if name and (is_on_hub or (path / "config.json").exists()):
        return files.model_folder(name, hf.FILES + HF_FILES, hf.is_complete)
    return path if path.is_file() else newest_checkpoint(name, out_dir)


def open_hf(folder: Path, name: str, dropout: float) -> tuple[GPT, Tokenizer]:
    """A model in Hugging Face's layout and its tokenizer, called `name`. Raises Failure."""
    model, tokenizer = hf.load(folder, dropout), load_hf_tokenizer(folder, name)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {count / 1e6:.0f}M parameters", file=sys.stderr)
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} entries, the model {model.config.vocab_size}"
        raise Failure(f"{folder}: the tokenizer has {sizes}: they do not belong together")
    return model, tokenizer


def newest_checkpoint(name: str, out_dir: str) -> Path:
    """The latest.pt of a run, or what else it has; without a name the newest of all in out_dir."""
    checkpoints, hint = [], "train a model first: python train.py config/small.py"
    if name:
        hint = "name a .pt file, a run's folder, or a model (gpt2, a folder, OWNER/NAME)"
    for folder in [Path(name)] if name else Path(out_dir).glob("*/"):
        paths = [*saved(folder), folder / "best.pt"]  # a young run has best.pt only
        checkpoints += [path for path in paths if path.exists()][:1]
    if not checkpoints:
        raise Failure(f"{name or out_dir}: there is no checkpoint in it; {hint}", NO_CHECKPOINT)
    return max(checkpoints, key=lambda file: file.stat().st_mtime)
