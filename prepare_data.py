"""Turn text into shards of tokens in data/NAME, ready to train on.

    python prepare_data.py stdlib                          a named dataset: stdlib, shakespeare
    python prepare_data.py mine --source=~/texts           your own file or folder
    python prepare_data.py mine --source=texts.jsonl.xz --tokenizer=bpe:8192

Read from the bottom up: `prepare` tells the story. Above it stand the datasets' texts, the tokenizers, and at the
top the shard format, in both directions; `Dataset` is what training opens.
"""

import base64
import gzip
import hashlib
import heapq
import json
import lzma
import math
import os
import shutil
import sys
import sysconfig
import tempfile
import time
import tokenize
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import requests
import tiktoken

import config
from config import INPUT_OUTPUT, Failure


@dataclass
class PrepareConfig:
    """Turn text into shards of tokens in data/NAME, ready to train on."""

    name: str = ""  # stdlib, shakespeare, or a name of your own for the text under --source
    source: str = ""  # a file, or a folder searched for .txt .md .py .jsonl, each also as .gz or .xz
    text_field: str = "text"  # the field of a .jsonl line that holds the document
    tokenizer: str = ""  # gpt2, bytes, bpe:N (trained here), a .tiktoken file; "" = the dataset's own, or gpt2
    val_fraction: float = 0.1  # share of the documents kept for validation, chosen by their hash
    shard_tokens: int = 100_000_000  # tokens a shard file holds at most
    data_dir: str = "data"  # the folder that datasets stand in

    def __post_init__(self):
        self.tokenizer = self.tokenizer or NAMED.get(self.name, "gpt2")

    def check(self):
        """Raise ValueError where a value makes no sense."""
        if not self.name or Path(self.name).name != self.name or self.name.startswith("."):
            raise ValueError(f"name {self.name!r}: give the dataset a plain name, as in: python prepare_data.py stdlib")
        if not self.source and self.name not in NAMED:
            raise ValueError(f"{self.name} is not among {', '.join(NAMED)}; for text of your own add --source=PATH")
        if self.source and self.name in NAMED:
            raise ValueError(f"{self.name} names a dataset of its own; choose another name for --source={self.source}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction {self.val_fraction} must lie between 0 and 1")
        if not 1 <= self.shard_tokens < 2**31:
            raise ValueError(f"shard_tokens {self.shard_tokens} must be from 1 to 2147483647, what a header can say")
        bpe_size(self.tokenizer)


# ---- shards: 256 int32 of header, then tokens; the layout of llm.c, modded-nanogpt and the public FineWeb shards

HEADER_INTS = 256
FORMATS = {  # type of a token: magic number and version in the header
    np.dtype("<u2"): (20240520, 1),
    np.dtype("<u4"): (20240801, 7),
}


def write_shard(path: Path, tokens: np.ndarray) -> str:
    """Write tokens, of a type in FORMATS, as one shard and return the file's SHA-256."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = *FORMATS[tokens.dtype], len(tokens)
    with open(path, "xb") as file:
        file.write(header.tobytes())
        file.write(tokens.tobytes())
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_shard(path: Path) -> np.memmap:
    """Map a shard's tokens, uint16 or uint32, into memory. Raises Failure where header and file disagree."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    for dtype, magic_and_version in FORMATS.items():
        if len(header) == HEADER_INTS and tuple(header[:2]) == magic_and_version:
            held = (path.stat().st_size - header.nbytes) / dtype.itemsize
            if held != header[2]:
                raise Failure(f"{path} says {header[2]} tokens but holds {held:g}: it is cut or damaged; make it again")
            return np.memmap(path, dtype=dtype, mode="r", offset=header.nbytes)
    raise Failure(f"{path} is not a shard: magic and version are {tuple(header[:2])}, not {list(FORMATS.values())}")


class ShardWriter:
    """Collects the documents of one split and writes a shard whenever it holds enough tokens."""

    def __init__(self, folder: Path, prefix: str, shard_tokens: int, dtype: np.dtype):
        self.folder, self.prefix, self.shard_tokens, self.dtype = folder, prefix, shard_tokens, dtype
        self.held, self.held_tokens, self.shards = [], 0, []

    def add(self, tokens: list[int]):
        self.held.append(np.array(tokens, dtype=self.dtype))
        self.held_tokens += len(tokens)
        while self.held_tokens >= self.shard_tokens:
            self.flush()

    def flush(self):
        tokens = np.concatenate(self.held)
        path = self.folder / f"{self.prefix}_{len(self.shards):06d}.bin"
        now, later = tokens[: self.shard_tokens], tokens[self.shard_tokens :]
        self.shards.append({"file": path.name, "tokens": len(now), "sha256": write_shard(path, now)})
        self.held, self.held_tokens = [later], len(later)

    def close(self) -> list[dict]:
        if self.held_tokens:
            self.flush()
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
    """The shards of one split: those of the manifest, as it describes them, or by their names where there is none."""
    if not manifest["splits"]:
        paths = sorted([*folder.glob(f"*_{split}_[0-9]*.bin"), *folder.glob(f"*_{split}.bin")])
        if not paths:
            raise Failure(f"{folder} has no shards named like fineweb_{split}_000001.bin")
        return paths
    paths = [folder / shard["file"] for shard in manifest["splits"][split]["shards"]]
    for path, shard in zip(paths, manifest["splits"][split]["shards"]):
        if not path.exists() or len(open_shard(path)) != shard["tokens"]:
            raise Failure(f"{path} is missing or not the shard of {shard['tokens']} tokens that manifest.json names")
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
        self.train, self.val = (
            Windows(shard_paths(folder, self.manifest, split), block_size, self.encoding.n_vocab)
            for split in ("train", "val")
        )
        for split, windows in (("training", self.train), ("validation", self.val)):
            if not len(windows):
                raise Failure(f"{folder} has less than one window of {block_size + 1} {split} tokens; lower block_size")

    def fingerprint(self) -> str:
        """What tells this dataset from another: a hash of the manifest's hashes, or of the shards' names and sizes."""
        shards = [split["shards"] for split in self.manifest["splits"].values()]
        shards = shards or [(path.name, path.stat().st_size) for path in self.train.paths + self.val.paths]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    def val_tokens_per_byte(self) -> float:
        """Tokens per byte of validation text; nan where no manifest says."""
        split = self.manifest["splits"].get("val", {"tokens": math.nan, "bytes": 1})
        return split["tokens"] / split["bytes"]


# ---- tokenizers: byte-pair encodings kept as .tiktoken files, a line an entry: the bytes in base64 and their rank

END_OF_TEXT = "<|endoftext|>"  # leads each document; text that merely contains these characters never becomes it
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_RANKS = (
    "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken",
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    2_000_000,
)


def bpe_size(name: str) -> int:
    """Return N for bpe:N, 0 for another tokenizer. Raises ValueError for a name that means nothing."""
    if name.startswith("bpe:") and name[4:].isascii() and name[4:].isdigit():
        if not 257 <= int(name[4:]) <= 1_000_000:
            raise ValueError(f"tokenizer {name}: N counts 256 bytes, merges and end-of-text: from 257 to 1000000")
        return int(name[4:])
    if name not in ("gpt2", "bytes") and not name.endswith(".tiktoken"):
        raise ValueError(f"tokenizer {name!r} is none of gpt2, bytes, bpe:N, or a .tiktoken file")
    return 0


def make_tokenizer(tokens: list[bytes], name: str) -> tiktoken.Encoding:
    """An encoding whose ranks are the order of `tokens`, end-of-text last."""
    return tiktoken.Encoding(
        name,
        pat_str=GPT2_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={END_OF_TEXT: len(tokens)},
    )


def read_tokenizer(text: str, name: str) -> tiktoken.Encoding:
    """The encoding in the text of a .tiktoken file. Raises Failure."""
    try:
        entries = [line.split() for line in text.splitlines()]
        ranks = {int(rank): base64.b64decode(token, validate=True) for token, rank in entries}
        tokens = [ranks[rank] for rank in range(len(entries))]
    except (ValueError, KeyError) as error:
        raise Failure(f"{name}: not a .tiktoken file with ranks from 0 without a gap ({error!r})") from None
    if not {bytes([byte]) for byte in range(256)} <= set(tokens) or len(set(tokens)) < len(tokens):
        raise Failure(f"{name}: a tokenizer holds each of the 256 bytes, and nothing twice")
    return make_tokenizer(tokens, name)


def write_tokenizer(encoding: tiktoken.Encoding) -> str:
    """The text of the .tiktoken file that `read_tokenizer` reads."""
    tokens = (encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token))
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def load_tokenizer(name: str, data_dir: Path) -> tiktoken.Encoding:
    """The tokenizer `name`: gpt2 (fetched into data_dir once), bytes, or the path of a .tiktoken file."""
    if name == "bytes":
        return make_tokenizer([bytes([byte]) for byte in range(256)], name)
    path = fetch(data_dir / "gpt2.tiktoken", *GPT2_RANKS) if name == "gpt2" else Path(name).expanduser()
    return read_tokenizer(path.read_text(encoding="ascii", errors="replace"), name)


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


# ---- downloads


def fetch(path: Path, url: str, sha256: str, most_bytes: int, deadline_seconds: float = 600) -> Path:
    """Return `path`, downloaded from `url` if it isn't there; it appears only when whole and of the right SHA-256."""
    if path.exists():
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise Failure(f"{path} has SHA-256 {found}, not {sha256}; delete it to download it anew")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    started = time.monotonic()
    try:
        with os.fdopen(descriptor, "wb") as file, requests.get(url, stream=True, timeout=(10, 30)) as response:
            response.raise_for_status()
            total = int(response.headers.get("Content-Length", 0))
            progress, digest = Progress(f"bytes of {path.name}", total), hashlib.sha256()
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                digest.update(chunk)
                progress.update(file.tell())
                if file.tell() > most_bytes or time.monotonic() - started > deadline_seconds:
                    raise Failure(f"{url}: more than {most_bytes} bytes or {deadline_seconds} s", INPUT_OUTPUT)
            progress.close()
        if digest.hexdigest() != sha256:
            raise Failure(f"{url} has SHA-256 {digest.hexdigest()}, not {sha256}: not the file we know", INPUT_OUTPUT)
        os.chmod(partial, 0o644)  # mkstemp keeps its file from everyone else
        os.replace(partial, path)
    except requests.RequestException as error:
        reason = f"could not download {url} ({type(error).__name__})"
        raise Failure(f"{reason};\nwith no network, put that file at {path} and run this again", INPUT_OUTPUT) from None
    finally:
        Path(partial).unlink(missing_ok=True)
    return path


# ---- texts: each source yields its documents, one string at a time, in an order that does not change

NAMED = {"stdlib": "bpe:4096", "shakespeare": "bytes"}  # the named datasets and their tokenizers
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    2_000_000,
)
SUFFIXES = (".txt", ".md", ".py", ".jsonl")
OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def read_documents(settings: PrepareConfig) -> Iterator[str]:
    if settings.source:
        yield from source_documents(Path(settings.source).expanduser(), settings.text_field)
    elif settings.name == "stdlib":
        yield from stdlib_documents()
    else:
        path = fetch(Path(settings.data_dir) / "tinyshakespeare.txt", *SHAKESPEARE)
        yield path.read_text(encoding="utf-8")


def stdlib_documents() -> Iterator[str]:
    """The modules of the running Python's standard library, tests left out: 12 MB of real text on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    modules = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    if not modules:
        raise Failure(f"{root} holds no .py files: this Python keeps its library zipped; use another, or --source=PATH")
    for path in modules:
        with tokenize.open(path) as file:  # in the encoding that the module states
            yield file.read()


def source_documents(source: Path, text_field: str) -> Iterator[str]:
    """A document a file, and in .jsonl a document a line. Raises Failure where text cannot be had."""
    if not source.exists():
        raise Failure(f"--source={source}: there is no such file or folder")
    files = (
        [source] if source.is_file() else sorted(p for p in source.rglob("*") if kind_of(p) in SUFFIXES and p.is_file())
    )
    if not files:
        raise Failure(f"--source={source} holds none of {', '.join(SUFFIXES)} (also .gz, .xz)")
    for path in files:
        try:
            with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as file:
                if kind_of(path) != ".jsonl":
                    yield file.read()
                    continue
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield read_json_line(line, text_field, f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise Failure(f"{path} is not UTF-8 text: {error.reason} near byte {error.start} of a read") from None
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise Failure(f"{path} is cut or damaged: {error}") from None


def kind_of(path: Path) -> str:
    """The suffix that says how to read a file, under that of its compression."""
    return Path(path.stem).suffix if path.suffix in OPENERS else path.suffix


def read_json_line(line: str, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise Failure(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        names = ", ".join(record) if isinstance(record, dict) else "none"
        raise Failure(f"{where}: no text in field {text_field!r}; its fields: {names} (--text_field)")
    return record[text_field].encode(errors="replace").decode()  # JSON can name half a character; Unicode can't


# ---- the way from documents to a dataset


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


def split_document(text: str, val_fraction: float, cut: bool) -> list[tuple[str, str]]:
    """Return (split, text) pairs: the document goes whole to one side, by its own hash, so that adding documents never
    moves another one; with `cut` its end goes to validation instead."""
    if cut:
        end = round(len(text) * (1 - val_fraction))
        return [("train", text[:end]), ("val", text[end:])]
    hashed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return [("val" if hashed < val_fraction else "train", text)]


@dataclass
class Survey:
    """What one reading of all documents finds."""

    cut: bool  # no whole document could be spared for one of the splits, so each is cut
    empty: int  # documents with nothing but white space
    documents: dict[str, int]  # by split
    text_bytes: dict[str, int]  # by split
    pieces: Counter  # of the training text, for the training of a tokenizer


def survey_documents(settings: PrepareConfig) -> Survey:
    """Read all documents once, twice where they must be cut. Raises Failure where that leaves a split without text."""
    split_pattern, wants_pieces = regex.compile(GPT2_PATTERN), bpe_size(settings.tokenizer) > 0
    for cut in (False, True):
        survey = Survey(cut, 0, {"train": 0, "val": 0}, {"train": 0, "val": 0}, Counter())
        progress = Progress("bytes read", 0)
        for document in read_documents(settings):
            if not document.strip():
                survey.empty += 1
                continue
            for split, text in split_document(document, settings.val_fraction, cut):
                survey.documents[split] += 1
                survey.text_bytes[split] += len(text.encode())
                if wants_pieces and split == "train":
                    survey.pieces.update(split_pattern.findall(text))
            progress.update(sum(survey.text_bytes.values()))
        progress.close()
        if all(survey.text_bytes.values()):
            return survey
    raise Failure(f"{settings.source or settings.name}: too little text for a training and a validation split")


def write_shards(settings: PrepareConfig, survey: Survey, encoding: tiktoken.Encoding, folder: Path) -> dict:
    """Tokenise every document into shards in `folder`; return the facts of each split for the manifest."""
    dtype = np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")
    writers = {
        split: ShardWriter(folder, f"{settings.name}_{split}", settings.shard_tokens, dtype)
        for split in ("train", "val")
    }
    progress, done, val_text = Progress("bytes tokenised", sum(survey.text_bytes.values())), 0, []
    keep_val_text = survey.text_bytes["val"] <= 16_000_000  # more takes lzma too long
    parts = (
        part
        for document in read_documents(settings)
        if document.strip()
        for part in split_document(document, settings.val_fraction, survey.cut)
    )
    while batch := list(islice(parts, 256)):  # enough for every core, few enough to hold
        tokens = encoding.encode_ordinary_batch([text for _, text in batch], num_threads=os.cpu_count())
        for (split, text), document_tokens in zip(batch, tokens):
            writers[split].add([encoding.eot_token] + document_tokens)
            done += len(text.encode())
            if split == "val" and keep_val_text:
                val_text.append(text)
        progress.update(done)
    progress.close()
    splits = {}
    for split, writer in writers.items():
        shards = writer.close()
        tokens = sum(shard["tokens"] for shard in shards)
        sizes = {"documents": survey.documents[split], "bytes": survey.text_bytes[split], "tokens": tokens}
        splits[split] = sizes | {"shards": shards}
    splits["val"]["compressed_bits_per_byte"] = compress("".join(val_text).encode()) if keep_val_text else {}
    return splits


def compress(text: bytes) -> dict[str, float]:
    """Bits per byte that two compressors need for `text`, for a model to be measured against."""
    compressed = {"lzma -9": lzma.compress(text, preset=9), "gzip -9": gzip.compress(text, 9)}
    return {name: 8 * len(data) / len(text) for name, data in compressed.items()}


def prepare(settings: PrepareConfig) -> Path:
    """Make the dataset that the settings name and return its folder, which appears only when all of it is there."""
    folder = Path(settings.data_dir) / settings.name
    made_from = {name: getattr(settings, name) for name in ("source", "text_field", "tokenizer", "val_fraction")}
    if folder.exists():
        if (folder / "manifest.json").exists():
            found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["made_from"]
            if found == made_from:
                print(f"{folder} is there already; delete it to read the text anew")
                return folder
            raise Failure(f"{folder} was made from {found}, not {made_from}; delete it or choose another name")
        raise Failure(f"{folder} holds something else already; choose another name")
    print(f"preparing {folder}: reading {settings.source or settings.name}", flush=True)
    survey = survey_documents(settings)
    if entries := bpe_size(settings.tokenizer):
        counts = Counter({piece.encode(): count for piece, count in survey.pieces.items()})
        print(f"training a tokenizer of {entries:,} entries on {len(counts):,} different pieces of text", flush=True)
        encoding = make_tokenizer(train_bpe(counts, entries), settings.tokenizer)
    else:
        encoding = load_tokenizer(settings.tokenizer, folder.parent)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{settings.name}."))
    try:
        tokenizer_text = write_tokenizer(encoding)
        (partial / "tokenizer.tiktoken").write_text(tokenizer_text, encoding="ascii", newline="")
        kept = sum(survey.documents.values()) // (2 if survey.cut else 1)  # a cut one counts in both splits
        manifest = {
            "name": settings.name,
            "made_from": made_from,
            "tokenizer": {
                "name": settings.tokenizer,
                "sha256": hashlib.sha256(tokenizer_text.encode()).hexdigest(),
                "vocab_size": encoding.n_vocab,
            },
            "documents": {"in": kept + survey.empty, "kept": kept, "dropped": {"empty": survey.empty}},
            "splits": write_shards(settings, survey, encoding, partial),
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp keeps its folder from everyone else
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(describe(manifest), flush=True)
    return folder


def describe(manifest: dict) -> str:
    documents, splits = manifest["documents"], manifest["splits"]
    text_bytes, tokens = (sum(split[unit] for split in splits.values()) for unit in ("bytes", "tokens"))
    return (
        f"{documents['kept']:,} of {documents['in']:,} documents, {text_bytes / 1e6:.1f} MB, "
        f"{text_bytes / tokens:.2f} bytes a token: {splits['train']['tokens']:,} training tokens "
        f"and {splits['val']['tokens']:,} for validation"
    )


def main(settings: PrepareConfig):
    folder = prepare(settings)
    print(f"train on it: python train.py config/small.py --dataset={folder.name} --out_dir=out/{folder.name}")


if __name__ == "__main__":
    settings = config.load(PrepareConfig, sys.argv[1:], positional="name")
    with config.exit_codes():
        main(settings)
