"""Files, folders, patterns and standard input as documents, in an order that does not change."""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path

from config import BAD_INPUT, INPUT_OUTPUT, Failure

BLOCK_BYTES = 1 << 20  # read at once
DOCUMENT_CHARACTERS = 2_000_000  # a longer text becomes several documents: bounded memory
LINE_CHARACTERS = 64_000_000  # a longer line of JSON or CSV is damage
STANDARD_INPUT = Path("-")
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
DAMAGED = (EOFError, ValueError, lzma.LZMAError, zlib.error)  # ValueError: pyarrow's
OPENERS = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": lambda file: load_pyarrow("a .zst file").CompressedInputStream(file, "zstd"),
}
# by their byte-order marks, UTF-32 first: its little-endian mark starts with that of UTF-16
ENCODINGS = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")


@dataclass
class Tally:
    """Counts what was dropped, by reason, with up to three examples of each reason."""

    documents: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    lines: Counter = field(default_factory=Counter)  # dropped from documents that were kept
    bytes_read: int = 0
    examples: dict[str, list] = field(default_factory=dict)  # reason -> [(where, beginning)]

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
        self.bytes_read += other.bytes_read
        for reason, examples in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + examples)[:3]


@dataclass
class Reader:
    """Yields the documents of `sources` in order as (text, where); where = "file" or "file:line".

    `tally` counts what was skipped; `done` of `total` bytes have been read. Raises Failure.
    """

    sources: str | list[Path]  # files, folders, patterns ("a,b*"), "-" for standard input; or paths
    format: str = ""  # text, jsonl, csv or parquet; "" = by the name of each file
    text_field: str = "text"  # the field or column that holds the document
    separator: str = ""  # the line between the documents of a text file
    on_error: str = "stop"  # or "skip": count what cannot be read and continue
    setting: str = "source"  # the setting that messages name

    def __post_init__(self):
        self.tally, self.done = Tally(), 0
        self.named = set()  # files that the user named, not found in a folder
        paths = self.find_files() if isinstance(self.sources, str) else self.sources
        self.sizes = {path: os.path.getsize(path) if os.path.exists(path) else 0 for path in paths}
        self.total = sum(self.sizes.values())

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for path, size in self.sizes.items():
            before = self.done
            try:
                yield from self.read_file(path)
            except (*DAMAGED, OSError) as error:
                self.skip_error(error, path)
            self.done = before + size

    def skip(self, reason: str, message: str, code: int = BAD_INPUT):
        """Count what cannot be read. Raises Failure unless on_error is skip."""
        if self.on_error == "stop":
            raise Failure(f"{message}; --on_error=skip would continue without it", code)
        self.tally.drop(reason, message)

    def skip_error(self, error: Exception, path: Path | None = None):
        if isinstance(error, UnicodeError):
            self.skip("invalid bytes", f"{path}: {error}")
        elif getattr(error, "errno", None):  # of the system; the OSError of a decompressor has none
            self.skip("unreadable", f"{path or error.filename}: {error.strerror}", INPUT_OUTPUT)
        else:
            self.skip("damaged file", f"{path} is cut or damaged: {' '.join(str(error).split())}")

    def find_files(self) -> Iterator[Path]:
        """The files that `sources` names; those of a folder sorted by name."""
        is_one = os.path.exists(os.path.expanduser(self.sources))  # a name may contain a comma
        for part in [self.sources] if is_one else filter(None, self.sources.split(",")):
            path = Path(os.path.expanduser(part))
            is_path = path == STANDARD_INPUT or os.path.exists(path)
            matches = [path] if is_path else match_pattern(path)
            self.named.update(matches)
            files = [file for match in matches for file in self.walk(match)]
            if not files:
                hint = f" (links do not count; try '{path}/*')" if self.tally.documents else ""
                raise Failure(f"--{self.setting}={path}: no such file, or an empty folder{hint}")
            yield from files

    def walk(self, path: Path) -> Iterator[Path]:
        """The files below `path`, without hidden ones and links, which can lead in circles."""
        if not path.is_dir():
            yield path
            return
        for parent, folders, names in os.walk(path, onerror=self.skip_error):
            folders[:] = sorted(name for name in folders if name[0] != ".")
            for name in sorted(folders + [name for name in names if name[0] != "."]):
                file = Path(parent, name)
                if file.is_symlink():
                    self.tally.drop("symbolic link", str(file))
                elif file.is_file():
                    yield file

    def format_of(self, path: Path) -> str:
        """The format of a file: the setting, or by its suffix without that of a compression."""
        suffix = Path(path.stem).suffix if path.suffix.lower() in OPENERS else path.suffix
        if suffix == ".json" and path in self.named and not self.format:
            raise Failure(f"{path} may hold one text or many: add --format=text or --format=jsonl")
        return self.format or FORMATS.get(suffix.lower(), "text")

    def read_file(self, path: Path) -> Iterator[tuple[str, str]]:
        """The documents of one file. Raises OSError, DAMAGED, and Failure."""
        file_format, opener = self.format_of(path), OPENERS.get(path.suffix.lower(), nullcontext)
        if file_format == "parquet":
            yield from self.read_parquet(path)
            return
        source = 0 if path == STANDARD_INPUT else path  # a number is a file descriptor
        with open(source, "rb") as file, opener(file) as stream:
            block = stream.read(BLOCK_BYTES)
            encoding = next((e for e in ENCODINGS if block.startswith("\ufeff".encode(e))), "utf-8")
            if encoding == "utf-8" and b"\0" in block[:4096]:
                drop = self.skip if path in self.named else self.tally.drop  # pictures in a folder
                drop("binary", f"{path} is binary, not text: NUL bytes at its beginning")
                return
            read = {"jsonl": self.read_jsonl, "csv": self.read_csv, "text": self.read_text}
            yield from read[file_format](self.decode(block, encoding, stream, file), path)

    def decode(self, first: bytes, encoding: str, stream, file) -> Iterator[str]:
        """The text of `stream`, whose `first` block was read; `file` is what it decompresses."""
        decoder = codecs.getincrementaldecoder(encoding)()
        before, position = self.done, 0
        blocks = iter(lambda: stream.read(BLOCK_BYTES), b"")
        for block in chain([first], blocks, [b""]):  # b"" ends the last character
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:  # its object: the block, and what was left before
                byte = position + len(block) - len(error.object) + error.start
                raise UnicodeError(f"not {encoding} text: {error.reason} at byte {byte}") from None
            yield text if position else text.removeprefix("\ufeff")  # the byte-order mark
            position += len(block)
            self.done = before + (file.tell() if file.seekable() else 0)

    def read_text(self, blocks: Iterable[str], path: Path) -> Iterator[tuple[str, str]]:
        separator = self.separator.strip()
        groups = groupby(lines_of(blocks), lambda line: line.strip() == separator)
        texts = (lines for is_separator, lines in groups if not is_separator)
        for text in texts if separator else [blocks]:
            yield from pieces_of(text, str(path))

    def read_jsonl(self, blocks: Iterable[str], path: Path) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(lines_of(blocks), 1):
            try:
                if line.strip():
                    yield from self.take_text(json.loads(line), path, number)
            except (ValueError, RecursionError) as error:
                self.skip("broken line", f"{path}:{number}: not JSON: {error}")

    def read_csv(self, blocks: Iterable[str], path: Path) -> Iterator[tuple[str, str]]:
        csv.field_size_limit(LINE_CHARACTERS)
        rows = csv.DictReader(lines_of(blocks), strict=True)
        while True:
            try:
                yield from self.take_text(next(rows), path, rows.line_num)
            except csv.Error as error:
                self.skip("broken line", f"{path}:{rows.reader.line_num}: not CSV: {error}")
            except StopIteration:
                return

    def read_parquet(self, path: Path) -> Iterator[tuple[str, str]]:
        """One document per row, 256 rows in memory."""
        before, number = self.done, 0
        with load_pyarrow("parquet").parquet.ParquetFile(path) as file:
            empty_row = dict.fromkeys(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=256, columns=[self.text_field]):
                for row in batch.to_pylist():
                    number += 1
                    yield from self.take_text(empty_row | row, path, number)
                self.done = before + self.sizes[path] * number // file.metadata.num_rows

    def take_text(self, record, path: Path, number: int) -> Iterator[tuple[str, str]]:
        """The documents of one row. Half a surrogate pair, which JSON can hold, becomes "?"."""
        record, where = record if isinstance(record, dict) else {}, f"{path}:{number}"
        text = record.get(self.text_field)
        if isinstance(text, str):
            yield from pieces_of([text.encode(errors="replace").decode()], where)
        else:
            message = f"{where}: no text in field {self.text_field!r} (--text_field)"
            self.skip("missing field", f"{message}; its fields: {list(record)}")


def match_pattern(pattern: Path) -> list[Path]:
    """The files and folders that a glob matches; hidden ones only where it names them."""
    named = {"..", *pattern.parts}
    try:
        matches = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    except ValueError:  # not a valid pattern
        return []
    return [path for path in matches if all(p[0] != "." or p in named for p in path.parts)]


def lines_of(blocks: Iterable[str]) -> Iterator[str]:
    """Blocks of text as lines with their ends. Raises EOFError where a line is too long."""
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        yield from (line + "\n" for line in lines)
        if len(rest) > LINE_CHARACTERS:
            raise EOFError(f"a line of more than {LINE_CHARACTERS:,} characters")
    if rest:
        yield rest


def pieces_of(blocks: Iterable[str], where: str) -> Iterator[tuple[str, str]]:
    """The joined blocks as documents of at most DOCUMENT_CHARACTERS, cut at white space."""
    rest = ""
    for block in blocks:
        rest += block
        while len(rest) > DOCUMENT_CHARACTERS:
            half = DOCUMENT_CHARACTERS // 2
            space = max(rest.rfind(white, half, DOCUMENT_CHARACTERS) for white in "\n ")
            end = space + 1 or DOCUMENT_CHARACTERS
            yield rest[:end], where
            rest = rest[end:]
    yield rest, where


def load_pyarrow(purpose: str):
    """The library that reads parquet and .zst."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise Failure(f"{purpose} needs pyarrow: pip install pyarrow") from None
    return pyarrow
