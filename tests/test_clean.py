"""Cleaning: one form of text, words as hashes, and each rule against its definition."""

import random
import string
import unicodedata
from collections import Counter

import numpy as np
import pytest

import clean
from clean import LINE_RULES, RULES, HashSet, Page, clean_text, hash_ngrams, hash_words, normalize

UNFINISHED_OFF = frozenset(["unfinished_lines"])


def random_words(generator: random.Random, count: int, length: int = 5) -> list[str]:
    alphabet = string.ascii_lowercase
    return ["".join(generator.choices(alphabet, k=length)) for _ in range(count)]


def ngrams_of(words: list, n: int) -> list[tuple]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


# ---- basic


def random_text(generator: random.Random) -> str:
    """Characters that composition and line ends are about, and any others of Unicode."""
    tricky = "\r\n\t\0\x0b\x7f\x85\ufeff \u0301\u0327\u0345eécçA\u030aK가\u1100\u1161\u11a8\u0958"
    others = (chr(generator.randrange(0xD800)), chr(generator.randrange(0xE000, 0x110000)))
    return "".join(generator.choices([*tricky, *others], k=20))


def test_normalizing_composes_and_is_idempotent():
    generator = random.Random(0)
    for _ in range(2000):
        text = normalize(random_text(generator))
        assert normalize(text) == text and unicodedata.is_normalized("NFC", text)
        plain = "".join(c for c in random_text(generator) if unicodedata.category(c)[0] not in "CZ")
        assert normalize(plain) == unicodedata.normalize("NFC", plain)


def test_normalizing_leaves_one_kind_of_line_end_and_no_control_characters():
    assert normalize("a\r\nb\rc\n\r\nd\te") == "a\nb\nc\n\nd\te"
    assert normalize("a page\x0cb\x0bc\x85d\u2028e\u2029") == "a page\nb\nc\nd\ne\n"
    codes = set(range(32)) | set(range(127, 160))
    controls = "".join(map(chr, codes - set(b"\t\n\r\x0b\x0c\x85")))
    assert normalize(f"a{controls}\ufeffb") == "ab"


def test_levels_do_what_they_say():
    text = "cafe\u0301\r\n"
    assert clean_text(text, "none") == (text, "", None, Counter())
    assert clean_text(text, "basic") == ("café\n", "", None, Counter())
    assert clean_text(text, "web", frozenset(LINE_RULES)).reason == "web: word_count"
    for level in ("none", "basic", "web"):
        for empty in ("", " \n\t \r\n\u00a0"):
            assert clean_text(empty, level).reason == "empty"


# ---- words and n-grams


def plain_words(text: str) -> list[str]:
    """Runs of letters and digits in lower case; Chinese and Japanese characters one by one."""
    words, is_open = [], False
    for character in text.lower():
        is_alone = "\u3040" <= character <= "\u9fff"
        if character.isalnum() and is_open and not is_alone:
            words[-1] += character
        elif character.isalnum():
            words.append(character)
        is_open = character.isalnum() and not is_alone
    return words


def test_words_are_hashed_as_the_worked_example_says():
    hashes, sizes = hash_words("Tea, no tea!")
    table = clean.BYTE_HASHES.reshape(-1, 256)
    tea = table[[0, 1, 2], list(b"tea")].sum()
    assert hashes.tolist() == [tea, table[[0, 1], list(b"no")].sum(), tea]
    assert sizes.tolist() == [3, 2, 3]


ALPHABETS = [
    string.printable,
    "01 ",
    "абвг ",
    "éßøÑçÅαβΓ한글ابת 12,._'-",
    "日本語中国カナあいabc 12.",
    "ab“”‘’–—…«»·•©\u00a0\u2009\u3000、。，！ ",
    "ab→€™■🙂🚀 ",
]


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_equal_words_have_equal_hashes_and_others_do_not(alphabet):
    generator = random.Random(0)
    weights = [4 if character in " .、" else 1 for character in alphabet]
    for length in (0, 1, 2, 10, 10_000):
        text = "".join(generator.choices(alphabet, weights, k=length))
        words, (hashes, sizes) = plain_words(text), hash_words(text)
        assert sizes.tolist() == [len(word.encode()) for word in words]
        pairs = set(zip(words, hashes.tolist()))
        assert len(set(words)) == len(set(hashes.tolist())) == len(pairs)


def test_equal_ngrams_have_equal_hashes_and_others_do_not():
    generator = np.random.default_rng(0)
    vocabulary = generator.integers(2**64, size=3, dtype=np.uint64)
    for count in (0, 1, 4, 5, 12, 13, 2000):
        words = vocabulary[generator.integers(3, size=count)]
        for n in (1, 2, 5, 13):
            ngrams, hashes = ngrams_of(words.tolist(), n), hash_ngrams(words, n).tolist()
            assert len(hashes) == max(0, count - n + 1)
            assert len(set(hashes)) == len(set(ngrams)) == len(set(zip(ngrams, hashes)))


def test_a_set_of_hashes_finds_what_numpy_finds():
    generator = np.random.default_rng(0)
    for trial in range(300):
        limit = (30, 2**64 - 1, 2**63)[trial % 3]
        pool = generator.integers(limit, size=50, dtype=np.uint64)
        pool = np.append(pool, np.array([0, 2**64 - 1], dtype=np.uint64))
        members, hashes = (generator.choice(pool, generator.choice((0, 1, 20, 300))) for _ in "ab")
        expected = np.flatnonzero(np.isin(hashes, members))
        assert HashSet(members).find(hashes).tolist() == expected.tolist()


# ---- rules that drop documents


def prose(words: int = 100, length: int = 5, excess: int = 0) -> list[str]:
    """Random words of `words` * `length` + `excess` letters in all, two stop words among them."""
    chosen = random_words(random.Random(words), words, length)
    chosen[1:3] = "the", "and"
    chosen[0] += "x" * (words * length - sum(map(len, chosen)))
    return [chosen[0][: len(chosen[0]) + excess] + "x" * excess, *chosen[1:]]


def lines_of(words: list[str]) -> list[str]:
    return [" ".join(words[i : i + 10]) + "." for i in range(0, len(words), 10)]


def page(words: list[str]) -> str:
    """A page that no rule drops for another reason: ten words per line, each line a sentence."""
    return "\n".join(lines_of(words))


def marked(parts: list[str], mark: str, count: int) -> list[str]:
    """`mark` at the end of the first `count` parts."""
    return [part + mark for part in parts[:count]] + parts[count:]


def mixed(parts: list[str], other: str, times: int) -> list[str]:
    """`other` after each of the first `times` parts."""
    return [part for pair in zip(parts, [other] * times) for part in pair] + parts[times:]


def with_phrase(words: int, length: int, times: int) -> str:
    """A page of words of five letters with a phrase of `length` words `times` times."""
    phrase = " ".join(random_words(random.Random(0), length))
    return page(" ".join(mixed(prose(words - length * times), phrase, times)).split())


def replaced(old: str, new: str) -> str:
    return page([new if word == old else word for word in prose()])


def bullets(count: int) -> str:
    """A hundred lines, `count` of them with bullets."""
    lines = lines_of(prose(1000))
    bulleted = [f" {'•‣◦▪●-*'[i % 7]} {line}" for i, line in enumerate(lines[:count])]
    return "\n".join(bulleted + lines[count:])


def paragraphs(count: int, repeated: int) -> str:
    """Paragraphs of two lines, and one that is repeated: too few of the lines are."""
    lines = lines_of(prose(10 * count))
    parts = [f"{line}\nline {number}" for number, line in enumerate(lines)]
    return "\n\n".join(mixed(parts, "ok", repeated))


def one_long_line_twice(letters: int) -> str:
    return "\n".join([*lines_of(prose(100)), "x" * letters, "x" * letters])


LINES, A_THIRD = lines_of(prose(1000)), sum(map(len, lines_of(prose(100)))) // 3
LONG, TOO_LONG = (" ".join(prose(100, 10, excess)).replace("a", "é") for excess in (0, 1))
NUMBERS = list(map(str, range(1000, 1021)))
NO_SENTENCES = " ".join([*marked(prose(), "!", 2), "is", "3.5", "e.g:"])
OK_31, OK_32 = ("\n".join(mixed(lines_of(prose(n)), "ok", m)) for n, m in ((690, 31), (680, 32)))
CASES = [  # the rule, a page just within its threshold, a page just beyond
    ("word_count", page(prose(50)), page(prose(49))),
    ("word_count", page(prose(100) * 1000), page([*prose(100) * 1000, "more"])),
    ("word_length", " ".join(prose(100, 3)), " ".join(prose(100, 3, excess=-1))),
    ("word_length", LONG, TOO_LONG),
    ("symbols", page(marked(prose(), "#…", 10)), page(marked(prose(), "#", 11))),
    ("symbols", page(marked(prose(), "...", 10)), page(marked(prose(), "…", 11))),
    ("bullet_lines", bullets(90), bullets(91)),
    ("ellipsis_lines", "\n".join(marked(LINES, "..", 30)), "\n".join(marked(LINES, "… ", 31))),
    ("words_without_letters", page([*prose(80), *NUMBERS[1:]]), page([*prose(79), *NUMBERS])),
    ("stop_words", page(prose()), replaced("and", "or")),
    ("stop_words", page(prose()), replaced("and", "the")),
    ("sentences", " ".join(marked(prose(), '?"', 3)), NO_SENTENCES),
    ("curly_brackets", page(prose()), page([*prose(), "{"])),
    ("lorem_ipsum", page([*prose(), "lorem", "and", "ipsum"]), page([*prose(), "Lorem", "Ipsum"])),
    ("repeated_lines", OK_31, OK_32),
    ("repeated_lines", paragraphs(69, 31), paragraphs(68, 32)),
    ("repeated_lines", one_long_line_twice(A_THIRD), one_long_line_twice(A_THIRD + 1)),
    ("top_ngrams", with_phrase(300, 2, 30), with_phrase(300, 2, 31)),
    ("top_ngrams", with_phrase(300, 3, 18), with_phrase(300, 3, 19)),
    ("top_ngrams", with_phrase(300, 4, 12), with_phrase(300, 4, 13)),
    ("repeated_ngrams", with_phrase(1000, 5, 31), with_phrase(1000, 5, 32)),
    ("repeated_ngrams", with_phrase(2001, 10, 21), with_phrase(2000, 10, 22)),
]


@pytest.mark.parametrize("name, passing, failing", CASES)
def test_each_rule_drops_what_is_just_beyond_its_threshold(name, passing, failing):
    assert not RULES[name](Page(passing)) and RULES[name](Page(failing))
    assert clean_text(failing, "web", UNFINISHED_OFF)[:2] == (failing, f"web: {name}")
    assert clean_text(failing, "web", UNFINISHED_OFF | {name}).reason != f"web: {name}"


def test_every_rule_has_such_a_case_and_a_good_page_passes_all():
    assert {name for name, *_ in CASES} == set(RULES)
    cleaned = clean_text(page(prose()), "web")
    assert cleaned[:2] == (page(prose()), "") and not cleaned.lines
    assert (cleaned.words == hash_words(page(prose()))[0]).all()


@pytest.mark.parametrize("white", [" ", "\n", "\t", " \n ", "\u00a0", "\u2003", "\u3000"])
def test_the_words_of_a_page_are_separated_by_any_white_space(white):
    a, b = Page(" ".join([*prose(), "12", "…", "é"])), Page(white.join([*prose(), "12", "…", "é"]))
    assert (b.words, b.word_characters) == (103, a.word_characters) == (103, 504)
    assert b.words_with_letter == a.words_with_letter == 102  # all beyond ASCII counts as letters


def repeated_share(words: list[str], n: int) -> float:
    """The definition: no byte counts twice."""
    seen, repeated = set(), set()
    for i, ngram in enumerate(ngrams_of(words, n)):
        repeated.update(range(i, i + n) if ngram in seen else ())
        seen.add(ngram)
    size = sum(len(words[i].encode()) for i in repeated)
    return size / max(len("".join(words).encode()), 1)


def top_shares(words: list[str], n: int) -> list[float]:
    """The share of each of the commonest n-grams."""
    counts = Counter(ngrams_of(words, n))
    size, top = len("".join(words).encode()), max(counts.values(), default=0)
    ngrams = [ngram for ngram, count in counts.items() if count == top]
    return [top * len("".join(ngram).encode()) / size for ngram in ngrams] or [0.0]


def random_sequences(count: int):
    """Sequences of few different words, passages of them repeated."""
    generator = random.Random(0)
    for _ in range(count):
        sizes = generator.choices(range(1, 9), k=generator.choice((3, 10, 40)))
        vocabulary = ["".join(generator.choices("abcdé", k=size)) for size in sizes]
        words = generator.choices(vocabulary, k=generator.randrange(60))
        for _ in range(generator.randrange(3)):
            start, end = generator.randrange(len(words) + 1), generator.randrange(len(words) + 1)
            words[end:end] = words[start : start + generator.randrange(15)]
        yield words


def test_repetition_is_measured_as_gopher_defines_it():
    repeated_decisions, top_decisions = Counter(), Counter()
    for words in random_sequences(1000):
        this_page = Page(" ".join(words))
        shares = {n: repeated_share(words, n) for n in range(5, 11)}
        assert all(clean.repeated_share(this_page, n) == shares[n] for n in shares)
        is_bad = any(shares[n] > clean.MAX_REPEATED_NGRAMS[n] for n in shares)
        assert clean.repeated_ngrams(this_page) == is_bad
        repeated_decisions[is_bad] += 1
        shares = {n: clean.top_ngram(this_page, n)[1] for n in (2, 3, 4)}
        assert all(shares[n] in top_shares(words, n) for n in shares)
        is_bad = any(shares[n] > clean.MAX_TOP_NGRAM[n] for n in shares)
        assert clean.top_ngrams(this_page) == is_bad
        top_decisions[is_bad] += 1
    assert min(repeated_decisions.values()) > 100 and min(top_decisions.values()) > 100


# ---- rules that drop lines


@pytest.mark.parametrize("phrase", clean.BOILERPLATE)
def test_lines_of_boilerplate_are_dropped_from_a_page_that_is_kept(phrase):
    lines, words = lines_of(prose()), phrase.split()
    mentions = [f"Please see our {phrase.upper()} for more.", phrase]
    text = "\n".join([lines[0], *mentions, *words, "", *lines[1:]])
    cleaned = clean_text(text, "web", UNFINISHED_OFF)
    kept = words if len(words) > 1 else []
    assert cleaned[:2] == ("\n".join([lines[0], *kept, "", *lines[1:]]), "")
    assert cleaned.lines == {"boilerplate_lines": 2 if kept else 3}
    assert clean_text(text, "web", frozenset(LINE_RULES))[:2] == (text, "")


def test_unfinished_lines_are_dropped_unless_turned_off():
    lines = lines_of(prose())
    finished = ["Are these not five words?", "Five loud words are these! ", '"A b c d e"']
    unfinished = ["Home", "Only four words here.", "No end to these words", "It ends in a comma,"]
    text = "\n".join([*finished, *unfinished, "", *lines])
    cleaned = clean_text(text, "web")
    assert cleaned[:2] == ("\n".join([*finished, "", *lines]), "")
    assert cleaned.lines == {"unfinished_lines": 4}
    assert clean_text(text, "web", UNFINISHED_OFF).text == text


def test_lines_of_pages_that_are_dropped_are_not_counted():
    cleaned = clean_text(f"{page(prose(49))}\nour cookie policy", "web")
    assert cleaned.reason == "web: word_count" and not cleaned.lines
