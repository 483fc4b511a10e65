"""Mixtures of datasets: who has which window of a run."""

import math

import numpy as np
import pytest
import torch
from conftest import FIXTURES, refused
from test_dataset import write_shards

from dataset import Dataset
from mixture import Mixture, parse_mixture, take_turns
from ranks import Ranks
from train import Run, TrainConfig, micro_batch


def test_a_mixtures_weights_are_kept_within_one_window_at_any_position():
    generator = np.random.default_rng(0)
    for trial in range(300):
        weights = generator.integers(1, (5, 30, 200)[trial % 3], size=1 + trial % 7).tolist()
        turns, _ = take_turns(weights)
        assert np.bincount(turns, minlength=len(weights)).tolist() == weights
        counts = np.cumsum(turns[:, None] == np.arange(len(weights)), axis=0)
        wanted = np.arange(1, len(turns) + 1)[:, None] * weights / len(turns)
        assert abs(counts - wanted).max() < 1


def make_mixture(folder, sizes=(9, 4, 30), weights=(5, 2, 3)) -> Mixture:
    """Datasets of so many windows of 4 tokens; window n of dataset k is of the number 50 k + n."""
    for number, size in enumerate(sizes):
        (folder / f"{number}").mkdir()
        for split in ("train", "val"):
            tokens = np.repeat(50 * number + np.arange(size), 4)
            write_shards(folder / f"{number}", f"a_{split}", [*tokens, 0])
    parts = [Dataset(folder / f"{number}", 4, "bytes") for number in range(len(sizes))]
    return Mixture(parts, list(weights))


def test_each_dataset_of_a_mixture_is_seen_as_alone(tmp_path):
    """Each window once per epoch of its dataset, in the order and epochs that it has by itself."""
    sizes, mixture = (9, 4, 30), make_mixture(tmp_path)
    numbers = mixture.batch(7, 0, 1000)[:, 0]
    for number, (part, size) in enumerate(zip(mixture.parts, sizes)):
        own = numbers[numbers // 50 == number]
        assert (own == part.batch(7, 0, len(own))[:, 0]).all()
        epochs = own[: len(own) // size * size].reshape(-1, size)
        assert (np.sort(epochs) == 50 * number + np.arange(size)).all() and len(epochs) > 5
    for first, count in ((0, 1), (3, 10), (17, 100), (999, 1)):  # wherever a run continues
        assert (mixture.batch(7, first, count)[:, 0] == numbers[first : first + count]).all()
    far = mixture.batch(7, 10**15, 20)[:, 0] // 50
    assert np.bincount(far).tolist() == [10, 4, 6]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_ranks_see_the_same_mixture(tmp_path, world_size):
    mixture = make_mixture(tmp_path)
    settings = TrainConfig(block_size=4, batch_tokens=64, micro_batch_size=2)
    for step in (0, 1, 9):
        seen = []
        for rank in range(world_size):
            ranks = Ranks(rank, world_size, torch.device("cpu"))
            run = Run(settings, ranks, mixture, model=None, forward=None, optimizers=[])
            for micro_step in range(run.micro_steps):
                seen += micro_batch(run, step, micro_step)[0][:, 0].tolist()
        assert sorted(seen) == sorted(mixture.batch(settings.seed, step * 16, 16)[:, 0])


def test_weights_are_part_of_a_mixtures_fingerprint_and_one_tokenizer_is_needed(tmp_path, data_dir):
    mixture = make_mixture(tmp_path)
    prints = {Mixture(mixture.parts, weights).fingerprint for weights in ([5, 2, 3], [5, 3, 2])}
    assert mixture.fingerprint in prints and len(prints) == 2
    assert Mixture(mixture.parts[::-1], [5, 2, 3]).fingerprint not in prints
    other = Dataset(FIXTURES / "dataset", 4)
    parts = [mixture.parts[0], other]
    refused(
        "needs one tokenizer and special_tokens: .*dataset has bpe:300:gpt4, .*bytes",
        Mixture,
        parts,
        [1, 1],
    )
    tiny = Dataset(data_dir / "tiny", 4)
    pair = Mixture([tiny, tiny], [1, 3])
    assert pair.bits_per_byte(1.5) == pytest.approx(tiny.bits_per_byte(1.5))
    assert math.isnan(mixture.bits_per_byte(1.5))


@pytest.mark.parametrize(
    "text, weights",
    [
        ("a", {"a": 1}),
        ("a,b", {"a,b": 1}),
        ("a:0.7,b:0.3", {"a": 7, "b": 3}),
        ("a:7, b:3", {"a": 7, "b": 3}),
        ("x/a:2,b:2.50", {"x/a": 4, "b": 5}),
        ("a:0.333,b:0.667", {"a": 333, "b": 667}),
        ("a:5", {"a": 1}),
    ],
)
def test_the_text_of_a_mixture(text, weights):
    assert parse_mixture(text) == weights


@pytest.mark.parametrize(
    "text, message",
    [
        ("a:0.7,b", "'b' is not NAME:WEIGHT"),
        ("a:0.7,b:", "'b:' is not"),
        ("a:0.7,:0.3", "':0.3' is not"),
        ("a:1,b:0", "'b:0' is not"),
        ("a:1,b:-1", "'b:-1' is not"),
        ("a:1,b:nan", "'b:nan' is not"),
        ("a:1,b:1e999999999", "is not"),
        ("a:1,x/a:1", "two are named a"),
        ("a:0.12345,b:0.5", "more than 10,000; round"),
    ],
)
def test_a_wrong_mixture_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(dataset=text).check()
