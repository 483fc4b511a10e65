"""Text to shards and back: formats, tokenizers, splits, and what can be wrong with a source."""

import base64
import gzip
import hashlib
import json
import lzma
import random
import struct
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import tiktoken_ext.openai_public
from conftest import run

import prepare_data
from config import Failure
from prepare_data import Dataset, PrepareConfig, Windows


def prepared(tmp_path, source, **changes) -> tuple:
    """Prepare `source` and return the manifest and the tokens of its two splits."""
    options = {"name": "mine", "source": str(source), "tokenizer": "bytes", "data_dir": str(tmp_path / "data")}
    settings = PrepareConfig(**options | changes)
    settings.check()
    folder = prepare_data.prepare(settings)
    manifest = json.loads((folder / "manifest.json").read_text())
    tokens = {
        split: np.concatenate([prepare_data.open_shard(folder / shard["file"]) for shard in facts["shards"]])
        for split, facts in manifest["splits"].items()
    }
    return manifest, tokens["train"], tokens["val"]


def texts_of(tokens: np.ndarray) -> list[str]:
    """The documents in a split that was made with the tokenizer `bytes`; each starts with an end-of-text, 256."""
    assert tokens[0] == 256
    parts = np.split(tokens, np.flatnonzero(tokens == 256)[1:])
    return [bytes(part[1:].astype(np.uint8)).decode() for part in parts]


def write_shard(path, tokens: np.ndarray) -> str:
    """Write tokens as one shard and return its SHA-256."""
    shard = prepare_data.ShardFile(path, tokens.dtype)
    shard.write(tokens)
    return shard.close()


# ---- shards


@pytest.mark.parametrize("dtype, most", [("<u2", 65535), ("<u4", 2**32 - 1)])
def test_shards_round_trip(tmp_path, dtype, most):
    tokens = np.random.default_rng(0).integers(0, most, 5000, endpoint=True).astype(dtype)
    tokens[:2] = 0, most
    sha256 = write_shard(tmp_path / "x.bin", tokens)
    found = prepare_data.open_shard(tmp_path / "x.bin")
    assert found.dtype == np.dtype(dtype) and (found == tokens).all()
    assert hashlib.sha256((tmp_path / "x.bin").read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize("magic, version, letter", [(20240520, 1, "H"), (20240801, 7, "I")])
def test_a_shard_in_llm_c_layout_loads(tmp_path, magic, version, letter):
    numbers = [50256, 464, 2068, 7586, 21831]
    header = struct.pack("<3i", magic, version, len(numbers)) + bytes(4 * 253)
    (tmp_path / "x.bin").write_bytes(header + struct.pack(f"<5{letter}", *numbers))
    assert prepare_data.open_shard(tmp_path / "x.bin").tolist() == numbers
    write_shard(tmp_path / "ours.bin", np.array(numbers, dtype=f"<u{struct.calcsize(letter)}"))
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "x.bin").read_bytes()


def test_damaged_shards_are_refused(tmp_path):
    write_shard(tmp_path / "x.bin", np.arange(100, dtype="<u2"))
    whole = (tmp_path / "x.bin").read_bytes()
    for content in (whole[:-1], whole[:-2], whole + b"ab", whole[:1024]):
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(Failure, match="says 100 tokens but holds"):
            prepare_data.open_shard(tmp_path / "x.bin")
    for content in (b"", whole[:500], b"\0" * 2000, whole[:4] + b"\7" + whole[5:]):
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(Failure, match="is not a shard"):
            prepare_data.open_shard(tmp_path / "x.bin")


def test_windows_cover_each_shard_and_overlap_by_one_token(tmp_path):
    for shard, tokens in enumerate((np.arange(0, 41), np.arange(100, 125), np.arange(200, 205))):
        write_shard(tmp_path / f"a_train_{shard}.bin", tokens.astype("<u2"))
    windows = Windows(sorted(tmp_path.glob("*.bin")), block_size=10, vocab_size=300)
    assert len(windows) == 4 + 2 + 0
    rows = windows[np.array([3, 0, 4, 5])]
    assert rows[:, 0].tolist() == [30, 0, 100, 110] and (np.diff(rows) == 1).all() and rows.shape == (4, 11)
    with pytest.raises(Failure, match="holds token 110, but its tokenizer has 110 entries"):
        Windows(windows.paths, 10, 110)[np.array([0, 4])]


def test_a_folder_of_foreign_shards_opens_with_a_tokenizer_named(tmp_path):
    for split in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{split}_000001.bin", np.arange(200, dtype="<u2"))
    with pytest.raises(Failure, match="name its tokenizer"):
        Dataset(tmp_path, 16)
    dataset = Dataset(tmp_path, 16, "bytes")
    assert len(dataset.train) == 12 and dataset.encoding.n_vocab == 257 and np.isnan(dataset.val_tokens_per_byte())
    with pytest.raises(Failure, match="less than one window of 201 train tokens"):
        Dataset(tmp_path, 200, "bytes")


# ---- tokenizers


def trained(text: str, size: int):
    pieces = Counter(piece.encode() for piece in prepare_data.regex.findall(prepare_data.PATTERNS["gpt2"], text))
    return prepare_data.train_bpe(pieces, size), pieces


def naive_bpe(counts: Counter, vocab_size: int) -> list[bytes]:
    """The definition: count all pairs, merge the most frequent one everywhere, start over."""
    tokens = [bytes([byte]) for byte in range(256)]
    pieces = {piece: [bytes([byte]) for byte in piece] for piece in counts}
    while len(tokens) < vocab_size - 1:
        pairs = Counter()
        for piece, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[piece]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], tokens.index(pair[0]), tokens.index(pair[1])))
        if best[0] + best[1] not in tokens:
            tokens.append(best[0] + best[1])
        for parts in pieces.values():
            position = 0
            while position < len(parts) - 1:
                if (parts[position], parts[position + 1]) == best:
                    parts[position : position + 2] = [best[0] + best[1]]
                position += 1
    return tokens


@pytest.mark.parametrize("alphabet", ["ab", "abc ", "abcdefgh  ", "aé日 "])
def test_the_bpe_trainer_equals_its_definition(alphabet):
    for seed in range(5):
        chooser = random.Random(seed)
        tokens, pieces = trained("".join(chooser.choice(alphabet) for _ in range(600)), 330)
        assert tokens == naive_bpe(pieces, 330)
        assert len(set(tokens)) == len(tokens) > 260


def test_the_bpe_trainer_ends_where_nothing_is_left_to_merge():
    tokens, _ = trained("abab", 1000)
    assert tokens[256:] == [b"ab", b"abab"]


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_tokenizers_round_trip_any_bytes_and_any_text(name):
    tokens = [bytes([byte]) for byte in range(256)]
    if name == "bpe":
        tokens, _ = trained("the cat sat on the mat with the other cats; that's that. " * 20, 300)
    encoding = prepare_data.make_tokenizer(tokens, name)
    chooser = random.Random(0)
    for _ in range(200):
        data = chooser.randbytes(chooser.randrange(50))
        assert encoding.decode_bytes(encoding._encode_bytes(data)) == data
        text = "".join(
            chr(chooser.choice([chooser.randrange(0xD800), chooser.randrange(0xE000, 0x110000)])) for _ in range(20)
        )
        text += prepare_data.END_OF_TEXT
        assert encoding.decode(encoding.encode_ordinary(text)) == text
        assert encoding.eot_token not in encoding.encode_ordinary(text)
    assert encoding.n_vocab == len(tokens) + 1 == encoding.eot_token + 1


def test_a_tokenizer_survives_its_file():
    tokens, _ = trained("low lower lowest newer newest wider widest " * 9, 290)
    encoding = prepare_data.make_tokenizer(tokens, "x")
    again = prepare_data.read_tokenizer(prepare_data.write_tokenizer(encoding), "x")
    assert again.encode_ordinary("the newest lowlands") == encoding.encode_ordinary("the newest lowlands")
    assert again._mergeable_ranks == encoding._mergeable_ranks


def test_bad_tokenizer_files_are_refused():
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    assert prepare_data.read_tokenizer("\n".join(lines), "x").n_vocab == 257
    for bad in (["hello"], lines[:-1], lines + ["YWI= 300"], lines + ["!!!! 256"], lines + ["YQ== 256"], ["a b c"]):
        with pytest.raises(Failure):
            prepare_data.read_tokenizer("\n".join(bad), "x")


# ---- datasets


def test_documents_are_led_by_end_of_text_and_never_hold_it(tmp_path):
    documents = [f"document {n} <|endoftext|> with é and 日本 {n * n}" for n in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    manifest, train, val = prepared(tmp_path, tmp_path / "a.jsonl")
    found = []
    for tokens, split in ((train, "train"), (val, "val")):
        texts = texts_of(tokens)
        assert len(texts) == manifest["splits"][split]["documents"]
        assert sum(len(text.encode()) for text in texts) == manifest["splits"][split]["bytes"]
        found += texts
    assert sorted(found) == sorted(documents)
    assert manifest["documents"] == {"in": 50, "kept": 50, "dropped": {}}


def test_adding_documents_moves_none_to_the_other_split(tmp_path):
    lines = [json.dumps({"text": f"document {n}"}) + "\n" for n in range(200)]
    splits = []
    for count in (100, 200):
        (tmp_path / "a.jsonl").write_text("".join(lines[:count]))
        _, train, val = prepared(tmp_path, tmp_path / "a.jsonl", name=f"first{count}")
        splits.append([set(texts_of(train)), set(texts_of(val))])
    (train_100, val_100), (train_200, val_200) = splits
    assert train_100 < train_200 and val_100 < val_200 and 5 < len(val_200) < 40


def test_a_single_document_is_cut(tmp_path):
    text = "".join(f"line {n}\n" for n in range(1000))
    (tmp_path / "a.txt").write_text(text)
    manifest, train, val = prepared(tmp_path, tmp_path / "a.txt")
    assert texts_of(train)[0] + texts_of(val)[0] == text and len(val) == pytest.approx(len(text) / 10, abs=2)
    bits = manifest["splits"]["val"]["compressed_bits_per_byte"]
    val_text = texts_of(val)[0].encode()
    assert bits["lzma -9"] == 8 * len(lzma.compress(val_text, preset=9)) / len(val_text)
    assert bits["gzip -9"] == pytest.approx(8 * len(gzip.compress(val_text, 9)) / len(val_text), rel=0.01)


def test_shards_are_cut_at_shard_tokens_and_hashed(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 100)
    manifest, train, val = prepared(tmp_path, tmp_path / "a.txt", shard_tokens=250)
    shards = manifest["splits"]["train"]["shards"]
    assert [shard["tokens"] for shard in shards] == [250, 250, 250, 151]
    for shard in shards:
        content = (tmp_path / "data" / "mine" / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]


def test_a_dataset_is_not_overwritten_by_another(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text " * 100)
    first, _, _ = prepared(tmp_path, tmp_path / "a.txt")
    assert prepared(tmp_path, tmp_path / "a.txt")[0] == first
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(Failure, match="was made with val_fraction 0.1 and not 0.2"):
        prepared(tmp_path, tmp_path / "a.txt", val_fraction=0.2)
    (tmp_path / "data" / "other").mkdir()
    with pytest.raises(Failure, match="holds something else already"):
        prepared(tmp_path, tmp_path / "a.txt", name="other")


def test_shards_are_those_of_the_manifest(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 100)
    prepared(tmp_path, tmp_path / "a.txt", name="a_val_b_train_c")  # a name that looks like those of shards
    folder = tmp_path / "data" / "a_val_b_train_c"
    dataset = Dataset(folder, 16)
    assert dataset.train.tokens() == dataset.manifest["splits"]["train"]["tokens"] == 901
    assert dataset.val.tokens() == dataset.manifest["splits"]["val"]["tokens"] == 101
    write_shard(folder / "x_train_000009.bin", np.arange(100, dtype="<u2"))  # belongs to something else
    assert Dataset(folder, 16).train.tokens() == 901
    (folder / "a_val_b_train_c_train_000000.bin").unlink()
    with pytest.raises(Failure, match="000000.bin is missing"):
        Dataset(folder, 16)
    write_shard(folder / "a_val_b_train_c_train_000000.bin", np.arange(100, dtype="<u2"))
    with pytest.raises(Failure, match="holds 100 tokens, but manifest.json says 901"):
        Dataset(folder, 16)


def test_a_changed_tokenizer_file_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 100)
    prepared(tmp_path, tmp_path / "a.txt")
    path = tmp_path / "data" / "mine" / "tokenizer.tiktoken"
    path.write_text(path.read_text().replace("AA== 0", "AQ== 0"))
    with pytest.raises(Failure, match="differs from its manifest"):
        Dataset(path.parent, 16)


def test_the_command_line_trains_a_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat with the other cats " * 50)
    options = ["--source=a.txt", "--tokenizer=bpe:270"]
    result = run(prepare_data.__file__, "cats", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    dataset = Dataset(tmp_path / "data" / "cats", 8)
    assert dataset.encoding.n_vocab == 270 == dataset.manifest["tokenizer"]["vocab_size"]
    assert "1 of 1 documents" in result.stdout and "--dataset=cats" in result.stdout


def test_the_stdlib_dataset_is_the_modules_without_tests():
    documents = [text for text, _ in prepare_data.open_named(PrepareConfig(name="stdlib"))]
    assert 300 < len(documents) and 5e6 < sum(map(len, documents)) < 50e6
    assert any("class HTTPConnection:" in document for document in documents)
    assert not any("class BaseTaskTests" in document for document in documents)  # of test_asyncio


@pytest.mark.parametrize("name, reference", [("gpt2", "r50k_base"), ("gpt4", "cl100k_base")])
def test_the_split_patterns_are_those_of_gpt2_and_gpt4(name, reference, monkeypatch):
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: {})  # no download
    theirs = getattr(tiktoken_ext.openai_public, reference)()["pat_str"]
    chooser, alphabet = random.Random(0), "abZ é日1234 \t\r\n  '!-.sStTdDmMlLrRvVeE\u3000\u00a0"
    for _ in range(2000):
        text = "".join(chooser.choices(alphabet, k=30))
        assert prepare_data.regex.findall(prepare_data.PATTERNS[name], text) == prepare_data.regex.findall(theirs, text)
