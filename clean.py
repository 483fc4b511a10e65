"""Cleaning: text in one form, its words as hashes, and the published rules for web pages.

Gopher: Rae et al. 2021, appendix A.1.1. C4: Raffel et al. 2020, section 2.2. FineWeb: Penedo et
al. 2024, section 3.6, with the thresholds of datatrove, which made the dataset.
"""

import re
import unicodedata
from collections import Counter
from itertools import islice
from typing import NamedTuple

import numpy as np

from hashing import mix64


class Cleaned(NamedTuple):
    """A document after cleaning."""

    text: str
    reason: str  # why it is dropped: "empty" or "web: RULE"; "" = it is kept
    words: np.ndarray | None  # hashes of its words, uint64 (W,), where the level computes them
    lines: Counter  # lines dropped from a document that is kept, by rule


def clean_text(text: str, level: str, rules_off: frozenset[str] = frozenset()) -> Cleaned:
    """Clean one document. level: none, basic (`normalize`) or web (also the rules not turned off).

    rules_off: keys of RULES and LINE_RULES.
    """
    text, lines = text if level == "none" else normalize(text), Counter()
    if level == "web":
        text, lines = drop_lines(text, rules_off)
    is_empty = not text.strip()
    if is_empty or level != "web":
        return Cleaned(text, "empty" if is_empty else "", None, lines)
    page = Page(text)
    for name, is_bad in RULES.items():
        if name not in rules_off and is_bad(page):
            return Cleaned(text, f"web: {name}", page.hashes, Counter())
    return Cleaned(text, "", page.hashes, lines)


# basic: one form of Unicode and of line ends, no control characters

LINE_ENDS = bytes.maketrans(b"\r\x0b\x0c", b"\n\n\n")  # of old systems, and between pages
CONTROL_CHARACTERS = bytes({*range(32), 127} - {*b"\t\n\r\x0b\x0c"})
RARE_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
RARE_CONTROL_CHARACTERS = re.compile("[\x80-\x9f\ufeff]")
RARE_BYTES = (b"\xc2", b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xef\xbb\xbf")  # of these in UTF-8


def normalize(text: str) -> str:
    """Text composed (NFC), with line feeds as the only line ends and without control characters."""
    data = text.encode().replace(b"\r\n", b"\n").translate(LINE_ENDS, CONTROL_CHARACTERS)
    text = data.decode()
    if any(rare in data for rare in RARE_BYTES):
        text = RARE_CONTROL_CHARACTERS.sub("", RARE_LINE_ENDS.sub("\n", text))
    return unicodedata.normalize("NFC", text)


# words and n-grams as hashes

SPACE = ord(" ")
WORD_BYTES = bytes(b if b >= 128 or chr(b).isalnum() else SPACE for b in range(256))
SYMBOLS = (  # no letters: the first and last as three bytes of UTF-8, and the bytes per character
    (0xC2A000, 0xC2BFFF, 2),  # Latin-1
    (0xC39700, 0xC397FF, 2),  # ×
    (0xC3B700, 0xC3B7FF, 2),  # ÷
    (0xE28000, 0xE2AFFF, 3),  # typography, arrows, mathematics: U+2000 to U+2BFF
    (0xE38080, 0xE380BF, 3),  # Chinese and Japanese punctuation
    (0xEFB880, 0xEFB88F, 3),  # variation selectors, as in ❤️
    (0xEFBC80, 0xEFBC8F, 3),  # full-width punctuation
    (0xEFBC9A, 0xEFBCA0, 3),
    (0xF09F00, 0xF09FFF, 4),  # emoji
)
WHITE_SPACE = (  # beyond ASCII, likewise, of what `normalize` leaves
    *((0xC2A000, 0xC2A0FF, 2), (0xE19A80, 0xE19A80, 3), (0xE28080, 0xE2808A, 3)),
    *((0xE280AF, 0xE280AF, 3), (0xE2819F, 0xE2819F, 3), (0xE38080, 0xE38080, 3)),
)
HASHED_BYTES = 64  # the offset of a byte in its word counts modulo this
BYTE_HASHES = mix64(np.arange(1, 256 * HASHED_BYTES + 1, dtype=np.uint64))  # [256 * offset + byte]
BYTE_HASHES[SPACE::256] = 0  # what separates words adds nothing


def hash_words(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the words of `text` as hashes, uint64 (W,), and their sizes in bytes, int64 (W,).

    A word is a run of letters and digits in lower case, or one Chinese or Japanese character.
    Its hash is the sum of random numbers R[offset in the word, byte], modulo 2^64:

        hash_words("Tea, no tea!") = [t, n, t], [3, 2, 3]
        t = R[0, "t"] + R[1, "e"] + R[2, "a"],  n = R[0, "n"] + R[1, "o"]
    """
    padded = b"   " + text.lower().encode().translate(WORD_BYTES) + b"   "
    data = np.frombuffer(bytearray(padded), dtype=np.uint8)
    blank(data, SYMBOLS)
    starts, ends = find_words(data)
    if not len(starts):
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    sizes, data, starts = ends - starts, data[starts[0] :], starts - starts[0]
    # the offset of each byte in its word, modulo 256: arithmetic on single bytes is the fastest
    word_starts = np.repeat(starts.astype(np.uint8), np.diff(starts, append=len(data)))
    offsets = (np.resize(np.arange(256, dtype=np.uint8), len(data)) - word_starts) % HASHED_BYTES
    return np.add.reduceat(BYTE_HASHES[offsets.astype(np.uint16) << 8 | data], starts), sizes


def find_words(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where words start and end in bytes of UTF-8 with three spaces around, int64 (W,) each."""
    # [3:] is each byte, [2:-1] the one before it, [:-3] the one three before it
    inside = data != SPACE
    alone = (data >= 0xE3) & (data <= 0xE9)  # the first of a Chinese or Japanese character's three
    starts = inside[3:] & (~inside[2:-1] | alone[3:] | alone[:-3])
    ends = inside[2:-1] & (~inside[3:] | starts)
    return np.flatnonzero(starts) + 3, np.flatnonzero(ends) + 3


def blank(data: np.ndarray, characters: tuple):
    """Replace characters in bytes of UTF-8 that end with three spaces by spaces, in place."""
    first_bytes = np.flatnonzero(data >= 0xC2)  # of characters beyond ASCII
    codes = sum(data[first_bytes + i].astype(np.uint32) << (16 - 8 * i) for i in range(3))
    for first, last, size in characters:
        matches = first_bytes[(codes >= first) & (codes <= last)]
        for i in range(size):
            data[matches + i] = SPACE


def hash_ngrams(words: np.ndarray, n: int) -> np.ndarray:
    """Hashes of each n consecutive words, uint64 (max(0, W - n + 1),).

    ngrams[i] = mix64(words[i] * M^(n-1) + words[i + 1] * M^(n-2) + ... + words[i + n - 1])
    """
    count = max(0, len(words) - n + 1)
    ngrams = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        ngrams = ngrams * np.uint64(0x9E3779B97F4A7C15) + words[i : i + count]
    return mix64(ngrams)


class HashSet:
    """A set of hashes that finds its members in an array; faster than np.isin if few are members.

    A table indexed by the upper bits of a hash, 16 or more entries per member, rules out nearly
    all others before the binary search.
    """

    def __init__(self, hashes: np.ndarray):
        self.hashes = np.unique(hashes)
        bits = max(8, (16 * len(self.hashes)).bit_length())
        self.shift = np.uint64(64 - bits)
        self.table = np.zeros(1 << bits, dtype=bool)
        self.table[self.hashes >> self.shift] = True

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """The indices at which `hashes` holds a member."""
        indices = np.flatnonzero(self.table[hashes >> self.shift])
        nearest = np.searchsorted(self.hashes, hashes[indices]).clip(max=len(self.hashes) - 1)
        return indices[self.hashes[nearest] == hashes[indices]]


# web: rules that drop lines. Each returns whether the line is bad

BOILERPLATE = ["javascript", "terms of use", "privacy policy", "cookie policy"]  # in lower case
BOILERPLATE += ["uses cookies", "use of cookies", "use cookies"]
SENTENCE_ENDS = (".", "!", "?", '"', "”")
MIN_LINE_WORDS = 5


def unfinished_lines(line: str) -> bool:
    """C4: fewer than five words, or no punctuation at the end."""
    return not line.rstrip().endswith(SENTENCE_ENDS) or len(line.split()) < MIN_LINE_WORDS


def boilerplate_lines(line: str) -> bool:
    """C4: a mention of JavaScript or of a policy of the site."""
    line = line.lower()
    return any(phrase in line for phrase in BOILERPLATE)


LINE_RULES = {rule.__name__: rule for rule in (unfinished_lines, boilerplate_lines)}


def drop_lines(text: str, rules_off: frozenset[str]) -> tuple[str, Counter]:
    """The text without bad lines, and how many there were, by rule."""
    lines, dropped = text.split("\n"), Counter()
    if not boilerplate_lines(text):  # so are most pages: faster than line by line
        rules_off |= {"boilerplate_lines"}
    for name, is_bad in LINE_RULES.items():
        if name not in rules_off:
            kept = [line for line in lines if not line.strip() or not is_bad(line)]
            dropped += Counter({name: len(lines) - len(kept)})
            lines = kept
    return "\n".join(lines), dropped


# web: rules that drop documents. Each returns whether the page is bad

PARAGRAPH_END = re.compile(r"\n\s*\n")
IS_LETTER = np.array([b >= 128 or chr(b).isalpha() for b in range(256)])  # or part of one


class Page:
    """A document as the rules see it. Its words are what is between white space."""

    def __init__(self, text: str):
        self.text = text
        self.lines = [line for line in map(str.strip, text.split("\n")) if line]
        self.paragraphs = [part for part in map(str.strip, PARAGRAPH_END.split(text)) if part]
        data = np.frombuffer(bytearray(b" " + text.encode() + b"   "), dtype=np.uint8)
        blank(data, WHITE_SPACE)
        is_white, continues = data <= SPACE, data & 0xC0 == 0x80  # continues a character in UTF-8
        starts = np.flatnonzero(is_white[:-1] & ~is_white[1:]) + 1
        self.words, self.word_characters = len(starts), np.count_nonzero(~is_white & ~continues)
        blank(data, SYMBOLS)
        self.words_with_letter = np.count_nonzero(np.maximum.reduceat(IS_LETTER[data], starts))
        self.hashes, self.sizes = hash_words(text)  # of words without punctuation, (W,) each
        self.bytes = max(int(self.sizes.sum()), 1)


# Gopher
MIN_WORDS, MAX_WORDS = 50, 100_000
MIN_WORD_LENGTH, MAX_WORD_LENGTH = 3, 10  # mean characters per word
MAX_SYMBOLS = 0.1  # hash signs per word, and ellipses per word
MAX_BULLET_LINES = 0.9  # share of lines that start with a bullet
MAX_ELLIPSIS_LINES = 0.3  # share of lines that end with an ellipsis
BULLETS = ("•", "‣", "◦", "▪", "●", "- ", "* ")
ELLIPSES = ("...", "…")


def word_count(page: Page) -> bool:
    return not MIN_WORDS <= page.words <= MAX_WORDS


def word_length(page: Page) -> bool:
    return not MIN_WORD_LENGTH <= page.word_characters / max(page.words, 1) <= MAX_WORD_LENGTH


def symbols(page: Page) -> bool:
    ellipses = sum(map(page.text.count, ELLIPSES))
    return max(page.text.count("#"), ellipses) > MAX_SYMBOLS * page.words


def bullet_lines(page: Page) -> bool:
    count = sum(line.startswith(BULLETS) for line in page.lines)
    return count > MAX_BULLET_LINES * len(page.lines)


def ellipsis_lines(page: Page) -> bool:
    count = sum(line.endswith(ELLIPSES) for line in page.lines)
    return count > MAX_ELLIPSIS_LINES * len(page.lines)


MIN_WORDS_WITH_LETTER = 0.8  # Gopher: share of words that hold a letter
MIN_STOP_WORDS = 2  # Gopher: how many of STOP_WORDS occur
STOP_WORDS = hash_words("the be to of and that have with")[0]


def words_without_letters(page: Page) -> bool:
    return page.words_with_letter < MIN_WORDS_WITH_LETTER * page.words


def stop_words(page: Page) -> bool:
    return sum(bool((page.hashes == word).any()) for word in STOP_WORDS) < MIN_STOP_WORDS


# C4: pages without sentences, of code, and drafts
MIN_SENTENCES = 3
SENTENCE_END = re.compile("[.!?][\"”')]*(?=\\s|$)")


def sentences(page: Page) -> bool:
    ends = islice(SENTENCE_END.finditer(page.text), MIN_SENTENCES)
    return len(list(ends)) < MIN_SENTENCES


def curly_brackets(page: Page) -> bool:
    return "{" in page.text


def lorem_ipsum(page: Page) -> bool:
    return "lorem ipsum" in page.text.lower()


# Gopher, table A1
MAX_REPEATED_LINES = 0.3  # share of lines, or of paragraphs, that occurred before
MAX_REPEATED_CHARACTERS = 0.2  # share of their characters
MAX_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}  # share of the commonest n consecutive words
MAX_REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # of all repeated


def repeated_lines(page: Page) -> bool:
    for parts in (page.lines, page.paragraphs):
        counts = Counter(parts)
        repeated_characters = sum(len(part) * (count - 1) for part, count in counts.items())
        if len(parts) - len(counts) > MAX_REPEATED_LINES * len(parts):
            return True
        if repeated_characters > MAX_REPEATED_CHARACTERS * sum(map(len, parts)):
            return True
    return False


def top_ngrams(page: Page) -> bool:
    for n, max_share in MAX_TOP_NGRAM.items():
        count, share = top_ngram(page, n)
        if share > max_share:
            return True
        if count * 4 * page.sizes.max(initial=0) <= MAX_TOP_NGRAM[4] * page.bytes:
            return False  # no longer phrase occurs more often: none can reach its limit
    return False


def top_ngram(page: Page, n: int) -> tuple[int, float]:
    """How often the commonest n consecutive words occur, and their share of the bytes of words."""
    ngrams = hash_ngrams(page.hashes, n)
    if not len(ngrams):
        return 0, 0.0
    values, counts = np.unique(ngrams, return_counts=True)
    start = np.argmax(ngrams == values[np.argmax(counts)])
    return counts.max(), counts.max() * page.sizes[start : start + n].sum() / page.bytes


def repeated_ngrams(page: Page) -> bool:
    for n, max_share in MAX_REPEATED_NGRAMS.items():
        share = repeated_share(page, n)
        if share > max_share:
            return True
        if share <= MAX_REPEATED_NGRAMS[10]:
            return False  # what repeats with more words is part of what repeats with fewer
    return False


def repeated_share(page: Page, n: int) -> float:
    """The share of the bytes of words in n consecutive words that occurred before."""
    ngrams = hash_ngrams(page.hashes, n)
    ordered = np.sort(ngrams)
    indices = HashSet(ordered[1:][ordered[1:] == ordered[:-1]]).find(ngrams)
    _, first = np.unique(ngrams[indices], return_index=True)
    is_repeated = np.zeros(len(page.hashes), dtype=bool)
    is_repeated[np.delete(indices, first)[:, None] + np.arange(n)] = True
    return page.sizes[is_repeated].sum() / page.bytes


# FineWeb
MIN_PUNCTUATED_LINES = 0.12  # share of lines that end with one of LINE_PUNCTUATION
MAX_SHORT_LINES, SHORT_LINE = 0.67, 30  # share of lines of that many characters or fewer
MAX_REPEATED_LINE_CHARACTERS = 0.01  # share of the characters; the paper has 0.1
MAX_LINE_BREAKS = 0.3  # per word or run of punctuation; in datatrove, not in the paper
WORD_OR_MARKS = re.compile(r"\w+|[^\w\s]+")
LINE_PUNCTUATION = (".", "!", "?", "。", "！", "？")


def unpunctuated_lines(page: Page) -> bool:
    count = sum(line.endswith(LINE_PUNCTUATION) for line in page.lines)
    return count < MIN_PUNCTUATED_LINES * len(page.lines)


def short_lines(page: Page) -> bool:
    count = sum(len(line) <= SHORT_LINE for line in page.lines)
    return count > MAX_SHORT_LINES * len(page.lines)


def repeated_line_characters(page: Page) -> bool:
    repeated = sum(len(line) * (count - 1) for line, count in Counter(page.lines).items())
    return repeated > MAX_REPEATED_LINE_CHARACTERS * (len(page.text) - page.text.count("\n"))


def line_breaks(page: Page) -> bool:
    breaks = page.text.count("\n")
    if breaks <= MAX_LINE_BREAKS * page.words:  # most pages; the finer count below is never lower
        return False
    return breaks > MAX_LINE_BREAKS * len(WORD_OR_MARKS.findall(page.text))


SHAPE_RULES = [word_count, word_length, symbols, bullet_lines, ellipsis_lines]
LANGUAGE_RULES = [words_without_letters, stop_words, sentences, curly_brackets, lorem_ipsum]
REPETITION_RULES = [repeated_lines, top_ngrams, repeated_ngrams]
FINEWEB_RULES = [unpunctuated_lines, short_lines, repeated_line_characters, line_breaks]
ALL_RULES = SHAPE_RULES + LANGUAGE_RULES + REPETITION_RULES + FINEWEB_RULES
RULES = {rule.__name__: rule for rule in ALL_RULES}
