"""Tokenizers: training, files, patterns, and Hugging Face folders in and out."""

import base64
import hashlib
import json
import random
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
import regex
import tiktoken_ext.openai_public

import tokenizer as tk
from config import Failure

CLASSIC = Counter({b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3})  # Sennrich et al. 2016
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
PROSE = "the cat sat on the mat with the other cats; that's that.  \n\n 1234 日本語 naïve 😀! " * 9


def trained(text: str, vocab_size: int, pattern: str = "gpt2") -> tk.Tokenizer:
    counts = tk.count_pieces([text], pattern)
    return tk.Tokenizer.from_tokens(tk.train_bpe(counts, vocab_size), "x", pattern)


def naive_bpe(counts: Counter, vocab_size: int) -> list[bytes]:
    """The definition: count all pairs, merge the most frequent one everywhere, repeat."""
    tokens = [bytes([byte]) for byte in range(256)]
    pieces = {piece: [bytes([byte]) for byte in piece] for piece in counts}
    while len(tokens) < vocab_size - 1:
        pairs = Counter()
        for piece, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[piece]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], *map(tokens.index, pair)))
        if best[0] + best[1] not in tokens:
            tokens.append(best[0] + best[1])
        for parts in pieces.values():
            position = 0
            while position < len(parts) - 1:
                if (parts[position], parts[position + 1]) == best:
                    parts[position : position + 2] = [best[0] + best[1]]
                position += 1
    return tokens


def random_texts(count: int) -> list[str]:
    """Mixed scripts, emoji, control characters, white space, and what looks like end-of-text."""
    chooser, texts = random.Random(0), []
    for _ in range(count):
        pieces = []
        for _ in range(chooser.randrange(1, 12)):
            alphabet, length = chooser.choice(ALPHABETS), chooser.randrange(1, 9)
            pieces.append("".join(chooser.choices(alphabet, k=length)))
            rare = [tk.END_OF_TEXT, "the cats", chr(chooser.randrange(0xE000, 0x110000))]
            pieces.append(chooser.choice(rare) if chooser.random() < 0.2 else "")
        texts.append("".join(pieces))
    return texts


# ---- training


def test_the_worked_example_of_the_trainer():
    assert tk.train_bpe(CLASSIC, 261)[256:] == [b"es", b"est", b"lo", b"low"]


@pytest.mark.parametrize("alphabet", ["ab", "abc ", "abcdefgh  ", "aé日 "])
def test_the_trainer_equals_its_definition(alphabet):
    for seed in range(5):
        text = "".join(random.Random(seed).choices(alphabet, k=600))
        counts = tk.count_pieces([text], "gpt2")
        tokens = tk.train_bpe(counts, 330)
        assert tokens == naive_bpe(counts, 330)
        assert len(set(tokens)) == len(tokens) > 260


def test_the_trainer_ends_if_nothing_is_left_to_merge():
    assert tk.train_bpe(Counter({b"abab": 1}), 1000)[256:] == [b"ab", b"abab"]


def test_pieces_are_counted_as_encode_sees_them():
    assert tk.count_pieces(["a b b", " b"], "gpt2") == {b"a": 1, b" b": 3}
    assert tk.count_pieces(["12"], "qwen") == {b"1": 1, b"2": 1}
    assert tk.count_pieces(["e\u0301"], "qwen") == {"é".encode(): 1}
    assert tk.count_pieces(["a" * 5000 + " b"], "gpt2") == {b" b": 1}  # no word


# ---- encoding


@pytest.mark.parametrize("pattern", tk.PATTERNS)
def test_any_text_survives_and_never_becomes_end_of_text(pattern):
    for tokenizer in (
        tk.Tokenizer.from_tokens(tk.BYTES, "bytes", pattern),
        trained(PROSE, 300, pattern),
    ):
        assert tokenizer.vocab_size == len(tokenizer.ids) + 1 == tokenizer.end_of_text + 1
        for text in random_texts(200):
            tokens = tokenizer.encode(text + tk.END_OF_TEXT)
            wanted = tk.normalize(text, pattern) + tk.END_OF_TEXT
            assert tokens.dtype == "uint32" and tokenizer.decode(tokens) == wanted.encode()
            assert tokenizer.end_of_text not in tokens


def test_long_white_space_is_encoded():
    tokenizer = tk.Tokenizer.from_tokens(tk.BYTES, "bytes", "gpt2")
    text = "a" + " " * 1_500_000 + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode()
    assert tokenizer.encode("").tolist() == []


def test_ids_without_meaning_have_no_bytes():
    ids = {bytes([byte]): 2 * byte for byte in range(256)}
    tokenizer = tk.Tokenizer("x", "gpt2", ids, 999)
    assert tokenizer.vocab_size == 1000
    assert [tokenizer.token_bytes(token) for token in (194, 195, 999)] == [b"a", b"", b""]
    assert tokenizer.decode([999, 194, 196]) == b"ab"


@pytest.mark.parametrize("name, reference", [("gpt2", "r50k_base"), ("gpt4", "cl100k_base")])
def test_the_patterns_are_those_of_gpt2_and_gpt4(name, reference, monkeypatch):
    no_download = {"load_tiktoken_bpe": lambda *_, **__: {}}
    monkeypatch.setattr(tiktoken_ext.openai_public, *no_download.popitem())
    theirs = getattr(tiktoken_ext.openai_public, reference)()["pat_str"]
    chooser, alphabet = random.Random(0), "abZ é日1234 \t\r\n  '!-.sStTdDmMlLrRvVeE\u3000\u00a0"
    for _ in range(2000):
        text = "".join(chooser.choices(alphabet, k=30))
        assert regex.findall(tk.PATTERNS[name], text) == regex.findall(theirs, text)


# ---- names and files


def test_a_tokenizer_survives_its_file():
    tokens = tk.BYTES + [b"ab", b"abab"]
    plain = tk.Tokenizer.from_tokens(tokens, "x", "gpt2")
    assert tk.END_OF_TEXT not in plain.to_text()  # the id after the last is understood
    first = tk.Tokenizer("x", "gpt2", {token: 1 + i for i, token in enumerate(tokens)}, 0)
    far = tk.Tokenizer("x", "gpt2", {token: 2 * i for i, token in enumerate(tokens)}, 999)
    for tokenizer, vocab_size in ((plain, 259), (first, 259), (far, 1000)):
        again = tk.Tokenizer.from_record(tokenizer.record(), tokenizer.to_text())
        assert again.same_ids(tokenizer) and again.record() == tokenizer.record()
        assert again.end_of_text == tokenizer.end_of_text and again.vocab_size == vocab_size
        assert again.encode("ababab").tolist() == tokenizer.encode("ababab").tolist()
    assert not plain.same_ids(first)
    assert not plain.same_ids(tk.Tokenizer.from_tokens(tokens, "x", "gpt4"))


def test_bad_tokenizer_files_are_refused():
    lines = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tk.BYTES)]
    assert tk.Tokenizer.from_text("\n".join(lines), "x", "gpt2").vocab_size == 257
    bad_files = [["hello"], lines[:-1], ["a b c"]]
    bad_files += [[*lines, line] for line in ("YWI= 300", "!!!! 256", "YQ== 256")]
    for numbers in (["300", "301"], ["256"], ["-1"], ["2147483648"], ["x"]):
        bad_files.append([*lines, "YWI= 256", *(f"{tk.END_OF_TEXT} {n}" for n in numbers)])
    bad_files.append([*lines, "YR== 256", f"{tk.END_OF_TEXT} 300"])  # YR== decodes as YQ==
    for bad in bad_files:
        with pytest.raises(Failure, match="^x: "):
            tk.Tokenizer.from_text("\n".join(bad), "x", "gpt2")


def test_names_say_what_they_mean():
    assert tk.bpe_size("bpe:8192") == 8192
    assert {tk.bpe_size(name) for name in ("gpt2", "bytes", "a.tiktoken", "me/tiny", ".")} == {0}
    for name in ("", "typo", "bpe:1", "bpe:x", "bpe:9999999", "a/b/c", "x.tiktokens", "./none"):
        with pytest.raises(ValueError, match="^tokenizer"):
            tk.bpe_size(name)
    with pytest.raises(ValueError, match="use --tokenizer=bpe:300 --split_pattern=gpt4"):
        tk.bpe_size("bpe:300:gpt4")


def test_records_before_the_pattern_was_a_field_have_it_in_the_name():
    patterns = {"bpe:300:gpt4": "gpt4", "me/tiny:qwen": "qwen", "gpt4": "gpt4", "bpe:300": "gpt2"}
    for name, pattern in patterns.items():
        assert tk.pattern_of({"name": name}) == pattern
    assert tk.pattern_of({"name": "qwen", "pattern": "gpt2"}) == "gpt2"


def test_the_pattern_of_a_file_is_known_or_asked_for(tmp_path):
    mine = trained(PROSE, 300, "gpt4")
    path = tmp_path / "mine.tiktoken"
    path.write_text(mine.to_text())
    with pytest.raises(Failure, match="does not say --split_pattern"):
        tk.load_tokenizer(str(path), "", tmp_path)
    assert tk.load_tokenizer(str(path), "gpt4", tmp_path).same_ids(mine)
    with pytest.raises(Failure, match="pattern 'typo' is none of gpt2, gpt4, qwen"):
        tk.load_tokenizer(str(path), "typo", tmp_path)
    path = path.rename(tmp_path / "tokenizer.tiktoken")  # as in a dataset's folder
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": mine.record()}))
    assert tk.load_tokenizer(str(path), "", tmp_path).same_ids(mine)
    with pytest.raises(Failure, match="splits text as gpt4, not as --split_pattern=qwen"):
        tk.load_tokenizer(str(path), "qwen", tmp_path)
    with pytest.raises(Failure, match="there is no file"):
        tk.load_tokenizer(str(tmp_path / "none.tiktoken"), "gpt2", tmp_path)


def test_gpt2s_file_is_known_wherever_it_is(tmp_path, monkeypatch):
    gpt2 = trained(PROSE, 300)  # in place of the real one
    path = tmp_path / "downloads" / "gpt2.tiktoken"
    path.parent.mkdir()
    path.write_text(gpt2.to_text())
    monkeypatch.setattr(tk, "GPT2_SHA256", gpt2.record()["sha256"])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert tk.load_tokenizer("gpt2", "", path.parent).same_ids(gpt2)
    assert tk.load_tokenizer(str(path), "", tmp_path).same_ids(gpt2)
    path.rename(tmp_path / hashlib.sha1(tk.GPT2_URL.encode()).hexdigest())  # tiktoken's cache
    assert tk.load_tokenizer("gpt2", "", path.parent).same_ids(gpt2)
    with pytest.raises(Failure, match="splits text as gpt2, not as --split_pattern=gpt4"):
        tk.load_tokenizer("gpt2", "gpt4", path.parent)


# ---- Hugging Face folders


def their_ids(folder, texts: list[str]) -> list[list[int]]:
    """What the library `tokenizers` makes of texts, special tokens taken for plain text."""
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return [result.ids for result in theirs.encode_batch(texts, add_special_tokens=False)]


def our_ids(tokenizer: tk.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text).tolist() for text in texts]


def make_folder(folder, special=(tk.END_OF_TEXT,), split="gpt2", **changes):
    """A tokenizer that the library trained, as tokenizer.json and as the older pair of files.

    special: its first tokens. changes: of tokenizer.json, model__type="x" for {"model": {"type"}}.
    """
    library = pytest.importorskip("tokenizers")
    theirs, steps = library.Tokenizer(library.models.BPE()), library.pre_tokenizers
    theirs.pre_tokenizer = steps.ByteLevel(add_prefix_space=False)
    if split == "qwen":
        theirs.normalizer = library.normalizers.NFC()
        split = steps.Split(library.Regex(tk.PATTERNS["qwen"]), "isolated")
        level = steps.ByteLevel(add_prefix_space=False, use_regex=False)
        theirs.pre_tokenizer = steps.Sequence([split, level])
    trainer = library.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=steps.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([PROSE], trainer)
    folder.mkdir(exist_ok=True)
    theirs.model.save(str(folder))
    content = json.loads(theirs.to_str())
    for path, value in changes.items():
        *parents, last = path.split("__")
        parent = content[parents[0]] if parents else content
        parent[last] = value(parent.get(last)) if callable(value) else value
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("special, end", [(["<|endoftext|>"], 0), (["<pad>", "<s>", "</s>"], 2)])
@pytest.mark.parametrize("files", ["tokenizer.json", "qwen", "pair"])
def test_a_folders_tokenizer_makes_the_same_ids(tmp_path, special, end, files):
    make_folder(tmp_path, special, split="qwen" if files == "qwen" else "gpt2")
    texts = random_texts(1000)
    wanted = their_ids(tmp_path, texts)
    names = {"pad_token": "<pad>", "bos_token": {"content": "<s>"}, "eos_token": special[-1]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    if files == "pair":
        (tmp_path / "tokenizer.json").unlink()
    tokenizer = tk.load_tokenizer(str(tmp_path), "", tmp_path)
    assert tokenizer.end_of_text == end and tokenizer.vocab_size > 300
    assert tokenizer.pattern == ("qwen" if files == "qwen" else "gpt2")
    assert our_ids(tokenizer, texts) == wanted
    again = tk.Tokenizer.from_text(tokenizer.to_text(), "x", tokenizer.pattern)
    assert our_ids(again, texts) == wanted and again.end_of_text == end


@pytest.mark.parametrize("name", ["gpt4", "qwen"])
def test_the_name_of_a_folder_does_not_change_its_pattern(tmp_path, name, monkeypatch):
    make_folder(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    tokenizer = tk.load_tokenizer(name, "", tmp_path)
    texts = ["it's 12345 e\u0301\n\n  x", *random_texts(100)]
    assert tokenizer.pattern == "gpt2" and our_ids(tokenizer, texts) == their_ids(
        tmp_path / name, texts
    )
    with pytest.raises(Failure, match=f"splits text as gpt2, not as --split_pattern={name}"):
        tk.load_tokenizer(name, name, tmp_path)


def test_end_of_text_is_what_the_folder_says(tmp_path):
    added = [{"id": 5000, "content": tk.END_OF_TEXT, "special": True}]
    added += [{"id": 5001, "content": "<|im_end|>", "special": True}]
    make_folder(tmp_path, [], added_tokens=added)
    assert tk.load_hf_tokenizer(tmp_path, "x").end_of_text == 5000
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert tk.load_hf_tokenizer(tmp_path, "x").end_of_text == 5001
    make_folder(tmp_path, [])
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": 777}')
    assert tk.load_hf_tokenizer(tmp_path, "x").end_of_text == 777
    (tmp_path / "config.json").unlink()
    with pytest.raises(Failure, match="neither an eos_token nor"):
        tk.load_hf_tokenizer(tmp_path, "x")


def with_a_merge_never_made(model: dict) -> dict:
    """Of "xqz", "x q" merges first, so that "x qz" never does."""
    last = max(model["vocab"].values())
    for number, (left, right) in enumerate((("x", "q"), ("q", "z"), ("x", "qz")), 1):
        model["vocab"][left + right] = last + number
        model["merges"].append([left, right])
    return model


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": "a|b"}, "behavior": "Isolated", "invert": False}
STEPS = {"type": "Sequence", "pretokenizers": [SPLIT, LEVEL]}
TWICE = [["th", "e"], ["t", "he"]]
AS_TEXT = [{"id": 0, "content": "  ", "special": False}]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"normalizer": {"type": "NFC"}}, "whose normalizer is {'type': 'NFC'}"),
        ({"split": "qwen", "normalizer": None}, "whose normalizer is None"),
        ({"model__type": "Unigram"}, "whose type is 'Unigram'"),
        ({"model__dropout": 0.1}, "whose dropout is 0.1"),
        ({"model__byte_fallback": True}, "whose byte_fallback is True"),
        ({"model__end_of_word_suffix": "</w>"}, "whose end_of_word_suffix is"),
        ({"pre_tokenizer": None}, "not byte-level"),
        ({"pre_tokenizer__add_prefix_space": True}, "add_prefix_space"),
        ({"pre_tokenizer": LEVEL}, "it splits text by none of gpt2, gpt4"),
        ({"pre_tokenizer": STEPS}, "it splits text by none of"),
        ({"model__merges": lambda merges: [*merges[1:], merges[0]]}, "out of order"),
        ({"model__merges": lambda merges: [*merges[:-2], *merges[:-3:-1]]}, "out of order"),
        ({"model__merges": lambda merges: merges[:-1]}, "is neither byte, nor merged"),
        ({"model__merges": lambda merges: [*merges, *TWICE]}, "out of order or never made"),
        ({"model": with_a_merge_never_made}, "merge 'x qz' is out of order or never made"),
        ({"model__vocab": lambda vocab: vocab | {"new": 900}}, "entry 'new' is neither"),
        ({"model__vocab": lambda vocab: {t: vocab[t] for t in vocab if t != "!"}}, "KeyError"),
        ({"model__vocab": lambda vocab: vocab | {"!": vocab["?"]}}, "no id twice"),
        ({"model__vocab": lambda vocab: vocab | {"!": "1"}}, "not a whole number"),
        ({"added_tokens": AS_TEXT}, "text can become the added token '  '"),
        ({"model": None}, "AttributeError"),
    ],
)
def test_a_tokenizer_whose_ids_could_differ_is_refused(tmp_path, changes, message):
    make_folder(tmp_path, **changes)
    with pytest.raises(Failure, match=message) as failure:
        tk.load_hf_tokenizer(tmp_path, str(tmp_path))
    assert "\n" not in str(failure.value) and str(tmp_path) in str(failure.value)


def test_a_damaged_folder_is_refused(tmp_path):
    with pytest.raises(Failure, match="has no tokenizer.json, nor vocab.json and merges.txt"):
        tk.load_hf_tokenizer(tmp_path, "x")
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(Failure, match="tokenizer.json holds a JSON list"):
        tk.load_hf_tokenizer(tmp_path, "x")
    make_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    for _ in range(2):
        with pytest.raises(Failure, match="add_prefix_space"):
            tk.load_hf_tokenizer(tmp_path, "x")
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)  # the older pair remains


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "gpt4", "qwen", "reversed", "folder"])
def test_an_exported_tokenizer_makes_the_same_ids(tmp_path, kind):
    tokenizer = tk.Tokenizer.from_tokens(tk.BYTES, "bytes", "gpt2")
    if kind in tk.PATTERNS:
        tokenizer = trained(PROSE, 330, kind)
    elif kind == "reversed":
        tokenizer = tk.Tokenizer.from_tokens([*reversed(tk.BYTES), b"th", b"the"], "x", "gpt2")
    elif kind == "folder":
        make_folder(tmp_path / "theirs")
        tokenizer = tk.load_tokenizer(str(tmp_path / "theirs"), "", tmp_path)
    tk.save_hf_tokenizer(tokenizer, tmp_path / "hf")
    texts = random_texts(1000)
    wanted = our_ids(tokenizer, texts)
    assert their_ids(tmp_path / "hf", texts) == wanted
    assert tk.load_tokenizer(str(tmp_path / "hf"), "", tmp_path).same_ids(tokenizer)
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = auto(texts, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert ids == wanted
    assert auto.eos_token_id == auto.bos_token_id == tokenizer.end_of_text
    plain = [unicodedata.normalize("NFC", text) if kind == "qwen" else text for text in texts[:50]]
    assert [auto.decode(tokens) for tokens in wanted[:50]] == plain


def test_tokens_that_merges_do_not_make_cannot_be_exported(tmp_path):
    end = tk.END_OF_TEXT.encode()
    for tokens in ([b"abc"], [end[:length] for length in range(2, len(end) + 1)]):
        with pytest.raises(Failure, match="cannot be written as a tokenizer.json"):
            tk.save_hf_tokenizer(
                tk.Tokenizer.from_tokens(tk.BYTES + tokens, "x", "gpt2"), tmp_path / "hf"
            )
    assert not (tmp_path / "hf").exists()
