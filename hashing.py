"""The one hash mixer: for the order of the data, for words and n-grams, for signatures."""

import numpy as np


def mix64(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 numbers, keeping the shape: SplitMix64, Steele et al. 2014."""
    x = np.asarray(x, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64; numpy warns of it for a scalar
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_numbers(*numbers: int) -> int:
    """One 64-bit integer that depends on all of `numbers` and their order."""
    result = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        result = mix64(result ^ mix64(np.array([number], dtype=np.uint64)))
    return int(result[0])
