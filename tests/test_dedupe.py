"""Duplicates: signatures estimate similarity, and what is dropped is similar to what is kept."""

import math
import random

import numpy as np
import pytest

import dedupe
from clean import hash_words
from dedupe import find_exact, find_near, minhash_signature, similarity


def random_document(generator, words: int) -> np.ndarray:
    return generator.integers(2**64, size=words, dtype=np.uint64)


def ngram_set(words: np.ndarray, n: int = 5) -> set[tuple]:
    return {tuple(words[i : i + n].tolist()) for i in range(len(words) - n + 1)}


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    first, second = ngram_set(first), ngram_set(second)
    return len(first & second) / len(first | second)


def signatures_of(documents) -> np.ndarray:
    return np.array([minhash_signature(words) for words in documents]).reshape(-1, 256)


def near_pair(generator, words: int, target: float, rounding=round) -> tuple:
    """Two documents that differ at the end, and the exact similarity of their sets of 5-grams."""
    ngrams = words - 4
    changed = rounding(ngrams * (1 - target) / (1 + target))
    first = random_document(generator, words)
    second = np.append(first[: words - changed], random_document(generator, changed))
    return first, second, (ngrams - changed) / (ngrams + changed)


def edited(generator, document: np.ndarray, target: float) -> np.ndarray:
    """A copy with other words here and there, so that about this similarity is left."""
    changed = round((len(document) - 4) * (1 - target) / (1 + target) / 5)
    positions = generator.choice(len(document) // 5, changed, replace=False) * 5
    copy = document.copy()
    copy[positions] = random_document(generator, changed)
    return copy


def random_corpus(seed: int, documents: int) -> np.ndarray:
    """Signatures of documents that are copies of copies, more or less similar."""
    generator = np.random.default_rng(seed)
    corpus = [random_document(generator, 300) for _ in range(20)]
    while len(corpus) < documents:
        original = corpus[generator.integers(len(corpus))]
        corpus.append(edited(generator, original, generator.uniform(0.6, 1)))
    return signatures_of(corpus)


def test_of_equal_digests_the_first_is_kept():
    digests = np.array([b"b", b"a", b"b", b"c", b"a", b"b"], dtype="S16")
    assert find_exact(digests).tolist() == [0, 1, 0, 3, 1, 0]


@pytest.mark.parametrize("words, pairs", [(20, 250), (100, 250), (5000, 100)])
def test_signatures_estimate_the_similarity_of_documents(words, pairs):
    generator = np.random.default_rng(words)
    for target in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9):
        documents = [near_pair(generator, words, target) for _ in range(pairs)]
        first, second, (exact, *_) = zip(*documents)
        assert exact == jaccard(first[0], second[0]) and abs(exact - target) < 0.07
        estimates = similarity(signatures_of(first), signatures_of(second))
        assert abs(estimates.mean() - exact) < 4 * estimates.std() / math.sqrt(pairs)
        deviation = math.sqrt(exact * (1 - exact) / 256)
        assert 0.75 < estimates.std() / deviation < 1.35  # bins share hashes, or exclude each other


def test_equal_sets_of_5_grams_have_equal_signatures():
    document = random_document(np.random.default_rng(0), 1000)
    twice, thrice = (minhash_signature(np.tile(document, count)) for count in (2, 3))
    assert (twice == thrice).all() and similarity(twice, thrice) == 1
    assert similarity(twice, minhash_signature(document)) > 0.9


@pytest.mark.parametrize("threshold", [0.8, 0.9])
def test_near_duplicates_are_found_and_nothing_else_is(threshold):
    generator = np.random.default_rng(0)
    for target in (threshold + 0.05, threshold + 0.08, threshold - 0.2, threshold - 0.45):
        rounding = math.floor if target > threshold else math.ceil
        sizes = [30, 100, 300, 1000, 3000] * 50
        pairs = [near_pair(generator, words, target, rounding)[:2] for words in sizes]
        first, second = map(signatures_of, zip(*pairs))
        originals = find_near(np.concatenate([first, second]), threshold)
        assert (originals[: len(pairs)] == np.arange(len(pairs))).all()
        is_found = originals[len(pairs) :] == np.arange(len(pairs))
        assert is_found.mean() >= 0.95 if target > threshold else not is_found.any()
        assert (originals[len(pairs) :][~is_found] == len(pairs) + np.flatnonzero(~is_found)).all()


def test_each_dropped_document_is_similar_to_an_earlier_one_that_is_kept():
    for seed in range(3):
        signatures = random_corpus(seed, 400)
        originals = find_near(signatures, 0.8)
        dropped = np.flatnonzero(originals != np.arange(400))
        kept = originals[dropped]
        assert 100 < len(dropped) < 350 and (kept < dropped).all()
        assert (originals[kept] == kept).all()
        assert (similarity(signatures[dropped], signatures[kept]) >= 0.8).all()


def test_what_is_similar_only_to_a_dropped_document_is_kept():
    words = random_document(np.random.default_rng(0), 1160)
    a, b, c = words[:1000], words[80:1080], words[160:]
    assert jaccard(a, b) == jaccard(b, c) > 0.85 and jaccard(a, c) < 0.73
    assert find_near(signatures_of([a, b, c]), 0.8).tolist() == [0, 0, 2]
    assert find_near(signatures_of([b, a, c]), 0.8).tolist() == [0, 0, 0]


BENCHMARK = "Who was first? Café owner André, of 12 Rue Saint-Jean, said: it can't be, for I saw."
WORDS = BENCHMARK.lower().translate(str.maketrans("?,-:'.", "      ")).split()


SHARED = [
    (" ".join(WORDS[3:16]), True),
    (" ".join(WORDS[3:15]), False),
    (" ".join([*WORDS[3:9], "and", *WORDS[9:16]]), False),
    (f"**{' -- '.join(WORDS[3:16]).upper()}**", True),
    ("“" + " — ".join(WORDS[-13:]) + "”?!", True),
]


@pytest.mark.parametrize("shared, expected", SHARED)
def test_thirteen_shared_words_are_contamination(tmp_path, shared, expected):
    path = dedupe.save_hashes(dedupe.ngrams_of(["Too short.", BENCHMARK]), tmp_path)
    words, _ = hash_words(f"Something else. {shared} Once more.")
    assert dedupe.is_contaminated(words, path) == expected
    assert not dedupe.is_contaminated(words[:2], path)


def test_overlap_is_the_share_of_ngrams_that_occur_in_other_texts(tmp_path):
    generator = random.Random(0)
    vocabulary = [f"word{number}" for number in range(1000)]
    train = [generator.choices(vocabulary, k=30) for _ in range(100)]
    val = [generator.choices(train)[0][: generator.randrange(30)] for _ in range(20)]
    val = [passage + generator.choices(vocabulary, k=20) for passage in [*val, train[0], train[0]]]
    known = set().union(*(ngram_set(np.array(words), 13) for words in train))
    ngrams = [tuple(words[i : i + 13]) for words in val for i in range(len(words) - 12)]
    val_ngrams = dedupe.ngrams_of(map(" ".join, val))
    path = dedupe.save_hashes(val_ngrams, tmp_path)
    assert path == dedupe.save_hashes(val_ngrams[::-1], tmp_path)
    texts = [" ".join(words).upper() for words in train]
    shared = [dedupe.find_shared(part, path) for part in (texts[:50], texts[50:], [])]
    share = sum(ngram in known for ngram in ngrams) / len(ngrams)
    assert dedupe.overlap(val_ngrams, shared) == share and 0.1 < share < 0.9
    assert dedupe.overlap(val_ngrams, []) == 0 == dedupe.overlap(val_ngrams[:0], shared)
