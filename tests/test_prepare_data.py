"""From text to a dataset: what is kept, in which split, and what a failed run leaves behind."""

import errno
import gzip
import hashlib
import json
import lzma
import multiprocessing
import os
import random
import re
import shutil
import signal
import string
import sys
from base64 import b64encode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import run

import config
import prepare_data
from config import INPUT_OUTPUT, Failure
from dataset import Dataset
from prepare_data import PrepareConfig

GOOD = "some text, and more of it\n" * 100
BYTES = [bytes([byte]) for byte in range(256)]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_texts(path: Path, texts) -> Path:
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    return write(path, "".join(lines))


def write_tokenizer(path: Path, tokens: list[bytes]) -> Path:
    return write(path, "".join(f"{b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))


def settings_for(folder: Path, source="", **changes) -> PrepareConfig:
    """Settings for the dataset `mine` in folder/data, made of files or of a list of texts."""
    if isinstance(source, list):
        source = write_texts(folder / "texts.jsonl", source)
    options = {"name": "mine", "source": str(source), "data_dir": str(folder / "data")}
    options |= {"processes": 1, "tokenizer": "bytes" if source else ""}
    settings = PrepareConfig(**options | changes)
    settings.check()
    return settings


def prepared(folder: Path, source="", **changes) -> tuple[dict, list[str], list[str]]:
    """The manifest of a new dataset, and its documents for training and for validation."""
    path = prepare_data.prepare(settings_for(folder, source, **changes))
    dataset = Dataset(path, 1)
    texts = []
    for split in ("train", "val"):
        tokens = np.concatenate(getattr(dataset, split).shards).tolist()
        starts = [i for i, token in enumerate(tokens) if token == dataset.tokenizer.end_of_text]
        assert starts[0] == 0
        ends = [*starts[1:], len(tokens)]
        decode = dataset.tokenizer.decode
        texts.append([decode(tokens[i + 1 : end]).decode() for i, end in zip(starts, ends)])
        entry = dataset.manifest["splits"][split]
        assert entry["documents"] == len(starts) and entry["tokens"] == len(tokens)
        assert entry["bytes"] == sum(len(text.encode()) for text in texts[-1])
    return dataset.manifest, *texts


def fails(message: str, folder: Path, source="", code: int = 2, **changes):
    with pytest.raises(Failure, match=message) as failure:
        prepare_data.prepare(settings_for(folder, source, **changes))
    assert failure.value.code == code and len(str(failure.value).splitlines()) <= 3
    assert not {"mine", ".mine"} & set(names(folder / "data"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_val(text: str) -> bool:
    """Whether a document is among the tenth for validation: its hash alone decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < 2**64 // 10


def in_split(val: bool, texts) -> str:
    return next(text for text in texts if is_val(text) == val)


def splits_of(texts) -> tuple[list[str], list[str]]:
    return [text for text in texts if not is_val(text)], [text for text in texts if is_val(text)]


def random_words(generator: random.Random, count: int) -> list[str]:
    return ["".join(generator.choices(string.ascii_lowercase, k=5)) for _ in range(count)]


def random_texts(seed: int, documents: int, words: int = 40) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(random_words(generator, words)) for _ in range(documents)]


# ---- settings and the command line


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "../up"}, "give the dataset a plain name"),
        ({"name": "downloads"}, "give the dataset a plain name"),
        ({"source": ""}, "mine is not one of stdlib, .*; for your own text --source=PATH"),
        ({"name": "stdlib"}, "stdlib is a named dataset; give your own text another name"),
        ({"merge": "a"}, "source x and merge a: give one of the two"),
        ({"source": "-", "decontaminate": "-"}, "cannot both be standard input"),
        ({"source": "", "merge": "a", "clean": "web"}, "clean has no effect here"),
        (
            {"source": "", "name": "fineweb-10b-gpt2", "tokenizer": "gpt2"},
            "tokenizer has no effect",
        ),
        ({"clean": "soap"}, "clean is 'soap' and must be one of none, basic, web"),
        ({"split_pattern": "gpt5"}, "split_pattern is 'gpt5' and must be one of gpt2, gpt4, qwen"),
        ({"processes": -1}, "processes is -1"),
        ({"val_fraction": 1.0}, "val_fraction 1.0 must be at least 0 and below 1"),
        ({"near_threshold": 0.0}, "near_threshold 0.0 must be above 0"),
        ({"shard_tokens": 2**31}, "shard_tokens 2147483648 must be from 1 to 2147483647"),
        ({"web_off": "sentences,typo"}, "web_off: typo is not one of word_count"),
        ({"tokenizer": "typo"}, "tokenizer 'typo' is none of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**{"name": "mine", "source": "x"} | changes).check()


def test_a_dataset_with_its_own_tokenizer_is_made_without_torch(tmp_path):
    """torch cannot be imported here, neither by the script nor by its workers."""
    write(tmp_path / "no_torch" / "torch.py", "raise ImportError('torch')")
    write_texts(tmp_path / "a.jsonl", random_texts(0, 60, 6000))  # 2 MB: two parts at least
    options = ["--source=a.jsonl", "--tokenizer=bpe:270", "--split_pattern=gpt4", "--processes=2"]
    script, environment = prepare_data.__file__, {"PYTHONPATH": str(tmp_path / "no_torch")}
    result = run(script, "mine", *options, cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    dataset = Dataset(tmp_path / "data" / "mine", 8)
    assert dataset.tokenizer.vocab_size == 270 and dataset.tokenizer.pattern == "gpt4"
    assert dataset.manifest["tokenizer"] == dataset.tokenizer.record()
    assert "60 of 60 documents" in result.stdout
    assert "python train.py config/small.py --dataset=mine --out_dir=out/mine" in result.stdout
    result = run(script, "mine", "--source=none", "--data_dir=x", cwd=tmp_path, **environment)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("prepare_data.py: --source=none: no such file")


def test_an_existing_folder_is_never_changed(tmp_path, capsys):
    prepared(tmp_path, [GOOD])
    before = contents(tmp_path / "data" / "mine")
    write(tmp_path / "data" / ".mine" / "texts", "left by a killed run")
    prepare_data.prepare(settings_for(tmp_path, [GOOD], processes=2))
    assert "exists; delete it to read the text again" in capsys.readouterr().out
    with pytest.raises(Failure, match="was made with val_fraction 0.1, not 0.2"):
        prepare_data.prepare(settings_for(tmp_path, [GOOD], val_fraction=0.2))
    assert contents(tmp_path / "data" / "mine") == before
    write(tmp_path / "data" / "other" / "notes.txt", "notes")
    write(tmp_path / "data" / "file", "notes")
    write(tmp_path / "data" / "app" / "manifest.json", '{"name": "an app"}')
    for name, message in (("other", "is not a dataset"), ("file", ""), ("app", "is damaged")):
        with pytest.raises((Failure, NotADirectoryError), match=message):
            prepare_data.prepare(settings_for(tmp_path, [GOOD], name=name))
    assert names(tmp_path / "data" / "other") == ["notes.txt"]
    assert {"app", "file", "mine", "other"} == {n for n in names(tmp_path / "data") if n[0] != "."}


# ---- what a dataset holds


def any_texts(count: int) -> list[str]:
    """Texts with characters of all planes, some with the name of the end-of-text token."""
    generator, texts = random.Random(0), []
    ranges = [range(0x80), range(0x800), range(0xD800), range(0xE000, 0x10000)]
    ranges.append(range(0x10000, 0x110000))
    for number in range(count):
        codes = [generator.choice(generator.choice(ranges)) for _ in range(1 + number % 30)]
        texts.append("".join(map(chr, codes)) + ("<|endoftext|>" if number % 3 else "\r\n x"))
    return texts


@pytest.mark.parametrize("tokenizer, pattern", [("bytes", ""), ("bpe:300", ""), ("file", "gpt4")])
def test_shards_hold_any_documents_exactly(tmp_path, tokenizer, pattern):
    if tokenizer == "file":
        pairs = [bytes(pair) for pair in product(b" \n\taeinorst\xc3\xe3\x81\xf0\x9f", repeat=2)]
        tokenizer = str(write_tokenizer(tmp_path / "x.tiktoken", BYTES + pairs))
    texts, options = any_texts(2000), {"tokenizer": tokenizer, "split_pattern": pattern}
    manifest, train, val = prepared(tmp_path, texts, clean="none", dedupe="none", **options)
    assert (train, val) == splits_of(texts)
    assert manifest["documents"] == {"in": 2000, "kept": 2000, "dropped": {}}
    size = sum(len(text.encode()) for text in texts)
    assert manifest["bytes"] == {"in": size, "kept": size, "dropped": {}}
    assert manifest["tokenizer"]["pattern"] == (pattern or "gpt2")


def test_a_vocabulary_above_65536_has_shards_of_32_bits(tmp_path):
    pairs = [first + second for first, second in product(BYTES, BYTES) if first != b"x"]
    pairs += [b"x" + second for second in BYTES]  # have the highest ids
    path, texts = write_tokenizer(tmp_path / "x.tiktoken", BYTES + pairs), random_texts(0, 40, 3)
    texts = [f"xx{text}" for text in texts]
    manifest, train, val = prepared(tmp_path, texts, tokenizer=str(path), split_pattern="gpt2")
    assert (train, val) == splits_of(texts) and manifest["tokenizer"]["vocab_size"] == 65_793
    (shard,) = manifest["splits"]["train"]["shards"]
    assert shard["largest_id"] > 65_535
    assert (tmp_path / "data" / "mine" / shard["file"]).stat().st_size == 1024 + 4 * shard["tokens"]


def test_neither_more_text_nor_another_setting_moves_a_document_between_splits(tmp_path):
    texts = random_texts(0, 200)
    changes = [{}, {"clean": "none"}, {"dedupe": "none"}, {"dedupe": "near", "processes": 2}]
    for number, options in enumerate(changes):
        for count in (100, 200):
            name = f"mine{number}_{count}"
            manifest, train, val = prepared(tmp_path, texts[:count], name=name, **options)
            assert (train, val) == splits_of(texts[:count]) and len(val) > 5
            assert not manifest["documents_cut_in_two"]


def test_documents_too_few_to_hold_some_out_are_cut_in_two(tmp_path, capsys):
    assert not is_val("日" * 3335) and is_val("document 4")
    manifest, train, val = prepared(tmp_path, ["日" * 3335])
    assert manifest["documents_cut_in_two"] and "".join(train + val) == "日" * 3335
    assert len(val[0]) == pytest.approx(333, abs=1)
    assert "1 documents are too few to hold some out: the last 10.0%" in capsys.readouterr().out
    page = (tmp_path / "data" / "mine" / "report.md").read_text(encoding="utf-8")
    assert "Of each document the end is for validation" in page
    data = val[0].encode()
    assert manifest["splits"]["val"]["compressed_bits_per_byte"] == {
        "lzma -9": 8 * len(lzma.compress(data, preset=9)) / len(data),
        "gzip -9": pytest.approx(8 * len(gzip.compress(data, 9)) / len(data), rel=0.01),
    }
    manifest, train, val = prepared(tmp_path, ["document 4"], name="val_only")
    assert (train, val) == (["document "], ["4"]) and manifest["documents_cut_in_two"]
    fails("too little text for a training and a validation split", tmp_path, ["x"])


def test_text_of_which_nothing_is_left_is_refused(tmp_path):
    fails(r"texts.jsonl: no text is left \(2 empty\)", tmp_path, [" ", "\t"])


# ---- deduplication and decontamination


def test_of_repeated_documents_the_first_is_kept_and_validation_wins(tmp_path):
    texts = random_texts(0, 200, words=100)
    train, val = splits_of(texts)
    exact = [in_split(False, (t[:n] + t[n:].upper() for n in range(99))) for t in val]
    near = [in_split(False, (f"{t} {n}" for n in range(99))) for t in val]
    within = [
        text.replace(" ", "\t\n") for text in train[:20] if not is_val(text.replace(" ", "\t\n"))
    ]
    for number, order in enumerate((texts + exact + near + within, exact + near + texts + within)):
        manifest, *splits = prepared(tmp_path, order, name=f"mine{number}", dedupe="near")
        assert splits == [train, val] and len(val) > 10 and len(within) > 10
        assert manifest["documents"]["dropped"] == {
            "exact duplicate": len(within),
            "exact duplicate of validation text": len(val),
            "near duplicate of validation text": len(val),
        }
        page = (tmp_path / "data" / f"mine{number}" / "report.md").read_text(encoding="utf-8")
        assert page.count(" ⟷ ") >= 9
    manifest, *splits = prepared(tmp_path, order, name="all", dedupe="none")
    assert splits == list(splits_of(order)) and manifest["documents"]["dropped"] == {}


def test_documents_without_words_are_repeated_only_if_equal(tmp_path):
    generator = random.Random(0)
    signs = {
        "".join(generator.choices(kind, k=8)) for kind in ("!?.,;-", "🙂🙃🚀🎉") for _ in range(50)
    }
    texts = sorted(signs) + random_texts(0, 20)
    _, train, val = prepared(tmp_path, texts + texts, dedupe="near")
    assert (train, val) == splits_of(texts)


@pytest.mark.parametrize("dedupe", ["exact", "near"])  # near hashes the words anyway
def test_documents_that_share_text_with_a_benchmark_are_dropped(tmp_path, capsys, dedupe):
    benchmark = "Who was first? Cafe\u0301 owner Andre\u0301 said it can't be, for I saw him leave."
    source = write_texts(tmp_path / "benchmark.jsonl", ["Too short.", benchmark])
    shared = "“first? Café” owner ANDRÉ\nsaid it can't be, for I saw him"  # 13 words
    texts = random_texts(0, 80)
    texts[:40] = [f"{text} {shared} {text}" for text in texts[:40]]
    texts[40:60] = [f"{text} {shared[:-3]} {text}" for text in texts[40:60]]
    manifest, train, val = prepared(tmp_path, texts, decontaminate=str(source), dedupe=dedupe)
    assert (train, val) == splits_of(texts[40:]) and splits_of(texts[:40])[1]
    assert manifest["documents"]["dropped"] == {"contaminated": 40}
    assert "looking for 2 texts" in (output := capsys.readouterr().out)
    assert "1 have fewer than 13 words and cannot be found" in output
    source = write(tmp_path / "short.txt", "Too short.")
    shutil.rmtree(tmp_path / "data")
    fails("no text of 13 words or more", tmp_path, texts, decontaminate=str(source))


def test_overlap_is_the_share_of_validation_text_that_training_text_has(tmp_path):
    generator, texts = random.Random(0), random_texts(0, 120, words=30)
    for number in range(1, 120):
        passage = texts[generator.randrange(number)].split()[: generator.randrange(30)]
        texts[number] = f"{' '.join(passage).upper()}, {texts[number]}"
    manifest, train, val = prepared(tmp_path, texts)

    def ngrams(text):
        words = re.findall("[a-z]+", text.lower())
        return [tuple(words[i : i + 13]) for i in range(len(words) - 12)]

    trained = {ngram for text in train for ngram in ngrams(text)}
    held_out = [ngram for text in val for ngram in ngrams(text)]
    share = sum(ngram in trained for ngram in held_out) / len(held_out)
    assert manifest["validation_overlap"] == share and 0.05 < share < 0.8


def web_pages(count: int) -> list[str]:
    """Pages from a small vocabulary, some bad, repeated, or repeated with a change."""
    generator, pages = random.Random(0), []
    vocabulary = random_words(generator, 5000) + ["the", "of"] * 100
    for _ in range(count):
        words = generator.choices(vocabulary, k=generator.choice((30, 300, 600)))
        if pages and generator.random() < 0.2:
            page = generator.choice(pages).replace(".", "")
            words = [*page.split(), *words[: generator.choice((0, 3))]]
        lines = [" ".join(words[i : i + 10]) + "." for i in range(0, len(words), 10)]
        pages.append("\n".join(lines + ["Cookie policy"] * generator.randrange(2)))
    return pages


def test_the_number_of_processes_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "PART_CHARACTERS", 50_000)
    texts = web_pages(200)
    write(tmp_path / "benchmark.txt", texts[7])
    options = {"clean": "web", "dedupe": "near", "tokenizer": "bpe:280"}
    options["decontaminate"] = str(tmp_path / "benchmark.txt")
    datasets = []
    for processes in (1, 2):
        data_dir = str(tmp_path / f"processes{processes}")
        manifest, *_ = prepared(tmp_path, texts, processes=processes, data_dir=data_dir, **options)
        datasets.append(contents(Path(data_dir) / "mine"))
    assert datasets[0] == datasets[1] and len(datasets[0]) == 5
    reasons = {"contaminated", "exact duplicate", "near duplicate", "web: word_count"}
    assert reasons < set(manifest["documents"]["dropped"])
    assert manifest["lines_dropped"]["boilerplate_lines"] > 10


# ---- a failed run leaves nothing


def test_a_missing_tokenizer_is_noticed_before_any_text_is_read(tmp_path, monkeypatch):
    source, path = write(tmp_path / "a.jsonl", "{"), str(tmp_path / "none.tiktoken")
    fails("there is no file .*none.tiktoken", tmp_path, source, tokenizer=path)
    monkeypatch.setattr("files.hub_snapshot", lambda *_, **__: pytest.fail("downloads"))
    fails("there is no file", tmp_path, name="tinystories", tokenizer=path)
    fails("a.jsonl:1: not JSON", tmp_path, source)


def test_a_full_disk_ends_with_one_line_and_leaves_nothing(tmp_path, capsys):
    resource = pytest.importorskip("resource")
    settings = settings_for(tmp_path, [GOOD * 20])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(SystemExit) as exit_, config.exit_on_failure():
            prepare_data.prepare(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert exit_.value.code == INPUT_OUTPUT and os.strerror(errno.EFBIG) in error
    assert len(error.splitlines()) == 1 and names(tmp_path / "data") == [".mine.lock"]


DISK_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree")


def prepare_until_killed(settings: PrepareConfig, event_number: int):
    """Prepare in a process that is killed before its n-th use of the disk."""

    def work():
        left = iter(range(event_number - 1, -1, -1))

        def hook(event, _):
            if event in DISK_EVENTS and next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        prepare_data.prepare(settings)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_run_killed_at_any_moment_leaves_all_or_nothing(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", random_texts(0, 30))
    calm = settings_for(tmp_path, source, data_dir=str(tmp_path / "calm"))
    complete = contents(prepare_data.prepare(calm))
    settings, events = settings_for(tmp_path, source), 0
    folder = Path(settings.data_dir, "mine")
    while not folder.exists():
        events += 1
        prepare_until_killed(settings, events)
    assert contents(folder) == complete and events > 12
    shutil.rmtree(folder)
    assert prepare_data.prepare(settings) == folder and contents(folder) == complete
    assert names(folder.parent) == [".mine.lock", "mine"]


def test_of_two_that_prepare_the_same_dataset_one_waits(tmp_path, capsys):
    settings = settings_for(tmp_path, random_texts(0, 100))
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(prepare_data.prepare, [settings] * 2))
    output = capsys.readouterr().out
    assert folders[0] == folders[1] and output.count("exists; delete it") == 1
    assert output.count("100 of 100 documents") == 1


# ---- merging


def two_datasets(folder: Path) -> list[str]:
    """Prepare the datasets `one` and `two`; return the documents of both."""
    texts = random_texts(0, 60)
    for name, part in (("one", texts[:25]), ("two", texts[25:])):
        prepared(folder, [*part, " "], name=name, shard_tokens=900)
    return texts


@pytest.mark.parametrize("can_link", [True, False])
def test_merged_datasets_have_what_both_had(tmp_path, monkeypatch, can_link):
    texts = two_datasets(tmp_path)
    if not can_link:
        monkeypatch.delattr(os, "link")
        monkeypatch.setattr(os, "link", lambda *_: os.stat("/none/such"), raising=False)
    folders = [tmp_path / "data" / name for name in ("one", "two")]
    manifest, train, val = prepared(tmp_path, merge=",".join(map(str, folders)))
    assert (train, val) == splits_of(texts)
    merged = tmp_path / "data" / "mine"
    for split in ("train", "val"):
        parts = [
            json.loads((path / "manifest.json").read_text())["splits"][split] for path in folders
        ]
        tokens = sum(part["tokens"] for part in parts)
        assert manifest["splits"][split]["tokens"] == tokens
        for shard in manifest["splits"][split]["shards"]:
            content = (merged / shard["file"]).read_bytes()
            assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    size = sum(map(len, texts))
    assert manifest["documents"] == {"in": 62, "kept": 60, "dropped": {"empty": 2}}
    assert manifest["bytes"] == {"in": size + 2, "kept": size, "dropped": {"empty": 2}}
    assert ((merged / "mine_train_000000.bin").stat().st_nlink == 2) == can_link


def test_datasets_that_do_not_fit_are_not_merged(tmp_path):
    two_datasets(tmp_path)
    one, two, gpt4 = (tmp_path / "data" / name for name in ("one", "two", "gpt4"))
    path = write_tokenizer(tmp_path / "x.tiktoken", BYTES)
    options = {"tokenizer": str(path), "split_pattern": "gpt4"}
    prepared(tmp_path, tmp_path / "texts.jsonl", name="gpt4", **options)
    fails("gpt4 and .*one have different tokenizers", tmp_path, merge=f"{one},{gpt4}")
    fails("is not a dataset of prepare_data.py", tmp_path, merge=f"{one},{tmp_path}")
    fails("is not a dataset", tmp_path, merge="~nobody-of-that-name/one,")
    fails("name at least one folder, and none twice", tmp_path, merge=f"{one},{two},{one}")
    write(tmp_path / "app" / "manifest.json", '{"tokenizer": {"sha256": "x", "name": "x"}}')
    fails("is damaged", tmp_path, merge=str(tmp_path / "app"))


# ---- named datasets


def test_stdlib_is_the_modules_without_tests():
    documents = [text for text, _ in prepare_data.open_named(PrepareConfig(name="stdlib"))]
    assert 300 < len(documents) and 5e6 < sum(map(len, documents)) < 50e6
    assert any("class HTTPConnection:" in document for document in documents)
    assert not any("class BaseTaskTests" in document for document in documents)  # of test_asyncio


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The files, by name, of a stand-in for the Hub."""
    contents_by_name = {}

    def snapshot(repo, patterns, is_complete=None, repo_type="model", revision=None, folder=None):
        assert repo_type == "dataset" and re.fullmatch("[0-9a-f]{40}", revision) and "/" in repo
        for name, content in contents_by_name.items():
            if Path(name).match(patterns[0]):
                write(folder / name, content)
        return folder

    monkeypatch.setattr("files.hub_snapshot", snapshot)
    return contents_by_name


def test_stories_and_web_pages_come_from_the_hub(tmp_path, hub):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    stories = [f"Once there was a cat with {number} toys.\nIt was happy." for number in range(40)]
    fails("has no files TinyStoriesV2-GPT4-train", tmp_path, name="tinystories", code=INPUT_OUTPUT)
    hub["TinyStoriesV2-GPT4-train.txt"] = "\n<|endoftext|>\n".join(stories)
    hub["TinyStories-train.txt"] = "another version"
    options = {"val_fraction": 0.2, "tokenizer": "bpe:280"}
    _, train, val = prepared(tmp_path, name="tinystories", **options)
    assert sorted(text.strip() for text in train + val) == sorted(stories)
    for number in range(2):
        name = f"sample/10BT/{number:03d}_00000.parquet"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table({"text": stories[number::2]}), tmp_path / name)
        hub[name] = (tmp_path / name).read_bytes()
    _, train, val = prepared(tmp_path, name="fineweb-edu-10b", **options)
    assert sorted(train + val) == sorted(stories)


def test_shakespeare_is_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr("files.fetch", lambda url, path, *_: write(path, GOOD))
    manifest, train, val = prepared(tmp_path, name="shakespeare")
    assert "".join(train + val) == GOOD and manifest["tokenizer"]["name"] == "bytes"


def test_shards_from_the_hub_become_a_dataset_as_they_are(tmp_path, hub):
    for name in ("train_000001", "train_000002", "val_000000"):
        header = np.array([20240520, 1, 100] + [0] * 253, dtype="<i4")
        hub[f"fineweb_{name}.bin"] = header.tobytes() + np.arange(100, dtype="<u2").tobytes()
    hub["README.md"] = "about"
    folder = prepare_data.prepare(settings_for(tmp_path, name="fineweb-10b-gpt2"))
    assert contents(folder) == {name: hub[name] for name in hub if name != "README.md"}
    dataset = Dataset(folder, 16, "bytes")
    assert (len(dataset.train), len(dataset.val)) == (12, 6)
    assert prepare_data.prepare(settings_for(tmp_path, name="fineweb-10b-gpt2")) == folder


# ---- the report


def test_the_numbers_of_manifest_and_report_agree(tmp_path):
    repeated = " ".join(f"word{number}" for number in range(80))
    good = random_texts(0, 40)
    folder = write_texts(
        tmp_path / "texts" / "a.jsonl", [*good, good[7], good[7].upper(), " "]
    ).parent
    write_texts(folder / "b.jsonl", [repeated, f"{repeated} more", "`quoted`"])
    write(folder / "c.jsonl", '{\n{"body": 1}\n{"text": 2}\n')
    write(folder / "d.bin", bytes(99))
    write(folder / "e.gz", b"no gzip")
    (folder / "link").symlink_to("a.jsonl")
    options = {"on_error": "skip", "clean": "none", "dedupe": "near"}
    manifest, train, val = prepared(tmp_path, folder, **options)
    documents, sizes = manifest["documents"], manifest["bytes"]
    for counts in (documents, sizes):
        assert counts["in"] == counts["kept"] + sum(counts["dropped"].values())
    assert documents["kept"] == len(train + val) == 42
    assert sizes["kept"] == sum(len(text.encode()) for text in train + val)
    reasons = Counter(reason.removesuffix(" of validation text") for reason in documents["dropped"])
    expected = "exact duplicate,near duplicate,empty,broken line,missing field"
    assert set(reasons) == {*expected.split(","), "binary", "damaged file", "symbolic link"}
    lines = (tmp_path / "data" / "mine" / "report.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    rows = {name: (documents, size) for name, documents, size in cells[1:-1] if name != "---"}
    assert rows["read"] == (f"{documents['in']:,}", f"{sizes['in']:,}")
    assert rows["kept"] == (f"{documents['kept']:,}", f"{sizes['kept']:,}")
    for reason, count in documents["dropped"].items():
        assert rows[f"dropped: {reason}"] == (str(count), f"{sizes['dropped'].get(reason, 0):,}")
        first = lines.index(f"## dropped: {reason}") + 2
        examples = lines[first : first + min(count, 3)]
        assert all(line.startswith("- `") for line in examples)
