"""Turn text into clean, deduplicated shards of tokens in data/NAME, ready to train on.

    python prepare_data.py stdlib                              a named dataset (--help lists them)
    python prepare_data.py mine --source=~/texts               your own files, folders, or globs
    python prepare_data.py mine --source=a.jsonl.gz,b.parquet --clean=web --dedupe=near --tokenizer=bpe:8192
    zcat *.gz | python prepare_data.py mine --source=-         standard input

Read from the bottom up: `prepare` tells the story. Text is read and cleaned once and kept beside the dataset as it
grows; then repeated documents are found and dropped, and what is left goes through the tokenizer into shards. Above
that story stand deduplication, cleaning, reading, downloads, the tokenizers, and at the top the shard format in both
directions; `Dataset` is what training opens.
"""

import base64
import bz2
import codecs
import csv
import gzip
import hashlib
import heapq
import json
import lzma
import math
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import chain, groupby, islice, pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import regex  # comes with tiktoken
import requests
import tiktoken
import urllib3  # comes with requests

try:
    from compression import zstd  # Python 3.14
except ImportError:
    zstd = None

import config
from checkpoint import atomic_file, locked
from config import INPUT_OUTPUT, Failure


@dataclass
class PrepareConfig:
    """Turn text into clean, deduplicated shards of tokens in data/NAME, ready to train on.

    Named datasets: stdlib (12 MB, this Python's own library, no network), shakespeare (1 MB), tinystories (2.2 GB),
    fineweb-edu-10b (28.5 GB of parquet, 100 GB of disk in all), fineweb-10b-gpt2 (20.8 GB, tokens already).
    """

    name: str = ""  # a named dataset, or a name of your own for the text under --source or --merge
    source: str = ""  # files, folders, globs, several with commas between; - reads standard input
    merge: str = ""  # dataset folders, with commas between, to join: their shards, without reading any text again
    format: str = ""  # text, jsonl, csv or parquet; "" = by each file's name, text where it says nothing
    text_field: str = "text"  # the field or column that holds the document in jsonl, csv and parquet
    separator: str = ""  # a line that parts the documents in a text file; "" = a file is one document
    invalid_bytes: str = "refuse"  # bytes that are no text in a file's encoding: refuse, or replace by U+FFFD
    on_error: str = "stop"  # what cannot be read (a file, a line, bytes that are no text): stop, or skip and count it
    tokenizer: str = ""  # gpt2, bytes, bpe:N[:gpt4] (made here), a .tiktoken file, a Hugging Face folder or OWNER/NAME
    val_fraction: float = 0.0  # share of documents for validation, chosen by their hash; 0 = 0.1, or the dataset's own
    clean: str = "basic"  # none, basic (Unicode NFC, line ends, no control characters), web (the rules below as well)
    dedupe: str = "exact"  # none, exact (but for case and white space), near (similar ones as well)
    near_threshold: float = 0.8  # near: estimated Jaccard similarity of 5-grams of words from which one goes
    near_signature: int = 256  # near: bytes of memory a document, each a sample of its 5-grams
    near_bands: int = 32  # near: bands the signature is cut into; those that agree in one are compared; more find more
    decontaminate: str = ""  # files like --source; documents that share 13 words in a row with them are dropped
    min_words: int = 50  # web, Gopher: words a document has at least
    max_words: int = 100_000  # web, Gopher: and at most; 0 = any number
    min_word_length: float = 3.0  # web, Gopher: mean characters a word, at least
    max_word_length: float = 10.0  # web, Gopher: and at most
    max_symbols: float = 0.1  # web, Gopher: '#' and ellipses for each word
    max_bullet_lines: float = 0.9  # web, Gopher: share of lines that start with a bullet
    max_ellipsis_lines: float = 0.3  # web, Gopher: share of lines that end with an ellipsis
    min_alphabetic_words: float = 0.8  # web, Gopher: share of words that hold a letter
    min_stop_words: int = 2  # web, Gopher: how many of "the be to of and that have with" occur; 0 = off, if not English
    max_repeated_lines: float = 0.3  # web, Gopher: share of lines, or of paragraphs, that stood before
    max_repeated_line_characters: float = 0.2  # web, Gopher: the same as a share of their characters
    max_top_ngram: float = 0.2  # web, Gopher: share of the text in its commonest 2 words; 0.02 less for 3, 0.04 for 4
    max_repeated_ngrams: float = 0.15  # web, Gopher: share in 5 words that stood before; 0.01 less a word more, to 10
    min_sentences: int = 3  # web, C4: ends of sentences a document has at least
    drop_curly_brackets: bool = True  # web, C4: drop documents with a curly bracket, which are code as a rule
    drop_boilerplate: bool = True  # web, C4: drop lines on JavaScript or a site's policies, and pages with lorem ipsum
    drop_unfinished_lines: bool = False  # web, C4: drop lines under 5 words or not ending in . ! ? or a quotation mark
    processes: int = 0  # how many work at once; 0 = one a core
    shard_tokens: int = 100_000_000  # tokens a shard file holds at most
    data_dir: str = "data"  # the folder that datasets stand in

    def __post_init__(self):
        named = NAMED.get(self.name, Named("gpt2"))
        self.tokenizer = self.tokenizer or named.tokenizer
        self.val_fraction = self.val_fraction or named.val_fraction
        self.separator = self.separator or named.separator
        self.processes = self.processes or available_cores()

    def check(self):
        """Raise ValueError where a value makes no sense."""
        if not self.name or Path(self.name).name != self.name or self.name.startswith(".") or self.name == "downloads":
            raise ValueError(f"name {self.name!r}: give the dataset a plain name, as in: python prepare_data.py stdlib")
        if not (self.source or self.merge) and self.name not in NAMED:
            raise ValueError(f"{self.name} is not among {', '.join(NAMED)}; for text of your own add --source=PATH")
        if (self.source or self.merge) and self.name in NAMED:
            raise ValueError(f"{self.name} names a dataset of its own; choose another name for --source or --merge")
        if self.source and self.merge:
            raise ValueError(f"source {self.source} and merge {self.merge}: give one of the two")
        if self.takes_shards():
            idle = [name for name in READING if getattr(self, name) != getattr(PrepareConfig(self.name), name)]
            if idle:
                raise ValueError(f"{idle[0]} has no effect here: shards are taken as they are; leave it out")
        if self.source == self.decontaminate == "-":
            raise ValueError("source and decontaminate cannot both be standard input")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(filter(None, choices))}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction {self.val_fraction} must lie between 0 and 1")
        if not 1 <= self.shard_tokens < 2**31:
            raise ValueError(f"shard_tokens {self.shard_tokens} must be from 1 to 2147483647, what a header can say")
        if self.processes < 1:
            raise ValueError(f"processes {self.processes} must be 1 or more, or 0 for one a core")
        bpe_size(self.tokenizer)
        self.check_near()

    def takes_shards(self) -> bool:
        """Whether the dataset is made of shards that are there already, and no text is read."""
        return bool(self.merge) or self.name == "fineweb-10b-gpt2"

    def check_near(self):
        """Raise ValueError where the search for near-duplicates would miss many, or cannot work."""
        if not 0 < self.near_threshold <= 1:
            raise ValueError(f"near_threshold {self.near_threshold} must be above 0 and at most 1")
        if self.near_bands < 1 or self.near_signature % self.near_bands or not 1 <= self.near_signature <= 4096:
            raise ValueError(f"near_bands {self.near_bands} must divide near_signature {self.near_signature} (to 4096)")
        similar = min(1.0, self.near_threshold + 0.05)
        found = chance_of_finding(similar, self.near_signature, self.near_bands)
        if similar < 1:  # its estimate must reach the threshold as well
            deviation = math.sqrt(similar * (1 - similar) / self.near_signature)
            found *= math.erfc((self.near_threshold - similar) / deviation / math.sqrt(2)) / 2
        if found < 0.95:
            raise ValueError(
                f"near_bands {self.near_bands} and near_signature {self.near_signature} find {found:.0%} of the pairs "
                f"of similarity {similar:.2f}; take more bands, or a longer signature"
            )


CHOICES = {
    "format": ("", "text", "jsonl", "csv", "parquet"),
    "invalid_bytes": ("refuse", "replace"),
    "on_error": ("stop", "skip"),
    "clean": ("none", "basic", "web"),
    "dedupe": ("none", "exact", "near"),
}


APART = ("name", "merge", "processes", "data_dir")  # what does not tell how text is read and what becomes of it
READING = tuple(field.name for field in fields(PrepareConfig) if field.name not in APART)


@dataclass
class Named:
    """A dataset that is known by name: what it is made with, and where on the Hugging Face Hub it lies, if it does."""

    tokenizer: str
    val_fraction: float = 0.1
    separator: str = ""
    repository: str = ""
    revision: str = ""  # a commit, so that the files stay the same
    prefix: str = ""  # of the paths of its files


NAMED = {
    "stdlib": Named("bpe:1024"),
    "shakespeare": Named("bytes"),
    "tinystories": Named(
        "bpe:8192",
        val_fraction=0.01,
        separator="<|endoftext|>",
        repository="roneneldan/TinyStories",
        revision="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        prefix="TinyStoriesV2-GPT4-train",
    ),
    "fineweb-edu-10b": Named(
        "gpt2",
        val_fraction=0.005,
        repository="HuggingFaceFW/fineweb-edu",
        revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        prefix="sample/10BT/",
    ),
    "fineweb-10b-gpt2": Named(
        "gpt2",
        repository="kjj0/fineweb10B-gpt2",
        revision="889765ea1f903759787add96995d81171b632d0c",
        prefix="fineweb_",
    ),
}


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Progress:
    """One line that shows how far a long task is and the time left; silent in its first two seconds."""

    def __init__(self, what: str, total: int):
        self.what, self.total = what, total
        self.started = time.monotonic()
        self.every = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log file wants fewer lines than a terminal
        self.next = self.started + 2
        self.shown = False

    def update(self, done: int):
        now = time.monotonic()
        if now < self.next:
            return
        self.next, self.shown = now + self.every, True
        left = f", {(now - self.started) * (self.total - done) / max(done, 1):.0f} s left" if self.total else ""
        line = f"{done:,}{f' of {self.total:,}' if self.total else ''} {self.what}{left}"
        print(f"\r{line:<70}" if sys.stderr.isatty() else line, end="", file=sys.stderr, flush=True)
        if not sys.stderr.isatty():
            print(file=sys.stderr)

    def close(self):
        if self.shown and sys.stderr.isatty():
            print(f"\r{'':<70}\r", end="", file=sys.stderr, flush=True)


# ---- shards: 256 int32 of header, then tokens; the layout of llm.c, modded-nanogpt and the public FineWeb shards

SPLITS = ("train", "val")
HEADER_INTS = 256
FORMATS = {  # type of a token: magic number and version in the header
    np.dtype("<u2"): (20240520, 1),
    np.dtype("<u4"): (20240801, 7),
}


class ShardFile:
    """A shard that is being written. It counts as one only after `close`, which returns its SHA-256."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path, self.dtype, self.tokens = path, dtype, 0
        self.file = open(path, "xb")
        self.file.write(bytes(4 * HEADER_INTS))

    def write(self, tokens: np.ndarray):
        self.file.write(tokens.astype(self.dtype).tobytes())
        self.tokens += len(tokens)

    def close(self) -> str:
        header = np.array([*FORMATS[self.dtype], self.tokens], dtype="<i4")
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return sha256_of(self.path)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_shard(path: Path) -> np.memmap:
    """Map a shard's tokens, uint16 or uint32, into memory. Raises Failure where header and file disagree."""
    try:
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except FileNotFoundError:
        raise Failure(f"{path} is missing; prepare the dataset anew") from None
    for dtype, magic_and_version in FORMATS.items():
        if len(header) == HEADER_INTS and tuple(header[:2]) == magic_and_version:
            held = (path.stat().st_size - header.nbytes) / dtype.itemsize
            if held != header[2]:
                raise Failure(f"{path} says {header[2]} tokens but holds {held:g}: it is cut or damaged; make it again")
            return np.memmap(path, dtype=dtype, mode="r", offset=header.nbytes)
    raise Failure(f"{path} is not a shard: magic and version are {tuple(header[:2])}, not {list(FORMATS.values())}")


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class ShardWriter:
    """Writes the tokens of one split into one shard after another."""

    def __init__(self, folder: Path, prefix: str, shard_tokens: int, dtype: np.dtype):
        self.folder, self.prefix, self.shard_tokens, self.dtype = folder, prefix, shard_tokens, dtype
        self.file, self.shards = None, []  # what is open, and the facts of those that are full

    def add(self, tokens: np.ndarray):
        while len(tokens):
            if not self.file:
                path = self.folder / f"{self.prefix}_{len(self.shards):06d}.bin"
                self.file = ShardFile(path, self.dtype)
            room = self.shard_tokens - self.file.tokens
            self.file.write(tokens[:room])
            tokens = tokens[room:]
            if self.file.tokens == self.shard_tokens:
                self.close()

    def close(self) -> list[dict]:
        """End the shard that is open; return the facts of all."""
        if self.file:
            sha256 = self.file.close()
            self.shards.append({"file": self.file.path.name, "tokens": self.file.tokens, "sha256": sha256})
            self.file = None
        return self.shards


class Windows:
    """The windows of block_size + 1 tokens of one split, each starting on the last token of the one before."""

    def __init__(self, paths: list[Path], block_size: int, vocab_size: int):
        self.paths, self.block_size, self.vocab_size = paths, block_size, vocab_size
        self.shards = [open_shard(path) for path in paths]
        windows = [max(0, (len(shard) - 1) // block_size) for shard in self.shards]  # none crosses into the next shard
        self.first = np.cumsum([0] + windows)  # the first window of each shard, and the count of all

    def __len__(self) -> int:
        return int(self.first[-1])

    def tokens(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Return windows as int64 (len(indices), block_size + 1)."""
        windows = np.empty((len(indices), self.block_size + 1), dtype=np.int64)
        for row, shard in enumerate(np.searchsorted(self.first, indices, side="right") - 1):
            start = (indices[row] - self.first[shard]) * self.block_size
            windows[row] = self.shards[shard][start : start + self.block_size + 1]
            if windows[row].max() >= self.vocab_size:
                raise Failure(
                    f"{self.paths[shard]} holds token {windows[row].max()}, "
                    f"but its tokenizer has {self.vocab_size} entries; name the one it was made with (--tokenizer)"
                )
        return windows


def shard_paths(folder: Path, manifest: dict, split: str) -> list[Path]:
    """The shards of one split: those of the manifest, or by their names where there is none."""
    if manifest["splits"]:
        return [folder / shard["file"] for shard in manifest["splits"][split]["shards"]]
    paths = sorted([*folder.glob(f"*_{split}_[0-9]*.bin"), *folder.glob(f"*_{split}.bin")])
    if not paths:
        raise Failure(f"{folder} has no shards named like fineweb_{split}_000001.bin")
    return paths


class Dataset:
    """A folder of shards, opened: `train` and `val` are Windows, `encoding` the tokenizer, `manifest` its facts.

    tokenizer: names the tokenizer of a folder without a manifest, shards made elsewhere. Raises Failure.
    """

    def __init__(self, folder: Path, block_size: int, tokenizer: str = ""):
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            if not tokenizer:
                raise Failure(f"{folder} has no manifest.json; name its tokenizer, as in --tokenizer=gpt2") from None
            self.manifest = {"splits": {}}
            self.encoding = load_tokenizer(tokenizer, folder.parent)
        else:
            text = (folder / "tokenizer.tiktoken").read_text(encoding="ascii")
            if hashlib.sha256(text.encode()).hexdigest() != self.manifest["tokenizer"]["sha256"]:
                raise Failure(f"{folder / 'tokenizer.tiktoken'} differs from its manifest; prepare it anew")
            self.encoding = read_tokenizer(text, self.manifest["tokenizer"]["name"])
        self.train, self.val = (self.open_split(folder, split, block_size) for split in SPLITS)

    def open_split(self, folder: Path, split: str, block_size: int) -> Windows:
        windows = Windows(shard_paths(folder, self.manifest, split), block_size, self.encoding.n_vocab)
        if self.manifest["splits"]:
            for path, tokens, shard in zip(windows.paths, windows.shards, self.manifest["splits"][split]["shards"]):
                if len(tokens) != shard["tokens"]:
                    raise Failure(f"{path} holds {len(tokens)} tokens, but manifest.json says {shard['tokens']}")
        if not len(windows):
            raise Failure(f"{folder} has less than one window of {block_size + 1} {split} tokens; lower block_size")
        return windows

    def fingerprint(self) -> str:
        """What tells this dataset from another: a hash of the manifest's hashes, or of the shards' names and sizes."""
        shards = [split["shards"] for split in self.manifest["splits"].values()]
        shards = shards or [(path.name, path.stat().st_size) for path in self.train.paths + self.val.paths]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    def val_tokens_per_byte(self) -> float:
        """Tokens per byte of validation text; nan where no manifest says."""
        split = self.manifest["splits"].get("val", {"tokens": math.nan, "bytes": 1})
        return split["tokens"] / split["bytes"]


# ---- tokenizers: byte-pair encodings kept as .tiktoken files, a line an entry: the bytes in base64 and their id
# Of two pairs that could merge, the one with the lower id does. End-of-text has the id after the last, or a line.

END_OF_TEXT = "<|endoftext|>"  # leads each document; text that merely contains these characters never becomes it
PATTERNS = {  # how text is split into the pieces that no merge crosses
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "gpt4": (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
        r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\s|\S)|\s*[\r\n]+|\s+(?!\S)|\s+"""  # (?!\s|\S): the end, in any engine
    ),
    "qwen": (  # of text in Unicode's composed form: every digit by itself
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"""
        r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
}
GPT2_RANKS = (
    "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken",
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    835_554,
)


def pattern_name(name: str) -> str:
    """How the tokenizer `name` splits text: as GPT-4 or Qwen where it ends in :gpt4 or :qwen, otherwise as GPT-2."""
    ending = name.rpartition(":")[2]
    return ending if ending in PATTERNS else "gpt2"


def bpe_size(name: str) -> int:
    """Return N for bpe:N, 0 for another tokenizer. Raises ValueError for a name that means nothing."""
    kind = name.removesuffix(f":{pattern_name(name)}")
    if kind.startswith("bpe:") and kind[4:].isascii() and kind[4:].isdigit():
        if not 257 <= int(kind[4:]) <= 1_000_000:
            raise ValueError(f"tokenizer {name}: N counts 256 bytes, merges and end-of-text: from 257 to 1000000")
        return int(kind[4:])
    if name != "bytes" and not kind.endswith(".tiktoken") and not names_model(name):
        raise ValueError(
            f"tokenizer {name!r} is none of gpt2, bytes, bpe:N, a .tiktoken file, a Hugging Face folder or OWNER/NAME"
        )
    return 0


def make_tokenizer(tokens: list[bytes], name: str) -> tiktoken.Encoding:
    """An encoding whose ids are the order of `tokens`, end-of-text last."""
    return make_encoding({token: rank for rank, token in enumerate(tokens)}, len(tokens), name)


def make_encoding(ids: dict[bytes, int], end_of_text: int, name: str) -> tiktoken.Encoding:
    """An encoding with these ids, which may leave some out. Raises Failure."""
    taken = {*ids.values(), end_of_text}
    if not {bytes([byte]) for byte in range(256)} <= ids.keys() or len(taken) <= len(ids):
        raise Failure(f"{name}: a tokenizer holds each of the 256 bytes, and nothing twice")
    if min(taken) < 0 or max(taken) >= 2**31:
        raise Failure(f"{name}: ids must be from 0 to 2147483647, and it has {min(taken)} to {max(taken)}")
    return tiktoken.Encoding(
        name, pat_str=PATTERNS[pattern_name(name)], mergeable_ranks=ids, special_tokens={END_OF_TEXT: end_of_text}
    )


def read_tokenizer(text: str, name: str) -> tiktoken.Encoding:
    """The encoding in the text of a .tiktoken file. Raises Failure."""
    try:
        lines = [(token, int(number)) for token, number in map(str.split, text.splitlines())]
        numbers = dict(lines)
        end_of_text = numbers.pop(END_OF_TEXT, None)
        ids = {base64.b64decode(token, validate=True): number for token, number in numbers.items()}
        if end_of_text is None and {*ids.values()} != {*range(len(ids))}:
            raise ValueError(f"an id from 0 to {len(ids) - 1} is left out, and no line gives {END_OF_TEXT} one")
    except ValueError as error:
        raise Failure(f"{name}: not a .tiktoken file: {error}") from None
    if len(ids) < len(numbers) or len(numbers) < len(lines) - (end_of_text is not None):
        raise Failure(f"{name}: a tokenizer holds each of the 256 bytes, and nothing twice")
    return make_encoding(ids, len(ids) if end_of_text is None else end_of_text, name)


def write_tokenizer(encoding: tiktoken.Encoding) -> str:
    """The text of the .tiktoken file that `read_tokenizer` reads."""
    entries = entries_of(encoding)
    lines = [f"{base64.b64encode(token).decode()} {number}\n" for token, number in entries.items()]
    is_plain = encoding.eot_token == len(entries) == max(entries.values()) + 1  # as any .tiktoken file
    return "".join(lines) + ("" if is_plain else f"{END_OF_TEXT} {encoding.eot_token}\n")


def entries_of(encoding: tiktoken.Encoding) -> dict[bytes, int]:
    """What text can become, with its ids, in their order."""
    ids = {token: encoding.encode_single_token(token) for token in encoding.token_byte_values()}
    return dict(sorted(ids.items(), key=lambda entry: entry[1]))


def same_tokens(first: tiktoken.Encoding, second: tiktoken.Encoding) -> bool:
    """Whether two encodings make the same ids of any text."""
    return write_tokenizer(first) == write_tokenizer(second) and pattern_name(first.name) == pattern_name(second.name)


def load_tokenizer(name: str, data_dir: Path) -> tiktoken.Encoding:
    """The tokenizer `name`: gpt2 (fetched once), bytes, a .tiktoken file, or a Hugging Face model's. Raises Failure."""
    if name == "bytes":
        return make_tokenizer([bytes([byte]) for byte in range(256)], name)
    file = Path(os.path.expanduser(name.removesuffix(f":{pattern_name(name)}")))
    path = gpt2_ranks(data_dir) if name == "gpt2" else file
    if path.suffix != ".tiktoken" and not path.is_file():
        return load_hf_tokenizer(fetch_model(name, weights=False), name)
    try:
        return read_tokenizer(path.read_text(encoding="ascii", errors="replace"), name)
    except FileNotFoundError:
        raise Failure(f"--tokenizer={name}: there is no file {path}") from None


def gpt2_ranks(data_dir: Path) -> Path:
    """The file of GPT-2's merges, from tiktoken's own cache where that has it."""
    url, sha256, size = GPT2_RANKS
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    cached, path = Path(cache, hashlib.sha1(url.encode()).hexdigest()), data_dir / "downloads" / "gpt2.tiktoken"
    if not path.exists() and cached.exists() and hashlib.sha256(cached.read_bytes()).hexdigest() == sha256:
        return cached
    return fetch(path, url, sha256, size)


STRETCH = 100_000  # characters; tiktoken's search gives up on a million of white space in a row


def encode(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """The tokens of `text`, uint32; no characters in it become a special token."""
    if pattern_name(encoding.name) == "qwen":
        text = unicodedata.normalize("NFC", text)
    stretches = [text]
    if any(text[start : start + STRETCH].isspace() for start in range(0, len(text) - STRETCH + 1, STRETCH)):
        stretches = [text[start : start + STRETCH] for start in range(0, len(text), STRETCH)]
    return np.concatenate([encoding.encode_to_numpy(stretch, disallowed_special=()) for stretch in stretches])


def train_bpe(counts: Counter, vocab_size: int) -> list[bytes]:
    """Learn a byte-pair encoding, Sennrich et al. 2016, on bytes as GPT-2 does.

    counts: how often each piece of text (bytes) occurs. Returns the entries in the order of their ranks, end-of-text
    not among them: the 256 bytes, then the most frequent pair of neighbours at each turn; of equal ones the pair with
    the lower ranks. Fewer than vocab_size - 1 come back where no pair is left to merge.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    pieces, weights = [list(piece) for piece in counts], list(counts.values())
    pair_counts, pieces_with = Counter(), defaultdict(set)
    for index, piece in enumerate(pieces):
        for pair in pairwise(piece):
            pair_counts[pair] += weights[index]
            pieces_with[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    progress = Progress("merges", vocab_size - 257)
    while len(tokens) < vocab_size - 1 and heap:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:  # out of date: merges since then took some of the pair's places
            if 0 < pair_counts[pair] < -count:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        rank = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changes = Counter()
        for index in pieces_with.pop(pair):
            merge_pair(pieces[index], pair, rank, weights[index], changes)
            for new_pair in pairwise(pieces[index]):
                if rank in new_pair:
                    pieces_with[new_pair].add(index)
        for changed, change in changes.items():
            pair_counts[changed] += change
            if change > 0:
                heapq.heappush(heap, (-pair_counts[changed], changed))
        progress.update(len(tokens) - 256)
    progress.close()
    return tokens


def merge_pair(piece: list[int], pair: tuple[int, int], rank: int, weight: int, changes: Counter):
    """Replace `pair` in `piece` by `rank`, from the left, and add to `changes` what that does to the pairs' counts."""
    position = 0
    while position < len(piece) - 1:
        if piece[position] == pair[0] and piece[position + 1] == pair[1]:
            before = piece[max(0, position - 1) : position + 3]
            piece[position : position + 2] = [rank]
            after = piece[max(0, position - 1) : position + 2]
            for old in pairwise(before):
                changes[old] -= weight
            for new in pairwise(after):
                changes[new] += weight
        position += 1


# ---- tokenizers of Hugging Face folders: tokenizer.json, or vocab.json and merges.txt

MOST_JSON_BYTES = 64 * 2**20


def has_tokenizer(folder: Path) -> bool:
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return pair or (folder / "tokenizer.json").is_file()


def load_hf_tokenizer(folder: Path, name: str) -> tiktoken.Encoding:
    """The byte-level BPE tokenizer in a Hugging Face folder as an encoding with the same ids.

    Its end-of-sequence token is our end-of-text; of its other special tokens, text never becomes one. Raises Failure
    where the ids could differ: another algorithm or split pattern, text that is changed first, merges out of order.
    """
    try:
        facts = read_json(folder / "tokenizer_config.json")
        if facts.get("add_prefix_space"):
            raise ValueError("it puts a space before each text (add_prefix_space)")
        named = {key: content_of(token) for key, token in facts.items() if key.endswith("_token")}
        vocab, merges, added, pattern = read_hf_files(folder)
        ids = merged_ids(vocab, merges, {END_OF_TEXT, *added, *named.values()})
        known, otherwise = vocab | added, read_json(folder / "config.json").get("eos_token_id")
        end_of_text = known.get(named.get("eos_token"), known.get(END_OF_TEXT, otherwise))
        if type(end_of_text) is not int:
            raise ValueError(f"neither an eos_token nor {END_OF_TEXT} is among its entries")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, ValueError) else f"it is not laid out as expected ({error!r})"
        raise Failure(f"the tokenizer in {folder} can't be used here: {reason}") from None
    return make_encoding(ids, end_of_text, name if pattern == "gpt2" else f"{name}:{pattern}")


def content_of(token) -> str:
    """The text of a special token, which such files give alone or among its properties."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} where there is none. Raises ValueError."""
    if not path.is_file():
        return {}
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes; more than {MOST_JSON_BYTES:,} are not read")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path.name} holds no JSON object") from None


def read_hf_files(folder: Path) -> tuple[dict[str, int], list, dict[str, int], str]:
    """The vocabulary, the merges, the tokens that were added to them, and the name of the split pattern."""
    file = read_json(folder / "tokenizer.json")
    if not file:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return read_json(folder / "vocab.json"), merges, {}, "gpt2"
    model = file["model"]
    pattern = split_pattern(file.get("pre_tokenizer") or {})
    for name, value in [("normalizer", file.get("normalizer")), *model.items()]:
        is_odd = name in ODDITIES and value or name == "normalizer" and value != NORMALIZERS.get(pattern)
        if is_odd or name == "type" and value != "BPE":
            raise ValueError(f"its {name} is {value!r}, which is not known here")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    for token in file.get("added_tokens", []):
        if not token["special"] and not re.fullmatch(r"<.+>", token["content"]):
            raise ValueError(f"text can become the token {token['content']!r}, which was added and not merged")
    added = {token["content"]: token["id"] for token in file.get("added_tokens", [])}
    return model["vocab"], merges, added, pattern


NORMALIZERS = {"qwen": {"type": "NFC"}}
ODDITIES = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")


def split_pattern(steps: dict) -> str:
    """The name in PATTERNS of how a tokenizer.json splits text. Raises ValueError where it isn't among them."""
    *splits, level = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space", True):
        raise ValueError("it isn't of the byte-level kind, or puts a space before each text (add_prefix_space)")
    if not splits and level.get("use_regex", True):
        return "gpt2"
    for name in PATTERNS:
        if splits == [split_step(name)] and not level.get("use_regex", True):
            return name
    raise ValueError(f"it splits text by a pattern that is none of {', '.join(PATTERNS)}: {splits}")


def split_step(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": PATTERNS[pattern]}, "behavior": "Isolated", "invert": False}


def byte_characters() -> dict[str, int]:
    """The printable characters that stand for the 256 bytes in such files, as GPT-2 chose them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def merged_ids(vocab: dict[str, int], merges: list, special: set[str]) -> dict[bytes, int]:
    """The ids of bytes and of what merges make of them. Raises ValueError where ids don't say all that merges do."""
    if not all(type(number) is int for number in vocab.values()):
        raise ValueError("an id in its vocabulary is no whole number")
    characters = byte_characters()
    ids, seen, last = {bytes([byte]): vocab[character] for character, byte in characters.items()}, {*characters}, -1
    for left, right in merges:
        first, second = (bytes(characters[character] for character in part) for part in (left, right))
        ids[first + second] = vocab[left + right]
        seen.add(left + right)
        if vocab[left + right] <= last or last_merge(first + second, ids) != [first, second]:
            raise ValueError(f"its merge of {left!r} and {right!r} is out of order or never made, so ids would differ")
        last = vocab[left + right]
    if others := vocab.keys() - seen - special:
        raise ValueError(f"its entry {min(others)!r} is neither a byte, nor merged, nor special")
    return ids


def last_merge(token: bytes, ids: dict[bytes, int]) -> list[bytes]:
    """The two parts of which byte-pair encoding makes `token` at last; more where it doesn't come to that."""
    parts, below = [token[place : place + 1] for place in range(len(token))], ids[token]
    while len(parts) > 2:
        number, place = min(
            (ids.get(left + right, below), place) for place, (left, right) in enumerate(pairwise(parts))
        )
        if number >= below:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def save_hf_tokenizer(encoding: tiktoken.Encoding, folder: Path):
    """Write tokenizer.json and tokenizer_config.json, of which transformers' AutoTokenizer makes the same ids.

    Text that holds <|endoftext|> is plain text here; there it takes tokenizer(text, split_special_tokens=True), or
    encode_special_tokens = True on a tokenizers.Tokenizer. Raises Failure.
    """
    ids, names = entries_of(encoding), {byte: character for character, byte in byte_characters().items()}
    vocab = {"".join(names[byte] for byte in token): number for token, number in ids.items()}
    pairs = [last_merge(token, ids) for token in ids if len(token) > 1]
    if any(len(pair) > 2 for pair in pairs) or END_OF_TEXT in vocab:
        raise Failure(
            f"{encoding.name} has entries that merges don't reach, or {END_OF_TEXT}: no tokenizer.json can say that"
        )
    pattern = pattern_name(encoding.name)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern == "gpt2"}
    splits = [] if level["use_regex"] else [split_step(pattern)]  # GPT-2's is part of the step to bytes
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = {
        "version": "1.0",
        "added_tokens": [{"id": encoding.eot_token, "content": END_OF_TEXT, "special": True} | flags],
        "normalizer": NORMALIZERS.get(pattern),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": vocab | {END_OF_TEXT: encoding.eot_token},
            "merges": [" ".join("".join(names[byte] for byte in part) for part in pair) for pair in pairs],
        },
    }
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    facts |= {"clean_up_tokenization_spaces": False}
    folder.mkdir(parents=True, exist_ok=True)
    for name, written in (("tokenizer.json", content), ("tokenizer_config.json", facts)):
        with atomic_file(folder / name) as file:
            file.write(json.dumps(written, ensure_ascii=False).encode() + b"\n")


# ---- downloads: a file gets its name when it is whole and checked; one that broke off goes on where it stopped

ATTEMPTS = 5
FIRST_WAIT_SECONDS, MOST_WAIT_SECONDS = 1.0, 60.0  # between attempts: doubled each time, or what Retry-After says
OFFLINE_WAIT_SECONDS = 0.5  # the same while no server has answered, so that without a network one soon knows
STALL_SECONDS = 30.0  # the longest wait for the next byte, and the time over which the rate is taken
LEAST_RATE = 1000  # bytes per second; an attempt that is slower has failed
MOST_BYTES = 10**10  # in a file whose length nobody states
HASHED_BYTES = 10**8  # what is there already is hashed each time; from here on its size must do, where it is known
MOST_PAGES, MOST_PAGE_BYTES = 100, 10**7  # of a listing


@dataclass(eq=False)
class Fault(Exception):
    """Why an attempt failed."""

    reason: str
    wait_seconds: float = 0.0  # what the server asks for
    reached: bool = True  # a server answered
    final: bool = False  # the next attempt would end alike


def fetch(path: Path, url: str, sha256: str = "", size: int = 0, deadline_seconds: float = 600) -> Path:
    """Return `path`, downloaded from `url` if it isn't there; it appears only when whole and as it should be.

    sha256, size: in hex and in bytes, "" and 0 where they aren't known. deadline_seconds: for all attempts together;
    a later call goes on from there. Raises Failure.
    """
    if not path.exists():
        partial, lock = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "lock"))
        with locked(lock):
            if not path.exists():  # another process may have brought it while this one waited
                known = f" (SHA-256 {sha256})" if sha256 else ""
                advice = f"run this again later, or first put that file at {path}{known} by other means"
                persist(download, url, deadline_seconds, advice, partial, sha256, size)
                os.replace(partial, path)
                discard(partial)
                with suppress(PermissionError):  # Windows keeps an open file
                    lock.unlink(missing_ok=True)  # whoever waits for this one, or makes a new one, finds `path`
                return path
    hashed = path.stat().st_size < HASHED_BYTES or not size
    if wrong := mismatch(path, sha256 if hashed else "", size):
        raise Failure(f"{path} {wrong}; delete it to download it anew")
    return path


def mismatch(path: Path, sha256: str, size: int) -> str:
    """In which way `path` isn't the file that is wanted; "" where it is."""
    found_size = path.stat().st_size
    if size and found_size != size:
        return f"has {found_size:,} bytes, not {size:,}"
    if not sha256 or (found := sha256_of(path)) == sha256:
        return ""
    return f"has SHA-256 {found}, not {sha256}"


def persist(attempt: Callable, url: str, deadline_seconds: float, advice: str, *more):
    """Return attempt(session, url, deadline, *more), tried again after what may pass. Raises Failure with `advice`."""
    deadline, reached = time.monotonic() + deadline_seconds, False
    with requests.Session() as session:
        session.max_redirects = 5
        for number in range(1, ATTEMPTS + 1):
            try:
                return attempt(session, url, deadline, *more)
            except Fault as fault:
                reached = reached or fault.reached
                most = MOST_WAIT_SECONDS if reached else OFFLINE_WAIT_SECONDS
                wait = min(max(FIRST_WAIT_SECONDS * 2 ** (number - 1), fault.wait_seconds), most)
                if fault.final or number == ATTEMPTS or time.monotonic() + wait > deadline:
                    raise Failure(f"could not download {url}: {fault.reason};\n{advice}", INPUT_OUTPUT) from None
            time.sleep(wait)


@contextmanager
def answer(session: requests.Session, url: str, deadline: float, headers: dict[str, str]) -> Iterator:
    """The answer to a GET, its body yet to be read. What goes wrong on the way, or while it is read, raises Fault."""
    headers = {"Accept-Encoding": "identity"} | headers  # so that the bytes that come are those of the file
    if url.startswith(f"{hub_endpoint()}/") and (token := os.environ.get("HF_TOKEN", "").strip()):
        headers["Authorization"] = f"Bearer {token}"  # requests drops it where a redirect leads elsewhere
    left = max(deadline - time.monotonic(), 0.1)
    timeout = min(10, left), min(STALL_SECONDS, left)  # to connect, and for each read
    try:
        with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
            check_status(response, "Range" in headers)
            yield response
    except requests.RequestException as error:
        final = isinstance(error, (requests.TooManyRedirects, ValueError))  # a ValueError: not a URL, or not http
        reached = not isinstance(error, requests.ConnectionError)
        raise Fault(type(error).__name__, reached=reached, final=final) from None
    except urllib3.exceptions.HTTPError as error:  # the body is cut, or stalls
        raise Fault(type(error).__name__) from None


def check_status(response: requests.Response, ranged: bool):
    """Raise Fault unless the answer is 200, or 206 or 416 to a `ranged` request, and not compressed."""
    status, encoding = response.status_code, response.headers.get("Content-Encoding", "identity")
    if status != 200 and not (ranged and status in (206, 416)):
        asked = response.headers.get("Retry-After", "") if status in (429, 503) else ""
        passing = status in (408, 429) or status >= 500
        raise Fault(f"the server answers {status}", float(asked) if asked.isdecimal() else 0.0, final=not passing)
    if encoding.lower() != "identity":
        raise Fault(f"it comes with the encoding {encoding!r}, which was not asked for", final=True)


def body(response: requests.Response, deadline: float, most: int) -> Iterator[bytes]:
    """The bytes of an answer as they come, and no more once over `most`. Raises Fault where they're slow or late."""
    since, recent, count = time.monotonic(), 0, 0
    while count <= most and (chunk := response.raw.read1(1 << 16, decode_content=False)):  # read1 waits for no more
        yield chunk
        now, recent, count = time.monotonic(), recent + len(chunk), count + len(chunk)
        if now > deadline:
            raise Fault("the time for it is over")
        if now - since > STALL_SECONDS:
            if recent < LEAST_RATE * (now - since):
                raise Fault(f"fewer than {LEAST_RATE:,} bytes per second came")
            since, recent = now, 0


def download(session: requests.Session, url: str, deadline: float, partial: Path, sha256: str, size: int):
    """One attempt to have the whole file in `partial`, from where the last one stopped if that fits. Raises Fault."""
    start, validator = resume_point(partial, url)
    headers = {"Range": f"bytes={start}-", "If-Range": validator} if start else {}
    with answer(session, url, deadline, headers) as response:
        length = response.raw.length_remaining or 0  # what Content-Length says
        if not continues(response, start, start + length, validator) or size not in (0, start + length):
            discard(partial)
            if response.status_code != 200:
                raise Fault("what had come of it is not a part of what the server has")
            start, validator = 0, validator_of(response)
        total = start + length if length else size
        if size and total != size:
            raise Fault(f"it has {total:,} bytes, not {size:,}", final=True)
        if total - start > (free := shutil.disk_usage(partial.parent).free):
            raise Failure(f"{partial.parent} has {free:,} bytes free, {url} needs {total - start:,}", INPUT_OUTPUT)
        partial.with_suffix(".source").write_text(f"{url}\n{validator}", encoding="utf-8")
        most = total or MOST_BYTES
        append(partial, start, total, body(response, deadline, most - start))
    if (found := partial.stat().st_size) < total:
        raise Fault(f"it ended after {found:,} of {total:,} bytes")
    if wrong := f"has more than {most:,} bytes" if found > most else mismatch(partial, sha256, size):
        discard(partial)
        raise Fault(f"it {wrong}", final=True)


def append(partial: Path, start: int, total: int, chunks: Iterator[bytes]):
    """Write `chunks` behind the `start` bytes that `partial` holds, to the disk."""
    progress = Progress(f"{'more ' if start else ''}bytes of {partial.stem[1:]}", max(total - start, 0))
    with closing(progress), open(partial, "ab") as file:
        for chunk in chunks:
            file.write(chunk)
            progress.update(file.tell() - start)
        file.flush()
        os.fsync(file.fileno())


def resume_point(partial: Path, url: str) -> tuple[int, str]:
    """The bytes of `url` that are there and the validator of their version; 0 and "" where they're of no use."""
    with suppress(FileNotFoundError, ValueError):
        source, validator = partial.with_suffix(".source").read_text(encoding="utf-8").split("\n")
        if source == url and validator:
            return partial.stat().st_size, validator
    return 0, ""


def validator_of(response: requests.Response) -> str:
    """What tells this version of a file from others: a strong ETag, or when it was last changed; "" for neither."""
    etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    validator = etag if etag.startswith('"') else modified
    return validator if validator.isprintable() else ""


def continues(response: requests.Response, start: int, total: int, validator: str) -> bool:
    """Whether the answer is all the rest, from byte `start` on, of the version that has this validator."""
    return (
        response.status_code == 206
        and response.headers.get("Content-Range") == f"bytes {start}-{total - 1}/{total}"
        and validator_of(response) in ("", validator)  # for servers that don't know If-Range
    )


def discard(partial: Path):
    partial.unlink(missing_ok=True)  # before its source: bytes never stand beside the validator of another version
    partial.with_suffix(".source").unlink(missing_ok=True)


class HubFile(NamedTuple):
    """A file in a repository of the Hugging Face hub."""

    path: str  # in the repository
    url: str
    size: int  # bytes
    sha256: str  # "" for a small file, of which the hub doesn't say it


def hub_endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_files(repo: str, revision: str, prefix: str, kind: str = "datasets") -> list[HubFile]:
    """The files of a Hugging Face repository whose path starts with `prefix`, sorted. Raises Failure.

    kind: datasets or models.
    """
    repo, revision, folder = quote(repo), quote(revision, safe=""), quote(prefix.rpartition("/")[0])
    page = f"{hub_endpoint()}/api/{kind}/{repo}/tree/{revision}/{folder}".rstrip("/") + "?recursive=true"
    source = f"{hub_endpoint()}/{'datasets/' if kind == 'datasets' else ''}{repo}/resolve/{revision}"
    advice = f"that page lists the files of {repo}; run this again with a network"
    files = []
    for _ in range(MOST_PAGES):
        found, page = persist(read_page, page, 60, advice, source, prefix)
        files += found
        if not page:
            return sorted(files)
    raise Failure(f"{repo} lists its files on more than {MOST_PAGES} pages; is the prefix too short?", INPUT_OUTPUT)


def read_page(session: requests.Session, url: str, deadline: float, source: str, prefix: str) -> tuple:
    """The list of HubFiles on one page of a listing, and the URL of the next page or "". Raises Fault."""
    with answer(session, url, deadline, {}) as response:
        text = b"".join(body(response, deadline, MOST_PAGE_BYTES))  # a page that is longer is cut, and so no JSON
        following = response.links.get("next", {}).get("url", "")
    files = []
    try:
        for item in json.loads(text):
            if item["type"] == "file" and item["path"].startswith(prefix):
                sha256 = item["lfs"]["oid"] if item.get("lfs") else ""
                files.append(HubFile(item["path"], f"{source}/{quote(item['path'])}", int(item["size"]), sha256))
    except Exception as error:  # of many types, for all that a page can hold instead of a listing
        raise Fault(f"it is not a listing of files ({type(error).__name__})", final=True) from None
    for file in files:
        if re.search(r"^/|[\\:\x00-\x1f]|(^|/)\.\.(/|$)", file.path):
            raise Fault(f"it names {file.path!r}, which leads out of a folder", final=True)
    return files, following


def fetch_all(files: list[HubFile], folder: Path) -> list[Path]:
    """Those files in `folder`, all of them whole. Raises Failure."""
    missing = [file for file in files if not (folder / Path(file.path).name).exists()]
    folder.mkdir(parents=True, exist_ok=True)
    need, free = sum(file.size for file in missing), shutil.disk_usage(folder).free
    if need > free:
        raise Failure(f"{folder} needs {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB of the disk are free", INPUT_OUTPUT)
    for number, file in enumerate(files, 1):
        print(f"{file.path}, {number} of {len(files)}, {file.size / 1e6:,.0f} MB", flush=True)
        fetch(folder / Path(file.path).name, file.url, file.sha256, file.size, deadline_seconds=24 * 3600)
    return [folder / Path(file.path).name for file in files]


# ---- models of the Hugging Face hub, kept where its own library keeps them

MODELS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
MODELS |= {"distilgpt2": "distilbert/distilgpt2"}
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL_FILES = "config.json generation_config.json tokenizer.json tokenizer_config.json vocab.json merges.txt".split()


def hub_name(name: str) -> str:
    """The repository OWNER/NAME that `name` means on the hub; "" where it means none."""
    return MODELS.get(name) or (name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) else "")


def names_model(name: str) -> bool:
    """Whether `name` can be a model's: an existing folder, one of MODELS, or OWNER/NAME."""
    return bool(hub_name(name) or name and Path(os.path.expanduser(name)).is_dir())


def fetch_model(name: str, weights: bool = True) -> Path:
    """The folder of a model: `name` itself, or its snapshot in the hub's cache, downloaded where it isn't there.

    weights: with them, or only config and tokenizer. What the cache holds is used without a request. Raises Failure.
    """
    folder, repo = Path(os.path.expanduser(name)), hub_name(name)
    if not (missing := missing_file(folder, weights)):
        return folder
    if not repo or folder.is_dir() and name not in MODELS:
        raise Failure(f"{folder} holds no {missing}; name a folder that does, or OWNER/NAME on the Hugging Face Hub")
    cache = hub_cache() / f"models--{repo.replace('/', '--')}"
    main = cache / "refs" / "main"  # names the commit whose snapshot is the newest
    if main.is_file() and is_commit(commit := main.read_text(encoding="utf-8", errors="replace").strip()):
        if not missing_file(cache / "snapshots" / commit, weights):
            return cache / "snapshots" / commit
    names = "config.json, model.safetensors and tokenizer.json" if weights else "tokenizer.json"
    advice = f"run this again with a network, or put {names} of {repo} into a folder and name that instead of {name}"
    commit = persist(read_commit, f"{hub_endpoint()}/api/models/{repo}/revision/main", 60, advice)
    download_model(repo, commit, weights, cache / "snapshots" / commit)
    main.parent.mkdir(exist_ok=True)
    with atomic_file(main) as file:  # last: what it names is whole
        file.write(commit.encode())
    return cache / "snapshots" / commit


def hub_cache() -> Path:
    """The folder in which the hub's own library keeps what it downloads."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def is_commit(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9a-f]{40}", text))


def read_commit(session: requests.Session, url: str, deadline: float) -> str:
    """The commit that the hub's page on a revision states. Raises Fault."""
    with answer(session, url, deadline, {}) as response:
        text = b"".join(body(response, deadline, MOST_PAGE_BYTES))
    try:
        commit = str(json.loads(text)["sha"])
    except Exception as error:  # of many types, for all that a page can hold instead
        raise Fault(f"it states no commit ({type(error).__name__})", final=True) from None
    if not is_commit(commit):
        raise Fault(f"it states {commit[:60]!r}, which is no commit", final=True)
    return commit


def missing_file(folder: Path, weights: bool) -> str:
    """A file that a model's folder lacks; "" where all that is needed is there."""
    if not weights:
        return "" if has_tokenizer(folder) else "tokenizer.json"
    is_sharded = (folder / WEIGHTS_INDEX).is_file() and not (folder / WEIGHTS).is_file()
    names = ["config.json", *(shard_names(folder) if is_sharded else [WEIGHTS])]
    return next((name for name in names if not (folder / name).is_file()), "")


def shard_names(folder: Path) -> list[str]:
    """The files of weights that a folder's index names. Raises Failure where one is not a plain name."""
    try:
        names = sorted(set(read_json(folder / WEIGHTS_INDEX)["weight_map"].values()))
        wrong = [name for name in names if not re.fullmatch(r"\w[\w.-]*\.safetensors", name, re.ASCII)]
    except (ValueError, KeyError, AttributeError, TypeError):
        names, wrong = [], ["nothing"]
    if wrong:
        raise Failure(f"{folder / WEIGHTS_INDEX} names {wrong[0]}, and only *.safetensors beside it are read")
    return names


def download_model(repo: str, commit: str, weights: bool, folder: Path):
    """Bring the files that a model needs from the hub into `folder`: never a pickle. Raises Failure."""
    files = {file.path: file for file in hub_files(repo, commit, "", "models")}
    wanted = [*SMALL_FILES, *([WEIGHTS if WEIGHTS in files else WEIGHTS_INDEX] if weights else [])]
    fetch_all([files[name] for name in wanted if name in files], folder)
    if weights and WEIGHTS not in files and WEIGHTS_INDEX in files:
        fetch_all([files[name] for name in shard_names(folder) if name in files], folder)
    if missing := missing_file(folder, weights):
        raise Failure(f"{repo} on the Hugging Face Hub has no {missing}, which is needed; choose another model")


# ---- reading: each source yields its documents, and where each stands, in an order that does not change

BLOCK_BYTES = 1 << 20  # read at once
DOCUMENT_CHARACTERS = 2_000_000  # a longer text becomes several documents, so that memory stays bounded
LINE_CHARACTERS = 64_000_000  # a longer line of JSON or CSV is broken
STANDARD_INPUT = Path("-")
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
BYTE_ORDER_MARKS = {  # those of UTF-32 first, as UTF-16's begin like them
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def pyarrow(what: str):
    """The library that reads parquet, and .zst on a Python that cannot."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise Failure(f"{what} needs pyarrow: pip install pyarrow") from None
    return pyarrow


def open_zst(file):
    return zstd.open(file) if zstd else pyarrow("a .zst file").CompressedInputStream(file, "zstd")


DAMAGED = (EOFError, lzma.LZMAError, zlib.error) + ((zstd.ZstdError,) if zstd else ())
OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": open_zst}


@dataclass
class Tally:
    """Counts what was dropped, by reason, and keeps a few examples of each."""

    documents: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    lines: Counter = field(default_factory=Counter)  # dropped from documents that stay
    examples: dict[str, list] = field(default_factory=dict)  # by reason: where it stood, and how it begins

    def drop(self, reason: str, where: str, text: str = ""):
        self.documents[reason] += 1
        self.bytes[reason] += len(text.encode())
        self.show(reason, where, text[:300])

    def show(self, reason: str, where: str, beginning: str):
        examples = self.examples.setdefault(reason, [])
        if len(examples) < 3:
            examples.append((where, beginning))

    def add(self, other: "Tally"):
        self.documents += other.documents
        self.bytes += other.bytes
        self.lines += other.lines
        for reason, examples in other.examples.items():
            for example in examples:
                self.show(reason, *example)


class Reader:
    """The documents of `sources`, in order, as (text, where it stands).

    `tally` counts what is skipped; `done` of `total` bytes of the files are read. Raises Failure.
    """

    def __init__(self, settings: PrepareConfig, sources: str | list[Path], setting: str = "source"):
        self.settings, self.setting, self.tally, self.done = settings, setting, Tally(), 0
        self.named = set()  # files that were named themselves, not found in a folder
        self.files = list(dict.fromkeys(self.find_files(sources) if isinstance(sources, str) else sources))
        self.sizes = {path: os.path.getsize(path) if os.path.exists(path) else 0 for path in self.files}
        self.total = sum(self.sizes.values())

    def problem(self, reason: str, message: str, code: int = config.BAD_INPUT):
        """Something cannot be read: the end, or with --on_error=skip one more that is skipped."""
        if self.settings.on_error == "stop":
            raise Failure(f"{message}; --on_error=skip would go on without it", code)
        self.tally.drop(reason, message)

    def find_files(self, sources: str) -> Iterator[Path]:
        """The files that `sources` names, each folder's in the order of their names."""
        for part in [sources] if os.path.exists(os.path.expanduser(sources)) else filter(None, sources.split(",")):
            path = Path(os.path.expanduser(part))
            if path == STANDARD_INPUT and not sys.stdin:
                raise Failure(f"--{self.setting}=-: standard input is closed")
            found = [path] if path == STANDARD_INPUT or os.path.exists(path) else self.match(path)
            self.named.update(found)
            files = [file for entry in found for file in (self.walk(entry) if entry.is_dir() else [entry])]
            if not files:
                links = self.tally.documents["symbolic link"]
                hint = f" ({links} symbolic links were not followed; name them, as in '{path}/*')" if links else ""
                raise Failure(f"--{self.setting}={path}: there is no such file, or a folder without text{hint}")
            yield from files

    def match(self, pattern: Path) -> list[Path]:
        """The files and folders that a pattern fits, hidden ones only where it names them."""
        names = {"..", *pattern.parts}
        try:
            found = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
        except ValueError:  # no pattern
            return []
        return [path for path in found if not any(part[0] == "." and part not in names for part in path.parts)]

    def walk(self, folder: Path) -> Iterator[Path]:
        """The files below `folder`; no hidden ones, and none behind links, which lead anywhere or in a circle."""

        def unreadable(error: OSError):
            self.problem("unreadable", f"{error.filename}: {error.strerror}", INPUT_OUTPUT)

        for parent, folders, names in os.walk(folder, onerror=unreadable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in (Path(parent, name) for name in sorted(folders + names) if not name.startswith(".")):
                if path.is_symlink():
                    self.tally.drop("symbolic link", str(path))
                elif path.is_file():
                    yield path

    def kind(self, path: Path) -> str:
        """How to read a file: as the settings say, or by its suffix under that of its compression."""
        suffix = Path(path.stem).suffix if path.suffix.lower() in OPENERS else path.suffix
        if suffix == ".json" and path in self.named and not self.settings.format:
            raise Failure(
                f"{path}: make it .jsonl, an object a line; or say --format=jsonl, or --format=text for all of it"
            )
        return self.settings.format or SUFFIXES.get(suffix.lower(), "text")

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for path in self.files:
            before = self.done
            try:
                yield from self.read_file(path)
            except UnicodeError as error:
                self.problem("invalid bytes", str(error))
            except (*DAMAGED, OSError) as error:
                if isinstance(error, OSError) and error.errno:  # the system's; a decompressor's have none
                    self.problem("unreadable", f"{path}: {error.strerror}", INPUT_OUTPUT)
                else:
                    self.problem("damaged file", f"{path} is cut or damaged: {error}")
            self.done = before + self.sizes[path]

    def read_file(self, path: Path) -> Iterator[tuple[str, str]]:
        """The documents of one file, by its kind and the separator. Raises Failure, or what `__iter__` makes one of."""
        if self.kind(path) == "parquet":
            yield from self.read_parquet(path)
            return
        with sys.stdin.buffer if path == STANDARD_INPUT else open(path, "rb") as file:
            with OPENERS.get(path.suffix.lower(), lambda file: file)(file) as stream:
                block = stream.read(BLOCK_BYTES)
                encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if block.startswith(mark)), "utf-8")
                if encoding == "utf-8" and b"\0" in block[:4096]:
                    if path in self.named:
                        self.problem("binary", f"{path} is binary, not text: it has NUL bytes at its beginning")
                    else:
                        self.tally.drop("binary", str(path))
                    return
                blocks = self.decode(block, stream, file, encoding, path)
                if self.kind(path) == "jsonl":
                    yield from self.read_json_lines(lines_of(blocks), path)
                elif self.kind(path) == "csv":
                    yield from self.read_csv(lines_of(blocks), path)
                elif separator := self.settings.separator.strip():
                    parted = groupby(lines_of(blocks), lambda line: line.strip() == separator)
                    texts = (text for is_separator, lines in parted if not is_separator for text in in_pieces(lines))
                    yield from ((text, str(path)) for text in texts)
                else:
                    yield from ((text, str(path)) for text in in_pieces(blocks))

    def decode(self, block: bytes, stream, file, encoding: str, path: Path) -> Iterator[str]:
        """The text of a stream by blocks, less its byte-order mark. The first block was read to see the encoding.

        file: what lies under the decompressing stream, for how far that is. Raises Failure.
        """
        decoder = codecs.getincrementaldecoder(encoding)(
            "strict" if self.settings.invalid_bytes == "refuse" else "replace"
        )
        before, read, mark = self.done, 0, "\ufeff"
        while True:
            held = len(decoder.getstate()[0])  # bytes of a character that the block before began
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                where = f"{path} is not {encoding} text: {error.reason} at byte {read - held + error.start}"
                raise UnicodeError(f"{where}; --invalid_bytes=replace puts U+FFFD there") from None
            if file.seekable():
                self.done = before + file.tell()
            yield text.removeprefix(mark)
            if not block:
                return
            mark = mark if not text else ""
            read += len(block)
            block = stream.read(BLOCK_BYTES)

    def read_json_lines(self, lines: Iterable[str], path: Path) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                self.problem("broken line", f"{path}:{number}: not JSON: {error}")
                continue
            if not isinstance(record, dict):
                record = {}
            yield from self.take_text(record.get(self.settings.text_field), list(record), f"{path}:{number}")

    def read_csv(self, lines: Iterable[str], path: Path) -> Iterator[tuple[str, str]]:
        csv.field_size_limit(LINE_CHARACTERS)
        rows = csv.DictReader(lines, strict=True)
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                self.problem("broken line", f"{path}:{rows.reader.line_num}: not CSV: {error}")
                continue
            if row is None:
                return
            yield from self.take_text(row.get(self.settings.text_field), list(row), f"{path}:{rows.line_num}")

    def read_parquet(self, path: Path) -> Iterator[tuple[str, str]]:
        """A document a row, 256 rows in memory at once. Raises EOFError where the file is damaged."""
        arrow, column = pyarrow("parquet"), self.settings.text_field
        try:
            with arrow.parquet.ParquetFile(path) as file:
                if column not in file.schema_arrow.names:
                    yield from self.take_text(None, file.schema_arrow.names, str(path))
                    return
                number, before = 0, self.done
                for batch in file.iter_batches(batch_size=256, columns=[column]):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        yield from self.take_text(value, [column], f"{path}:{number}")
                    self.done = before + self.sizes[path] * number // file.metadata.num_rows
        except (arrow.ArrowInvalid, UnicodeDecodeError) as error:
            raise EOFError(error) from None

    def take_text(self, value, fields: list[str], where: str) -> Iterator[tuple[str, str]]:
        """The text in a row, as documents. JSON can name half a character, which Unicode cannot: it becomes `?`."""
        if isinstance(value, str):
            yield from ((text, where) for text in in_pieces([value.encode(errors="replace").decode()]))
        else:
            names = ", ".join(map(str, fields)) or "none"
            message = f"{where}: no text in field {self.settings.text_field!r}; its fields: {names} (--text_field)"
            self.problem("missing field", message)


def lines_of(blocks: Iterable[str]) -> Iterator[str]:
    """Text by blocks as lines with their ends. Raises EOFError where one is too long to be a row."""
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        yield from (line + "\n" for line in lines)
        if len(rest) > LINE_CHARACTERS:
            raise EOFError(f"a line of more than {LINE_CHARACTERS:,} characters")
    if rest:
        yield rest


def in_pieces(stretches: Iterable[str]) -> Iterator[str]:
    """The text that `stretches` make up, in documents of DOCUMENT_CHARACTERS at most, cut at white space."""
    held = ""
    for stretch in stretches:
        held += stretch
        while len(held) > DOCUMENT_CHARACTERS:
            space = max(held.rfind(white, DOCUMENT_CHARACTERS // 2, DOCUMENT_CHARACTERS) for white in "\n ")
            end = space + 1 or DOCUMENT_CHARACTERS
            yield held[:end]
            held = held[end:]
    yield held


SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    1_115_394,
)


def open_named(settings: PrepareConfig) -> Reader:
    """A reader of a named dataset, which is downloaded first where it is from elsewhere."""
    downloads, named = Path(settings.data_dir) / "downloads", NAMED[settings.name]
    if settings.name == "shakespeare":
        return Reader(settings, [fetch(downloads / "tinyshakespeare.txt", *SHAKESPEARE)])
    if settings.name == "stdlib":
        return Reader(settings, stdlib_files())
    return Reader(settings, download_all(named, downloads / settings.name))


def stdlib_files() -> list[Path]:
    """The modules of the running Python's standard library, tests left out: 12 MB of real text on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    modules = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    if not modules:
        raise Failure(f"{root} holds no .py files: this Python keeps its library zipped; use another, or --source=PATH")
    return modules


def download_all(named: Named, folder: Path) -> list[Path]:
    """The files of a dataset on the Hugging Face Hub, in `folder`, all of them whole. Raises Failure."""
    return fetch_all(hub_files(named.repository, named.revision, named.prefix), folder)


# ---- words and their n-grams as hashes, for whatever looks for repetition

WORD_BYTES = bytes(byte if byte >= 128 or chr(byte).isalnum() else ord(" ") for byte in range(256))
SYMBOLS = (  # that are no letters: first and last three bytes in UTF-8, and how many bytes such a character has
    (0xC2A000, 0xC2BFFF, 2),  # Latin-1
    (0xE28000, 0xE2AFFF, 3),  # typography, arrows, mathematics: U+2000 to U+2BFF
    (0xE38080, 0xE380BF, 3),  # Chinese and Japanese punctuation, and the same in full width
    (0xEFBC80, 0xEFBC8F, 3),
    (0xEFBC9A, 0xEFBCA0, 3),
    (0xF09F00, 0xF09FFF, 4),  # emoji
)
SPACES = (  # likewise: the white space beyond ASCII
    (0xC28500, 0xC285FF, 2),
    (0xC2A000, 0xC2A0FF, 2),
    (0xE19A80, 0xE19A80, 3),
    (0xE28080, 0xE2808A, 3),
    (0xE280A8, 0xE280A9, 3),
    (0xE280AF, 0xE280AF, 3),
    (0xE2819F, 0xE2819F, 3),
    (0xE38080, 0xE38080, 3),
)


def mix(hashes: np.ndarray) -> np.ndarray:
    """Each uint64 as one that looks random: the finaliser of splitmix64, Steele et al. 2014."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


HASHED_PLACES = 64  # bytes of a word beyond these take the numbers of its first ones again
BYTE_HASHES = mix(np.arange(1, 256 * HASHED_PLACES + 1, dtype=np.uint64))  # at 256 * place in the word + byte
BYTE_HASHES[ord(" ") :: 256] = 0  # for what stands between words


def hash_words(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the words of `text` as hashes, uint64 (words,), and their sizes in bytes, int64 (words,).

    A word is a run of letters and digits in lower case, or one Chinese or Japanese character; beyond ASCII whatever is
    none of SYMBOLS counts as a letter. Its hash is the sum of random numbers, one for each of its bytes at its place.
    """
    data = np.frombuffer(bytearray(b"   " + text.lower().encode().translate(WORD_BYTES) + b"   "), dtype=np.uint8)
    blank(data, SYMBOLS)
    # below, [3:] is each byte, [2:-1] the one before it, and [:-3] the one three before, where a lone character begins
    inside, single = data != ord(" "), (data >= 0xE3) & (data <= 0xE9)  # what such characters' three bytes begin with
    starts = inside[3:] & (~inside[2:-1] | single[3:] | single[:-3])
    ends = np.flatnonzero(inside[2:-1] & (~inside[3:] | starts)) + 3
    starts = np.flatnonzero(starts) + 3
    if not len(starts):
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    sizes, data, starts = ends - starts, data[starts[0] :], starts - starts[0]
    begins = np.repeat(starts.astype(np.uint8), np.diff(starts, append=len(data)))  # each byte's word, modulo 256
    places = (np.resize(np.arange(256, dtype=np.uint8), len(data)) - begins) % HASHED_PLACES
    return np.add.reduceat(BYTE_HASHES[places.astype(np.uint16) << 8 | data], starts), sizes


def blank(data: np.ndarray, characters: tuple):
    """Make spaces of SYMBOLS or SPACES in UTF-8, uint8 (bytes,), which ends with at least three spaces."""
    begins = np.flatnonzero(data >= 0xC2)  # of characters beyond ASCII
    codes = sum(data[begins + place].astype(np.uint32) << (16 - 8 * place) for place in range(3))
    for first, last, size in characters:
        for place in range(size):
            data[begins[(codes >= first) & (codes <= last)] + place] = ord(" ")


def hash_ngrams(words: np.ndarray, n: int) -> np.ndarray:
    """Every n words in a row as one hash, uint64 (words - n + 1,); none where there are fewer than n."""
    count = max(0, len(words) - n + 1)
    ngrams = np.zeros(count, dtype=np.uint64)
    for word in range(n):
        ngrams = ngrams * np.uint64(0x9E3779B97F4A7C15) + words[word : word + count]
    return mix(ngrams)


STOP_WORDS = hash_words("the be to of and that have with")[0]


class HashSet:
    """A set of hashes that finds its members in an array, faster than np.isin where few are."""

    def __init__(self, hashes: np.ndarray):
        self.hashes = np.unique(hashes)
        bits = max(8, (16 * len(self.hashes)).bit_length())
        self.shift = np.uint64(64 - bits)
        self.maybe = np.zeros(1 << bits, dtype=bool)
        self.maybe[self.hashes >> self.shift] = True

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """The places in `hashes` that hold a member."""
        places = np.flatnonzero(self.maybe[hashes >> self.shift])
        if not len(places):
            return places
        nearest = np.searchsorted(self.hashes, hashes[places]).clip(max=len(self.hashes) - 1)
        return places[self.hashes[nearest] == hashes[places]]


# ---- cleaning: `basic` mends text; `web` also drops what published rules take for no running text
# Gopher: Rae et al. 2021, appendix A.1.1. C4: Raffel et al. 2020, section 2.2.

LINE_ENDS = bytes.maketrans(b"\r\x0b\x0c", b"\n\n\n")  # of old systems, and of pages
CONTROL_CHARACTERS = bytes({*range(32), 127} - {*b"\t\n\r\x0b\x0c"})  # to be dropped
RARE_LINE_ENDS, RARE_CONTROLS = re.compile("[\x85\u2028\u2029]"), re.compile("[\x80-\x9f\ufeff]")
RARE = (b"\xc2", b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xef\xbb\xbf")  # one of these is in a text with one of those
BULLETS = ("•", "‣", "◦", "▪", "●", "- ", "* ")
ELLIPSES = ("...", "…")
LETTERS = np.array([byte >= 128 or chr(byte).isalpha() for byte in range(256)])  # beyond ASCII all count as letters
BOILERPLATE = (  # C4's words and phrases, in lower case
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
SENTENCE_ENDS = (".", "!", "?", '"', "”")
SENTENCE_END = re.compile("[.!?][\"”')]*(?=\\s|$)")


def mend(text: str) -> str:
    """Text in Unicode's composed form (NFC), its lines ended by one line feed, without control characters."""
    data = text.encode().replace(b"\r\n", b"\n").translate(LINE_ENDS, CONTROL_CHARACTERS)
    text = data.decode()
    if any(mark in data for mark in RARE):
        text = RARE_CONTROLS.sub("", RARE_LINE_ENDS.sub("\n", text))
    return unicodedata.normalize("NFC", text)


def drop_lines(text: str, settings: PrepareConfig, dropped: Counter) -> str:
    """Text without the lines that C4 drops from a page that stays; they are counted in `dropped`."""
    if settings.drop_unfinished_lines:
        text = keep_lines(text, "unfinished line", is_finished, dropped)
    if settings.drop_boilerplate and is_boilerplate(text):  # somewhere
        text = keep_lines(text, "boilerplate line", lambda line: not is_boilerplate(line), dropped)
    return text


def is_boilerplate(text: str) -> bool:
    """C4: mentions JavaScript or a policy of the site."""
    lowered = text.lower()
    return any(phrase in lowered for phrase in BOILERPLATE)


def keep_lines(text: str, reason: str, is_kept: Callable[[str], bool], dropped: Counter) -> str:
    lines = text.split("\n")
    kept = [line for line in lines if not line.strip() or is_kept(line)]
    dropped[reason] += len(lines) - len(kept)
    return "\n".join(kept)


def is_finished(line: str) -> bool:
    """C4: a line ends in terminal punctuation and has at least five words."""
    return line.rstrip().endswith(SENTENCE_ENDS) and len(line.split()) >= 5


class Page:
    """A document as the rules look at it. Its lines and paragraphs are stripped, its words parted by white space."""

    def __init__(self, text: str):
        self.text = text
        self.lines = [line for line in map(str.strip, text.split("\n")) if line]
        self.paragraphs = [part for part in map(str.strip, re.split(r"\n\s*\n", text)) if part]
        data = np.frombuffer(bytearray(b" " + text.encode() + b"   "), dtype=np.uint8)
        blank(data, SPACES)
        white = data <= ord(" ")
        starts = np.flatnonzero(white[:-1] & ~white[1:]) + 1
        self.words = len(starts)
        self.word_characters = np.count_nonzero(~white & (data & 0xC0 != 0x80))  # UTF-8 continues a character so
        self.lettered_words = np.count_nonzero(np.maximum.reduceat(LETTERS[data], starts)) if self.words else 0
        self.hashes, self.sizes = hash_words(text)  # of its letters and digits alone


def word_count(page: Page, settings: PrepareConfig) -> bool:
    """Gopher: 50 to 100,000 words."""
    return page.words < settings.min_words or 0 < settings.max_words < page.words


def word_length(page: Page, settings: PrepareConfig) -> bool:
    """Gopher: a mean of 3 to 10 characters a word."""
    mean = page.word_characters / max(page.words, 1)
    return not settings.min_word_length <= mean <= settings.max_word_length


def symbols(page: Page, settings: PrepareConfig) -> bool:
    """Gopher: at most 0.1 hash signs or ellipses a word, each counted for itself."""
    ellipses = sum(map(page.text.count, ELLIPSES))
    return max(page.text.count("#"), ellipses) > settings.max_symbols * page.words


def bullet_lines(page: Page, settings: PrepareConfig) -> bool:
    """Gopher: at most 90% of the lines start with a bullet."""
    return sum(line.startswith(BULLETS) for line in page.lines) > settings.max_bullet_lines * len(page.lines)


def ellipsis_lines(page: Page, settings: PrepareConfig) -> bool:
    """Gopher: at most 30% of the lines end with an ellipsis."""
    return sum(line.endswith(ELLIPSES) for line in page.lines) > settings.max_ellipsis_lines * len(page.lines)


def words_without_letters(page: Page, settings: PrepareConfig) -> bool:
    """Gopher: at least 80% of the words hold a letter."""
    return page.lettered_words < settings.min_alphabetic_words * page.words


def stop_words(page: Page, settings: PrepareConfig) -> bool:
    """Gopher: at least two of the, be, to, of, and, that, have, with occur."""
    return sum(bool(np.any(page.hashes == word)) for word in STOP_WORDS) < settings.min_stop_words


def repeated_lines(page: Page, settings: PrepareConfig) -> bool:
    """Gopher: at most 30% of the lines, and 20% of what they hold, stood before; the same for paragraphs."""
    for parts in (page.lines, page.paragraphs):
        counts = Counter(parts)
        repeated = sum(len(part) * (count - 1) for part, count in counts.items())
        if len(parts) - len(counts) > settings.max_repeated_lines * len(parts):
            return True
        if repeated > settings.max_repeated_line_characters * sum(map(len, parts)):
            return True
    return False


def top_ngrams(page: Page, settings: PrepareConfig) -> bool:
    """Gopher: the commonest 2, 3 or 4 words in a row make up at most 20%, 18% or 16% of the text."""
    for n in (2, 3, 4):
        ngrams = hash_ngrams(page.hashes, n)
        values, counts = np.unique(ngrams, return_counts=True)
        if not len(values):
            return False
        first = np.argmax(ngrams == values[np.argmax(counts)])
        share = counts.max() * page.sizes[first : first + n].sum() / page.sizes.sum()
        if share > round(max(0, settings.max_top_ngram - 0.02 * (n - 2)), 9):
            return True
        if counts.max() * 4 * page.sizes.max() <= (settings.max_top_ngram - 0.04) * page.sizes.sum():
            return False  # no 3 or 4 words occur more often than 2 of them
    return False


def repeated_ngrams(page: Page, settings: PrepareConfig) -> bool:
    """Gopher: at most 15% of the text is 5 words in a row that stood before, falling to 10% for 10 words."""
    for n in range(5, 11):
        ngrams = hash_ngrams(page.hashes, n)
        in_order = np.sort(ngrams)
        places = HashSet(in_order[1:][in_order[1:] == in_order[:-1]]).find(ngrams)
        first = np.unique(ngrams[places], return_index=True)[1]
        again = np.zeros(len(page.hashes), dtype=bool)
        again[np.delete(places, first)[:, None] + np.arange(n)] = True
        share = page.sizes[again].sum() / max(page.sizes.sum(), 1)
        if share > round(max(0, settings.max_repeated_ngrams - 0.01 * (n - 5)), 9):
            return True
        if share <= round(max(0, settings.max_repeated_ngrams - 0.05), 9):
            return False  # nor will 10 words be too much: what repeats more in a row is among what repeats fewer
    return False


def sentences(page: Page, settings: PrepareConfig) -> bool:
    """C4: at least three sentences."""
    ends = islice(SENTENCE_END.finditer(page.text), settings.min_sentences)
    return len(list(ends)) < settings.min_sentences


def curly_brackets(page: Page, settings: PrepareConfig) -> bool:
    """C4: no curly bracket."""
    return settings.drop_curly_brackets and "{" in page.text


def lorem_ipsum(page: Page, settings: PrepareConfig) -> bool:
    """C4: no placeholder text."""
    return settings.drop_boilerplate and "lorem ipsum" in page.text.lower()


RULES = (
    word_count,
    word_length,
    symbols,
    bullet_lines,
    ellipsis_lines,
    words_without_letters,
    stop_words,
    sentences,
    curly_brackets,
    lorem_ipsum,
    repeated_lines,
    top_ngrams,
    repeated_ngrams,
)


def clean(text: str, settings: PrepareConfig, tally: Tally) -> tuple[str, str, np.ndarray | None]:
    """Return the text as it is kept, why it is to be dropped instead or "", and its words' hashes where known."""
    if settings.clean != "none":
        text = mend(text)
    lines = Counter()
    if settings.clean == "web":
        text = drop_lines(text, settings, lines)
    if not text or text.isspace():
        return text, "empty", None
    if settings.clean != "web":
        return text, "", None
    page = Page(text)
    reason = next((f"web: {rule.__name__}" for rule in RULES if rule(page, settings)), "")
    if not reason:
        tally.lines += lines
    return text, reason, page.hashes


# ---- deduplication: exact by hash, near by MinHash (Broder 1997) and locality-sensitive hashing (Lee et al. 2022)


def chance_of_finding(similarity: float, signature_bytes: int, bands: int) -> float:
    """The chance that two documents of some Jaccard similarity agree in all rows of at least one band."""
    return 1 - (1 - similarity ** (signature_bytes // bands)) ** bands


def sign(words: np.ndarray, size: int) -> np.ndarray:
    """A document's signature, uint8 (size,): two agree in about the share of 5-grams of words that they share.

    words: hashes of its words. One permutation hashing with optimal densification (Li et al. 2012, Shrivastava 2017):
    5-grams are dealt into `size` bins by their upper bits, each bin keeps its least hash, an empty bin takes that
    of the first filled one it asks. One byte of each is kept (b-bit minwise hashing, Li and König 2010).
    """
    ngrams = hash_ngrams(words, max(1, min(5, len(words))))
    least = np.full(size, 2**64 - 1, dtype=np.uint64)
    np.minimum.at(least, ((ngrams >> np.uint64(32)) * np.uint64(size) >> np.uint64(32)).astype(np.int64), ngrams)
    empty, filled, attempt = np.flatnonzero(least == 2**64 - 1), least < 2**64 - 1, 0
    while len(empty) and filled.any():
        donors = donor_bins(size, attempt)[:, empty]  # (64, empty bins): the same for every document
        found = filled[donors].argmax(axis=0)
        donor = donors[found, np.arange(len(empty))]
        least[empty] = np.where(filled[donor], least[donor], least[empty])
        empty, attempt = empty[~filled[donor]], attempt + 1
    return mix(least + np.arange(size, dtype=np.uint64)).astype(np.uint8)  # with the bin: equal borrowed ones differ


@lru_cache
def donor_bins(size: int, attempt: int) -> np.ndarray:
    """Which bins an empty one asks, int64 (64, size)."""
    numbers = np.arange(64 * size, dtype=np.uint64) + np.uint64(64 * size * attempt)
    return (mix(numbers) % np.uint64(size)).astype(np.int64).reshape(64, size)


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of documents with these signatures, (..., size) each."""
    agree = (first == second).mean(axis=-1)
    return (agree - 1 / 256) / (1 - 1 / 256)  # bytes agree by chance, too


def find_exact(digests: np.ndarray) -> np.ndarray:
    """For each document the first one with the same digest, its own number where it is that one."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return first[inverse]


def find_near(signatures: np.ndarray, bands: int, threshold: float) -> np.ndarray:
    """For each document the earlier one that it nearly repeats, its own number where it stays.

    Each document that goes is similar to one that stays, by the estimate, whose standard error is 0.025 at 0.8 and 256
    bytes. Memory beside the signatures: about 110 bytes a document where few are similar.
    """
    numbers = np.arange(len(signatures))
    originals, stay = numbers.copy(), numbers
    while len(pairs := similar_pairs(signatures, stay, bands, threshold)):
        for second, first in pairs:
            original = originals[first]
            if original == first or similarity(signatures[original], signatures[second]) >= threshold:
                originals[second] = original
        gone = originals[originals] != originals  # their original was dropped in turn: they are compared once more
        originals[gone] = numbers[gone]
        stay = np.flatnonzero(originals == numbers)
    return originals


def similar_pairs(signatures: np.ndarray, stay: np.ndarray, bands: int, threshold: float) -> np.ndarray:
    """Pairs of those documents in `stay` that share a band and are similar, (pairs, 2): the later one, the earlier.

    Of many that share a band each is compared with the first and with the eight behind it.
    """
    pairs, progress = stay[:0], Progress("bands compared", bands)
    rows, count = signatures.shape[1] // bands, len(signatures)
    for number in range(1, bands + 1):
        keys = np.zeros(len(stay), dtype=np.uint64)
        for column in signatures[stay, (number - 1) * rows : number * rows].T:
            keys = mix(keys * np.uint64(256) + column)
        order = np.argsort(keys, kind="stable")
        new = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))  # the places where another key begins
        leaders = np.repeat(new, np.diff(new, append=len(keys)))
        places, found = np.flatnonzero(leaders < np.arange(len(keys))), [pairs]
        for back in range(9):  # 0 stands for the first with the same key, else so many before
            others = places - back if back else leaders[places]
            chosen = np.flatnonzero(others > leaders[places]) if back else np.arange(len(places))
            for some in np.array_split(chosen, len(chosen) // 100_000 + 1):
                first, second = stay[order[others[some]]], stay[order[places[some]]]
                alike = similarity(signatures[first], signatures[second]) >= threshold
                found.append(second[alike] * count + first[alike])
        pairs = np.unique(np.concatenate(found))
        progress.update(number)
    progress.close()
    return np.stack(np.divmod(pairs, max(count, 1)), axis=1)


# ---- the way from documents to a dataset


class Workers:
    """Processes that each do a part of a long task. They start with the second part: small data needs none.

    Each has a pipe of its own and shares nothing with the others: whoever is killed, at whatever moment, the others
    find the end of a pipe, and none waits for what doesn't come.
    """

    def __init__(self, count: int):
        self.count, self.processes, self.pipes = count, [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def start(self):
        context = multiprocessing.get_context("spawn")
        while len(self.pipes) < self.count:
            pipe, theirs = context.Pipe()
            self.processes.append(context.Process(target=work_on, args=(theirs,), daemon=True))
            with no_interrupt():  # what starts now inherits that Ctrl-C is not for it
                self.processes[-1].start()
            theirs.close()  # its process holds the only one
            self.pipes.append(pipe)

    def map(self, function: Callable, parts: Iterable) -> Iterator:
        """Yield function(part) for each part, in the order of the parts, with few of them in memory at once."""
        parts = iter(parts)
        first = list(islice(parts, 2))
        if len(first) < 2 or self.count == 1:
            yield from map(function, chain(first, parts))
            return
        self.start()
        tasks, idle, busy = enumerate(chain(first, parts)), list(self.pipes), {}  # busy: the part that each pipe is at
        answers, following = {}, 0  # those that came before their turn, by part, and the part whose turn it is
        while True:
            while idle and len(busy) + len(answers) < 2 * self.count and (task := next(tasks, None)):
                pipe = idle.pop()
                busy[pipe], part = task
                with suppress(OSError):  # its process is gone, as the lack of an answer will tell
                    pipe.send((function, part))
            if following in answers:
                yield answers.pop(following)
                following += 1
            elif busy:
                for pipe in multiprocessing.connection.wait(busy):
                    answers[busy.pop(pipe)] = answer_of(pipe)
                    idle.append(pipe)
            else:
                return


def answer_of(pipe):
    """What a process made of its part. Raises what went wrong there."""
    try:
        answer, error = pipe.recv()
    except (EOFError, OSError):
        raise Failure("a process was killed, for want of memory? try fewer --processes", INPUT_OUTPUT) from None
    if error:
        raise error
    return answer


def work_on(pipe):
    """Do one part after another, until the process that sends them is gone."""
    with suppress(EOFError, OSError):
        while True:
            function, part = pipe.recv()
            try:
                answer = function(part), None
            except Exception as error:
                answer = None, error
            pipe.send(answer)


@contextmanager
def no_interrupt() -> Iterator:
    """Ctrl-C has no effect within this."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


PART_CHARACTERS = 1_000_000  # of text that a worker takes at once
CONTAMINATION_WORDS = 13  # in a row, as GPT-3 had it (Brown et al. 2020, appendix C)
DOCUMENT = np.dtype(
    [
        ("bytes", np.int64),  # of its text
        ("is_val", np.bool_),
        ("digest", "S16"),  # the same where two documents differ in case and white space at most
    ]
)
SPAN = np.dtype([("is_val", np.bool_), ("start", np.int64), ("end", np.int64)])  # bytes in a file of texts


@dataclass
class Corpus:
    """The documents that cleaning left, and a tally of those that it did not."""

    texts: Path  # a file of their texts in UTF-8, one behind the other
    documents: np.ndarray  # of DOCUMENT, 25 bytes each
    signatures: np.ndarray  # uint8 (documents, near_signature); (documents, 0) where none are wanted
    tally: Tally

    def spans(self) -> np.ndarray:
        """Where the documents stand in `texts`, an array of SPAN."""
        spans = np.empty(len(self.documents), dtype=SPAN)
        spans["is_val"], spans["end"] = self.documents["is_val"], np.cumsum(self.documents["bytes"])
        spans["start"] = spans["end"] - self.documents["bytes"]
        return spans


def read_texts(path: Path, spans: np.ndarray) -> Iterator[str]:
    """The texts that stand at `spans` of SPAN."""
    with open(path, "rb") as file:
        for _, start, end in spans:
            file.seek(start)
            yield file.read(end - start).decode()


def clean_part(settings: PrepareConfig, forbidden: Path | None, part: list[tuple[str, str]]) -> tuple:
    """Clean documents, given with where each stands; return the texts, documents, signatures and tally for a Corpus.

    A document's own hash decides whether it is for validation. forbidden: a file with the hashes of n-grams that no
    document may hold.
    """
    tally, texts, documents, signatures = Tally(), [], [], []
    for original, where in part:
        tally.bytes["in"] += len(original.encode())
        text, reason, words = clean(original, settings, tally)
        if words is None and (settings.dedupe == "near" or forbidden):
            words, _ = hash_words(text)
        if not reason and forbidden:
            shared = load_hashes(forbidden).find(hash_ngrams(words, CONTAMINATION_WORDS))
            reason = "contaminated" if len(shared) else ""
        if reason:
            tally.drop(reason, where, original)
            continue
        data = text.encode()
        is_val = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64 < settings.val_fraction
        squeezed = text.lower().encode().translate(None, b" \t\n\r\x0b\x0c")
        digest = hashlib.sha256(squeezed).digest()[:16]
        texts.append(data)
        documents.append((len(data), is_val, digest))
        if settings.dedupe == "near":
            signatures.append(sign(words if len(words) else np.frombuffer(digest, np.uint64), settings.near_signature))
    width = settings.near_signature if settings.dedupe == "near" else 0
    signatures = np.array(signatures, dtype=np.uint8).reshape(len(texts), width)
    return b"".join(texts), np.array(documents, dtype=DOCUMENT), signatures, tally


@lru_cache(maxsize=2)
def load_hashes(path: Path) -> HashSet:
    """A set that `save_hashes` left for the workers."""
    return HashSet(np.load(path))


def save_hashes(hashes: np.ndarray, folder: Path) -> Path:
    """Write hashes into a file whose name tells its content, so that a worker may remember it."""
    path = folder / f"{hashlib.sha256(hashes.tobytes()).hexdigest()[:16]}.npy"
    np.save(path, hashes)
    return path


def forbidden_ngrams(settings: PrepareConfig, folder: Path) -> Path | None:
    """A file of the n-grams in the texts that --decontaminate names; None where it names none."""
    if not settings.decontaminate:
        return None
    ngrams, short = [], 0
    for text, _ in Reader(replace(settings, on_error="stop"), settings.decontaminate, "decontaminate"):
        words, _ = hash_words(mend(text) if settings.clean != "none" else text)
        ngrams.append(hash_ngrams(words, CONTAMINATION_WORDS))
        short += not len(ngrams[-1])
    if short == len(ngrams):
        raise Failure(f"--decontaminate={settings.decontaminate}: no text of {CONTAMINATION_WORDS} words or more")
    few = f"; {short:,} have fewer than {CONTAMINATION_WORDS} words and cannot be found" if short else ""
    print(f"looking for {len(ngrams):,} texts of {settings.decontaminate}{few}", flush=True)
    return save_hashes(np.unique(np.concatenate(ngrams)), folder)


def parts_of(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Documents in lists of about PART_CHARACTERS."""
    part, characters = [], 0
    for document in documents:
        part.append(document)
        characters += len(document[0])
        if characters >= PART_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


def collect(settings: PrepareConfig, reader: Reader, forbidden: Path | None, workers: Workers, work: Path) -> Corpus:
    """Read and clean all documents. Raises Failure."""
    progress = Progress("bytes read", reader.total)
    clean_one = partial(clean_part, settings, forbidden)
    tally, parts = Tally(), [np.zeros(0, dtype=DOCUMENT)]
    with open(work / "texts", "wb") as text_file, open(work / "signatures", "wb") as signature_file:
        for texts, documents, signatures, part_tally in workers.map(clean_one, parts_of(reader)):
            text_file.write(texts)
            signature_file.write(signatures.tobytes())
            parts.append(documents)
            tally.add(part_tally)
            progress.update(reader.done)
    progress.close()
    tally.add(reader.tally)
    documents = np.concatenate(parts)
    if not len(documents):
        raise Failure(f"{settings.source or settings.name}: no text is left: {dict(tally.documents)}")
    shape = len(documents), settings.near_signature if settings.dedupe == "near" else 0
    signatures = np.memmap(work / "signatures", np.uint8, "r", shape=shape) if shape[1] else np.zeros(shape, np.uint8)
    return Corpus(work / "texts", documents, signatures, tally)


def deduplicate(settings: PrepareConfig, corpus: Corpus) -> np.ndarray:
    """Return the numbers of the documents that stay: of repeated ones the first, but validation wins over training."""
    order = np.argsort(~corpus.documents["is_val"], kind="stable")
    if settings.dedupe != "none":
        first = find_exact(corpus.documents["digest"][order])
        order = drop_repeated("exact duplicate", corpus, order, first)
    if settings.dedupe == "near":
        similar = find_near(corpus.signatures[order], settings.near_bands, settings.near_threshold)
        order = drop_repeated("near duplicate", corpus, order, similar)
    return np.sort(order)


def drop_repeated(reason: str, corpus: Corpus, order: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Tally the documents that repeat another and return the others. originals: whom each in `order` repeats, by place
    in `order`, its own place where it stays."""
    places, spans = np.flatnonzero(originals != np.arange(len(order))), corpus.spans()
    for dropped, kept in zip(order[places], order[originals[places]]):
        name = reason + (" of validation text" if spans["is_val"][kept] > spans["is_val"][dropped] else "")
        corpus.tally.documents[name] += 1
        corpus.tally.bytes[name] += int(corpus.documents["bytes"][dropped])
        if corpus.tally.documents[name] <= 3:
            pair = [text[:300] for text in read_texts(corpus.texts, spans[[dropped, kept]])]
            corpus.tally.show(name, "it and the one that stays", " ⟷ ".join(pair))
    return order[originals == np.arange(len(order))]


def cut_spans(path: Path, spans: np.ndarray, val_fraction: float) -> np.ndarray:
    """Each document as two: its beginning for training and its end for validation, cut between characters."""
    cut = []
    with open(path, "rb") as file:
        for _, start, end in spans:
            middle = end - round((end - start) * val_fraction)
            file.seek(middle)
            middle += next(place for place, byte in enumerate(file.read(4) + b" ") if byte & 0xC0 != 0x80)
            cut += [(False, start, middle), (True, middle, end)]
    return np.array(cut, dtype=SPAN)


def sizes_of(spans: np.ndarray) -> np.ndarray:
    return spans["end"] - spans["start"]


def in_parts(workers: Workers, function: Callable, spans: np.ndarray, what: str) -> Iterator:
    """Yield function(part) for parts of `spans` of about PART_CHARACTERS, in order; show how far that is."""
    parts = np.split(spans, np.flatnonzero(np.diff(np.cumsum(sizes_of(spans)) // PART_CHARACTERS)) + 1)
    progress, done = Progress(what, int(sizes_of(spans).sum())), 0
    for part, result in zip(parts, workers.map(function, parts)):
        yield result
        done += int(sizes_of(part).sum())
        progress.update(done)
    progress.close()


def beginning(spans: np.ndarray, most_bytes: int) -> np.ndarray:
    """The first documents, until they hold so many bytes."""
    return spans[np.cumsum(sizes_of(spans)) - sizes_of(spans) < most_bytes]


BPE_BYTES = 1_000_000_000  # a tokenizer is trained on the first so many of the training text


def count_pieces(texts: Path, pattern: str, spans: np.ndarray) -> Counter:
    """How often each piece of the documents occurs, as bytes; the few beyond 1,000 characters left out, which are no
    words and take long to merge."""
    counts, split = Counter(), regex.compile(pattern)
    for text in read_texts(texts, spans):
        counts.update(split.findall(text))
    return Counter({piece.encode(): count for piece, count in counts.items() if len(piece) <= 1000})


def new_tokenizer(settings: PrepareConfig, workers: Workers, texts: Path, spans: np.ndarray) -> tiktoken.Encoding:
    """A tokenizer of the size that the settings name, trained on the training documents."""
    entries = bpe_size(settings.tokenizer)
    spans, counts = beginning(spans[~spans["is_val"]], BPE_BYTES), Counter()
    pattern = PATTERNS[pattern_name(settings.tokenizer)]
    for some in in_parts(workers, partial(count_pieces, texts, pattern), spans, "bytes split"):
        counts.update(some)
    print(f"training a tokenizer of {entries:,} entries on {len(counts):,} different pieces of text", flush=True)
    return make_tokenizer(train_bpe(counts, entries), settings.tokenizer)


def save_tokenizer(encoding: tiktoken.Encoding, folder: Path) -> dict:
    """Write the tokenizer of a dataset into its folder; return its facts for the manifest."""
    text = write_tokenizer(encoding)
    (folder / "tokenizer.tiktoken").write_text(text, encoding="ascii", newline="")
    return {"name": encoding.name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "vocab_size": encoding.n_vocab}


@lru_cache(maxsize=1)
def tokenizer_at(path: Path, name: str, sha256: str) -> tiktoken.Encoding:
    """A tokenizer from its file, remembered by a worker."""
    return read_tokenizer(path.read_text(encoding="ascii"), name)


def tokenize_part(texts: Path, tokenizer: tuple[Path, str, str], spans: np.ndarray) -> list[np.ndarray]:
    """The tokens of some documents, each led by end-of-text: those for training, and those for validation."""
    encoding = tokenizer_at(*tokenizer)
    start = np.array([encoding.eot_token], dtype=np.uint32)
    dtype, splits = token_dtype(encoding.n_vocab), ([start[:0]], [start[:0]])
    for is_val, text in zip(spans["is_val"], read_texts(texts, spans)):
        splits[int(is_val)].extend([start, encode(encoding, text)])
    return [np.concatenate(tokens).astype(dtype) for tokens in splits]


def write_shards(
    settings: PrepareConfig, workers: Workers, texts: Path, spans: np.ndarray, tokenizer: dict, folder: Path
) -> dict:
    """Tokenise the documents into shards in `folder`, which holds the tokenizer; return each split's facts."""
    dtype = token_dtype(tokenizer["vocab_size"])
    writers = [ShardWriter(folder, f"{settings.name}_{split}", settings.shard_tokens, dtype) for split in SPLITS]
    tokenize = partial(tokenize_part, texts, (folder / "tokenizer.tiktoken", tokenizer["name"], tokenizer["sha256"]))
    for splits in in_parts(workers, tokenize, spans, "bytes tokenised"):
        for writer, tokens in zip(writers, splits):
            writer.add(tokens)
    facts = {}
    for number, split in enumerate(SPLITS):
        shards, sizes = writers[number].close(), sizes_of(spans[spans["is_val"] == number])
        tokens = sum(shard["tokens"] for shard in shards)
        facts[split] = {"documents": len(sizes), "bytes": int(sizes.sum()), "tokens": tokens, "shards": shards}
    return facts


def compress(texts: Path, spans: np.ndarray) -> dict[str, float]:
    """Bits per byte that two compressors need for a text, for a model to be measured against; none for a long one."""
    if sizes_of(spans).sum() > 16_000_000:  # more takes lzma too long
        return {}
    text = "".join(read_texts(texts, spans)).encode()
    compressed = {"lzma -9": lzma.compress(text, preset=9), "gzip -9": gzip.compress(text, 9)}
    return {name: 8 * len(data) / len(text) for name, data in compressed.items()}


OVERLAP_BYTES = 1_000_000  # of validation text that is looked for in the training text


def find_shared(texts: Path, hashes: Path, spans: np.ndarray) -> np.ndarray:
    """Those of the hashes in a file that are n-grams of some documents."""
    wanted, found = load_hashes(hashes), []
    for text in read_texts(texts, spans):
        ngrams = hash_ngrams(hash_words(text)[0], CONTAMINATION_WORDS)
        found.append(ngrams[wanted.find(ngrams)])
    return np.unique(np.concatenate(found))


def measure_overlap(workers: Workers, texts: Path, spans: np.ndarray, work: Path) -> float:
    """The share of 13 words in a row of validation text that stand in the training text, too; of much text the first
    part is looked for."""
    val, found = beginning(spans[spans["is_val"]], OVERLAP_BYTES), []
    ngrams = np.concatenate([hash_ngrams(hash_words(text)[0], CONTAMINATION_WORDS) for text in read_texts(texts, val)])
    hashes = save_hashes(np.unique(ngrams), work)
    for some in in_parts(workers, partial(find_shared, texts, hashes), spans[~spans["is_val"]], "bytes compared"):
        found.append(some)
    return len(HashSet(np.concatenate(found)).find(ngrams)) / max(len(ngrams), 1)


def build(settings: PrepareConfig, work: Path, folder: Path) -> dict:
    """Turn the text that the settings name into a dataset in `folder`; return its manifest."""
    forbidden = forbidden_ngrams(settings, work)
    reader = Reader(settings, settings.source) if settings.source else None  # what is missing shows before a download
    encoding = None if bpe_size(settings.tokenizer) else load_tokenizer(settings.tokenizer, Path(settings.data_dir))
    reader = reader or open_named(settings)
    with Workers(settings.processes) as workers:
        corpus = collect(settings, reader, forbidden, workers, work)
        kept = deduplicate(settings, corpus)
        spans, is_cut = corpus.spans()[kept], False
        held = sizes_of(spans[spans["is_val"]]).sum() / sizes_of(spans).sum()
        if not 1 / 8 < held / settings.val_fraction < 4 or held == 1:  # there are too few documents to part them whole
            spans, is_cut = cut_spans(corpus.texts, spans, settings.val_fraction), True
        if not all(sizes_of(spans[spans["is_val"] == split]).sum() for split in (False, True)):
            raise Failure(f"{settings.source or settings.name}: too little text for a training and a validation split")
        encoding = encoding or new_tokenizer(settings, workers, corpus.texts, spans)
        tokenizer = save_tokenizer(encoding, folder)
        splits = write_shards(settings, workers, corpus.texts, spans, tokenizer, folder)
        overlap = measure_overlap(workers, corpus.texts, spans, work)
    splits["val"]["compressed_bits_per_byte"] = compress(corpus.texts, spans[spans["is_val"]])
    dropped, sizes = corpus.tally.documents, corpus.documents["bytes"][kept]
    read = corpus.tally.bytes.pop("in")
    return manifest_of(settings, tokenizer, splits) | {
        "documents": {"in": len(kept) + dropped.total(), "kept": len(kept), "dropped": dict(dropped)},
        "bytes": {"in": read, "kept": int(sizes.sum()), "dropped": dict(corpus.tally.bytes)},
        "lines_dropped": dict(corpus.tally.lines),
        "documents_cut_in_two": is_cut,
        "validation_overlap": overlap,
        "lengths": {2**power: count for power, count in enumerate(np.bincount(np.log2(sizes).astype(int)).tolist())},
        "examples": corpus.tally.examples,
    }


def manifest_of(settings: PrepareConfig, tokenizer: dict, splits: dict) -> dict:
    """What every manifest holds, however its shards came about."""
    return {"name": settings.name, "made_from": made_from(settings), "tokenizer": tokenizer, "splits": splits}


def made_from(settings: PrepareConfig) -> dict:
    """The settings that decide what a dataset holds."""
    names = ("merge",) if settings.takes_shards() else READING
    return {name: getattr(settings, name) for name in names}


def read_manifest(folder: Path, otherwise: str) -> dict:
    """The manifest of a dataset of ours. Raises Failure with the message `otherwise`."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return {name: dict(manifest[name]) for name in ("made_from", "tokenizer", "splits", "documents", "bytes")}
    except (OSError, ValueError, KeyError, TypeError):
        raise Failure(otherwise) from None


def merge(settings: PrepareConfig, folder: Path) -> dict:
    """Join the shards of several datasets, as links to the same files where the disk can; return the manifest."""
    parts = [Path(os.path.expanduser(part)) for part in settings.merge.split(",") if part]
    if not parts or len({part.resolve() for part in parts}) < len(parts):
        raise Failure(f"--merge={settings.merge}: name at least one folder, and none twice")
    manifests = [read_manifest(part, f"--merge: {part} holds no manifest.json, so it is no dataset") for part in parts]
    tokenizers = [(facts["tokenizer"]["sha256"], pattern_name(facts["tokenizer"]["name"])) for facts in manifests]
    for part, tokenizer in zip(parts, tokenizers):
        if tokenizer != tokenizers[0]:
            raise Failure(f"--merge: {part} and {parts[0]} have different tokenizers; prepare one of them anew")
    link_or_copy(parts[0] / "tokenizer.tiktoken", folder / "tokenizer.tiktoken")
    splits = {}
    for split in SPLITS:
        found = [manifest["splits"][split] for manifest in manifests]
        shards = [(part / shard["file"], shard) for part, facts in zip(parts, found) for shard in facts["shards"]]
        for number, (path, shard) in enumerate(shards):
            shard["file"] = f"{settings.name}_{split}_{number:06d}.bin"
            link_or_copy(path, folder / shard["file"])
        splits[split] = {unit: sum(facts[unit] for facts in found) for unit in ("documents", "bytes", "tokens")}
        splits[split] |= {"shards": [shard for _, shard in shards]}
    documents, sizes = (
        {way: sum(manifest[unit][way] for manifest in manifests) for way in ("in", "kept")}
        | {"dropped": dict(sum((Counter(manifest[unit]["dropped"]) for manifest in manifests), Counter()))}
        for unit in ("documents", "bytes")
    )
    return manifest_of(settings, manifests[0]["tokenizer"], splits) | {"documents": documents, "bytes": sizes}


def adopt(settings: PrepareConfig, folder: Path) -> dict:
    """Make a dataset of the Hub's shards of tokens, as they are; return the manifest."""
    encoding = load_tokenizer(settings.tokenizer, Path(settings.data_dir))
    sizes = [len(encoding.decode_single_token_bytes(token)) for token in range(encoding.eot_token)] + [0]
    sizes = np.array(sizes, dtype=np.uint16)  # bytes a token
    tokenizer = save_tokenizer(encoding, folder)
    splits = {split: {"documents": 0, "bytes": 0, "tokens": 0, "shards": []} for split in SPLITS}
    paths = download_all(NAMED[settings.name], Path(settings.data_dir) / "downloads" / settings.name)
    if not paths:
        raise Failure(f"{settings.name}: the Hub lists no files of it any more", INPUT_OUTPUT)
    progress = Progress("shards checked", len(paths))
    for number, path in enumerate(paths, 1):
        link_or_copy(path, folder / path.name)
        tokens, facts = open_shard(path), splits["val" if "_val_" in path.name else "train"]
        if tokens.max(initial=0) > encoding.eot_token:
            raise Failure(f"{path} holds token {tokens.max()}, but {encoding.name} has {encoding.n_vocab} entries")
        facts["shards"].append({"file": path.name, "tokens": len(tokens), "sha256": sha256_of(path)})
        facts["tokens"] += len(tokens)
        facts["documents"] += int(np.count_nonzero(tokens == encoding.eot_token))
        facts["bytes"] += int(sizes[tokens].sum(dtype=np.int64))
        progress.update(number)
    progress.close()
    documents, read = (sum(facts[unit] for facts in splits.values()) for unit in ("documents", "bytes"))
    return manifest_of(settings, tokenizer, splits) | {
        "documents": {"in": documents, "kept": documents, "dropped": {}},
        "bytes": {"in": read, "kept": read, "dropped": {}},
    }


def link_or_copy(source: Path, target: Path):
    """Let `target` be the same file as `source`, or a copy where the disk has no second names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def prepare(settings: PrepareConfig) -> Path:
    """Make the dataset that the settings name and return its folder, which appears only when all of it is there."""
    folder = Path(settings.data_dir) / settings.name
    work = folder.with_name(f".{settings.name}")  # what a killed run left there is cleared away by the next
    with locked(folder.with_name(f".{settings.name}.lock")):
        shutil.rmtree(work, ignore_errors=True)
        if is_there(folder, settings):
            return folder
        dataset = work / "dataset"
        try:
            dataset.mkdir(parents=True)
            print(f"preparing {folder}", flush=True)
            if settings.merge:
                manifest = merge(settings, dataset)
            elif settings.name == "fineweb-10b-gpt2":
                manifest = adopt(settings, dataset)
            else:
                manifest = build(settings, work, dataset)
            examples = manifest.pop("examples", {})
            page = report(manifest, examples).encode(errors="backslashreplace")  # a file's name may be no Unicode
            (dataset / "report.md").write_bytes(page)
            if "lengths" in manifest:
                draw_lengths(manifest, dataset)
            (dataset / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            dataset.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    print(f"{describe(manifest)}\nwhat was kept and dropped, and why: {folder / 'report.md'}", flush=True)
    return folder


def is_there(folder: Path, settings: PrepareConfig) -> bool:
    """Whether the dataset is made already. Raises Failure where its folder holds something else."""
    if not folder.exists():
        return False
    found = read_manifest(folder, f"{folder} holds something else already; choose another name")["made_from"]
    wanted = made_from(settings)
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        changes = ", ".join(f"{name} {found.get(name)!r} and not {wanted[name]!r}" for name in different)
        raise Failure(f"{folder} was made with {changes}; delete it or choose another name")
    print(f"{folder} is there already; delete it to read the text anew")
    return True


def describe(manifest: dict) -> str:
    """The dataset in a few lines for the screen."""
    documents, splits = manifest["documents"], manifest["splits"]
    text_bytes, tokens = (sum(split[unit] for split in splits.values()) for unit in ("bytes", "tokens"))
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in documents["dropped"].items())
    return (
        f"{documents['kept']:,} of {documents['in']:,} documents, {text_bytes / 1e6:.1f} MB, "
        f"{text_bytes / tokens:.2f} bytes a token: {splits['train']['tokens']:,} training tokens "
        f"and {splits['val']['tokens']:,} for validation" + (f"\ndropped: {dropped}" if dropped else "")
    )


def report(manifest: dict, examples: dict) -> str:
    """The manifest's numbers as a page to read, in Markdown, with examples of what was dropped."""
    documents, sizes, splits = manifest["documents"], manifest["bytes"], manifest["splits"]
    rows = [("read", documents["in"], sizes["in"])]
    rows += [(f"dropped: {why}", count, sizes["dropped"].get(why, 0)) for why, count in documents["dropped"].items()]
    rows += [("kept", documents["kept"], sizes["kept"])]
    for split, facts in splits.items():
        rows += [(f"{split}: {facts['tokens']:,} tokens", facts["documents"], facts["bytes"])]
    lines = [f"# {manifest['name']}", "", describe(manifest).split("\n")[0] + ".", ""]
    lines += ["| | documents | bytes |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {count:,} | {size:,} |" for name, count, size in rows]
    lines += [
        "",
        "Bytes read, and those dropped by a rule, are counted before cleaning. Skipped files count as documents.",
    ]
    if manifest.get("documents_cut_in_two"):
        lines += ["", "No whole document could be spared for validation: the end of each is kept for it."]
    if manifest.get("lines_dropped"):
        dropped = ", ".join(f"{count:,} {reason}s" for reason, count in manifest["lines_dropped"].items())
        lines += ["", f"Dropped from within documents that stay: {dropped}."]
    if "validation_overlap" in manifest:
        share = f"{manifest['validation_overlap']:.2%}"
        lines += [
            "",
            f"Of 13 words in a row of the first MB of validation text, {share} stand in the training text, too.",
        ]
    if manifest.get("lengths"):
        most = max(manifest["lengths"].values())
        lines += ["", "| bytes a document | documents kept | |", "| ---: | ---: | --- |"]
        for low, count in filter(lambda entry: entry[1], manifest["lengths"].items()):
            lines += [f"| {low:,} to {2 * low - 1:,} | {count:,} | {'█' * math.ceil(40 * count / most)} |"]
    for reason, shown in examples.items():
        lines += ["", f"## dropped: {reason}"]
        for where, text in shown:
            quoted = " ".join(text.split()).replace("`", "'")
            lines += ["", f"- `{where}`" + (f": `{quoted}`" if quoted else "")]
    lines += ["", "Made with:", "", "```json", json.dumps(manifest["made_from"], indent=2), "```"]
    return "\n".join(lines) + "\n"


def draw_lengths(manifest: dict, folder: Path):
    """Draw how long the documents are as lengths.png, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lengths = manifest["lengths"]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="bytes a document", ylabel="documents", title=manifest["name"])
    axes.bar(list(lengths), list(lengths.values()), width=list(lengths), align="edge", edgecolor="white")
    figure.savefig(folder / "lengths.png", dpi=120)


def main(settings: PrepareConfig):
    folder = prepare(settings)
    where = f" --data_dir={settings.data_dir}" if settings.data_dir != "data" else ""
    print(f"train on it: python train.py config/small.py --dataset={folder.name}{where} --out_dir=out/{folder.name}")


if __name__ == "__main__":
    settings = config.load(PrepareConfig, sys.argv[1:], positional="name")
    with config.exit_codes():
        main(settings)
