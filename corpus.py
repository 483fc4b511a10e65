"""The corpus: cleaned documents on disk, between reading and tokenising.

Their texts are one file, and everything else of a document is a few bytes in an array. A part of
the documents is given by its spans, the starts and ends of its texts in the file, int64 (N, 2).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from config import Progress
from readers import Tally
from workers import Workers

PART_CHARACTERS = 1_000_000  # of text that a worker takes at once
DOCUMENT = np.dtype([("bytes", np.int64), ("is_val", np.bool_), ("digest", "S16")])


@dataclass
class Corpus:
    """The documents that cleaning kept."""

    path: Path  # a file of their texts in UTF-8, one after the other
    documents: np.ndarray  # DOCUMENT (N,)
    signatures: np.ndarray  # MinHash signatures, uint8 (N, 256); (N, 0) where none are needed
    tally: Tally  # of what was dropped

    def spans(self) -> np.ndarray:
        """The spans of all documents."""
        ends = np.cumsum(self.documents["bytes"])
        return np.stack((ends - self.documents["bytes"], ends), axis=1)

    def texts(self, spans: np.ndarray) -> Iterator[str]:
        """The texts of some documents."""
        return read_texts(self.path, spans)

    def map(self, workers: Workers, function: Callable, spans: np.ndarray, unit: str) -> Iterator:
        """Yield function(texts) for parts of some documents, in order; show the progress."""
        ends = np.cumsum(np.diff(spans))
        parts = np.split(spans, np.flatnonzero(np.diff(ends // PART_CHARACTERS)) + 1)
        results, done = workers.map(partial(call_on_texts, self.path, function), parts), 0
        with Progress(unit, int(ends[-1])) as progress:
            for part, result in zip(parts, results):
                yield result
                done += count_bytes(part)
                progress.update(done)

    def cut(self, spans: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Each document as two spans, the second with about `fraction` of its bytes."""
        cuts = spans[:, 1] - np.rint(np.diff(spans)[:, 0] * fraction).astype(np.int64)
        with open(self.path, "rb") as file:
            for i, cut in enumerate(cuts):
                file.seek(cut)
                following = file.read(4) + b" "  # bytes 10...... continue a character in UTF-8
                cuts[i] += next(n for n, byte in enumerate(following) if byte & 0xC0 != 0x80)
        return np.stack((spans[:, 0], cuts), axis=1), np.stack((cuts, spans[:, 1]), axis=1)


def write_corpus(parts: Iterable, folder: Path, signature_bytes: int) -> Corpus:
    """Write parts (texts, DOCUMENTs, signatures, tally) into files as they come; return the Corpus.

    texts and signatures: bytes. signature_bytes: of one document; 0 where none are wanted.
    """
    tally, arrays = Tally(), [np.zeros(0, dtype=DOCUMENT)]
    with ExitStack() as stack:
        names = ("texts", "signatures")
        files = [stack.enter_context(open(folder / name, "wb")) for name in names]
        for texts, documents, signatures, dropped in parts:
            files[0].write(texts)
            files[1].write(signatures)
            arrays.append(documents)
            tally.add(dropped)
    documents = np.concatenate(arrays)
    shape = (len(documents), signature_bytes)
    signatures = np.zeros(shape, np.uint8)
    if signatures.size:
        signatures = np.memmap(folder / "signatures", np.uint8, "r", shape=shape)
    return Corpus(folder / "texts", documents, signatures, tally)


def in_parts(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Documents (text, where) in lists of about PART_CHARACTERS."""
    part, characters = [], 0
    for document in documents:
        part.append(document)
        characters += len(document[0])
        if characters >= PART_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


def first_bytes(spans: np.ndarray, max_bytes: int) -> np.ndarray:
    """The spans of the first documents, up to that many bytes."""
    sizes = np.diff(spans)[:, 0]
    return spans[np.cumsum(sizes) - sizes < max_bytes]


def count_bytes(spans: np.ndarray) -> int:
    return int(np.diff(spans).sum())


def read_texts(path: Path, spans: np.ndarray) -> Iterator[str]:
    with open(path, "rb") as file:
        for start, end in spans:
            file.seek(start)
            yield file.read(end - start).decode()


def call_on_texts(path: Path, function: Callable, spans: np.ndarray):
    return function(read_texts(path, spans))
