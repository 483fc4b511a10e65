"""A mixture of datasets: each has its share of a run's windows.

Which dataset has a position of the run is a pure function of the position and the weights, so a
mixture resumes exactly, on any number of ranks, as a single dataset does.
"""

import hashlib
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np

from config import Failure
from dataset import Dataset

MAX_PERIOD = 10_000  # windows after which the turns of a mixture's datasets repeat


class Mixture:
    """Several datasets by weight, with what train.py uses of a Dataset.

    Each has its own order and epochs, as alone: only who has which position of a run is shared out.
    weights: positive integers without a common divisor. Raises Failure.
    """

    def __init__(self, parts: list[Dataset], weights: list[int]):
        self.parts, self.weights, self.manifest = parts, np.array(weights), {}
        self.shares = [weight / sum(weights) for weight in weights]
        self.tokenizer, first = parts[0].tokenizer, parts[0].folder
        for part in parts:
            is_same = part.tokenizer.special_tokens == self.tokenizer.special_tokens
            if not is_same or not part.tokenizer.same_ids(self.tokenizer):
                names = f"{part.folder} has {part.tokenizer.name}, {first} {self.tokenizer.name}"
                hint = f"prepare one of them with --tokenizer={first / 'tokenizer.tiktoken'}"
                raise Failure(f"a mixture needs one tokenizer and special_tokens: {names};\n{hint}")
        self.turns, self.earlier = take_turns(weights)

    def batch(self, seed: int, first: int, count: int) -> np.ndarray:
        """As of a Dataset. A part has weight windows in each period, and `earlier` in this one."""
        periods, positions = np.divmod(np.arange(first, first + count), len(self.turns))
        turns = self.turns[positions]
        own_positions = periods * self.weights[turns] + self.earlier[positions]
        windows = np.empty((count, self.parts[0].block_size + 1), dtype=np.int64)
        for number in np.unique(turns):
            rows = np.flatnonzero(turns == number)  # at consecutive positions of the part
            own_first = int(own_positions[rows[0]])
            windows[rows] = self.parts[number].batch(seed, own_first, len(rows))
        return windows

    def verify(self, hash_all: bool, is_known: bool):
        """Verify each dataset. Raises Failure."""
        for part in self.parts:
            part.verify(hash_all, is_known)

    @property
    def fingerprint(self) -> str:
        """A hash of the datasets' fingerprints and weights, in order."""
        parts = [(part.fingerprint, int(w)) for part, w in zip(self.parts, self.weights)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def old_fingerprint(self) -> str:
        return self.fingerprint  # 0.1 had no mixtures

    def bits_per_byte(self, loss: float) -> float:
        """A loss per byte of a text in which each dataset has its share of the tokens."""
        tokens_per_byte = [part.bits_per_byte(math.log(2)) for part in self.parts]
        bytes_per_token = sum(share / n for share, n in zip(self.shares, tokens_per_byte))
        return loss / math.log(2) / bytes_per_token


def parse_mixture(text: str) -> dict[str, int]:
    """The names in "a:0.7,b:0.3" and their weights, here 7 and 3; {name: 1} for one without ":".

    Raises ValueError.
    """
    if ":" not in text:
        return {text: 1}
    shares = {}
    for part in text.split(","):
        name, _, weight = part.strip().rpartition(":")
        is_number = re.fullmatch(r"\d{1,9}(\.\d{1,9})?", weight) and Fraction(weight) > 0
        if not name or not is_number:
            raise ValueError(
                f"dataset {text}: {part!r} is not NAME:WEIGHT, as in books:0.7,code:0.3"
            )
        if Path(name).name in {Path(other).name for other in shares}:
            raise ValueError(f"dataset {text}: two are named {Path(name).name}")
        shares[name] = Fraction(weight)
    whole = math.lcm(*(share.denominator for share in shares.values()))
    weights = [int(share * whole) for share in shares.values()]
    weights = [weight // math.gcd(*weights) for weight in weights]
    if sum(weights) > MAX_PERIOD:
        ratio, limit = ":".join(map(str, weights)), f"{MAX_PERIOD:,}"
        raise ValueError(f"dataset {text}: in {ratio} windows are more than {limit}; round weights")
    return dict(zip(shares, weights))


def take_turns(weights: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which of several datasets has each window of a period, and how many it had before in it.

    Both int64 (sum(weights),). Of the first p windows each dataset has p * weight / sum(weights),
    and less than one more or less: of the datasets whose next window may come now, the one whose
    window is due first takes the turn. Window n is due in the interval of p where the share is n to
    n + 1, and on one machine such a schedule always exists (Baruah et al. 1996).
    """
    period, counts, turns = sum(weights), [0] * len(weights), []
    for position in range(period):
        allowed = [k for k, n in enumerate(counts) if n * period // weights[k] <= position]
        turn = min(allowed, key=lambda k: -(-(counts[k] + 1) * period // weights[k]))
        turns.append((turn, counts[turn]))
        counts[turn] += 1
    return tuple(np.array(turns).T)
