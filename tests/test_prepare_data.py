"""From text to a dataset: what is kept, in which split, and what a failed run leaves behind."""

import errno
import fnmatch
import gzip
import hashlib
import lzma
import multiprocessing
import os
import random
import re
import signal
import string
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import full_disk, refused, run, split_tokens, write, write_texts

import config
import corpus
import prepare_data
from dataset import Dataset, read_manifest
from prepare_data import PrepareConfig
from tokenizer import BYTES, Tokenizer

GOOD = "some text, and more of it\n" * 100


def write_tokenizer(path: Path, tokens: list[bytes]) -> str:
    return str(write(path, Tokenizer.from_tokens(tokens, "x", "gpt2").to_text()))


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
    dataset = Dataset(prepare_data.prepare(settings_for(folder, source, **changes)), 1)
    splits = []
    for split in ("train", "val"):
        tokens = split_tokens(dataset, split)
        parts = np.split(tokens, np.flatnonzero(tokens == dataset.tokenizer.end_of_text))
        texts = [dataset.tokenizer.decode(part[1:].tolist()).decode() for part in parts[1:]]
        entry, size = dataset.manifest["splits"][split], sum(len(text.encode()) for text in texts)
        counts = (entry["documents"], entry["bytes"], entry["tokens"])
        assert counts == (len(texts), size, len(tokens)) and not len(parts[0])
        splits.append(texts)
    return dataset.manifest, *splits


def fails(message: str, folder: Path, source="", code: int = 2, **changes):
    refused(message, prepare_data.prepare, settings_for(folder, source, **changes), code=code)
    assert not list(folder.glob("data/*mine"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_val(text: str) -> bool:
    """Whether a document is among the tenth for validation: its hash alone decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < 2**64 // 10


def splits_of(texts) -> list[list[str]]:
    splits = [], []
    for text in texts:
        splits[is_val(text)].append(text)
    return list(splits)


def are_splits_of(texts, splits: list[list[str]]) -> bool:
    """Whether the splits have these texts, those for training in any order."""
    train, val = splits_of(texts)
    return sorted(splits[0]) == sorted(train) and splits[1] == val


def random_texts(documents: int, words: int = 40) -> list[str]:
    generator, letters = random.Random(0), string.ascii_lowercase
    pages = [[generator.choices(letters, k=5) for _ in range(words)] for _ in range(documents)]
    return [" ".join(map("".join, page)) for page in pages]


def test_a_dataset_with_its_own_tokenizer_is_made_without_torch(tmp_path):
    """Here neither the script nor its workers can import torch."""
    write(tmp_path / "no_torch" / "torch.py", "raise ImportError")
    write_texts(tmp_path / "a.jsonl", random_texts(60, 6000))  # 2 MB: two parts
    options = ["--source=a.jsonl", "--tokenizer=bpe:270", "--split_pattern=gpt4", "--processes=2"]
    script, where = prepare_data.__file__, {"cwd": tmp_path, "PYTHONPATH": f"{tmp_path}/no_torch"}
    result = run(script, "mine", *options, **where)
    assert result.returncode == 0, result.stderr
    dataset = Dataset(tmp_path / "data" / "mine", 8)
    assert dataset.tokenizer.vocab_size == 270 and dataset.tokenizer.pattern == "gpt4"
    assert "60 of 60 documents" in result.stdout
    assert "python train.py config/small.py --dataset=mine --out_dir=out/mine" in result.stdout
    result = run(script, "mine", "--source=none", "--data_dir=x", "--tokenizer=bytes", **where)
    message = "prepare_data.py: --source=none: no such file, or an empty folder\n"
    assert (result.returncode, result.stderr) == (2, message)


def test_an_existing_folder_is_never_changed(tmp_path, capsys):
    prepared(tmp_path, [GOOD])
    before = contents(tmp_path / "data" / "mine")
    write(tmp_path / "data" / ".mine" / "texts", "left by a killed run")
    prepare_data.prepare(settings_for(tmp_path, [GOOD], processes=2))
    assert "exists; delete it to read the text again" in capsys.readouterr().out
    write(tmp_path / "data" / "other" / "notes.txt", "notes")
    refused("other is not a dataset of prepare", prepared, tmp_path, [GOOD], name="other")
    refused("was made with clean 'basic', not 'web'", prepared, tmp_path, [GOOD], clean="web")
    assert contents(tmp_path / "data" / "mine") == before
    assert not {".mine", ".other"} & set(os.listdir(tmp_path / "data"))


def any_texts(count: int) -> list[str]:
    """Texts with characters of all planes, and with the name of the end-of-text token."""
    generator, codes = random.Random(0), [*range(0xD800), *range(0xE000, 0x110000)]
    plain = [f"{n}\r\n<|endoftext|> é xx {n * n}" for n in range(count)]
    return ["".join(map(chr, generator.choices(codes, k=n % 9))) + t for n, t in enumerate(plain)]


@pytest.mark.parametrize("tokenizer, pattern", [("bytes", ""), ("bpe:300", ""), ("file", "gpt4")])
def test_shards_hold_any_documents_exactly(tmp_path, tokenizer, pattern):
    if tokenizer == "file":  # ids of more than 16 bits, the highest for x and another byte
        pairs = sorted(map(b"".join, product(BYTES, BYTES)), key=lambda pair: pair[:1] == b"x")
        tokenizer = write_tokenizer(tmp_path / "x.tiktoken", BYTES + pairs)
    texts, options = any_texts(2000), {"tokenizer": tokenizer, "split_pattern": pattern}
    manifest, *splits = prepared(tmp_path, texts, clean="none", dedupe="none", **options)
    size = sum(len(text.encode()) for text in texts)
    assert are_splits_of(texts, splits)
    assert manifest["documents"] == {"in": 2000, "kept": 2000, "dropped": {}}
    assert not manifest["documents_cut_in_two"]
    assert manifest["bytes"] == {"in": size, "kept": size, "dropped": {}}
    assert manifest["tokenizer"]["pattern"] == (pattern or "gpt2")
    (shard,), is_wide = manifest["splits"]["train"]["shards"], tokenizer.endswith(".tiktoken")
    file_size = (tmp_path / "data" / "mine" / shard["file"]).stat().st_size
    assert file_size == 1024 + (4 if is_wide else 2) * shard["tokens"]
    assert is_wide == (shard["largest_id"] > 65_535)


def test_training_documents_lie_scattered_and_always_alike(tmp_path):
    texts = random_texts(300)
    (_, train, _), (_, again, _) = (prepared(tmp_path, texts, name=name) for name in ("a", "b"))
    places = [texts.index(text) for text in train]
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.2 and train == again


def test_documents_too_few_to_hold_some_out_are_cut_in_two(tmp_path, capsys):
    manifest, train, val = prepared(tmp_path, ["日" * 3335])
    assert "".join(train + val) == "日" * 3335 and 332 <= len(val[0]) <= 334
    assert "documents: 1, too few to hold whole ones out: the last 10.0%" in capsys.readouterr().out
    data = val[0].encode()
    sizes = {"lzma -9": len(lzma.compress(data, preset=9)), "gzip -9": len(gzip.compress(data, 9))}
    bits = {name: 8 * size / len(data) for name, size in sizes.items()}
    assert manifest["splits"]["val"]["compressed_bits_per_byte"] == bits
    only_val = splits_of(f"document {number}" for number in range(999))[1][0]
    manifest, *splits = prepared(tmp_path, [only_val], name="other")
    assert splits == [[only_val[:-1]], [only_val[-1]]] and manifest["documents_cut_in_two"]
    fails("too little text for a training and a validation split", tmp_path / "x", ["x"])


@pytest.mark.parametrize(
    "fraction, sizes, is_cut",
    [
        (0.25, (400, 4200), True),
        (0.25, (400, 532), False),
        (0.25, (400, 540), True),
        (0.9, (400, 401), True),
        (0.9, (400, 4000), False),
        (0.1, (40_000, 556), False),
        (0.1, (40_000, 550), True),
    ],
)
def test_the_odds_of_validation_text_are_near_those_asked_for(tmp_path, fraction, sizes, is_cut):
    texts = []
    for wanted, size in enumerate(sizes):
        candidates = (f"{n:0{size}}".encode() for n in range(999))
        is_val = prepare_data.is_for_validation
        texts.append(next(t for t in candidates if is_val(t, fraction) == wanted).decode())
    texts += ["x"] * is_cut  # too short for a part in each split
    manifest, *splits = prepared(tmp_path, texts, val_fraction=fraction)
    assert manifest["documents_cut_in_two"] == is_cut and all(map(all, splits))


def test_bytes_are_those_of_the_text_that_the_tokens_stand_for(tmp_path):
    texts = ["e\u0301" * 500]  # two bytes each once composed, as qwen does
    options = {"tokenizer": "bpe:300", "split_pattern": "qwen", "clean": "none"}
    manifest, train, val = prepared(tmp_path, texts, **options)
    assert manifest["bytes"]["kept"] == 1500 and len("".join(train + val).encode()) == 1000


def test_a_separator_without_effect_is_said(tmp_path, capsys):
    source, texts = write(tmp_path / "a.txt", f"{GOOD}\n\nmore"), [GOOD]
    for number, (input, separator) in enumerate(((source, "***"), (texts, r"\n\n"))):
        prepared(tmp_path, input, name=f"mine{number}", separator=separator)
        assert f"--separator={separator}: no text file has such a line" in capsys.readouterr().out
        report = (tmp_path / "data" / f"mine{number}" / "report.md").read_text(encoding="utf-8")
        assert f"No text file has the separator `{separator}` as a line." in report
    assert prepared(tmp_path, source, separator=r"\n\n")[0]["documents"]["in"] == 2
    assert "no text file" not in capsys.readouterr().out
    for name, values in {"separator": (r"\n", " "), "encoding": ("hex", "x")}.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name} .* is (white space|not known)"):
                settings_for(tmp_path, source, **{name: value})


def test_of_repeated_documents_the_first_is_kept_and_validation_wins(tmp_path):
    texts, signs = random_texts(200, words=100), [*map("".join, product("!?.,;-🙂", repeat=3))]
    train, val = splits_of(texts)
    exact = [splits_of(t[:n] + t[n:].upper() for n in range(99))[0][0] for t in val]
    near = [splits_of(f"{t} {n}" for n in range(99))[0][0] for t in val]
    again, _ = splits_of(text.replace(" ", "\t\n") for text in train[:20])
    again += signs  # without words, and none like another
    for number, order in enumerate((texts + exact + near, exact + near + texts)):
        order += again
        manifest, *splits = prepared(tmp_path, order, name=f"mine{number}", dedupe="near")
        assert are_splits_of(texts + signs, splits) and manifest["validation_overlap"] == 0
        assert manifest["documents"]["dropped"] == {
            "exact duplicate": len(again) - len(signs),
            "exact duplicate of validation text": len(val),
            "near duplicate of validation text": len(val),
        }
    manifest, *splits = prepared(tmp_path, order, name="all", dedupe="none")
    assert are_splits_of(order, splits) and manifest["validation_overlap"] == 1


@pytest.mark.parametrize("dedupe", ["exact", "near"])  # near hashes the words anyway
def test_documents_that_share_text_with_a_benchmark_are_dropped(tmp_path, capsys, dedupe):
    benchmark = "Who was first? Cafe\u0301 owner Andre\u0301 said it can't be, for I saw him leave."
    source, short = tmp_path / "benchmark.jsonl", write(tmp_path / "short.txt", "Too short.")
    write_texts(source, ["Too short.", benchmark])
    shared = "“first? Café” owner ANDRÉ\nsaid it can't be, for I saw him"  # 13 words
    texts = random_texts(200)
    write(tmp_path / "short" / "a.json", "[]")
    fails("no text of 13 words or more$", tmp_path, texts, decontaminate=str(short))
    fails("13 words or more; skipped: 1 JSON", tmp_path, texts, decontaminate=f"{tmp_path}/short")
    bad = str(write(tmp_path / "bad.jsonl", "{"))
    fails("skips no errors$", tmp_path, texts, decontaminate=bad, on_error="skip")
    texts = [f"{t} {shared if n < 100 else shared[:-3]} {t}" for n, t in enumerate(texts)]
    manifest, *splits = prepared(tmp_path, texts, decontaminate=str(source), dedupe=dedupe)
    assert are_splits_of(texts[100:], splits) and splits_of(texts[:100])[1]
    assert manifest["documents"]["dropped"] == {"contaminated": 100}
    assert "1 have fewer than 13 words and cannot be found" in capsys.readouterr().out


def test_the_number_of_processes_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PART_CHARACTERS", 20_000)  # many parts
    texts = random_texts(60, words=200)
    lines = [[f"The {t[i : i + 60]} of." for i in range(0, len(t), 60)] for t in texts]
    pages = ["\n".join([*page, "Cookie policy"]) for page in lines]
    pages += [*texts[:9], *pages[:9], *(f"{page}\nOne more." for page in pages[9:19])]
    source = str(write(tmp_path / "benchmark.txt", pages[20]))
    options = {"clean": "web", "dedupe": "near", "tokenizer": "bpe:280", "decontaminate": source}
    datasets = []
    for processes in (1, 2):
        options |= {"processes": processes, "data_dir": str(tmp_path / str(processes))}
        manifest, *_ = prepared(tmp_path, pages, **options)
        datasets.append(contents(tmp_path / str(processes) / "mine"))
    assert datasets[0] == datasets[1] and len(datasets[0]) == 5
    reasons = {reason.split()[0] for reason in manifest["documents"]["dropped"]}
    assert reasons == {"contaminated", "exact", "near", "web:"}
    assert manifest["lines_dropped"] == {"boilerplate_lines": 78}  # not of the contaminated page


def test_a_file_name_that_is_no_text_is_kept(tmp_path):
    source = write(tmp_path / "caf\udce9.txt", GOOD)
    assert prepared(tmp_path, source)[0]["made_from"]["source"] == str(source)


def test_what_is_missing_or_wrong_leaves_nothing(tmp_path, monkeypatch):
    source, path = write(tmp_path / "a.jsonl", '{"text": "x"}\n{'), str(tmp_path / "none.tiktoken")
    fails("there is no file .*none.tiktoken", tmp_path, source, tokenizer=path)
    monkeypatch.setattr("files.hub_snapshot", lambda *_, **__: pytest.fail("it downloads first"))
    fails("there is no file .*none.tiktoken", tmp_path, name="tinystories", tokenizer=path)
    fails("a.jsonl:2: not JSON", tmp_path, source)
    fails(r"texts.jsonl: no text is left \(2 empty\); .*texts.jsonl:1", tmp_path, [" ", "\t"])


def test_a_full_disk_ends_with_one_line_and_leaves_nothing(tmp_path, capsys):
    settings, ends = settings_for(tmp_path, [GOOD * 9]), pytest.raises(SystemExit, match="6")
    with full_disk(9000), ends, config.exit_on_failure():
        prepare_data.prepare(settings)
    error = capsys.readouterr().err
    assert f"{os.strerror(errno.EFBIG)}: '{tmp_path / 'data' / 'mine'}'\n" in error
    assert len(error.splitlines()) == 1
    assert os.listdir(tmp_path / "data") == [".mine.lock"]


DISK_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree")


def prepare_until_killed(settings: PrepareConfig, event_number: int):
    """Prepare in this process, which is killed before its n-th use of the disk."""
    numbers = iter(range(1, 10**6))

    def hook(event, _):
        if event in DISK_EVENTS and next(numbers) == event_number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    prepare_data.prepare(settings)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_run_killed_at_any_moment_leaves_all_or_nothing(tmp_path):
    source, events = write_texts(tmp_path / "a.jsonl", random_texts(30)), 0
    calm = settings_for(tmp_path, source, data_dir=str(tmp_path / "calm"))
    settings, complete = settings_for(tmp_path, source), contents(prepare_data.prepare(calm))
    folder, fork = tmp_path / "data" / "mine", multiprocessing.get_context("fork")
    while not folder.exists():
        events += 1
        process = fork.Process(target=prepare_until_killed, args=(settings, events))
        process.start()
        process.join()
    assert contents(folder) == complete and events > 12
    prepare_data.prepare(settings)
    assert sorted(os.listdir(folder.parent)) == [".mine.lock", "mine"]


def test_a_dataset_gets_its_name_once_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    done = []  # files, as they were when they were flushed

    def state(file) -> tuple:
        return os.stat(file).st_ino, os.path.isdir(file) or os.stat(file).st_size

    def rename(*names, rename=os.rename):
        done.append("renamed")
        rename(*names)

    monkeypatch.setattr(os, "fsync", lambda number: done.append(state(number)))
    monkeypatch.setattr(os, "rename", rename)
    folder = prepare_data.prepare(settings_for(tmp_path, random_texts(30)))
    flushed = done[: done.index("renamed")]
    assert {state(path) for path in (folder, *folder.iterdir())} <= {*flushed}
    assert done[-2:] == ["renamed", state(folder.parent)]


def test_a_link_to_a_disk_that_is_not_mounted_is_refused_before_text_is_read(tmp_path):
    settings = settings_for(tmp_path, [GOOD])
    write(tmp_path / "data" / "x", "")
    (tmp_path / "data" / "mine").symlink_to(tmp_path / "disk" / "mine")
    refused("mine is not a dataset", prepare_data.prepare, settings)


@pytest.mark.parametrize("can_link", [True, False])
def test_merged_datasets_have_what_both_had(tmp_path, monkeypatch, can_link):
    texts = random_texts(60)
    for name, part in (("one", texts[:25]), ("two", texts[25:])):
        prepared(tmp_path, [*part, " "], name=name, shard_tokens=900)
    if not can_link:
        monkeypatch.setattr(os, "link", lambda *_: os.stat("/none/such"))
    folders = f"{tmp_path / 'data' / 'one'},{tmp_path / 'data' / 'two'}"
    manifest, *splits = prepared(tmp_path, merge=folders)
    size, shard = sum(map(len, texts)), tmp_path / "data" / "mine" / "mine_train_000000.bin"
    assert are_splits_of(texts, splits)
    assert manifest["documents"] == {"in": 62, "kept": 60, "dropped": {"empty": 2}}
    assert manifest["bytes"] == {"in": size + 2, "kept": size, "dropped": {"empty": 2}}
    assert (shard.stat().st_nlink == 2) == can_link


def test_datasets_that_do_not_fit_are_not_merged(tmp_path):
    prepared(tmp_path, [GOOD], name="one")
    one, gpt4 = (tmp_path / "data" / name for name in ("one", "gpt4"))
    path = write_tokenizer(tmp_path / "x.tiktoken", BYTES)
    prepared(tmp_path, [GOOD], name="gpt4", tokenizer=path, split_pattern="gpt4")
    fails("gpt4 and .*one differ in tokenizer", tmp_path, merge=f"{one},{gpt4}")
    fails("is not a dataset of prepare_data.py", tmp_path, merge=f"{one},{tmp_path}")
    fails("is not a dataset", tmp_path, merge="~nobody-of-that-name/one,")
    fails("name at least one folder, and none twice", tmp_path, merge=f"{one},{gpt4},{one}")
    shard = one / "one_train_000000.bin"
    write(shard, shard.read_bytes()[:-1] + b"\1")
    fails("one_train_000000.bin is not the shard", tmp_path, merge=f"{one}")


@pytest.fixture
def hub(monkeypatch):
    """The files, by name, of a stand-in for the Hub."""
    hub_files = {}

    def snapshot(repo, patterns, repo_type, revision, folder):
        assert repo_type == "dataset" and re.fullmatch("[0-9a-f]{40}", revision) and "/" in repo
        for name in fnmatch.filter(hub_files, patterns[0]):
            write(folder / name, hub_files[name])
        return folder

    monkeypatch.setattr("files.hub_snapshot", snapshot)
    return hub_files


def test_named_datasets_are_downloaded(tmp_path, hub, monkeypatch):
    stories = [f"Once there was a cat with {number} toys.\nIt was happy." for number in range(40)]
    hub["TinyStoriesV2-GPT4-train.txt"] = "\n<|endoftext|>\n".join(stories)
    hub["TinyStories-train.txt"] = "another version"
    _, train, val = prepared(tmp_path, name="tinystories", val_fraction=0.2, tokenizer="bpe:280")
    assert sorted(text.strip() for text in train + val) == sorted(stories)
    monkeypatch.setattr("files.fetch", lambda url, path, *_: write(path, GOOD))
    manifest, train, val = prepared(tmp_path, name="shakespeare")
    assert "".join(train + val) == GOOD and manifest["tokenizer"]["name"] == "bytes"


def test_shards_from_the_hub_become_a_dataset_as_they_are(tmp_path, hub):
    header = np.array([20240520, 1, 100] + [0] * 253, dtype="<i4").tobytes()
    for name in ("train_000001", "train_000002", "val_000000"):
        hub[f"fineweb_{name}.bin"] = header + np.arange(100, dtype="<u2").tobytes()
    settings = settings_for(tmp_path, name="fineweb-10b-gpt2")
    folder = prepare_data.prepare(settings)
    assert contents(folder) == hub and prepare_data.prepare(settings) == folder
    dataset = Dataset(folder, 16, "bytes")
    assert (len(dataset.train), len(dataset.val)) == (12, 6)


def test_stdlib_is_the_modules_without_tests():
    paths = prepare_data.download_named(PrepareConfig(name="stdlib"))
    documents = [path.read_text("utf-8") for path in paths]
    assert len(documents) > 300 and 5e6 < sum(map(len, documents)) < 50e6
    assert any("class HTTPConnection:" in document for document in documents)
    assert not any("class BaseTaskTests" in document for document in documents)  # of test_asyncio


def test_the_numbers_of_manifest_and_report_agree(tmp_path):
    good, text = random_texts(40), " ".join(f"word{number}" for number in range(80))
    repeated = [good[7], good[7].upper(), " ", text, f"{text} more", "`quoted`"]
    folder = write_texts(tmp_path / "texts" / "a.jsonl", good + repeated).parent
    write(folder / "b.jsonl", '{\n{"body": 1}\n{"text": 2}\n')
    manifest, *splits = prepared(tmp_path, folder, on_error="skip", dedupe="near")
    documents, sizes = manifest["documents"], manifest["bytes"]
    for counts in (documents, sizes):
        assert counts["in"] == counts["kept"] + sum(counts["dropped"].values())
    assert (documents["kept"], sizes["kept"]) == (42, sum(len(t) for s in splits for t in s))
    reasons = {reason.removesuffix(" of validation text") for reason in documents["dropped"]}
    duplicates = {"exact duplicate", "near duplicate"}
    assert reasons == duplicates | {"empty", "broken line", "missing field"}
    report = (tmp_path / "data" / "mine" / "report.md").read_text(encoding="utf-8")
    assert f"| kept | {documents['kept']:,} | {sizes['kept']:,} |" in report
    for reason, count in documents["dropped"].items():
        assert f"| dropped: {reason} | {count} | {sizes['dropped'].get(reason, 0):,} |" in report
        assert f"## dropped: {reason}\n\n- `" in report


def test_special_tokens_in_text_are_reported_and_kept_on_request(tmp_path, capsys):
    texts = [f"{n} red<|endoftext|>blue" for n in range(40)]
    manifest, *_ = prepared(tmp_path, texts, tokenizer="bpe:5000")
    counts = [entry["special_tokens"] for entry in manifest["splits"].values()]
    assert sum(count["<|endoftext|>"] for count in counts) == 40
    line = "In the text 40 `<|endoftext|>` became plain text; --special_tokens=keep keeps them."
    out, page = capsys.readouterr().out, (tmp_path / "data" / "mine" / "report.md").read_text()
    assert line in out and line in page
    assert f"it has only {manifest['tokenizer']['vocab_size']}: no pair" in out
    folder = prepare_data.prepare(settings_for(tmp_path, texts, name="kept", special_tokens="keep"))
    dataset = Dataset(folder, 1)
    shards = [split_tokens(dataset, split) for split in ("train", "val")]
    assert np.count_nonzero(np.concatenate(shards) == dataset.tokenizer.end_of_text) == 80
    assert "40 `<|endoftext|>` became special tokens." in (folder / "report.md").read_text()
    plain = prepare_data.prepare(settings_for(tmp_path, texts, name="plain"))
    settings = settings_for(tmp_path, name="all", merge=f"{folder},{plain}")
    refused("differ in tokenizer or --special_tokens", prepare_data.prepare, settings)
    again = prepare_data.prepare(settings_for(tmp_path, texts, name="again"))
    merged = prepare_data.prepare(settings_for(tmp_path, name="all", merge=f"{again},{plain}"))
    splits = read_manifest(merged)["splits"].values()
    assert sum(split["special_tokens"]["<|endoftext|>"] for split in splits) == 80
