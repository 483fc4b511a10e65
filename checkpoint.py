"""Files that survive: each is whole or absent, knows its own checksum, and belongs to one run at a time."""

import hashlib
import os
import pickle
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config import IN_USE, NO_CHECKPOINT, Failure


def save(path: Path, state: dict):
    """Write `state`, nested dicts and lists of tensors and plain types, with its own checksum."""
    import torch  # only here and below, so that a file can be locked without waiting for it

    with atomic_file(path) as file:
        try:
            torch.save(state | {"checksum": checksum(state)}, file)
        except RuntimeError as error:  # torch's own writer hides the system's reason, a full disk as a rule
            raise OSError(f"{path} could not be written; is the disk full? ({str(error).splitlines()[0]})") from None


def load(path: Path) -> dict:
    """Read what `save` wrote, tensors on the CPU. Nothing in the file can run code. Raises Failure."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Failure(f"there is no checkpoint {path}; to make one, train a model first", NO_CHECKPOINT) from None
    except Exception as error:  # torch raises many types for what is cut, changed, or not a checkpoint at all
        reason = str(error).split("\n")[0]
        if isinstance(error, pickle.UnpicklingError):  # whose text tells how to run code from the file
            reason = "it holds something else than tensors and plain types"
        raise Failure(f"{path} is not a checkpoint, or is damaged: {reason}", NO_CHECKPOINT) from None
    if not isinstance(state, dict) or state.pop("checksum", "none") != checksum(state):
        raise Failure(f"{path} is damaged: what it holds does not match its checksum", NO_CHECKPOINT)
    return state


def restore_model(state: dict, path: Path):
    """The GPT of a checkpoint's state. Raises Failure where an older version, with other weights, wrote it."""
    from model import GPTConfig, empty_model

    try:
        model = empty_model(GPTConfig(**state["model_config"]))
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError):
        raise Failure(f"{path} was written by an older version, and this one cannot read it", NO_CHECKPOINT) from None
    return model


def checksum(state) -> str:
    """SHA-256 over every name and value in `state`, tensors by type, shape and bytes."""
    import torch

    digest = hashlib.sha256()

    def visit(value):
        """Add `value`, and what is in it, to the digest."""
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
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(f"{value!r};".encode())

    visit(state)
    return digest.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator:
    """A binary file that stands under `path` only once all of it has reached the disk."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        if os.name == "posix":  # the new name itself is kept by the folder; Windows has no handle for that
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, in_use: str = "") -> Iterator:
    """Hold the lock file `path` for this process alone; the system drops the lock with the process, however that ends.

    in_use: the message of the Failure where another process holds it; "" = wait until that one is done.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        is_waiting = False
        while not lock(file):
            if in_use:
                raise Failure(in_use, IN_USE)
            if not is_waiting:
                print(f"waiting for another process that holds {path}", flush=True)
            is_waiting = True
            time.sleep(0.1)
        yield


def lock(file) -> bool:
    """Lock an open file until it is closed; return whether that worked, as no other process has it."""
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    return True
