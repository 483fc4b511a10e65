"""Text to shards and back: formats, tokenizers, splits, and what can be wrong with a source."""

import base64
import gzip
import hashlib
import json
import lzma
import random
import struct
import unicodedata
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


def test_a_tokenizer_with_end_of_text_anywhere_survives_its_file(tmp_path):
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abab"]
    plain = prepare_data.make_tokenizer(tokens, "x")
    assert prepare_data.END_OF_TEXT not in prepare_data.write_tokenizer(plain)  # the id after the last is understood
    first = prepare_data.make_encoding({token: 1 + rank for rank, token in enumerate(tokens)}, 0, "x")
    far = prepare_data.make_encoding({token: 2 * rank for rank, token in enumerate(tokens)}, 999, "x")
    for encoding, n_vocab in ((plain, 259), (first, 259), (far, 1000)):
        (tmp_path / "x.tiktoken").write_text(prepare_data.write_tokenizer(encoding))
        again = prepare_data.load_tokenizer(str(tmp_path / "x.tiktoken"), tmp_path)
        assert prepare_data.same_tokens(again, encoding) and again.eot_token == encoding.eot_token
        assert again.encode_ordinary("ababab") == encoding.encode_ordinary("ababab") and again.n_vocab == n_vocab
    assert not prepare_data.same_tokens(plain, first)
    gpt4 = prepare_data.make_tokenizer(tokens, "x:gpt4")
    assert not prepare_data.same_tokens(plain, gpt4)  # the pattern differs


def test_bad_tokenizer_files_are_refused():
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    assert prepare_data.read_tokenizer("\n".join(lines), "x").n_vocab == 257
    for bad in (["hello"], lines[:-1], lines + ["YWI= 300"], lines + ["!!!! 256"], lines + ["YQ== 256"], ["a b c"]):
        with pytest.raises(Failure):
            prepare_data.read_tokenizer("\n".join(bad), "x")
    for ids in (["300", "301"], ["256"], ["-1"], ["2147483648"], ["x"]):  # two, another's, and what is no id
        bad = [*lines, "YWI= 256", *(f"{prepare_data.END_OF_TEXT} {number}" for number in ids)]
        with pytest.raises(Failure):
            prepare_data.read_tokenizer("\n".join(bad), "x")
    with pytest.raises(Failure):  # YR== is another spelling of YQ==
        prepare_data.read_tokenizer("\n".join([*lines, "YR== 256", f"{prepare_data.END_OF_TEXT} 300"]), "x")


# ---- tokenizers of Hugging Face folders


ALPHABETS = (
    "abcdefgh 'sStTlLvVrReEdDmM",
    " \t\n\r\x0b\x0c\x85\u2028\u3000\xa0",
    "0123456789\u00b2\u00bd\u0663",
    "\u00e9\u00e0\u00fc\u00df\u0301\u017f\u212a\ufb06",
    "\u65e5\u672c\u8a9e\ud55c\uad6d\u05d0\u05d1\u0627\u0644\u0939\u093f",
    "\U0001f600\U0001f469\u200d\U0001f467\U0001f3fd\U0001f1e9\U0001f1ea\ufe0f",
    "".join(map(chr, range(32))) + "\x7f",
    "!?.,-\u2014<|>",
)
PROSE = (
    "the cat sat on the mat with the other cats; that's that.  \n\n 1234 \u65e5\u672c\u8a9e na\u00efve \U0001f600! " * 9
)


def random_texts(count: int) -> list[str]:
    """Strings of mixed scripts, emoji, control characters, runs of white space, and what looks like end-of-text."""
    chooser, texts = random.Random(0), []
    for _ in range(count):
        pieces = []
        for _ in range(chooser.randrange(1, 12)):
            pieces.append("".join(chooser.choices(chooser.choice(ALPHABETS), k=chooser.randrange(1, 9))))
            rare = [prepare_data.END_OF_TEXT, "the cats", chr(chooser.randrange(0xE000, 0x110000))]
            pieces.append(chooser.choice(rare) if chooser.random() < 0.2 else "")
        texts.append("".join(pieces))
    return texts


def their_ids(folder, texts: list[str]) -> list[list[int]]:
    """What the library `tokenizers` makes of texts, in which it is to see no special tokens."""
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return [found.ids for found in theirs.encode_batch(texts, add_special_tokens=False)]


def make_hf_folder(folder, special=(prepare_data.END_OF_TEXT,), split="gpt2", **changes):
    """A tokenizer that the library trained, special tokens first, as tokenizer.json and as the older pair of files."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer, steps = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = steps.ByteLevel(add_prefix_space=False)
    if split == "qwen":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
        split = steps.Split(tokenizers.Regex(prepare_data.PATTERNS["qwen"]), "isolated")
        tokenizer.pre_tokenizer = steps.Sequence([split, steps.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.model.save(str(folder))
    facts = json.loads(tokenizer.to_str())
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = facts
        for parent in parents:
            place = place[parent]
        place[last] = value(place.get(last)) if callable(value) else value
    (folder / "tokenizer.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("special, end", [(["<|endoftext|>"], 0), (["<pad>", "<s>", "</s>"], 2)])
@pytest.mark.parametrize("files", ["tokenizer.json", "qwen", "pair"])
def test_a_folders_tokenizer_makes_the_same_ids(tmp_path, special, end, files):
    make_hf_folder(tmp_path, special, split="qwen" if files == "qwen" else "gpt2")
    texts = random_texts(2000)
    wanted = their_ids(tmp_path, texts)
    names = {"pad_token": "<pad>", "bos_token": {"content": "<s>"}, "eos_token": special[-1]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    if files == "pair":
        (tmp_path / "tokenizer.json").unlink()
    encoding = prepare_data.load_tokenizer(str(tmp_path), tmp_path)
    assert encoding.eot_token == end and encoding.n_vocab > 300
    assert encoding.name.endswith(":qwen") == (files == "qwen")
    assert [prepare_data.encode(encoding, text).tolist() for text in texts] == wanted
    again = prepare_data.read_tokenizer(prepare_data.write_tokenizer(encoding), encoding.name)
    assert [prepare_data.encode(again, text).tolist() for text in texts] == wanted and again.eot_token == end


def test_end_of_text_is_what_the_folder_says(tmp_path):
    added = [
        {"id": 5000 + number, "content": content, "special": True}
        for number, content in enumerate((prepare_data.END_OF_TEXT, "<|im_end|>"))
    ]
    make_hf_folder(tmp_path, [], added_tokens=added)
    assert prepare_data.load_hf_tokenizer(tmp_path, "x").eot_token == 5000
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert prepare_data.load_hf_tokenizer(tmp_path, "x").eot_token == 5001
    make_hf_folder(tmp_path, [])
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": 777}')
    assert prepare_data.load_hf_tokenizer(tmp_path, "x").eot_token == 777
    (tmp_path / "config.json").unlink()
    with pytest.raises(Failure, match="neither an eos_token nor"):
        prepare_data.load_hf_tokenizer(tmp_path, "x")


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": "a|b"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"normalizer": {"type": "NFC"}}, "its normalizer is {'type': 'NFC'}"),
        ({"split": "qwen", "normalizer": None}, "its normalizer is None"),
        ({"model__type": "Unigram"}, "its type is 'Unigram'"),
        ({"model__dropout": 0.1}, "its dropout is 0.1"),
        ({"model__byte_fallback": True}, "its byte_fallback is True"),
        ({"model__end_of_word_suffix": "</w>"}, "its end_of_word_suffix is"),
        ({"pre_tokenizer": None}, "byte-level kind"),
        ({"pre_tokenizer__add_prefix_space": True}, "add_prefix_space"),
        ({"pre_tokenizer": LEVEL}, "it splits text by a pattern that is none of gpt2, gpt4"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, LEVEL]}}, "it splits text by a pattern"),
        ({"model__merges": lambda merges: [*merges[1:], merges[0]]}, "out of order or never made"),
        ({"model__merges": lambda merges: [*merges[:-2], merges[-1], merges[-2]]}, "out of order or never made"),
        ({"model__merges": lambda merges: merges[:-1]}, "is neither a byte, nor merged, nor special"),
        ({"model__merges": lambda merges: [*merges, ["th", "e"], ["t", "he"]]}, "out of order or never made"),
        ({"model__vocab": lambda vocab: vocab | {"unheard of": 900}}, "its entry 'unheard of' is neither"),
        ({"model__vocab": lambda vocab: {token: vocab[token] for token in vocab if token != "!"}}, "KeyError"),
        ({"model__vocab": lambda vocab: vocab | {"!": vocab["?"]}}, "nothing twice"),
        ({"model__vocab": lambda vocab: vocab | {"!": "1"}}, "no whole number"),
        ({"added_tokens": [{"id": 0, "content": "  ", "special": False}]}, "text can become the token '  '"),
        ({"model": None}, "AttributeError"),
    ],
)
def test_a_tokenizer_whose_ids_could_differ_is_refused(tmp_path, changes, message):
    make_hf_folder(tmp_path, **changes)
    with pytest.raises(Failure, match=message) as failure:
        prepare_data.load_hf_tokenizer(tmp_path, "x")
    assert len(str(failure.value).splitlines()) == 1


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json"])
def test_a_space_put_before_each_text_is_refused(tmp_path, file):
    make_hf_folder(tmp_path)
    if file == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    with pytest.raises(Failure, match="add_prefix_space"):
        prepare_data.load_hf_tokenizer(tmp_path, "x")


def test_a_merge_that_is_never_made_is_refused(tmp_path):
    make_hf_folder(tmp_path)
    facts = json.loads((tmp_path / "tokenizer.json").read_text())
    last = max(facts["model"]["vocab"].values())
    for number, (left, right) in enumerate((("x", "q"), ("q", "z"), ("x", "qz")), 1):  # of x q z, x q merges first
        facts["model"]["vocab"][left + right] = last + number
        facts["model"]["merges"].append([left, right])
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(Failure, match="merge of 'x' and 'qz' is out of order or never made"):
        prepare_data.load_hf_tokenizer(tmp_path, "x")


def test_a_huge_or_damaged_tokenizer_file_is_refused(tmp_path, monkeypatch):
    for content in ("[" * 100_000, "[1]", "{", "\ud800"):
        (tmp_path / "tokenizer.json").write_text(content, errors="surrogatepass")
        with pytest.raises(Failure, match="holds no JSON object"):
            prepare_data.load_hf_tokenizer(tmp_path, "x")
    monkeypatch.setattr(prepare_data, "MOST_JSON_BYTES", 10)
    (tmp_path / "tokenizer.json").write_text(" " * 11)
    with pytest.raises(Failure, match="has 11 bytes; more than 10 are not read"):
        prepare_data.load_hf_tokenizer(tmp_path, "x")


@pytest.mark.parametrize("kind", ["bytes", "bpe:330", "bpe:330:gpt4", "bpe:330:qwen", "x.tiktoken", "folder"])
def test_an_exported_tokenizer_makes_the_same_ids(tmp_path, kind):
    encoding = prepare_data.load_tokenizer("bytes", tmp_path)
    if kind.startswith("bpe"):
        pieces = prepare_data.regex.findall(prepare_data.PATTERNS[prepare_data.pattern_name(kind)], PROSE)
        tokens = prepare_data.train_bpe(Counter(piece.encode() for piece in pieces), 330)
        encoding = prepare_data.make_tokenizer(tokens, kind)
    elif kind == "folder":
        make_hf_folder(tmp_path / "theirs")
        encoding = prepare_data.load_tokenizer(str(tmp_path / "theirs"), tmp_path)
    elif kind == "x.tiktoken":
        lines = [base64.b64encode(bytes([byte])).decode() for byte in reversed(range(256))] + ["dGg=", "dGhl"]
        (tmp_path / kind).write_text("".join(f"{line} {number}\n" for number, line in enumerate(lines)))
        encoding = prepare_data.load_tokenizer(str(tmp_path / kind), tmp_path)
    prepare_data.save_hf_tokenizer(encoding, tmp_path / "hf")
    texts = random_texts(2000)
    wanted = [prepare_data.encode(encoding, text).tolist() for text in texts]
    assert their_ids(tmp_path / "hf", texts) == wanted
    assert prepare_data.same_tokens(prepare_data.load_tokenizer(str(tmp_path / "hf"), tmp_path), encoding)
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "hf")
    found = auto(texts, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert found == wanted and auto.eos_token_id == auto.bos_token_id == encoding.eot_token
    plain = [unicodedata.normalize("NFC", text) if kind.endswith("qwen") else text for text in texts[:50]]
    assert [auto.decode(tokens) for tokens in wanted[:50]] == plain


def test_entries_that_merges_do_not_reach_cannot_be_exported(tmp_path):
    tokens = [bytes([byte]) for byte in range(256)]
    end = prepare_data.END_OF_TEXT.encode()
    for entries in ([b"abc"], [end[:length] for length in range(2, len(end) + 1)]):
        with pytest.raises(Failure, match="merges don't reach"):
            prepare_data.save_hf_tokenizer(prepare_data.make_tokenizer(tokens + entries, "x"), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_dataset_is_made_with_a_folders_tokenizer(tmp_path):
    make_hf_folder(tmp_path / "theirs")
    text = PROSE * 20
    (tmp_path / "a.txt").write_text(text)
    manifest, train, val = prepared(tmp_path, tmp_path / "a.txt", tokenizer=str(tmp_path / "theirs"))
    (wanted,) = their_ids(tmp_path / "theirs", [text])
    assert train[0] == val[0] == 0 and (train[1:51] == wanted[:50]).all()
    assert Dataset(tmp_path / "data" / "mine", 8).encoding.eot_token == 0
    assert manifest["tokenizer"]["name"] == str(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["typo", "bpe:1", "a/b/c", "x.tiktokens", "./none"])
def test_a_tokenizer_that_is_none_is_refused_at_once(name):
    with pytest.raises(ValueError, match="^tokenizer"):
        PrepareConfig(name="x", source="y", tokenizer=name).check()


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
