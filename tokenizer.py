"""The tokenizer: byte-pair encoding, learned from text.

A tokenizer is a table of byte strings with their ids, and a pattern that splits text into pieces
which no merge crosses. Of the pairs that can merge, the one that makes the token with the lowest id
merges first. Each document is prefixed with END_OF_TEXT. Text that contains these characters, or
those of another special token, becomes that token only if the tokenizer is told to keep them.
"""

import base64
import hashlib
import heapq
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import regex  # comes with tiktoken
import tiktoken

from config import Failure, Progress

END_OF_TEXT = "<|endoftext|>"
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "gpt4": (  # (?!\s|\S) is the end of the text in any regex engine
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
        r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\s|\S)|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
    "qwen": (  # after NFC; each digit is a piece
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"""
        r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
}
BYTES = [bytes([byte]) for byte in range(256)]
STRETCH = 100_000  # characters; tiktoken's regex engine fails on a million of white space
MAX_PIECE = 1000  # characters; longer pieces are counted in stretches, as they are slow to merge


@dataclass(eq=False)
class Tokenizer:
    """A byte-level BPE tokenizer. Raises Failure if a byte is missing or an id occurs twice."""

    name: str  # what the user called it, for messages
    pattern: str  # a key of PATTERNS
    ids: dict[bytes, int]  # in the order of ids, which may have gaps
    end_of_text: int
    added_tokens: dict[str, int] = field(default_factory=dict)  # special ones besides END_OF_TEXT
    special_tokens: str = "text"  # where text contains one: "text" = characters, "keep" = its id

    def __post_init__(self):
        if self.pattern not in PATTERNS:
            raise Failure(f"{self.name}: pattern {self.pattern!r} is none of {', '.join(PATTERNS)}")
        if not isinstance(self.added_tokens, dict):  # in a damaged manifest
            raise Failure(f"{self.name}: added_tokens is not an object")
        self.ids = dict(sorted(self.ids.items(), key=lambda entry: entry[1]))
        self.special_ids = dict(self.added_tokens)  # with end-of-text, which can be one of these
        if self.end_of_text not in self.special_ids.values():
            self.special_ids[END_OF_TEXT] = self.end_of_text
        numbers = [*self.ids.values(), *self.special_ids.values()]
        if not set(BYTES) <= self.ids.keys():
            raise Failure(f"{self.name}: a tokenizer holds each of the 256 bytes")
        if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
            raise Failure(f"{self.name}: ids must be whole numbers from 0 to 2147483647")
        number, count = Counter(numbers).most_common(1)[0]
        if count > 1:
            raise Failure(f"{self.name}: {count} tokens have the id {number}")
        self.vocab_size = max(numbers) + 1
        self.bytes_of = {n: name.encode(errors="replace") for name, n in self.special_ids.items()}
        self.bytes_of |= {n: token for token, n in self.ids.items()} | {self.end_of_text: b""}
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self.special_regex = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        options = dict(mergeable_ranks=self.ids, special_tokens={END_OF_TEXT: self.end_of_text})
        self.encoding = tiktoken.Encoding(self.name, pat_str=PATTERNS[self.pattern], **options)

    @classmethod
    def from_tokens(cls, tokens: list[bytes], name: str, pattern: str) -> "Tokenizer":
        """A tokenizer whose ids are the order of `tokens`, end-of-text last."""
        return cls(name, pattern, {token: i for i, token in enumerate(tokens)}, len(tokens))

    @classmethod
    def from_text(cls, text: str, name: str, pattern: str) -> "Tokenizer":
        """The tokenizer in the text of a .tiktoken file. Raises Failure."""
        try:
            numbers = {token: int(number) for token, number in map(str.split, text.splitlines())}
            if END_OF_TEXT not in numbers and {*numbers.values()} != {*range(len(numbers))}:
                raise ValueError(f"ids are missing, and {END_OF_TEXT} has no line")
            end_of_text = numbers.pop(END_OF_TEXT, len(numbers))
            ids = {base64.b64decode(token, validate=True): n for token, n in numbers.items()}
        except ValueError as error:
            raise Failure(f"{name}: not a .tiktoken file: {error}") from None
        return cls(name, pattern, ids, end_of_text)

    @classmethod
    def from_record(cls, record: dict, text: str) -> "Tokenizer":
        """The tokenizer that `record` describes and whose `to_text` is `text`."""
        fields = {key: record[key] for key in ("added_tokens", "special_tokens") if key in record}
        return replace(cls.from_text(text, record["name"], pattern_of(record)), **fields)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text`, uint32."""
        if self.special_tokens == "text":
            return self.encode_text(text)
        parts = self.special_regex.split(text)  # text and special tokens by turns
        tokens = [self.encode_text(part) for part in parts]
        tokens[1::2] = [np.array([self.special_ids[part]], np.uint32) for part in parts[1::2]]
        return np.concatenate(tokens)

    def encode_text(self, text: str) -> np.ndarray:
        """The tokens of `text`, uint32; no characters in it become a special token."""
        text = normalize(text, self.pattern)
        stretches = (text[start : start + STRETCH] for start in range(0, len(text), STRETCH))
        if not any(map(str.isspace, stretches)):  # a million of white space would hold a whole one
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        pieces = regex.findall(PATTERNS[self.pattern], text)  # slower, but never fails
        encode = self.encoding._encode_single_piece
        return np.array([n for piece in pieces for n in encode(piece.encode())], np.uint32)

    def encode_document(self, text: str) -> np.ndarray:
        """The tokens of a document, uint32: end-of-text, then those of its text."""
        return np.concatenate([np.array([self.end_of_text], np.uint32), self.encode(text)])

    def decode(self, tokens: Iterable[int]) -> bytes:
        return b"".join(map(self.token_bytes, tokens))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; b"" for end-of-text and for an id that is not used."""
        return self.bytes_of.get(token, b"")

    def to_text(self) -> str:
        """The text of a .tiktoken file: a line for each token, its bytes in base64, its id."""
        lines = [f"{base64.b64encode(token).decode()} {n}\n" for token, n in self.ids.items()]
        # End-of-text has a line only if its id is not the one after the last
        if not self.end_of_text == len(self.ids) == max(self.ids.values()) + 1:
            lines.append(f"{END_OF_TEXT} {self.end_of_text}\n")
        return "".join(lines)

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether both have the same tokens, added ones, too, the same pattern and end-of-text."""
        mine = self.to_text(), self.pattern, self.added_tokens
        return mine == (other.to_text(), other.pattern, other.added_tokens)

    def record(self) -> dict:
        """What a manifest says about this tokenizer."""
        record = {"name": self.name, "pattern": self.pattern, "vocab_size": self.vocab_size}
        record |= {"added_tokens": self.added_tokens, "special_tokens": self.special_tokens}
        return record | {"sha256": hashlib.sha256(self.to_text().encode()).hexdigest()}


def pattern_of(record: dict) -> str:
    """The pattern of a tokenizer's record, as in a manifest."""
    # Records of 0.1 lack it: their name ends in the pattern (bpe:8192:gpt4), or it is gpt2
    ending = str(record.get("name")).rpartition(":")[2]
    return str(record.get("pattern") or (ending if ending in PATTERNS else "gpt2"))


def count_pieces(texts: Iterable[str], pattern: str) -> Counter:
    """Count the pieces, in UTF-8, into which the pattern splits texts, cut to MAX_PIECE."""
    split, counts, stretches = regex.compile(PATTERNS[pattern]), Counter(), Counter()
    for text in texts:
        counts.update(split.findall(normalize(text, pattern)))
    for piece, n in counts.items():
        for start in range(0, len(piece), MAX_PIECE):
            stretches[piece[start : start + MAX_PIECE].encode()] += n
    return stretches


def train_bpe(counts: Counter, vocab_size: int) -> list[bytes]:
    """Learn a byte-pair encoding (Sennrich et al. 2016) on bytes, as GPT-2 does.

    counts: how often each piece occurs. Returns the 256 bytes, then a token for each merge of the
    most frequent pair of neighbours; of equally frequent ones the pair with the lower ids. There
    are vocab_size - 1 (end-of-text follows), or fewer if no pair is left to merge.

    Example: low 5 times, lower 2, newest 6, widest 3. The pairs "e s" and "s t" both occur 9 times,
    and e has the lower id: the first merge is "es". Then "es t" occurs most often: "est" is next.
    """
    tokens, weights = list(BYTES), list(counts.values())
    pieces = [list(piece) for piece in counts]  # of token ids
    pair_counts, pieces_with, heap = count_pairs(pieces, weights)
    with Progress("merges", vocab_size - 257) as progress:
        while len(tokens) < vocab_size - 1 and (pair := most_frequent(heap, pair_counts)):
            new_pairs = set()
            for index in pieces_with.pop(pair):
                lost, gained = merge_pair(pieces[index], pair, len(tokens))
                for old in lost:
                    pair_counts[old] -= weights[index]
                for new in gained:
                    pair_counts[new] += weights[index]
                    pieces_with[new].add(index)
                new_pairs.update(gained)
            tokens.append(tokens[pair[0]] + tokens[pair[1]])
            for new in new_pairs:
                heapq.heappush(heap, (-pair_counts[new], new))
            progress.update(len(tokens) - 256)
    return tokens


def count_pairs(pieces: list[list[int]], weights: list[int]) -> tuple[Counter, dict, list]:
    """The count of each pair, the indices of the pieces with it, and a heap of (-count, pair)."""
    pair_counts, pieces_with = Counter(), defaultdict(set)
    for index, piece in enumerate(pieces):
        for pair in pairwise(piece):
            pair_counts[pair] += weights[index]
            pieces_with[pair].add(index)
    return pair_counts, pieces_with, sorted((-n, pair) for pair, n in pair_counts.items())


def most_frequent(heap: list, pair_counts: Counter) -> tuple[int, int] | None:
    """Pop the most frequent pair. Counts in the heap can be too high: merges have used some up."""
    while heap:
        count, pair = heapq.heappop(heap)
        if -count == pair_counts[pair] > 0:
            return pair
        if 0 < pair_counts[pair] < -count:
            heapq.heappush(heap, (-pair_counts[pair], pair))
    return None


def merge_pair(piece: list[int], pair: tuple, new_id: int) -> tuple[list, list]:
    """Replace `pair` in `piece`, from the left; return the pairs that this removes and makes."""
    lost, gained, position = [], [], 0
    while position < len(piece) - 1:
        if piece[position] == pair[0] and piece[position + 1] == pair[1]:
            lost += pairwise(piece[max(0, position - 1) : position + 3])
            piece[position : position + 2] = [new_id]
            gained += pairwise(piece[max(0, position - 1) : position + 2])
        position += 1
    return lost, gained


def normalize(text: str, pattern: str) -> str:
    return unicodedata.normalize("NFC", text) if pattern == "qwen" else text
