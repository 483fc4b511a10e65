"""Disk and network, without torch: atomic writes, locks, JSON, hashes, downloads."""

import hashlib
import json
import os
import re
import secrets
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from config import IN_USE, INPUT_OUTPUT, Failure

MAX_JSON_BYTES = 64 * 2**20
TIMEOUT_SECONDS = 10, 30  # to connect, and to wait for the next bytes
GPT2_SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_NAMES = {"distilgpt2": "distilbert/distilgpt2"}
HUB_NAMES |= {name: f"openai-community/{name}" for name in GPT2_SIZES}


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises OSError, or Failure if it holds anything else."""
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise Failure(f"{path} has {size:,} bytes, more than the {MAX_JSON_BYTES:,} of a JSON file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Failure(f"{path} is damaged, or is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise Failure(f"{path} holds a JSON {type(content).__name__}, and must hold an object")
    return content


def write_json(path: Path, content: dict):
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


@contextmanager
def atomic_file(path: Path) -> Iterator:
    """Open a binary file that appears under `path` only once it is complete and on the disk."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(partial, "xb") as file:
            yield file
        with open(partial, "rb+") as file:  # again: safetensors replaces the file that was opened
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name is on the disk once its folder is
        os.fsync(folder)
        os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, in_use: str = "") -> Iterator:
    """Hold the lock file `path`; the system releases it when the process ends, even if killed.

    in_use: the message of the Failure if another process holds it; "" waits for that process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        if not lock(file):
            if in_use:
                raise Failure(in_use, IN_USE)
            print(f"waiting for another process that holds {path}", flush=True)
            while not lock(file):
                time.sleep(0.1)
        yield


def fetch(url: str, path: Path, sha256: str, max_bytes: int) -> Path:
    """Return `path`, downloaded from `url` if it does not exist. Raises Failure."""
    if path.exists():
        if sha256_of(path) != sha256:
            raise Failure(f"{path} does not have SHA-256 {sha256}; delete it to fetch it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(path) as file:
            download(url, file, sha256, max_bytes)
    except requests.RequestException as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        advice = f"put it at {path} by hand (SHA-256 {sha256})"
        raise Failure(f"could not download {url}: {reason}; {advice}", INPUT_OUTPUT) from None
    return path


def download(url: str, file, sha256: str, max_bytes: int):
    """Write the answer of a GET to `file`. Raises RequestException, also for other content."""
    digest, size = hashlib.sha256(), 0
    with requests.get(url, stream=True, timeout=TIMEOUT_SECONDS) as response:
        response.raise_for_status()
        for chunk in response.iter_content(2**16):
            size += len(chunk)
            if size > max_bytes:
                raise requests.RequestException(f"it has more than {max_bytes:,} bytes")
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != sha256:
        raise requests.RequestException(f"it has SHA-256 {digest.hexdigest()}")


def hub_repo(name: str) -> str:
    """The OWNER/NAME that `name` means on the Hugging Face Hub; "" if it means none."""
    is_repo = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)
    return HUB_NAMES.get(name) or (name if is_repo else "")


def hub_snapshot(repo, patterns, is_complete=None, repo_type="model", revision=None, folder=None):
    """The folder with the files of a Hub repository that match `patterns`. Raises Failure.

    is_complete: called with a folder. If it accepts `folder`, or the library's cache, no request
    is made; else the files are downloaded and their checksums verified. None always asks the Hub.
    """
    try:
        import huggingface_hub as hub
    except ImportError:
        raise Failure(f"{repo} needs a package: pip install huggingface_hub") from None
    source = {"repo_id": repo, "repo_type": repo_type, "revision": revision, "local_dir": folder}
    snapshot = folder or cached_snapshot(hub, source)
    if is_complete and snapshot and is_complete(snapshot):
        return snapshot
    try:
        snapshot = Path(hub.snapshot_download(**source, allow_patterns=patterns))
        mismatches = hub.HfApi().verify_repo_checksums(**source).mismatches
    except Exception as error:  # of the many types of its HTTP client and storage back ends
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        advice = f"run this again with a network, or download {repo} by hand and name its folder"
        raise Failure(f"could not download {repo}: {reason};\n{advice}", INPUT_OUTPUT) from None
    delete_damaged(snapshot, [mismatch["path"] for mismatch in mismatches], repo)
    if is_complete and not is_complete(snapshot):
        raise Failure(f"{repo} lacks files that are needed: {', '.join(patterns)}")
    return snapshot


def cached_snapshot(hub, source: dict) -> Path | None:
    """The snapshot in the library's cache, complete or not, without a request."""
    try:  # without patterns, or the library would judge what is complete
        return Path(hub.snapshot_download(**source, local_files_only=True, allow_patterns=[]))
    except (OSError, ValueError):
        return None


def delete_damaged(snapshot: Path, names: list[str], repo: str):
    """Delete files, that the next call would find in the cache. Raises Failure if there are any."""
    for name in names:
        (snapshot / name).resolve().unlink(missing_ok=True)  # the cache's own file
        (snapshot / name).unlink(missing_ok=True)  # the link to it
    if names:
        raise Failure(f"{repo}: {', '.join(names)} came damaged; run this again", INPUT_OUTPUT)


def model_folder(name: str, patterns: list[str], is_complete: Callable[[Path], bool]) -> Path:
    """The local folder `name`, else the snapshot of a model on the Hub. Raises Failure."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        if is_complete(folder):
            return folder
        raise Failure(f"{folder} is incomplete: a model's folder holds {', '.join(patterns)}")
    if not hub_repo(name):
        raise Failure(f"{name} is neither a folder nor OWNER/NAME on the Hugging Face Hub")
    return hub_snapshot(hub_repo(name), patterns, is_complete)


def lock(file) -> bool:
    """Lock an open file until it is closed; return False if another process holds the lock."""
    import fcntl  # not on native Windows

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
