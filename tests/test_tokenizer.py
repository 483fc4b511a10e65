"""Tokenizers: training, files, patterns, and Hugging Face folders in and out."""

import base64
import json
import os
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import regex
import tiktoken_ext.openai_public
from conftest import refused, write

import tokenizer as tk
import tokenizer_files as tf

CLASSIC = Counter({b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3})  # Sennrich et al. 2016
ALPHABETS = (
    "abcdefgh 'sStTlLvVrReEdDmM",
    " \t\n\r\x0b\x0c\x85\u2028\u3000\xa0\0\x01\x1f\x7f",
    "0123456789\u00b2\u00bd\u0663!?.,-\u2014<|>",
    "\u00e9\u00e0\u00fc\u00df\u0301\u017f\u212a\ufb06",
    "\u65e5\u672c\u8a9e\ud55c\uad6d\u05d0\u05d1\u0627\u0644\u0939\u093f",
    "\U0001f600\U0001f469\u200d\U0001f467\U0001f3fd\U0001f1e9\U0001f1ea\ufe0f",
)
PROSE = "the cat sat on the mat with the other cats; that's that.  \n\n 1234 日本語 naïve 😀! " * 9


def trained(text: str, vocab_size: int, pattern: str = "gpt2") -> tk.Tokenizer:
    counts = tk.count_pieces([text], pattern)
    return tk.Tokenizer.from_tokens(tk.train_bpe(counts, vocab_size), "x", pattern)


def load(path, pattern="") -> tk.Tokenizer:
    return tf.load_tokenizer(str(path), pattern, downloads=path.parent)


def restored(tokenizer: tk.Tokenizer) -> tk.Tokenizer:
    """The tokenizer from its record and file, after asserting that nothing is lost."""
    again = tk.Tokenizer.from_record(tokenizer.record(), tokenizer.to_text())
    assert again.same_ids(tokenizer) and again.record() == tokenizer.record()
    assert again.end_of_text == tokenizer.end_of_text
    return again


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


def test_the_trainer_makes_the_worked_example_and_ends_if_nothing_is_left_to_merge():
    assert tk.train_bpe(CLASSIC, 261)[256:] == [b"es", b"est", b"lo", b"low"]
    assert tk.train_bpe(Counter({b"abab": 1}), 1000)[256:] == [b"ab", b"abab"]


@pytest.mark.parametrize("alphabet", ["ab", "abc ", "abcdefgh  ", "aé日 "])
def test_the_trainer_equals_its_definition(alphabet):
    for seed in range(5):
        text = "".join(random.Random(seed).choices(alphabet, k=600))
        counts = tk.count_pieces([text], "gpt2")
        tokens = tk.train_bpe(counts, 330)
        assert tokens == naive_bpe(counts, 330)
        assert len(set(tokens)) == len(tokens) > 260


def test_pieces_are_counted_as_encode_sees_them():
    assert tk.count_pieces(["a b b", " b"], "gpt2") == {b"a": 1, b" b": 3}
    assert tk.count_pieces(["12"], "qwen") == {b"1": 1, b"2": 1}
    assert tk.count_pieces(["e\u0301"], "qwen") == {"é".encode(): 1}
    long = tk.count_pieces(["a" * 2500 + " b"], "gpt2")  # in stretches
    assert long == {b"a" * 1000: 2, b"a" * 500: 1, b" b": 1}
    dna = "".join(random.Random(0).choices("ACGT", k=10_000))
    assert trained(dna, 300).vocab_size == 300


@pytest.mark.parametrize("pattern", tk.PATTERNS)
def test_any_text_survives_and_never_becomes_end_of_text(pattern):
    for tokenizer in (trained("", 300, pattern), trained(PROSE, 300, pattern)):
        assert tokenizer.vocab_size == len(tokenizer.ids) + 1 == tokenizer.end_of_text + 1
        for text in random_texts(200):
            tokens = tokenizer.encode(text + tk.END_OF_TEXT)
            wanted = tk.normalize(text, pattern) + tk.END_OF_TEXT
            assert tokens.dtype == "uint32" and tokenizer.decode(tokens) == wanted.encode()
            assert tokenizer.end_of_text not in tokens


@pytest.mark.parametrize("pattern", tk.PATTERNS)
def test_long_white_space_is_encoded_as_short(pattern, monkeypatch):
    tokenizer = tk.Tokenizer.from_tokens([*tk.BYTES, b"ab"], "x", pattern)
    assert tokenizer.encode("").tolist() == []
    text = " " * 1_500_000 + "x" * 99_999 + "ab"  # too long for tiktoken's regex engine
    assert tokenizer.encode(text).tolist() == [32] * 1_500_000 + [120] * 99_999 + [256]
    tokenizer, chooser = trained(PROSE + " \n \n\n  \t " * 50, 400, pattern), random.Random(0)
    texts = ["".join(chooser.choices("    \n\n\r\t\x1c\u3000ab!1'", k=30)) for _ in range(2000)]
    wanted = our_ids(tokenizer, texts)
    for stretch in (1, 2, 3):
        monkeypatch.setattr(tk, "STRETCH", stretch)
        assert our_ids(tokenizer, texts) == wanted


@pytest.mark.parametrize("name, reference", [("gpt2", "r50k_base"), ("gpt4", "cl100k_base")])
def test_the_patterns_are_those_of_gpt2_and_gpt4(name, reference, monkeypatch):
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    theirs = getattr(tiktoken_ext.openai_public, reference)()["pat_str"]
    chooser, alphabet = random.Random(0), "abZ é日1234 \t\r\n  '!-.sStTdDmMlLrRvVeE\u3000\u00a0"
    for _ in range(2000):
        text = "".join(chooser.choices(alphabet, k=30))
        assert regex.findall(tk.PATTERNS[name], text) == regex.findall(theirs, text)


def test_a_tokenizer_survives_its_file():
    tokens = tk.BYTES + [b"ab", b"abab"]
    plain = tk.Tokenizer.from_tokens(tokens, "x", "gpt2")
    assert tk.END_OF_TEXT not in plain.to_text()  # the id after the last is understood
    first = tk.Tokenizer("x", "gpt2", {token: 1 + i for i, token in enumerate(tokens)}, 0)
    far = tk.Tokenizer("x", "gpt2", {token: 2 * i for i, token in enumerate(tokens)}, 999)
    for tokenizer, vocab_size in ((plain, 259), (first, 259), (far, 1000)):
        again = restored(tokenizer)
        assert again.vocab_size == vocab_size
        assert again.encode("ababab").tolist() == tokenizer.encode("ababab").tolist()
    assert far.decode([999, 194, 195, 196]) == b"ab"  # ids without meaning have no bytes
    assert not plain.same_ids(first)
    assert not plain.same_ids(tk.Tokenizer.from_tokens(tokens, "x", "gpt4"))


def test_bad_tokenizer_files_are_refused():
    lines = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tk.BYTES)]
    assert tk.Tokenizer.from_text("\n".join(lines), "x", "gpt2").vocab_size == 257
    bad_files = [["hello"], lines[:-1], ["a b c"]]
    bad_files += [[*lines, line] for line in ("YWI= 300", "!!!! 256", "YQ== 256")]
    for number in ("256", "-1", "2147483648", "x"):
        bad_files.append([*lines, "YWI= 256", f"{tk.END_OF_TEXT} {number}"])
    for bad in bad_files:
        refused("^x: ", tk.Tokenizer.from_text, "\n".join(bad), "x", "gpt2")


def test_names_say_what_they_mean():
    assert tf.bpe_size("bpe:8192") == 8192
    assert {tf.bpe_size(name) for name in ("gpt2", "bytes", "a.tiktoken", "me/tiny", ".")} == {0}
    for name in ("", "typo", "bpe:1", "bpe:300:gpt4", "bpe:9999999", "a/b/c", "x.tik", "./none"):
        with pytest.raises(ValueError, match="^tokenizer"):
            tf.bpe_size(name)


def test_the_pattern_of_a_file_is_known_or_asked_for(tmp_path):
    mine = trained(PROSE, 300, "gpt4")
    path = write(tmp_path / "mine.tiktoken", mine.to_text())
    refused("choose --split_pattern", load, path)
    assert load(path, "gpt4").same_ids(mine)
    refused("pattern 'typo' is none of gpt2, gpt4, qwen", load, path, "typo")
    path = path.rename(tmp_path / "tokenizer.tiktoken")  # as in a dataset's folder
    write(tmp_path / "manifest.json", json.dumps({"tokenizer": mine.record()}))
    assert load(path).same_ids(mine)
    refused("splits text as gpt4, not as --split_pattern=qwen", load, path, "qwen")
    os.mkfifo(tmp_path / "pipe.tiktoken")
    for name in ("none.tiktoken", "pipe.tiktoken"):
        refused("there is no file", load, tmp_path / name)
    for added in ([1], {"\ud800": 999}):  # half a character, which JSON can name
        damaged = {"tokenizer": mine.record() | {"added_tokens": added}}
        write(tmp_path / "manifest.json", json.dumps(damaged))
        if isinstance(added, list):
            refused("added_tokens is not an object", load, path)
        else:
            assert load(path).decode([999]) == b"?"
    for foreign in ('{"tokenizer": [1]}', '{"tokenizer": {"sha256": 3}}', "{}"):
        write(tmp_path / "manifest.json", foreign)
        refused("choose --split_pattern", load, path)


def test_openais_files_are_known(tmp_path, monkeypatch):
    theirs = trained(PROSE, 300)  # in place of the real ones
    path = write(tmp_path / "downloads" / "gpt2.tiktoken", theirs.to_text())
    sha256 = theirs.record()["sha256"]
    monkeypatch.setattr(tf, "GPT2_SHA256", sha256)
    gpt2, cl100k = tf.KNOWN_FILES.values()
    monkeypatch.setitem(tf.KNOWN_FILES, sha256, gpt2)
    assert tf.load_tokenizer("gpt2", "", path.parent).same_ids(theirs)
    monkeypatch.setitem(tf.KNOWN_FILES, sha256, cl100k)
    assert (load(path).pattern, load(path).end_of_text) == ("gpt4", 100257)
    refused("splits text as gpt4, not as --split_pattern=gpt2", load, path, "gpt2")


def their_ids(folder, texts: list[str]) -> list[list[int]]:
    """What the library `tokenizers` makes of texts, special tokens taken for plain text."""
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return [result.ids for result in theirs.encode_batch(texts, add_special_tokens=False)]


def our_ids(tokenizer: tk.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text).tolist() for text in texts]


def make_folder(folder, special=(tk.END_OF_TEXT,), split="gpt2", **changes):
    """A tokenizer.json that the library trained; `special` are its first tokens.

    changes: of its content, model__type="x" for {"model": {"type"}}.
    """
    library = pytest.importorskip("tokenizers")
    theirs, steps = library.Tokenizer(library.models.BPE()), library.pre_tokenizers
    theirs.pre_tokenizer = steps.ByteLevel(add_prefix_space=False)
    if split == "qwen":
        theirs.normalizer = library.normalizers.NFC()
        split = steps.Split(library.Regex(tk.PATTERNS["qwen"]), "isolated")
        level = steps.ByteLevel(add_prefix_space=False, use_regex=False)
        theirs.pre_tokenizer = steps.Sequence([split, level])
    options = dict(special_tokens=list(special), initial_alphabet=steps.ByteLevel.alphabet())
    trainer = library.trainers.BpeTrainer(vocab_size=400, show_progress=False, **options)
    theirs.train_from_iterator([PROSE], trainer)
    content = json.loads(theirs.to_str())
    for path, value in changes.items():
        *parents, last = path.split("__")
        parent = content[parents[0]] if parents else content
        parent[last] = value(parent.get(last)) if callable(value) else value
    write(folder / "tokenizer.json", json.dumps(content))


@pytest.mark.parametrize("special, end", [(["<|endoftext|>"], 0), (["<pad>", "<s>", "</s>"], 2)])
@pytest.mark.parametrize("pattern", ["gpt2", "qwen"])
def test_a_folders_tokenizer_makes_the_same_ids(tmp_path, special, end, pattern):
    folder, texts = tmp_path / "gpt4", random_texts(1000)  # the folder's name says nothing
    make_folder(folder, special, pattern)
    names = {"bos_token": {"content": special[0]}, "eos_token": special[-1], "pad_token": None}
    write(folder / "tokenizer_config.json", json.dumps(names))
    tokenizer = load(folder)
    assert (tokenizer.end_of_text, tokenizer.pattern) == (end, pattern)
    assert tokenizer.vocab_size > 300 and our_ids(tokenizer, texts) == their_ids(folder, texts)
    restored(tokenizer)
    refused(f"splits text as {pattern}, not as --split_pattern=gpt4", load, folder, "gpt4")


def test_end_of_text_is_what_the_folder_says(tmp_path):
    added = [{"id": 5000, "content": tk.END_OF_TEXT, "special": True}]
    added += [{"id": 5001, "content": "<|im_end|>", "special": True}]
    make_folder(tmp_path, [], added_tokens=added)
    assert tf.load_hf_tokenizer(tmp_path, "x").end_of_text == 5000
    settings = write(tmp_path / "tokenizer_config.json", '{"eos_token": "<|im_end|>"}')
    assert tf.load_hf_tokenizer(tmp_path, "x").end_of_text == 5001
    make_folder(tmp_path, [])
    settings.unlink()
    write(tmp_path / "config.json", '{"eos_token_id": 777}')
    assert tf.load_hf_tokenizer(tmp_path, "x").end_of_text == 777
    settings = write(tmp_path / "tokenizer_config.json", '{"eos_token": null}')
    assert tf.load_hf_tokenizer(tmp_path, "x").end_of_text == 777
    for number, message in (("null", "neither an eos_token nor"), ("5", "2 tokens have the id 5")):
        write(tmp_path / "config.json", f'{{"eos_token_id": {number}}}')
        refused(message, tf.load_hf_tokenizer, tmp_path, "x")


ADDED = {"<|endoftext|>": 5000, "<|im_end|>": 5001, "<think>": 5002, "<think>!": 5004, "a ": 5005}


def make_chat_folder(folder, pattern: str):
    """A folder as Qwen3's: its eos_token is not <|endoftext|>, and some tokens are not special."""
    tokens = [{"id": n, "content": token, "special": n < 5002} for token, n in ADDED.items()]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    changes = {"added_tokens": [token | flags for token in tokens]}
    changes["model__vocab"] = lambda vocab: vocab | ADDED  # else their ids follow the others
    make_folder(folder, [], pattern, **changes)
    write(folder / "tokenizer_config.json", '{"eos_token": "<|im_end|>"}')


@pytest.mark.parametrize("pattern", ["gpt2", "qwen"])
def test_added_tokens_are_kept_or_plain_text(tmp_path, pattern):
    make_chat_folder(tmp_path / "theirs", pattern)
    plain = load(tmp_path / "theirs")
    assert (plain.end_of_text, plain.vocab_size) == (5001, 5006)
    keep, texts = replace(plain, special_tokens="keep"), random_texts(500)
    texts = [text + "<think>!the a <|im_end|>a\u0301<think>" + text for text in texts]
    auto = pytest.importorskip("transformers").AutoTokenizer
    theirs = auto.from_pretrained(tmp_path / "theirs")(texts)["input_ids"]
    assert our_ids(keep, texts) == theirs
    ids = plain.encode("".join(texts))
    assert not set(ids) & {*ADDED.values()} and plain.encode("<think>").size > 3
    assert plain.special_regex.findall("<<think>>!a<think>!") == ["<think>", "<think>!"]
    assert keep.decode([5002, 5001]) == b"<think>"
    for tokenizer in (plain, keep):
        restored(tokenizer)
        write(tmp_path / "set" / "x.tiktoken", tokenizer.to_text())
        write(tmp_path / "set" / "manifest.json", json.dumps({"tokenizer": tokenizer.record()}))
        assert load(tmp_path / "set" / "x.tiktoken").same_ids(plain)
        tf.save_hf_tokenizer(tokenizer, tmp_path / "hf")
        assert load(tmp_path / "hf").same_ids(plain)
        exported = auto.from_pretrained(tmp_path / "hf")
        assert exported.eos_token == "<|im_end|>" and exported.get_added_vocab() == ADDED
        wanted = [tokenizer.encode_document(text).tolist() for text in texts]
        assert exported(texts)["input_ids"] == wanted
    without = tk.Tokenizer(plain.name, pattern, plain.ids, plain.end_of_text)
    assert not without.same_ids(plain)


def with_a_merge_never_made(model: dict) -> dict:
    """Of "xqz", "x q" merges first, so that "x qz" never does."""
    last = max(model["vocab"].values())
    for number, (left, right) in enumerate((("x", "q"), ("q", "z"), ("x", "qz")), 1):
        model["vocab"][left + right] = last + number
        model["merges"].append([left, right])
    return model


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
TWICE = [["th", "e"], ["t", "he"]]
WITH_FLAG = [{"id": 0, "content": "<mask>", "special": True, "lstrip": True}]
TAKEN = [{"id": 5, "content": "<user>", "special": True}]
NO_NUMBER = [{"id": "5000", "content": "<user>", "special": True}]
DAMAGE = [
    ({"normalizer": {"type": "NFC"}}, "of normalizer {'type': 'NFC'}"),
    ({"split": "qwen", "normalizer": None}, "of normalizer None"),
    ({"model__type": "Unigram"}, "of type 'Unigram'"),
    ({"model__end_of_word_suffix": "</w>"}, "of end_of_word_suffix '</w>'"),
    ({"pre_tokenizer": None}, "not byte-level"),
    ({"pre_tokenizer__add_prefix_space": True}, "add_prefix_space"),
    ({"pre_tokenizer": LEVEL}, "splits text by .*, not as gpt2, gpt4, qwen do"),
    ({"model__merges": lambda merges: [*merges[1:], merges[0]]}, "out of order"),
    ({"model__merges": lambda merges: merges[:-1]}, "is neither byte, nor merged"),
    ({"model__merges": lambda merges: [*merges, *TWICE]}, "out of order or never made"),
    ({"model": with_a_merge_never_made}, "merge 'x qz' is out of order or never made"),
    ({"model__vocab": lambda vocab: {t: vocab[t] for t in vocab if t != "!"}}, "KeyError"),
    ({"model__vocab": lambda vocab: vocab | {"!": vocab["?"]}}, "2 tokens have the id"),
    ({"model__vocab": lambda vocab: vocab | {"!": "1"}}, "damaged or of another kind"),
    ({"added_tokens": WITH_FLAG}, "an added token like .*mask.* is not supported"),
    ({"added_tokens": TAKEN}, "2 tokens have the id 5"),
    ({"added_tokens": NO_NUMBER}, "ids must be whole numbers"),
    ({"model": None}, "TypeError"),
]


@pytest.mark.parametrize("changes, message", DAMAGE)
def test_a_tokenizer_whose_ids_could_differ_is_refused(tmp_path, changes, message):
    make_folder(tmp_path, **changes)
    assert str(tmp_path) in refused(message, load, tmp_path)


def test_a_damaged_folder_is_refused(tmp_path):
    write(tmp_path / "vocab.json", "{}")  # of the older pair of files
    refused("has no tokenizer.json; transformers", tf.load_hf_tokenizer, tmp_path, "x")
    write(tmp_path / "tokenizer.json", "[1]")
    refused("tokenizer.json holds a JSON list", tf.load_hf_tokenizer, tmp_path, "x")


BAD_SETTINGS = [
    ({"add_prefix_space": True}, "add_prefix_space"),
    ({"eos_token": []}, "damaged or of another kind"),
    ({"eos_token": "</s>"}, "tokenizer.json lacks '</s>'"),
    ({"added_tokens_decoder": {"9": {"content": "<user>"}}}, "tokenizer.json lacks '<user>'"),
    ({"tokenizer_class": "Qwen2Tokenizer"}, "splits text as gpt2, not as Qwen2Tokenizer"),
    ({"tokenizer_class": None}, "splits text as gpt2, not as qwen3"),
]


@pytest.mark.parametrize("settings, message", BAD_SETTINGS)
def test_settings_that_change_ids_are_refused(tmp_path, settings, message):
    make_folder(tmp_path)
    write(tmp_path / "config.json", '{"model_type": "qwen3"}')
    settings = {"tokenizer_class": "GPT2TokenizerFast"} | settings
    write(tmp_path / "tokenizer_config.json", json.dumps(settings))
    refused(message, load, tmp_path)


@pytest.mark.parametrize("kind", [*tk.PATTERNS, "reversed", "folder"])
def test_an_exported_tokenizer_makes_the_same_ids(tmp_path, kind):
    if kind in tk.PATTERNS:
        tokenizer = trained(PROSE, 330, kind)
    elif kind == "reversed":
        tokenizer = tk.Tokenizer.from_tokens([*reversed(tk.BYTES), b"th", b"the"], "x", "gpt2")
    else:
        make_folder(tmp_path / "theirs")
        tokenizer = load(tmp_path / "theirs")
    tf.save_hf_tokenizer(tokenizer, tmp_path / "hf")
    texts = random_texts(1000)
    wanted = our_ids(tokenizer, texts)
    assert load(tmp_path / "hf").same_ids(tokenizer)
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "hf")
    prefixed = [[tokenizer.end_of_text, *tokens] for tokens in wanted]
    assert auto(texts)["input_ids"] == prefixed
    assert auto.eos_token_id == auto.bos_token_id == tokenizer.end_of_text
    plain = [tk.normalize(text, tokenizer.pattern) for text in texts[:50]]
    assert [auto.decode(tokens) for tokens in wanted[:50]] == plain


def test_tokens_that_merges_do_not_make_cannot_be_exported(tmp_path):
    end = tk.END_OF_TEXT.encode()
    for tokens in ([b"abc"], [end[:length] for length in range(2, len(end) + 1)]):
        tokenizer = tk.Tokenizer.from_tokens(tk.BYTES + tokens, "x", "gpt2")
        refused("cannot be written as the merges", tf.save_hf_tokenizer, tokenizer, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
