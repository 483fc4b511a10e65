"""Shards, windows, the manifest, and the order in which training sees the windows."""

import hashlib
import json
import math
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from conftest import refused, write

from dataset import (
    Dataset,
    Shard,
    ShardWriter,
    Windows,
    read_manifest,
    shuffle,
)
from hashing import mix64
from ranks import Ranks
from train import Run, TrainConfig, micro_batch


def write_shards(folder, prefix: str, tokens, shard_tokens: int = 10**6, vocab_size: int = 257):
    """Write tokens as prefix_000000.bin and so on; return the manifest's records."""
    with ShardWriter(folder, prefix, shard_tokens, vocab_size) as writer:
        for part in np.array_split(np.asarray(tokens, dtype=np.uint32), 3):
            writer.add(part)
        return writer.finish()


def tokens_of(path) -> list[int]:
    shard = Shard(path)
    return shard.read(0, shard.count).tolist()


@pytest.fixture
def tiny(data_dir, tmp_path):
    """A copy of the dataset `tiny`, to damage."""
    return shutil.copytree(data_dir / "tiny", tmp_path / "tiny")


FORMATS = [(20240520, 1, "H", 2**16), (20240801, 7, "I", 2**16 + 1)]


@pytest.mark.parametrize("magic, version, letter, vocab_size", FORMATS)
def test_shards_have_the_layout_of_llm_c(tmp_path, magic, version, letter, vocab_size):
    numbers = [50256, 0, vocab_size - 1, 7586, 21831]
    header = struct.pack("<3i", magic, version, len(numbers)) + bytes(4 * 253)
    (record,) = write_shards(tmp_path, "x", numbers, vocab_size=vocab_size)
    content = (tmp_path / "x_000000.bin").read_bytes()
    assert content == header + struct.pack(f"<5{letter}", *numbers)
    assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert (record["file"], record["tokens"]) == ("x_000000.bin", 5)
    assert tokens_of(tmp_path / "x_000000.bin") == numbers


def test_a_shard_is_full_before_the_next_begins(tmp_path):
    records = write_shards(tmp_path, "x", range(1000), shard_tokens=300, vocab_size=1000)
    assert [record["tokens"] for record in records] == [300, 300, 300, 100]
    assert [record["largest_id"] for record in records] == [299, 599, 899, 999]
    shards = [tokens_of(tmp_path / record["file"]) for record in records]
    assert sum(shards, []) == list(range(1000))
    assert write_shards(tmp_path, "none", []) == []


def test_damaged_and_unfinished_shards_are_refused(tmp_path):
    path = tmp_path / "x_000000.bin"
    write_shards(tmp_path, "x", range(100))
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:-2], whole + b"ab", whole[:1024]):
        path.write_bytes(content)
        refused("says 100 tokens but has", Shard, path)
    for content in (b"", whole[:500], b"\0" * 2000, whole[:4] + b"\7" + whole[5:]):
        path.write_bytes(content)
        refused("is not a shard", Shard, path)
    with ShardWriter(tmp_path, "y", 1000, 257) as writer:
        writer.add(np.arange(100))
    refused("is not a shard", Shard, tmp_path / "y_000000.bin")


def test_windows_overlap_by_one_token_and_do_not_cross_shards(tmp_path):
    for number, tokens in enumerate((range(41), range(100, 130), range(200, 205))):
        write_shards(tmp_path, f"shard{number}", tokens)
    windows = Windows(sorted(tmp_path.glob("*.bin")), block_size=10)
    assert len(windows) == 4 + 2 + 0 and [shard.count for shard in windows.shards] == [41, 30, 5]
    rows = windows[np.array([3, 0, 4, 5])]
    assert rows[:, 0].tolist() == [30, 0, 100, 110]
    assert rows.shape == (4, 11) and rows.dtype == np.int64 and (np.diff(rows) == 1).all()
    windows.shards[1].path.write_bytes(windows.shards[1].path.read_bytes()[:-20])
    with pytest.raises(OSError, match="shard1_000000.bin has become shorter"):
        windows[np.array([0, 5])]


def test_the_shards_are_those_of_the_manifest(tiny):
    dataset = Dataset(tiny, 16)
    train, val = (dataset.manifest["splits"][split] for split in ("train", "val"))
    write_shards(tiny, "x_train", range(100))  # belongs to something else
    again = Dataset(tiny, 16)
    assert sum(shard.count for shard in again.train.shards) == train["tokens"]
    assert again.bits_per_byte(math.log(2)) == val["tokens"] / val["bytes"]
    assert dataset.tokenizer.name == "bytes" and dataset.fingerprint == again.fingerprint
    refused("less than one window of 100001 train tokens", Dataset, tiny, 100_000)
    shutil.move(tiny / "x_train_000000.bin", tiny / "tiny_train_000000.bin")
    refused("has 100 tokens, manifest.json says 20000", Dataset, tiny, 16)


def test_bytes_that_are_not_the_manifests_are_noticed(tiny, monkeypatch):
    path, dataset = tiny / "tiny_train_000000.bin", Dataset(tiny, 16)
    dataset.verify(hash_all=False, is_known=False)
    before = dataset.fingerprint
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    dataset, message = Dataset(tiny, 16), "is not the shard that manifest.json was made with"
    refused(message, dataset.verify, hash_all=False, is_known=True)
    assert dataset.fingerprint != before  # with or without a manifest
    monkeypatch.setattr("dataset.HASHED_BYTES", 1000)
    dataset.verify(hash_all=False, is_known=True)
    refused(message, dataset.verify, hash_all=True, is_known=True)


DAMAGE = [  # a file, its new content, or what makes it (None: deleted), the message
    ("tokenizer.tiktoken", "AQ== 0\n", "is not the one in"),
    ("manifest.json", '{"name', "is damaged, or is not JSON"),
    ("manifest.json", "{}", "an entry is missing"),
    ("tokenizer.tiktoken", os.mkdir, "tokenizer.tiktoken is not a file"),
    ("manifest.json", os.mkfifo, "manifest.json is not a file"),
    ("tiny_val_000000.bin", os.mkfifo, "tiny_val_000000.bin is not a file"),
    ("manifest.json", None, "has no manifest.json; name the tokenizer"),
]


@pytest.mark.parametrize("name, content, message", DAMAGE)
def test_a_damaged_dataset_is_refused(tiny, name, content, message):
    (tiny / name).unlink()
    if callable(content):
        content(tiny / name)
    elif content:
        write(tiny / name, content)
    refused(message, Dataset, tiny, 16)


def test_a_manifests_tokenizer_that_is_no_text_is_refused(tiny):
    content, manifest = b"\xff 0\n", read_manifest(tiny)
    (tiny / "tokenizer.tiktoken").write_bytes(content)
    manifest["tokenizer"]["sha256"] = hashlib.sha256(content).hexdigest()
    write(tiny / "manifest.json", json.dumps(manifest))
    refused("not a .tiktoken file", Dataset, tiny, 16)


def test_every_entry_of_a_manifest_is_checked(tiny):
    manifest = read_manifest(tiny)
    for name in ("made_from", "tokenizer", "splits", "documents", "bytes"):
        without = {key: value for key, value in manifest.items() if key != name}
        write(tiny / "manifest.json", json.dumps(without))
        refused("manifest.json is damaged: an entry is missing", read_manifest, tiny)
    shards = manifest["splits"]["val"]["shards"]
    for name in ("../x.bin", "/x.bin", manifest["splits"]["train"]["shards"][0]["file"], 7):
        shards[0]["file"] = name
        write(tiny / "manifest.json", json.dumps(manifest))
        refused("names a shard twice|an entry is missing", read_manifest, tiny)


def test_shards_made_elsewhere_open_with_a_tokenizer_named(tmp_path):
    refused("has no shards like fineweb_train_000001.bin", Dataset, tmp_path, 16, "bytes")
    (tmp_path / "train.bin").write_bytes(bytes(100))
    refused("nanoGPT's .bin and build-nanogpt's .npy have no header", Dataset, tmp_path, 16)
    (tmp_path / "train.bin").unlink()
    for split in ("train", "val"):
        write_shards(tmp_path, f"fineweb_{split}", range(200))
    refused("name the tokenizer of its shards, as in --tokenizer=gpt2", Dataset, tmp_path, 16)
    dataset = Dataset(tmp_path, 16, "bytes")
    assert len(dataset.train) == len(dataset.val) == 12 and dataset.tokenizer.vocab_size == 257
    assert math.isnan(dataset.bits_per_byte(1.0))
    shutil.copy(tmp_path / "fineweb_train_000000.bin", tmp_path / "fineweb_train_000001.bin")
    assert Dataset(tmp_path, 16, "bytes").fingerprint != dataset.fingerprint
    dataset.verify(hash_all=True, is_known=False)
    write_shards(tmp_path, "more_train", [1] * 50 + [257])
    dataset = Dataset(tmp_path, 16, "bytes")
    message = "more_train_000000.bin has token 257, its tokenizer 257 entries"
    refused(message, dataset.verify, hash_all=False, is_known=False)


def test_documents_begin_at_each_end_of_text_and_at_each_shard_that_has_tokens(tmp_path):
    write_shards(tmp_path, "a_train", [256, 1, 2, 256, 3, 4, 256, 5], shard_tokens=5)
    write_shards(tmp_path, "a_val", [256, 9])
    empty = np.zeros(256, dtype="<i4")
    empty[:2] = 20240520, 1
    (tmp_path / "a_train_000002.bin").write_bytes(empty.tobytes())
    documents = Dataset(tmp_path, 1, "bytes").documents("train")
    path = f"{tmp_path}/a_train_00000"
    first = [(f"{path}0.bin, token 0", [256, 1, 2]), (f"{path}0.bin, token 3", [256, 3])]
    second = [(f"{path}1.bin, token 0", [256, 4]), (f"{path}1.bin, token 1", [256, 5])]
    assert [(where, tokens.tolist()) for where, tokens in documents] == first + second


def test_mix64_is_splitmix64_and_keeps_the_shape():
    """The first numbers of the generator with seed 1234567, as its authors publish them."""
    states = np.uint64(1234567) + np.arange(2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix64(states).tolist() == [6457827717110365317, 3203168211198807973]
    table = np.arange(6, dtype=np.uint64).reshape(2, 3)
    assert mix64(table).shape == (2, 3) and mix64(table).dtype == np.uint64
    assert mix64(table)[1, 2] == mix64(np.uint64(5))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000])
def test_a_shuffle_has_every_number_once(count):
    orders = [shuffle(np.arange(count), count, key).tolist() for key in (1, 2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(count))
    assert count < 7 or orders[0] != orders[1] != list(range(count))


def test_a_shuffle_looks_random():
    order = shuffle(np.arange(20_000), 20_000, 5).astype(float)
    for other in (np.arange(20_000), np.roll(order, 1)):
        assert abs(np.corrcoef(order, other)[0, 1]) < 0.03


def test_each_epoch_cuts_the_text_elsewhere_and_has_each_token_once(tmp_path):
    for number, tokens in enumerate((range(43), range(100, 131))):
        write_shards(tmp_path, f"shard{number}", tokens)
    dataset = Dataset.__new__(Dataset)
    dataset.block_size, dataset.train = 10, Windows(sorted(tmp_path.glob("*.bin")), 10)
    epochs = [dataset.batch(4, first, 7) for first in (0, 7, 14)]
    for rows in epochs:
        assert len(np.unique(rows[:, 1:])) == 70
        assert set(np.diff(rows).flat) <= {1, -42, -30}  # a shard goes on at its start
    assert set(epochs[0][:, 0] % 100 % 10) == {0}
    assert len({frozenset(rows[:, 0].tolist()) for rows in epochs}) == 3
    assert (dataset.batch(4, 5, 4) == np.concatenate((epochs[0][5:], epochs[1][:2]))).all()


class Numbers(list):  # stands in for Windows: window n is n, repeated
    def read(self, indices, move):
        return np.repeat(indices[:, None], 5, axis=1)


def numbers(count: int) -> Dataset:
    """A dataset of so many windows, without files."""
    dataset = Dataset.__new__(Dataset)
    dataset.train, dataset.block_size = Numbers(range(count)), 4
    return dataset


def test_an_epoch_may_end_inside_a_batch():
    dataset = numbers(10)
    order = dataset.batch(3, 0, 25)[:, 0]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert (order[:10] != order[10:20]).any()
    assert (dataset.batch(3, 8, 4)[:, 0] == order[8:12]).all()
    assert (dataset.batch(4, 0, 25)[:, 0] != order).any()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_ranks_see_the_same_batches_and_every_window_once_per_epoch(world_size):
    settings = TrainConfig(block_size=4, batch_tokens=64, micro_batch_size=2)
    dataset, batches = numbers(48), [[] for _ in range(6)]
    for rank in range(world_size):
        ranks = Ranks(rank, world_size, torch.device("cpu"))
        run = Run(settings, ranks, dataset, model=None, forward=None, optimizers=[])
        for step in range(6):
            for micro_step in range(run.micro_steps):
                tokens, targets = micro_batch(run, step, micro_step)
                assert tokens.shape == targets.shape == (2, 4)
                batches[step] += tokens[:, 0].tolist()
        assert torch.equal(micro_batch(run, 0, run.micro_steps)[0], micro_batch(run, 1, 0)[0])
    assert sorted(sum(batches[:3], [])) == sorted(sum(batches[3:], [])) == list(range(48))
    orders = [dataset.batch(settings.seed, step * 16, 16)[:, 0] for step in range(6)]
    assert [sorted(batch) for batch in batches] == [sorted(order) for order in orders]
    assert batches[:3] != batches[3:]
