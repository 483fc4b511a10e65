"""Exact and near duplicates, and text that is shared with benchmarks or between splits.

Near duplicates: MinHash (Broder 1997) with bands (Lee et al. 2022, appendix A). In memory are the
signatures (256 bytes per document), the similar pairs (8 bytes each, at most 9 per document and
band), and 100,000 candidate pairs at once.
"""

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from clean import HashSet, hash_ngrams, hash_words
from config import Progress
from hashing import mix64

SIGNATURE_BYTES = 256  # one per bin; a bin is chosen by the upper 8 bits of a hash
BANDS = 32  # of 8 bytes each; documents that agree in one whole band are compared
NGRAM_WORDS = 5
CONTAMINATION_WORDS = 13  # Brown et al. 2020, appendix C
NEIGHBORS = 8  # documents of a bucket that each one is compared with, besides the first
EMPTY = np.uint64(2**64 - 1)
PRIORITIES = mix64(np.arange(SIGNATURE_BYTES**2, dtype=np.uint64)).astype(np.uint32)
PRIORITIES = PRIORITIES.reshape(SIGNATURE_BYTES, SIGNATURE_BYTES)  # [empty bin, bin with a hash]


def text_digest(text: str) -> bytes:
    """16 bytes that are equal for texts that differ in case and white space only."""
    squeezed = text.lower().encode().translate(None, b" \t\n\r\x0b\x0c")
    return hashlib.sha256(squeezed).digest()[:16]


def find_exact(digests: np.ndarray) -> np.ndarray:
    """For each document the index of the first with the same digest, int64 (documents,)."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return first[inverse]


def minhash_signature(words: np.ndarray) -> np.ndarray:
    """The signature of a document, uint8 (256,), from the hashes of its words, uint64 (W,).

    Two signatures agree in about the share of 5-grams that the documents have in common (Jaccard
    similarity). One permutation hashing (Li et al. 2012): the upper 8 bits of the hash of a 5-gram
    choose a bin, and each bin keeps its smallest hash. With 2-bit hashes and 2 bins:

        hashes 00 01 11  ->  bin 0: min(00, 01) = 00, bin 1: 11

    An empty bin copies the bin that has the highest priority for it among those with a hash; the
    priorities are random and the same for all documents (Shrivastava 2017). One byte of each hash
    is kept (Li and König 2010). A document without words has no signature: give
    np.frombuffer(text_digest(text), np.uint64) as its words.
    """
    ngrams = hash_ngrams(words, max(1, min(NGRAM_WORDS, len(words))))
    minima = np.full(SIGNATURE_BYTES, EMPTY)
    np.minimum.at(minima, (ngrams >> np.uint64(56)).astype(np.int64), ngrams)
    is_empty = minima == EMPTY
    filled = np.flatnonzero(minima < EMPTY)
    donors = filled[PRIORITIES[is_empty][:, filled].argmax(axis=1)]
    minima[is_empty] = minima[donors]
    bins = np.arange(SIGNATURE_BYTES, dtype=np.uint64)
    return mix64(minima + bins).astype(np.uint8)  # the lowest byte; copies differ by their bins


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of documents by their signatures, (..., 256) each.

    Bytes agree by chance, too: agreement = similarity + (1 - similarity) / 256.
    """
    agreement = (first == second).mean(axis=-1)
    return (agreement - 1 / 256) / (1 - 1 / 256)


def find_near(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """For each document the index of the earlier one it is similar to, or its own, int64 (N,).

    signatures: uint8 (N, 256). A document is dropped only if it is similar to one that is kept: an
    earlier neighbour, or the document for which that neighbour was dropped. With a like b, b like
    c, but a unlike c, documents in the order a b c have the originals a a c, and b a c have b b b.
    """
    originals = np.arange(len(signatures))
    for second, first in similar_pairs(signatures, threshold):
        original = originals[first]
        if originals[second] == second and (
            original == first or similarity(signatures[original], signatures[second]) >= threshold
        ):
            originals[second] = original
    return originals


def similar_pairs(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Pairs (second, first) of similar documents that share a band, int64 (pairs, 2), sorted."""
    pairs, count = np.zeros(0, dtype=np.int64), len(signatures)
    with Progress("bands compared", BANDS) as progress:
        for band in range(BANDS):
            columns = signatures[:, 8 * band : 8 * (band + 1)]
            keys = np.ascontiguousarray(columns).view(np.uint64)[:, 0]  # 8 bytes as one number
            found = [pairs]
            for second, first in candidates(keys):
                is_similar = similarity(signatures[first], signatures[second]) >= threshold
                found.append(second[is_similar] * count + first[is_similar])
            pairs = np.unique(np.concatenate(found))
            progress.update(band + 1)
    return np.stack(np.divmod(pairs, count), axis=1)


def candidates(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents with equal keys, as indices (second, first), at most 100,000 pairs at once.

    Of many with one key, each is paired with the first and the NEIGHBORS before it.
    """
    order = np.argsort(keys, kind="stable")  # equal keys are adjacent, the earliest document first
    keys = keys[order]
    leaders = np.searchsorted(keys, keys)
    for distance in range(NEIGHBORS + 1):  # 0: to the leader
        position = np.flatnonzero(leaders < np.arange(len(keys)) - distance)
        earlier = position - distance if distance else leaders[position]
        for part in np.array_split(np.arange(len(position)), len(position) // 100_000 + 1):
            yield order[position[part]], order[earlier[part]]


# shared text: decontamination, and the overlap of training and validation text


def text_ngrams(text: str) -> np.ndarray:
    """Hashes of each CONTAMINATION_WORDS consecutive words, uint64; none for a shorter text."""
    return hash_ngrams(hash_words(text)[0], CONTAMINATION_WORDS)


def ngrams_of(texts: Iterable[str]) -> np.ndarray:
    """The hashes of `text_ngrams` for all texts, one after another."""
    return np.concatenate([np.zeros(0, dtype=np.uint64), *map(text_ngrams, texts)])


def save_hashes(hashes: np.ndarray, folder: Path) -> Path:
    """Write hashes into a file named by its content, so that a worker can cache it by name."""
    hashes = np.unique(hashes)
    path = folder / f"{hashlib.sha256(hashes.tobytes()).hexdigest()[:16]}.npy"
    np.save(path, hashes)
    return path


@lru_cache(maxsize=2)
def load_hashes(path: Path) -> HashSet:
    """The set that `save_hashes` wrote."""
    return HashSet(np.load(path))


def is_contaminated(words: np.ndarray, path: Path) -> bool:
    """Whether a document, as hashes of its words, shares an n-gram with the file of hashes."""
    return len(load_hashes(path).find(hash_ngrams(words, CONTAMINATION_WORDS))) > 0


def find_shared(texts: Iterable[str], path: Path) -> np.ndarray:
    """The n-grams of `texts` that are in the file of hashes, each once."""
    ngrams = ngrams_of(texts)
    return np.unique(ngrams[load_hashes(path).find(ngrams)])


def overlap(ngrams: np.ndarray, shared: Iterable[np.ndarray]) -> float:
    """The share of `ngrams` that is in one of the arrays `shared`."""
    members = HashSet(np.concatenate([np.zeros(0, dtype=np.uint64), *shared]))
    return len(members.find(ngrams)) / max(len(ngrams), 1)
