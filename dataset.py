"""The dataset: shards (files of tokens), the windows cut from them, and the order of the windows.

A dataset is a folder of shards with a `manifest.json` that describes them and `tokenizer.tiktoken`.
prepare_data.py writes it with ShardWriter; train.py and evaluate.py open it as a Dataset.

The invariant: the window at each position of a run is a pure function of (seed, position), see
`Dataset.batch`. train.py gives each step its positions. So a run resumes exactly, on any number of
ranks, and the order of the data needs no state and no memory.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from config import Failure, Progress
from files import check_file, check_version, has_layout, read_file, read_json, sha256_of
from hashing import hash_numbers, mix64
from tokenizer import Tokenizer
from tokenizer_files import load_tokenizer

SPLITS = ("train", "val")
MANIFEST_VERSION = 1  # a manifest without format_version is older
SHARD = {"file": str, "tokens": int, "sha256": str}
SPLIT = {"documents": int, "bytes": int, "tokens": int, "shards": [SHARD]}
MANIFEST = {  # what each manifest has at least, and of which type
    "made_from": dict,  # settings of prepare_data.py
    "tokenizer": {"name": str, "sha256": str},
    "splits": {"train": SPLIT, "val": SPLIT},
    "documents": {"in": int, "kept": int, "dropped": dict},  # dropped: by reason
    "bytes": {"in": int, "kept": int, "dropped": dict},
}
HASHED_BYTES = 2_000_000_000  # smaller datasets are hashed whole at each start

# The shard format of llm.c, modded-nanogpt and the public FineWeb shards: 256 little-endian int32
# of header (magic, version, number of tokens, zeros), then the tokens, of a type by the magic.
HEADER_INTS = 256
MAGIC_AND_VERSION = {np.dtype("<u2"): (20240520, 1), np.dtype("<u4"): (20240801, 7)}


class Dataset:
    """A dataset's folder, opened: `train` and `val` are Windows, `tokenizer` is its Tokenizer.

    tokenizer, pattern: as load_tokenizer takes them, for shards made elsewhere: a folder without a
    manifest. A manifest names its own. Raises Failure.
    """

    def __init__(self, folder: Path, block_size: int, tokenizer: str = "", pattern: str = ""):
        self.folder, self.block_size = folder, block_size
        self.manifest = read_manifest(folder) if (folder / "manifest.json").exists() else {}
        self.records = {split: self.find_records(split) for split in SPLITS}
        if self.manifest:
            self.tokenizer = read_tokenizer(folder, self.manifest["tokenizer"])
        elif tokenizer:
            self.tokenizer = load_tokenizer(tokenizer, pattern, folder.parent / "downloads")
        else:
            hint = "name the tokenizer of its shards, as in --tokenizer=gpt2"
            raise Failure(f"{folder} has no manifest.json; {hint}")
        self.train, self.val = map(self.open_split, SPLITS)
        self.shards = self.train.shards + self.val.shards
        self.parts, self.shares = [self], [1.0]  # as a Mixture's

    def find_records(self, split: str) -> list[dict]:
        """The manifest's records of a split's shards; without a manifest their names alone."""
        if self.manifest:
            return self.manifest["splits"][split]["shards"]
        names = (f"*_{split}_[0-9]*.bin", f"*_{split}.bin")
        paths = sorted(path for name in names for path in self.folder.glob(name))
        if not paths:
            hint = "nanoGPT's .bin and build-nanogpt's .npy have no header: prepare the text here"
            raise Failure(f"{self.folder} has no shards like fineweb_{split}_000001.bin; {hint}")
        return [{"file": path.name} for path in paths]

    def open_split(self, split: str) -> "Windows":
        """The windows of one split. Raises Failure if the manifest gives a shard another length."""
        paths = [self.folder / record["file"] for record in self.records[split]]
        windows = Windows(paths, self.block_size)
        for shard, record in zip(windows.shards, self.records[split]):
            tokens = record.get("tokens", shard.count)
            if shard.count != tokens:
                raise Failure(f"{shard.path} has {shard.count} tokens, manifest.json says {tokens}")
        if not len(windows):
            window = f"one window of {self.block_size + 1} {split} tokens"
            raise Failure(f"{self.folder} has less than {window}; lower block_size")
        return windows

    def batch(self, seed: int, first: int, count: int) -> np.ndarray:
        """The windows at `count` positions of a run from `first` on, int64 (count, block_size + 1).

        Position p lies in epoch p // len(train). Each epoch is a shuffle of all windows, keyed by
        (seed, epoch). In all but the first, windows begin up to block_size - 1 tokens later.
        """
        epochs, positions = np.divmod(np.arange(first, first + count), len(self.train))
        parts = []
        for epoch in np.unique(epochs).tolist():
            key = hash_numbers(seed, epoch)
            indices = shuffle(positions[epochs == epoch], len(self.train), key)
            parts.append(self.train.read(indices, key % self.block_size if epoch else 0))
        return np.concatenate(parts)

    def verify(self, hash_all: bool, is_known: bool):
        """Raise Failure where a shard is not the manifest's, or has an id beyond its tokenizer's.

        hash_all: compare the content of shards also where they have HASHED_BYTES or more.
        is_known: shards without a manifest were verified before, as their fingerprint shows.
        """
        total, entries = sum(shard.bytes for shard in self.shards), self.tokenizer.vocab_size
        hash_all, done = (hash_all or total < HASHED_BYTES), 0
        with Progress("bytes verified", total) as progress:
            for shard, record in zip(self.shards, self.records["train"] + self.records["val"]):
                if self.manifest and hash_all and sha256_of(shard.path) != record["sha256"]:
                    raise Failure(f"{shard.path} is not the shard that manifest.json was made with")
                largest_id = record.get("largest_id")
                if type(largest_id) is not int and (self.manifest or hash_all or not is_known):
                    largest_id = int(shard.read(0, shard.count).max(initial=0))
                if (largest_id or 0) >= entries:
                    what = f"{shard.path} has token {largest_id}, its tokenizer {entries} entries"
                    raise Failure(f"{what}; name the one it was made with (--tokenizer)")
                done += shard.bytes
                progress.update(done)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of each shard's length, first and last MB, in order."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.dtype} {shard.count} ".encode())
            digest.update(shard.read(0, min(shard.count, 500_000)))
            digest.update(shard.read(max(0, shard.count - 500_000), shard.count))
        return digest.hexdigest()

    def old_fingerprint(self) -> str:
        """The fingerprint in checkpoints of 0.1: of the manifest's records, or names and sizes."""
        shards = [split["shards"] for split in self.manifest.get("splits", {}).values()]
        shards = shards or [(shard.path.name, shard.bytes) for shard in self.shards]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    def describe(self, tokens: float) -> str:
        """How much training text there is, and how often a run of so many tokens reads it."""
        count = sum(shard.count for shard in self.train.shards)
        return f"{count:,} training tokens of {self.folder.name} ({tokens / count:.2f} epochs)"

    def bits_per_byte(self, loss: float) -> float:
        """A validation loss per byte of text, which compares tokenizers; nan without a manifest."""
        if not self.manifest:
            return math.nan
        split = self.manifest["splits"]["val"]
        return loss / math.log(2) * split["tokens"] / split["bytes"]

    def documents(self, split: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yield where each document begins, and its tokens, int64, the first an end-of-text."""
        end_of_text = self.tokenizer.end_of_text
        for shard in getattr(self, split).shards:
            content = shard.read(0, shard.count).astype(np.int64)
            starts = np.union1d(0, np.flatnonzero(content == end_of_text))
            starts = starts[: len(content)]  # an empty shard has none
            for start, tokens in zip(starts, np.split(content, starts[1:])):
                if tokens[0] != end_of_text:  # a document that began in the shard before
                    tokens = np.insert(tokens, 0, end_of_text)
                yield f"{shard.path}, token {start}", tokens


class Windows:
    """The windows of one split, block_size + 1 tokens each. Neighbours share a token: the last
    target of one is the first input of the next. No window crosses from one shard into the next;
    the rest of a shard that is too short for a window is not used.
    """

    def __init__(self, paths: list[Path], block_size: int):
        self.block_size = block_size
        self.shards = [Shard(path) for path in paths]
        counts = [max(0, (shard.count - 1) // block_size) for shard in self.shards]
        self.first_windows = np.cumsum([0, *counts])  # of each shard; the last is the number of all

    def __len__(self) -> int:
        return int(self.first_windows[-1])

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """The windows with these indices, int64 (len(indices), block_size + 1)."""
        return self.read(indices, 0)

    def read(self, indices: np.ndarray, move: int) -> np.ndarray:
        """The same, but `move` < block_size tokens later; after a shard's end comes its start."""
        windows = np.empty((len(indices), self.block_size + 1), dtype=np.int64)
        numbers = np.searchsorted(self.first_windows, indices, side="right") - 1
        starts = (indices - self.first_windows[numbers]) * self.block_size + move
        for row, (number, start) in enumerate(zip(numbers, starts.tolist())):
            shard = self.shards[number]
            tokens = shard.read(start, min(start + self.block_size + 1, shard.count))
            windows[row, : len(tokens)] = tokens
            if rest := self.block_size + 1 - len(tokens):
                windows[row, len(tokens) :] = shard.read(0, rest)
        return windows


def shuffle(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """What a shuffle of 0..count-1 has at `positions`, without ever holding the shuffle.

    A Feistel network (Luby & Rackoff 1988) on numbers with an even number of bits. Each round maps
    the halves (left, right) to (right, left ^ f(right)). Another ^ f(right) recovers left, so no
    two inputs collide, and all rounds together are a permutation, whatever f is. Four rounds look
    random; six are used. A result of count or more is sent through again until it is below (cycle
    walking, Black & Rogaway 2002): that still is a permutation, of 0..count-1.
    """
    half = np.uint64(max(1, math.ceil((count - 1).bit_length() / 2)))  # bits of a half
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = mix64(np.arange(6, dtype=np.uint64) ^ np.uint64(key))

    def permute(x):
        left, right = x >> half, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix64(right ^ round_key) & mask)
        return left << half | right

    result = permute(positions.astype(np.uint64))
    while (is_outside := result >= count).any():
        result[is_outside] = permute(result[is_outside])
    return result.astype(np.int64)


# Shards and the manifest


class Shard:
    """A file of tokens, uint16 or uint32. Raises Failure for a damaged one."""

    def __init__(self, path: Path):
        check_file(path)
        self.path, self.bytes = path, path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
        types = {numbers: dtype for dtype, numbers in MAGIC_AND_VERSION.items()}
        found = tuple(header[:2].tolist())
        if len(header) < HEADER_INTS or found not in types:
            known = " or ".join(map(str, types))
            raise Failure(f"{path} is not a shard: magic and version are {found}, not {known}")
        self.dtype, self.count = types[found], int(header[2])
        tokens = (self.bytes - header.nbytes) / self.dtype.itemsize
        if tokens != self.count:
            raise Failure(f"{path} says {self.count} tokens but has {tokens:.1f}; prepare it again")

    def read(self, start: int, end: int) -> np.ndarray:
        """The tokens from start up to end. Raises OSError where the file has become shorter."""
        # No file stays open. No memory map: a process is killed if the file of one becomes shorter
        offset = 4 * HEADER_INTS + start * self.dtype.itemsize
        tokens = np.fromfile(self.path, self.dtype, end - start, offset=offset)
        if len(tokens) < end - start:
            raise OSError(f"{self.path} has become shorter since it was opened")
        return tokens


class ShardWriter(contextlib.AbstractContextManager):
    """Writes the tokens of one split as shards of at most shard_tokens; use it in a `with`."""

    def __init__(self, folder: Path, prefix: str, shard_tokens: int, vocab_size: int):
        self.folder, self.prefix, self.shard_tokens = folder, prefix, shard_tokens
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.file = None  # the shard that is being written
        self.records = []  # of finished shards, for the manifest

    def __exit__(self, *_):
        if self.file:
            self.file.close()

    def add(self, tokens: np.ndarray):
        """Append tokens, in as many shards as it takes."""
        while len(tokens):
            if not self.file:
                path = self.folder / f"{self.prefix}_{len(self.records):06d}.bin"
                self.file = open(path, "xb")  # noqa: SIM115  closed by finish_shard
                self.file.write(bytes(4 * HEADER_INTS))
                self.count = self.largest_id = 0
            part = tokens[: self.shard_tokens - self.count]
            self.file.write(part.astype(self.dtype).tobytes())
            self.count += len(part)
            self.largest_id = max(self.largest_id, int(part.max()))
            tokens = tokens[len(part) :]
            if self.count == self.shard_tokens:
                self.finish_shard()

    def finish(self) -> list[dict]:
        """Close the last shard; return the manifest's records of all."""
        if self.file:
            self.finish_shard()
        return self.records

    def finish_shard(self):
        """Write the header, which makes the file a shard."""
        header = np.array([*MAGIC_AND_VERSION[self.dtype], self.count], dtype="<i4")
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.close()
        path, self.file = Path(self.file.name), None
        record = {"file": path.name, "tokens": self.count, "largest_id": self.largest_id}
        self.records.append(record | {"sha256": sha256_of(path)})


def find_folder(name: str, data_dir: str) -> Path:
    """The folder of a dataset: the one that `name` is, or the one of that name in data_dir."""
    return Path(name) if Path(name, "manifest.json").exists() else Path(data_dir, name)


def read_manifest(folder: Path) -> dict:
    """The manifest of a dataset. Raises Failure where it is missing, damaged or of another kind."""
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        raise Failure(f"{path} is missing: {folder} is not a dataset of prepare_data.py") from None
    check_version(path, manifest, MANIFEST_VERSION)
    if not has_layout(manifest, MANIFEST):
        raise Failure(f"{path} is damaged: an entry is missing; prepare the dataset again")
    splits = [manifest["splits"][split] for split in SPLITS]
    names = [shard["file"] for split in splits for shard in split["shards"]]
    are_plain = all(Path(name).name == name and name.isprintable() for name in names)
    if len(set(names)) < len(names) or not are_plain:
        raise Failure(f"{path} names a shard twice, or one that is not in {folder}")
    compressors = [split.get("compressed_bits_per_byte", {}) for split in splits]
    counts = [split[unit] for split in splits for unit in ("bytes", "tokens")]
    if not all(0 < n < 2**63 for n in counts) or not all(isinstance(c, dict) for c in compressors):
        raise Failure(f"{path} is damaged: it has impossible counts")
    return manifest


def read_tokenizer(folder: Path, record: dict) -> Tokenizer:
    """The tokenizer of a dataset. Raises Failure where it is not the manifest's."""
    path = folder / "tokenizer.tiktoken"
    content = read_file(path)
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise Failure(f"{path} is not the one in manifest.json; prepare the dataset again")
    return Tokenizer.from_record(record, content.decode(errors="replace"))
