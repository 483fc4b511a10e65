"""Disk and network, without torch: atomic writes, locks, JSON, hashes, downloads."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import requests

from config import BAD_INPUT, IN_USE, INPUT_OUTPUT, Failure

PARTIAL = ".partial"  # the subfolder in which files are until they are complete
GPT2_SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_NAMES = {name: f"openai-community/{name}" for name in GPT2_SIZES}
HUB_NAMES |= {"distilgpt2": "distilbert/distilgpt2"}


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path):
    """Raise Failure for a folder, or a pipe, which a reader could wait for."""
    if path.exists() and not path.is_file():
        raise Failure(f"{path} is not a file")


def read_file(path: Path) -> bytes:
    """What a file holds. Raises OSError, and Failure as `check_file` does."""
    check_file(path)
    return path.read_bytes()


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises OSError, or Failure if it holds anything else."""
    try:
        content = json.loads(read_file(path).decode())
    except (ValueError, RecursionError) as error:
        raise Failure(f"{path} is damaged, or is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise Failure(f"{path} holds a JSON {type(content).__name__}, and must hold an object")
    return content


def write_json(path: Path, content: dict):
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # in JSON, too, what a file name can be


def check_version(path: Path, content: dict, newest: int, code: int = BAD_INPUT):
    """Raise Failure where the file's format is newer than `newest`; what has no version is old."""
    version = content.get("format_version", 0)
    if type(version) is not int or version not in range(newest + 1):
        raise Failure(f"{path} has format_version {version}; this version reads {newest}", code)


def has_layout(value, layout) -> bool:
    """Whether a value read from a file has the entries and types that `layout` names."""
    if isinstance(layout, dict):
        is_dict = isinstance(value, dict) and layout.keys() <= value.keys()
        return is_dict and all(has_layout(value[name], layout[name]) for name in layout)
    if isinstance(layout, list):
        return isinstance(value, list) and all(has_layout(item, layout[0]) for item in value)
    return isinstance(value, layout)


@contextlib.contextmanager
def atomic_file(path: Path, backup: Path | None = None) -> Iterator:
    """Open a binary file that appears under `path` only once it is complete and on the disk.

    backup: the new name of the file that was at `path`.
    """
    partial = path.parent / PARTIAL / f"{path.name}.{secrets.token_hex(8)}"
    old = partial.with_suffix(".old")
    try:
        with naming(path):
            partial.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "xb") as file:
                yield file
            sync(partial)  # opened again: safetensors replaces the file that was opened
            if backup and path.exists():
                try:
                    os.link(path, old)
                except OSError:  # a disk without such links
                    os.replace(path, backup)
            os.replace(partial, path)
            if old.exists():
                os.replace(old, backup)  # only now, so that at each moment there are two
            sync(path.parent)  # the new name is on the disk once its folder is
    finally:
        partial.unlink(missing_ok=True)
        old.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process writes a file here
            partial.parent.rmdir()


@contextlib.contextmanager
def naming(path: Path) -> Iterator:
    """An OSError inside that names no file, as of a full disk, gets the name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def publish(folder: Path, target: Path):
    """Rename a folder once all files in it are on the disk."""
    for path in folder.iterdir():
        sync(path)
    sync(folder)
    folder.rename(target)
    sync(target.parent)


def link_or_copy(source: Path, target: Path):
    """Make `target` another name of the file `source`, or a copy where the disk cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def sync(path: Path):
    """Wait until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextlib.contextmanager
def locked(path: Path, in_use: str = "") -> Iterator:
    """Hold the lock file `path`; the system releases it when the process ends, even if killed.

    in_use: the message of the Failure if another process holds it; "" waits for that process.
    """
    import fcntl  # not on native Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if in_use:
                raise Failure(in_use, IN_USE) from None
            print(f"waiting for another process that holds {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch(url: str, path: Path, sha256: str, max_bytes: int) -> Path:
    """Return `path`, downloaded from `url` unless it has this SHA-256. Raises Failure."""
    if path.exists() and sha256_of(path) == sha256:
        return path
    content = bytearray()
    try:
        with requests.get(url, stream=True, timeout=30) as response:
            response.raise_for_status()
            for chunk in response.iter_content(2**16):
                content += chunk
                if len(content) > max_bytes:
                    raise requests.RequestException(f"it has more than {max_bytes:,} bytes")
        if hashlib.sha256(content).hexdigest() != sha256:
            raise requests.RequestException("it has another SHA-256")
    except requests.RequestException as error:
        advice = f"put it at {path} by hand (SHA-256 {sha256})"
        raise Failure(f"could not download {url}: {error}; {advice}", INPUT_OUTPUT) from None
    with atomic_file(path) as file:
        file.write(content)
    return path


def hub_repo(name: str) -> str:
    """The OWNER/NAME that `name` means on the Hugging Face Hub; "" where OWNER is a folder here."""
    is_repo = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(?<!\.pt)", name, re.ASCII)
    is_repo = is_repo and not Path(name).parent.is_dir()
    return HUB_NAMES.get(name) or (name if is_repo else "")


def model_folder(name: str, patterns: list[str], is_complete: Callable[[Path], bool]) -> Path:
    """The local folder `name`, else the snapshot of a model on the Hub. Raises Failure."""
    folder = Path(name)
    if not folder.is_dir():
        if not hub_repo(name):
            raise Failure(f"{name} is neither a folder nor OWNER/NAME on the Hugging Face Hub")
        folder = hub_snapshot(hub_repo(name), patterns, is_complete)
    if not is_complete(folder):
        raise Failure(f"{name} lacks some of what save_pretrained writes: {', '.join(patterns)}")
    return folder


def hub_snapshot(repo, patterns, is_complete=None, repo_type="model", revision=None, folder=None):
    """The folder with the files of a Hub repository that match `patterns`. Raises Failure.

    No request is made if `is_complete` accepts the cached folder of the file patterns[0].
    """
    try:
        import huggingface_hub as hub
    except ImportError:
        raise Failure(f"{repo} needs a package: pip install huggingface_hub") from None
    if is_complete:
        cached = hub.try_to_load_from_cache(repo, patterns[0])
        if isinstance(cached, str) and is_complete(Path(cached).parent):
            return Path(cached).parent
    source = {"repo_id": repo, "repo_type": repo_type, "revision": revision, "local_dir": folder}
    try:
        snapshot = Path(hub.snapshot_download(**source, allow_patterns=patterns))
        mismatches = hub.HfApi().verify_repo_checksums(**source).mismatches
    except Exception as error:  # of the many types of its HTTP client and storage back ends
        advice = f"run this again with a network, or download {repo} by hand and name its folder"
        message = f"could not download {repo}: {error!r:.200};\n{advice}"
        raise Failure(message, INPUT_OUTPUT) from None
    names = [mismatch["path"] for mismatch in mismatches]
    for name in names:  # the cache's own file, not the link to it, or the next call would take it
        (snapshot / name).resolve().unlink(missing_ok=True)
    if names:
        raise Failure(f"{repo}: {', '.join(names)} came damaged; run this again", INPUT_OUTPUT)
    return snapshot
