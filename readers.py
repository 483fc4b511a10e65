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
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path

from config import BAD_INPUT, INPUT_OUTPUT, Failure

BLOCK_BYTES = 1 << 20  # read at once
DOCUMENT_CHARACTERS = 2_000_000  # a longer text becomes several documents: bounded memory
LINE_CHARACTERS = 64_000_000  # a longer line of JSON or CSV is damage
STANDARD_INPUT = Path("-")
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "JSON", ".ipynb": "JSON"}
FORMATS |= {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
OPENERS = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": lambda file: load_pyarrow("a .zst file").CompressedInputStream(file, "zstd"),
}
# PDF, zip (and Word), and compressed files whose names do not say so
BINARY = (b"%PDF-", b"PK\3\4", b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh", b"\x28\xb5\x2f\xfd")
# by their byte-order marks, UTF-32 first: its little-endian mark starts with that of UTF-16
ENCODINGS = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be", "utf-8")


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

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.documents.items())


@dataclass
class Reader:
    """Yields the documents of `sources` in order as (text, where); where = "file" or "file:line".

    `tally` counts what was skipped; `done` of `total` bytes have been read; `separator_found`
    says whether the separator occurred. Raises Failure.
    """

    sources: str | list[Path]  # files, folders, patterns ("a,b*"), "-" for standard input; or paths
    format: str = ""  # text, lines, jsonl, csv, tsv or parquet; "" = by each file's name
    text_field: str = "text"  # the field or column that holds the document
    separator: str = ""  # the line between the documents of a text file; "\n\n" = a blank line
    encoding: str = ""  # of files without a byte-order mark; "" = UTF-8
    on_error: str = "stop"  # or "skip": count what cannot be read and continue
    setting: str = "source"  # the setting that messages name
    advice: str = ""  # what messages advise where the script lacks the settings above

    def __post_init__(self):
        self.tally, self.done, self.separator_found = Tally(), 0, False
        self.named = set()  # files that the user named, not found in a folder
        paths = self.find_files() if isinstance(self.sources, str) else self.sources
        self.sizes = {path: os.path.getsize(path) if os.path.exists(path) else 0 for path in paths}
        self.total = sum(self.sizes.values())

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for path, size in self.sizes.items():
            before = self.done
            try:
                yield from self.read_file(path)
            except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
                self.skip_error(error, path)
            self.done = before + size

    def skip(self, reason: str, message: str, code: int = BAD_INPUT, fix: str = "", is_named=True):
        """Count what cannot be read. Raises Failure, unless on_error is skip or nobody named it."""
        if self.on_error == "stop" and is_named:
            fixes = [fix, "--on_error=skip would continue without it"]
            advice = self.advice or ", or ".join(filter(None, fixes))
            raise Failure(f"{message}; {advice}", code)
        self.tally.drop(reason, message)

    def skip_error(self, error: Exception, path: Path | None = None):
        if isinstance(error, UnicodeError):
            fix = "--encoding=NAME (such as cp1252 or gb18030) reads other text than UTF-8"
            self.skip("invalid bytes", f"{path}: {error}", fix=fix)
        elif getattr(error, "errno", None):  # of the system; the OSError of a decompressor has none
            self.skip("unreadable", f"{path or error.filename}: {error.strerror}", INPUT_OUTPUT)
        elif "too much memory" in str(error):
            fix = f"zstd -dc --long=31 {path} | … --source=- reads it"
            self.skip("unreadable", f"{path} was compressed with a longer --long than 27", fix=fix)
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

    def read_file(self, path: Path) -> Iterator[tuple[str, str]]:
        """The documents of one file. Raises Failure, and what a library raises for damage."""
        suffix, opener = path.suffix.lower(), OPENERS.get(path.suffix.lower(), nullcontext)
        suffix = Path(path.stem).suffix.lower() if suffix in OPENERS else suffix
        file_format = self.format or FORMATS.get(suffix, "text")
        if file_format == "parquet":
            yield from self.read_parquet(path)
            return
        source = 0 if path == STANDARD_INPUT else path  # a number is a file descriptor
        with open(source, "rb") as file, opener(file) as stream:
            block = stream.read(BLOCK_BYTES)
            marked = [name for name in ENCODINGS if block.startswith("\ufeff".encode(name))]
            encoding = marked[0] if marked else self.encoding or "utf-8"
            blocks = self.decode(block, encoding, stream, file)
            has_nul = b"\0" in block[:4096] and b"\0" not in "a".encode(encoding)
            if has_nul or block.startswith(BINARY):
                file_format = "binary"
            elif not self.format and file_format in ("text", "JSON"):
                file_format, blocks = self.find_json(file_format, blocks)
            if file_format in ("binary", "JSON"):
                fix = "convert it, or say what it is, as in --format=jsonl or --encoding=utf-16"
                lines = f"lines of JSON with field {self.text_field!r}"
                message = f"{path} is {file_format}: neither text nor {lines}"
                self.skip(file_format, message, fix=fix, is_named=path in self.named)
            else:
                yield from getattr(self, f"read_{file_format}")(blocks, path)

    def find_json(self, file_format: str, blocks: Iterator[str]) -> tuple[str, Iterator[str]]:
        """The format, by its first line, of a file that its name calls text or JSON; and its text.

        jsonl: a .json file whose first line is an object with text. JSON: what else is JSON.
        """
        first = next(blocks)
        if first.startswith("{"):
            blocks = lines_of(chain([first], blocks))
            first = next(blocks)
            with suppress(ValueError, RecursionError):  # text, or an object of several lines
                if row := json.loads(first):
                    is_rows = isinstance(row.get(self.text_field, 0), str | None)
                    file_format = "jsonl" if is_rows and file_format == "JSON" else "JSON"
        return file_format, chain([first], blocks)

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
        if not self.separator:
            yield from pieces_of(blocks, str(path))
            return
        separator = self.separator.replace("\\n", "\n").strip()
        for is_separator, lines in groupby(lines_of(blocks), lambda x: x.strip() == separator):
            if is_separator:
                self.separator_found = True
            else:
                yield from pieces_of(lines, str(path))

    def read_lines(self, blocks: Iterable[str], path: Path) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(lines_of(blocks), 1):
            yield from pieces_of([line.rstrip("\r\n")], f"{path}:{number}")

    def read_jsonl(self, blocks: Iterable[str], path: Path) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(lines_of(blocks), 1):
            try:
                if line.strip():
                    yield from self.take_text(json.loads(line), f"{path}:{number}")
            except (ValueError, RecursionError) as error:
                self.skip("broken line", f"{path}:{number}: not JSON: {error}")

    def read_csv(self, blocks, path: Path, delimiter: str = ",") -> Iterator[tuple[str, str]]:
        """One document per row. A row with another number of fields than the header is broken."""
        csv.field_size_limit(LINE_CHARACTERS)
        rows, header = csv.reader(lines_of(blocks), delimiter=delimiter, strict=True), []
        while True:
            try:
                row = next(rows)
                header = header or row
                if row and len(row) != len(header):
                    raise csv.Error(f"{len(row)} fields, but {len(header)} in the header")
                if row and row is not header:
                    yield from self.take_text(dict(zip(header, row)), f"{path}:{rows.line_num}")
            except csv.Error as error:
                self.skip("broken line", f"{path}:{rows.line_num}: not CSV: {error}")
            except StopIteration:
                return

    def read_tsv(self, blocks: Iterable[str], path: Path) -> Iterator[tuple[str, str]]:
        return self.read_csv(blocks, path, "\t")

    def read_parquet(self, path: Path) -> Iterator[tuple[str, str]]:
        """One document per row, 256 rows in memory."""
        before, number = self.done, 0
        with load_pyarrow("parquet").parquet.ParquetFile(path) as file:
            others = {name: None for name in file.schema_arrow.names if name != self.text_field}
            for batch in file.iter_batches(batch_size=256, columns=[self.text_field]):
                for row in batch.to_pylist():
                    number += 1
                    yield from self.take_text(others | row, f"{path}:{number}")
                self.done = before + self.sizes[path] * number // file.metadata.num_rows

    def take_text(self, row, where: str) -> Iterator[tuple[str, str]]:
        """The documents of a row; null is an empty one. Raises ValueError for half a surrogate."""
        match row:
            case {self.text_field: str() | None as text}:
                (text or "").encode()  # half a surrogate pair, which JSON can hold, is not text
                yield from pieces_of([text or ""], where)
                return
            case {self.text_field: value}:
                found = f"field {self.text_field!r} holds {repr(value):.60}, not text"
            case dict():
                found = f"no field {self.text_field!r}; its fields: {str(list(row)):.300}"
            case _:
                found = f"{repr(row):.60} is not an object"
        self.skip("missing field", f"{where}: {found}", fix="--text_field=NAME names another")


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
