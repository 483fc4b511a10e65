"""The corpus: cleaned documents on disk, between reading and tokenising.

Their texts are one file, and everything else of a document is a few bytes in an array. A part of
the documents is given by its spans, the starts and ends of its texts in the file, int64 (N, 2).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from config import Failure, Progress
from hashing import mix64
from readers import Reader, Tally
from workers import Workers

PART_CHARACTERS = 1_000_000  # of text that a worker takes at once
MIN_ODDS, MAX_ODDS = 1 / 8, 4  # of validation bytes to those wished; beyond, documents are cut
DOCUMENT = np.dtype([("bytes", np.int64), ("is_val", np.bool_), ("digest", "S16")])


@dataclass
class Corpus:
    """The documents that cleaning kept."""

    path: Path  # a file of their texts in UTF-8, one after the other
    documents: np.ndarray  # DOCUMENT (N,)
    tally: Tally  # of what was dropped
    workers: Workers

    def signatures(self) -> np.ndarray:
        """The MinHash signatures, if cleaning made them: uint8 (N, 256)."""
        path = self.path.with_name("signatures")
        return np.memmap(path, np.uint8, "r").reshape(len(self.documents), -1)

    def spans(self) -> np.ndarray:
        """The spans of all documents."""
        ends = np.cumsum(self.documents["bytes"])
        return np.stack((ends - self.documents["bytes"], ends), axis=1)

    def map(self, function: Callable, spans: np.ndarray, unit: str) -> Iterator:
        """Yield function(texts) for parts of some documents, in order; show the progress."""
        ends = np.cumsum(np.diff(spans))
        parts = np.split(spans, np.flatnonzero(np.diff(ends // PART_CHARACTERS)) + 1)
        results = self.workers.map(partial(call_on_texts, self.path, function), parts)
        done = 0
        with Progress(unit, int(ends[-1])) as progress:
            for part, result in zip(parts, results):
                yield result
                done += count_bytes(part)
                progress.update(done)

    def drop_repeated(self, reason: str, order: np.ndarray, originals: np.ndarray) -> np.ndarray:
        """Tally the documents that repeat another; return the others.

        originals: the position in `order` of what each repeats, or its own.
        """
        is_repeated, is_val = originals != np.arange(len(order)), self.documents["is_val"]
        for dropped, kept in zip(order[is_repeated], order[originals[is_repeated]]):
            name = reason + (" of validation text" if is_val[kept] > is_val[dropped] else "")
            self.tally.documents[name] += 1
            self.tally.bytes[name] += int(self.documents["bytes"][dropped])
            if self.tally.documents[name] <= 3:
                texts = read_texts(self.path, self.spans()[[dropped, kept]])
                self.tally.show(name, "dropped ⟷ kept", " ⟷ ".join(text[:300] for text in texts))
        return order[~is_repeated]

    def split(self, kept: np.ndarray, val_fraction: float) -> tuple[dict, bool]:
        """The spans of the training and of the validation documents, and whether they are cut.

        With very few documents their hashes can leave a split empty, or far from its share. Then
        the end of each document is held out instead. Odds are the ratio of validation to training.
        Training documents are in the order of a hash: sources are often sorted, and a window, or
        the part that a tokenizer is trained on, should have documents from anywhere.
        """
        spans, is_val = self.spans()[kept], self.documents["is_val"][kept]
        splits = {"train": spans[~is_val], "val": spans[is_val]}
        train, val = map(count_bytes, splits.values())
        expected = train * val_fraction / (1 - val_fraction)
        is_cut = not MIN_ODDS * expected < val < MAX_ODDS * expected
        if is_cut:
            consequence = f"the last {val_fraction:.1%} of each is for validation"
            print(f"documents: {len(spans)}, too few to hold whole ones out: {consequence}")
            splits = dict(zip(splits, self.cut(spans, val_fraction)))
        if not all(map(count_bytes, splits.values())):
            raise Failure("there is too little text for a training and a validation split")
        splits["train"] = splits["train"][np.argsort(mix64(splits["train"][:, 0]))]
        return splits, is_cut

    def cut(self, spans: np.ndarray, fraction: float) -> list[np.ndarray]:
        """The beginnings of some documents, and their ends: about `fraction` of their bytes."""
        cuts = spans[:, 1] - np.rint(np.diff(spans)[:, 0] * fraction).astype(np.int64)
        with open(self.path, "rb") as file:
            for i, cut in enumerate(cuts):
                file.seek(cut)
                following = file.read(4) + b" "  # bytes 10...... continue a character in UTF-8
                cuts[i] += next(n for n, byte in enumerate(following) if byte & 0xC0 != 0x80)
        halves = np.stack((spans[:, 0], cuts), axis=1), np.stack((cuts, spans[:, 1]), axis=1)
        return [half[half[:, 0] < half[:, 1]] for half in halves]


def write_corpus(reader: Reader, clean: Callable, workers: Workers, folder: Path) -> Corpus:
    """Write what `clean` keeps of the reader's documents into files in `folder`, as it comes.

    clean takes documents (text, where). It returns their texts, joined, in UTF-8; their DOCUMENTs;
    their signatures, joined; and a Tally of what it dropped.
    """
    tally, arrays = Tally(), [np.zeros(0, dtype=DOCUMENT)]
    with open(folder / "texts", "wb") as text_file, open(folder / "signatures", "wb") as file:
        for texts, documents, signatures, dropped in workers.map(clean, in_parts(reader)):
            text_file.write(texts)
            file.write(signatures)
            arrays.append(documents)
            tally.add(dropped)
    tally.add(reader.tally)
    return Corpus(folder / "texts", np.concatenate(arrays), tally, workers)


def in_parts(reader: Reader) -> Iterator[list[tuple[str, str]]]:
    """The documents (text, where) in lists of about PART_CHARACTERS; show the progress."""
    part, characters = [], 0
    with Progress("bytes read", reader.total) as progress:
        for document in reader:
            part.append(document)
            characters += len(document[0])
            if characters >= PART_CHARACTERS:
                yield part
                part, characters = [], 0
                progress.update(reader.done)
    if part:
        yield part


def first_bytes(spans: np.ndarray, max_bytes: int) -> np.ndarray:
    """The spans of the first documents, up to that many bytes."""
    sizes = np.diff(spans)[:, 0]
    return spans[np.cumsum(sizes) - sizes < max_bytes]


def count_bytes(spans: np.ndarray) -> int:
    return int(np.diff(spans).sum())


def read_texts(path: Path, spans: np.ndarray) -> Iterator[str]:
    """The texts of some documents in a corpus's file."""
    with open(path, "rb") as file:
        for start, end in spans:
            file.seek(start)
            yield file.read(end - start).decode()


def call_on_texts(path: Path, function: Callable, spans: np.ndarray):
    return function(read_texts(path, spans))
