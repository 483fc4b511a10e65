"""Cleaning: one form of text, words as hashes, and each rule against its definition."""

import random
import string
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import clean
from clean import LINE_RULES, RULES, HashSet, Page, clean_text, hash_words, normalize

UNFINISHED_OFF = frozenset(["unfinished_lines"])


def random_words(generator: random.Random, count: int, length: int = 5) -> list[str]:
    alphabet = string.ascii_lowercase
    return ["".join(generator.choices(alphabet, k=length)) for _ in range(count)]


def ngrams_of(words: list, n: int) -> list[tuple]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def test_normalizing_leaves_one_form_of_text():
    generator, letters = random.Random(0), "\u0301\u0327\u0345eécçA\u030aK\u1100\u1161\u11a8\u0958"
    for _ in range(2000):
        text = normalize("".join(generator.choices(f"{letters}\r\n\t\0\x0b\x7f\x85\ufeff ", k=20)))
        assert normalize(text) == text and unicodedata.is_normalized("NFC", text)
        plain = "".join(generator.choices(letters, k=20))
        assert normalize(plain) == unicodedata.normalize("NFC", plain)
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


ALPHABETS = [
    string.printable,
    "01 ",
    "абвг éßøÑçÅαβΓ한글ابת 12,._'-",
    "日本語中国カナあいabc 12.",
    "ab“”‘’–—…«»·•©×÷\u00a0\u2009\u3000、。，！ →€™■🙂🚀❤️ ",
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


def test_a_set_of_hashes_finds_what_numpy_finds():
    generator = np.random.default_rng(0)
    for trial in range(300):
        limit = (30, 2**64 - 1, 2**63)[trial % 3]
        pool = generator.integers(limit, size=50, dtype=np.uint64)
        pool = np.append(pool, np.array([0, 2**64 - 1], dtype=np.uint64))
        members, hashes = (generator.choice(pool, generator.choice((0, 1, 20, 300))) for _ in "ab")
        expected = np.flatnonzero(np.isin(hashes, members))
        assert HashSet(members).find(hashes).tolist() == expected.tolist()


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


def bullets(count: int) -> str:
    """A hundred lines, `count` of them with bullets."""
    lines = lines_of(prose(1000))
    bulleted = [f" {'•‣◦▪●-*'[i % 7]} {line}" for i, line in enumerate(lines[:count])]
    return "\n".join(bulleted + lines[count:])


def one_long_line_twice(letters: int) -> str:
    return "\n".join([*lines_of(prose(100)), "x" * letters, "x" * letters])


LINES, A_THIRD = lines_of(prose(1000)), sum(map(len, lines_of(prose(100)))) // 3
LONG, TOO_LONG = (" ".join(prose(100, 10, excess)).replace("a", "é") for excess in (0, 1))
NUMBERS = list(map(str, range(1000, 1021)))
SIGNS = [*"•–→×➤½©…☃🙂③°£§¿—÷■", "❤️", "€500", "“12”"]
NO_SENTENCES = " ".join([*marked(prose(), "!", 2), "is", "3.5", "e.g:"])
OK_31, OK_32 = ("\n".join(mixed(lines_of(prose(n)), "ok", m)) for n, m in ((690, 31), (680, 32)))
SHORT, LONGER = ([start + line[-30:] for line in LINES] for start in ("", "x"))
UNENDED = [line[:-1] for line in LINES]
CASES = [  # the rule, a page just within its threshold, a page just beyond
    ("word_count", page(prose(50)), page(prose(49))),
    ("word_count", page(prose(100) * 1000), page([*prose(100) * 1000, "more"])),
    ("word_length", " ".join(prose(100, 3)), " ".join(prose(100, 3, excess=-1))),
    ("word_length", LONG, TOO_LONG),
    ("symbols", page(marked(prose(), "#…", 10)), page(marked(prose(), "#", 11))),
    ("bullet_lines", bullets(90), bullets(91)),
    ("ellipsis_lines", "\n".join(marked(LINES, "..", 30)), "\n".join(marked(LINES, "… ", 31))),
    ("words_without_letters", page([*prose(80), *NUMBERS[1:]]), page([*prose(79), *NUMBERS])),
    ("words_without_letters", page([*prose(80), *SIGNS[1:]]), page([*prose(79), *SIGNS])),
    ("stop_words", page(prose()), page(prose()).replace("and", "the")),
    ("sentences", " ".join(marked(prose(), '?"', 3)), NO_SENTENCES),
    ("curly_brackets", page(prose()), page([*prose(), "{"])),
    ("lorem_ipsum", page([*prose(), "lorem", "and", "ipsum"]), page([*prose(), "Lorem", "Ipsum"])),
    ("repeated_lines", OK_31, OK_32),
    ("repeated_lines", one_long_line_twice(A_THIRD), one_long_line_twice(A_THIRD + 1)),
    ("top_ngrams", with_phrase(300, 2, 30), with_phrase(300, 2, 31)),
    ("top_ngrams", with_phrase(300, 4, 12), with_phrase(300, 4, 13)),
    ("repeated_ngrams", with_phrase(1000, 5, 31), with_phrase(1000, 5, 32)),
    ("repeated_ngrams", with_phrase(2001, 10, 21), with_phrase(2000, 10, 22)),
    ("unpunctuated_lines", *("\n".join(marked(UNENDED, "? ", n)) for n in (12, 11))),
    ("short_lines", *("\n".join(LINES[:1] + LONGER[1:n] + SHORT[n:]) for n in (33, 32))),
    ("repeated_line_characters", one_long_line_twice(6), one_long_line_twice(7)),
    ("line_breaks", page(prose()) + "\n" * 24, page(prose()) + "\n" * 25),  # 110 words and marks
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
        vocabulary = random_words(generator, generator.choice((3, 10, 40)), 3)
        words = [word * generator.choice((1, 1, 3)) for word in vocabulary]
        words = generator.choices(words, k=generator.randrange(60))
        for _ in range(generator.randrange(3)):
            start, end = generator.randrange(len(words) + 1), generator.randrange(len(words) + 1)
            words[end:end] = words[start : start + generator.randrange(15)]
        yield words


def test_repetition_is_measured_as_gopher_defines_it():
    decisions = Counter()
    for words in random_sequences(1000):
        this_page = Page(" ".join(words))
        repeated = {n: repeated_share(words, n) for n in range(5, 11)}
        assert all(clean.repeated_share(this_page, n) == repeated[n] for n in repeated)
        top = {n: clean.top_ngram(this_page, n)[1] for n in (2, 3, 4)}
        assert all(top[n] in top_shares(words, n) for n in top)
        for rule, shares, limits in (
            (clean.repeated_ngrams, repeated, clean.MAX_REPEATED_NGRAMS),
            (clean.top_ngrams, top, clean.MAX_TOP_NGRAM),
        ):
            is_bad = any(shares[n] > limits[n] for n in shares)
            assert rule(this_page) == is_bad
            decisions[rule, is_bad] += 1
    assert len(decisions) == 4 and min(decisions.values()) > 100


def test_finewebs_rules_agree_with_datatroves_on_real_documents():
    """Its filter stops at the first rule that drops; spaCy's words differ a little from ours."""
    filters = pytest.importorskip("datatrove.pipeline.filters")
    pytest.importorskip("spacy")
    theirs, decisions = filters.FineWebQualityFilter(), Counter()
    names = ["line_punct_ratio", "short_line_ratio", "char_dup_ratio", "list_ratio"]
    for path in [*Path(string.__file__).parent.glob("*.py"), *ROOT.glob("**/*.md")]:
        lines = normalize(path.read_text(encoding="utf-8", errors="ignore")).split("\n")
        text = "\n".join(map(str.strip, lines))  # white space around lines does not count for us
        result = theirs.filter(SimpleNamespace(text=text or "x"))
        expected = names.index(result[1]) if result is not True else None
        page = Page(text or "x")
        found = [number for number, rule in enumerate(clean.FINEWEB_RULES) if rule(page)]
        decisions[expected, found[0] if found else None] += 1
    differing = sum(count for (one, other), count in decisions.items() if one != other)
    assert {pair for pair in decisions if pair[0] != pair[1]} <= {(None, 3), (3, None)}
    assert len(decisions) > 3 and differing < 0.03 * decisions.total(), decisions


@pytest.mark.parametrize("phrase", clean.BOILERPLATE)
def test_lines_of_boilerplate_are_dropped_from_a_page_that_is_kept(phrase):
    text = page(prose())
    with_mentions = f"Please see our {phrase.upper()} for more.\n{text}\n\n{phrase}"
    cleaned = clean_text(with_mentions, "web", UNFINISHED_OFF)
    assert cleaned[:2] == (f"{text}\n", "") and cleaned.lines == {"boilerplate_lines": 2}
    assert clean_text(with_mentions, "web", frozenset(LINE_RULES))[:2] == (with_mentions, "")


def test_unfinished_lines_are_dropped_unless_turned_off():
    lines = lines_of(prose())
    finished = ["Are these not five words?", "Five loud words are these! ", '"A b c d e"']
    unfinished = ["Home", "Only four words here.", "No end to these words", "It ends in a comma,"]
    text = "\n".join([*finished, *unfinished, "", *lines])
    cleaned = clean_text(text, "web")
    assert cleaned[:2] == ("\n".join([*finished, "", *lines]), "")
    assert cleaned.lines == {"unfinished_lines": 4}
    assert clean_text(text, "web", UNFINISHED_OFF).text == text
    cleaned = clean_text(f"{page(prose(49))}\nour cookie policy", "web")  # a page that is dropped
    assert cleaned.reason == "web: word_count" and not cleaned.lines
