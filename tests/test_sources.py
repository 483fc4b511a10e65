"""From files to a dataset and its report: what is read and how, what is refused, and what a disturbed run leaves."""

import base64
import bz2
import codecs
import contextlib
import errno
import gzip
import hashlib
import http.server
import json
import lzma
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import config
import prepare_data
from config import BAD_INPUT, INPUT_OUTPUT, Failure
from prepare_data import Dataset, PrepareConfig, Reader


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No drawing, which takes longer than most of these tests, and no hub but the one of a test."""
    monkeypatch.setattr(prepare_data, "draw_lengths", lambda *_: None)
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(path: Path, texts, name: str = "text") -> Path:
    """Write a column with two rows in each group."""
    pyarrow.parquet.write_table(pyarrow.table({name: texts}), path, row_group_size=2)
    return path


def json_lines(texts, name: str = "text") -> str:
    return "".join(json.dumps({name: text}, ensure_ascii=False) + "\n" for text in texts)


def read(source, **changes) -> list[str]:
    """The documents in a source before any cleaning."""
    return [text for text, _ in Reader(PrepareConfig("mine", **changes), str(source))]


def skipped(source, **changes) -> dict:
    """What a reader counts that goes on behind errors."""
    reader = Reader(PrepareConfig("mine", on_error="skip", **changes), str(source))
    list(reader)
    return dict(reader.tally.documents)


def settings_for(tmp_path, source, **changes) -> PrepareConfig:
    options = {"name": "mine", "source": str(source), "data_dir": str(tmp_path / "data"), "processes": 1}
    settings = PrepareConfig(**options | ({"tokenizer": "bytes"} if source else {}) | changes)
    settings.check()
    return settings


def prepared(tmp_path, source="", **changes) -> tuple[dict, list[str]]:
    """Prepare `source`; return the manifest and the documents in the shards, those for training first."""
    folder = prepare_data.prepare(settings_for(tmp_path, source, **changes))
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8")), documents_of(folder)


def documents_of(folder: Path) -> list[str]:
    encoding, texts = Dataset(folder, 1).encoding, []
    for split in ("train", "val"):
        tokens = tokens_of(folder, split)
        assert tokens[0] == encoding.eot_token
        parts = np.split(tokens, np.flatnonzero(tokens == encoding.eot_token)[1:])
        texts += [encoding.decode(part[1:].tolist(), errors="strict") for part in parts]
    return texts


def tokens_of(folder: Path, split: str) -> np.ndarray:
    facts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["splits"][split]
    return np.concatenate([prepare_data.open_shard(folder / shard["file"]) for shard in facts["shards"]])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fails(message: str, action, *arguments, code: int = BAD_INPUT, **options) -> str:
    """Check that an action fails as expected errors do, and return the error's text."""
    with pytest.raises(Failure, match=message) as failure:
        action(*arguments, **options)
    assert failure.value.code == code and len(str(failure.value).splitlines()) <= 3
    return str(failure.value)


def start(folder: Path, *options, **more) -> subprocess.Popen:
    """prepare_data.py mine, as a user starts it in `folder`, without matplotlib, which takes a second to import."""
    write(folder / "without" / "matplotlib.py", "raise ImportError")
    environment = {"PYTHONPATH": str(folder / "without"), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, prepare_data.__file__, "mine", "--tokenizer=bytes", *options],
        cwd=folder,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **more,
    )


def finish(process: subprocess.Popen, text: bytes = b"", seconds: float = 30) -> tuple[int, str, str]:
    """The exit code and the output, once the process, and all that it started, are gone."""
    try:
        output, errors = process.communicate(text, seconds)  # a pipe ends with the last process that holds it
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    errors = re.sub(r"(?m)^[\d,]+ .* s left\n", "", errors.decode())  # the progress of a slow machine
    return process.returncode, output.decode(), errors


# ---- sources


def test_a_folder_is_read_in_order_and_without_what_is_hidden(tmp_path):
    for name in ("b.txt", "a.md", "q/z", "q/deeper/x.py", "c/1.txt", ".hidden.txt", ".git/config", "q/.cache/x.txt"):
        write(tmp_path / name, name)
    assert read(tmp_path) == ["a.md", "b.txt", "c/1.txt", "q/z", "q/deeper/x.py"]


@pytest.mark.parametrize(
    "sources, found",
    [
        ("a.txt", "a.txt"),
        ("b.txt,a.txt", "b.txt a.txt"),
        ("b.txt,,*.txt,b.txt,.", "b.txt [1].txt a.txt one,two.txt q/a.txt q/r/b.txt"),
        ("*.txt", "[1].txt a.txt b.txt one,two.txt"),
        ("?.txt,q/*", "a.txt b.txt q/a.txt q/r/b.txt"),
        ("**/a.txt", "a.txt q/a.txt"),
        ("q/**", "q/a.txt q/r/b.txt"),
        ("one,two.txt", "one,two.txt"),
        ("[1].txt", "[1].txt"),
        ("q/.r/*,.a.txt", "q/.r/a.txt .a.txt"),
        ("~/a.txt,~/q", "a.txt q/a.txt q/r/b.txt"),
    ],
)
def test_lists_and_patterns_name_each_file_once_and_in_order(tmp_path, monkeypatch, sources, found):
    for name in ("a.txt", "b.txt", "one,two.txt", "[1].txt", "q/a.txt", "q/r/b.txt", ".a.txt", "q/.r/a.txt"):
        write(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(sources) == found.split()


def test_a_list_may_be_longer_than_a_file_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [write(Path(f"file {number}.txt"), str(number)) for number in range(50)]
    assert read(",".join(map(str, files))) == [str(number) for number in range(50)]


def test_standard_input_is_a_source(tmp_path):
    texts = [f"document {number} é" for number in range(10, 40)]
    code, output, errors = finish(start(tmp_path, "--source=-", "--format=jsonl"), json_lines(texts).encode())
    assert code == 0 and "30 of 30 documents" in output and errors == ""
    assert sorted(documents_of(tmp_path / "data" / "mine")) == texts
    assert "lengths.png" not in names(tmp_path / "data" / "mine")  # as there is no matplotlib


def test_a_closed_standard_input_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # what a shell's <&- makes of it
    with pytest.raises(Failure, match="standard input is closed"):
        read("-")


def test_standard_input_is_no_source_twice(tmp_path):
    with pytest.raises(ValueError, match="standard input"):
        settings_for(tmp_path, "-", decontaminate="-")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_a_source(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # what <(zcat *.gz) gives, too
    writer = threading.Thread(target=write, args=(tmp_path / "pipe", "text from elsewhere"))
    writer.start()
    try:
        assert read(tmp_path / "pipe") == ["text from elsewhere"]
    finally:
        writer.join()


def zst(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zst}
CSV = 'text,number\r\nplain,1\r\n"two\r\nlines, and ""quoted""",2\r\n'
ROWS = ["plain", 'two\r\nlines, and "quoted"']


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_each_format_is_read_by_its_name_in_each_compression(tmp_path, suffix):
    compress = COMPRESSORS[suffix]
    for name, text, documents in (
        ("a.txt", "one\n", ["one\n"]),
        ("README", CSV, [CSV]),
        ("x.tar.py", json_lines("ab"), [json_lines("ab")]),
        ("b.jsonl", json_lines(ROWS) + "\n \n" + json_lines(["é"]), [*ROWS, "é"]),
        ("b.NDJSON", json_lines(ROWS).rstrip(), ROWS),
        ("c.csv", CSV, ROWS),
    ):
        assert read(write(tmp_path / (name + suffix), compress(text.encode()))) == documents
    joined = compress(b"two parts ") + compress(b"behind each other")
    assert read(write(tmp_path / ("joined" + suffix), joined)) == ["two parts behind each other"]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary("int32", "string")])
def test_parquet_is_read_through_all_row_groups(tmp_path, kind):
    texts = [f"text {number} é" for number in range(7)]
    assert read(write_parquet(tmp_path / "a.parquet", pyarrow.array(texts).cast(kind))) == texts
    assert read(write_parquet(tmp_path / "b.bin", texts, "body"), format="parquet", text_field="body") == texts


def test_the_suffix_of_a_compression_may_be_in_capitals(tmp_path):
    assert read(write(tmp_path / "A.JSONL.GZ", gzip.compress(json_lines(ROWS).encode()))) == ROWS


def test_settings_say_more_than_a_name(tmp_path):
    lines, table = json_lines(ROWS, "body"), CSV.replace("text", "body")
    for name, text in (("a.txt", lines), ("b.csv", lines), ("c.jsonl", table)):
        write(tmp_path / name, text)
        assert read(tmp_path / name, format="text") == [text]
        form = "csv" if text is table else "jsonl"
        assert read(tmp_path / name, format=form, text_field="body") == ROWS


def test_json_that_may_be_one_document_or_many_is_refused(tmp_path):
    path = write(tmp_path / "a.json", json_lines(ROWS))
    fails("a.json: make it .jsonl, .*or say --format=jsonl, or --format=text", read, path)
    assert read(path, format="jsonl") == ROWS and read(path, format="text") == [json_lines(ROWS)]


@pytest.mark.parametrize("end", ["", "<|endoftext|>", "<|endoftext|>\n"])
def test_a_separator_parts_the_documents_of_a_file(tmp_path, end):
    text = "<|endoftext|>\nOnce.\n\nMore <|endoftext|> here.\n<|endoftext|>\r\n <|endoftext|> \nTwice.\n" + end
    write(tmp_path / "a.txt", text)
    assert read(tmp_path / "a.txt", separator="<|endoftext|>") == ["Once.\n\nMore <|endoftext|> here.\n", "Twice.\n"]
    assert read(tmp_path / "a.txt") == [text]


# ---- encodings

ENCODINGS = [  # with the byte-order mark that stands before it, and something that is none of its characters
    pytest.param("utf-8", b"", b"\xff", id="utf-8"),
    pytest.param("utf-8", b"", b"\xe6\x97", id="utf-8, half a character"),
    pytest.param("utf-8", codecs.BOM_UTF8, b"\xff", id="utf-8 with a mark"),
    pytest.param("utf-16-le", codecs.BOM_UTF16_LE, b"\x00\xdc", id="utf-16-le"),
    pytest.param("utf-16-be", codecs.BOM_UTF16_BE, b"\xdc\x00", id="utf-16-be"),
    pytest.param("utf-32-le", codecs.BOM_UTF32_LE, b"\xff" * 4, id="utf-32-le"),
    pytest.param("utf-32-be", codecs.BOM_UTF32_BE, b"\xff" * 4, id="utf-32-be"),
]


@pytest.mark.parametrize("encoding, mark, _", ENCODINGS)
def test_text_in_each_encoding_is_the_same_wherever_blocks_end(tmp_path, monkeypatch, encoding, mark, _):
    text = "plain é 日本 😀\r\nx" * 3
    for size in range(5, 20):
        monkeypatch.setattr(prepare_data, "BLOCK_BYTES", size)
        assert read(write(tmp_path / "a.txt", mark + text.encode(encoding))) == [text]


@pytest.mark.parametrize("encoding, mark, bad", ENCODINGS)
def test_invalid_bytes_are_refused_with_their_place_or_replaced(tmp_path, monkeypatch, encoding, mark, bad):
    monkeypatch.setattr(prepare_data, "BLOCK_BYTES", 16)
    for before in range(20):
        good = mark + ("é" * before).encode(encoding)
        for after in ("", "xyz"):
            path = write(tmp_path / "a.txt", good + bad + after.encode(encoding))
            message = fails("a.txt is not utf-.* text: .*--invalid_bytes=replace", read, path)
            assert int(re.search(r"at byte (\d+);", message)[1]) == len(good)
            assert read(path, invalid_bytes="replace") == ["é" * before + "\ufffd" + after]


def test_characters_go_across_the_blocks_of_a_large_file(tmp_path):
    for before in range(4):
        data = b"a" * (prepare_data.BLOCK_BYTES - before) + "日😀".encode()
        assert read(write(tmp_path / "a.txt", data)) == [data.decode()]
        path = write(tmp_path / "a.txt", data[:-1] + b"x")
        fails(f"invalid continuation byte at byte {len(data) - 4};", read, path)


@pytest.mark.parametrize("before", [0, 100])
def test_a_file_with_invalid_bytes_can_be_skipped(tmp_path, monkeypatch, before):
    monkeypatch.setattr(prepare_data, "BLOCK_BYTES", 64)
    path = write(tmp_path / "a.txt", b"a" * before + b"\xff")
    assert skipped(path) == {"invalid bytes": 1} and read(path, on_error="skip") == []


def test_utf_16_without_a_mark_is_binary(tmp_path):
    fails("a.txt is binary, not text", read, write(tmp_path / "a.txt", "some text".encode("utf-16-le")))


# ---- long texts


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "separated"])
def test_a_long_text_becomes_several_documents(tmp_path, monkeypatch, name):
    monkeypatch.setattr(prepare_data, "DOCUMENT_CHARACTERS", 100)
    monkeypatch.setattr(prepare_data, "BLOCK_BYTES", 64)
    chooser = random.Random(0)
    for length in (0, 1, 99, 100, 101, 102, 200, 201, 1777):
        text = "".join(chooser.choices("aé日    \n", k=length))
        path = write(tmp_path / name, json_lines([text]) if name == "a.jsonl" else text)
        pieces = read(path, separator="---" if name == "separated" else "")
        assert "".join(pieces) == text and max(map(len, pieces), default=0) <= 100
        assert all(piece[-1] in " \n" and len(piece) > 50 for piece in pieces[:-1])
        assert all(pieces) or text == ""  # none is empty where there is text


def test_a_long_text_without_white_space_is_cut_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "DOCUMENT_CHARACTERS", 100)
    text = "white at the beginning does not count " + "日" * 312
    assert [len(piece) for piece in read(write(tmp_path / "a.txt", text))] == [100, 100, 100, 50]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_that_is_too_long_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(prepare_data, "LINE_CHARACTERS", 1000)
    monkeypatch.setattr(prepare_data, "BLOCK_BYTES", 100)
    good = json_lines(["x" * 900]) if name == "a.jsonl" else f"text\n{'x' * 900}\n"
    assert read(write(tmp_path / name, good)) == ["x" * 900]
    path = write(tmp_path / name, good + good.splitlines()[-1].replace("x", "xx") + "\n")
    fails("a line of more than 1,000 characters", read, path)
    assert skipped(path) == {"damaged file": 1}


@pytest.mark.parametrize("line", [b"words " * 7_000_000, b"w" * 42_000_000], ids=["white space", "none"])
def test_a_huge_line_takes_little_memory(tmp_path, line):
    path = write(tmp_path / "a.txt.gz", gzip.compress(line, 1))
    tracemalloc.start()
    try:
        assert sum(len(text) for text, _ in Reader(PrepareConfig("mine"), str(path))) == len(line)
        assert tracemalloc.get_traced_memory()[1] < 25e6
    finally:
        tracemalloc.stop()


# ---- bad input

GOOD = "This is a good document.\n" * 9
SOME = "".join(random.Random(0).choices("abcdefgh \n", k=5000)).encode()
BAD = [  # a file, what is wrong, and how that is counted
    ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl:3: not JSON", {"broken line": 1}),
    ("a.jsonl", b"\xef\xbb\xbfnothing\n", "a.jsonl:1: not JSON", {"broken line": 1}),
    ("a.jsonl", b"[" * 100_000 + b"\n{}}\n", "a.jsonl:1: not JSON", {"broken line": 2}),
    ("a.jsonl", b"1" * 5000, "a.jsonl:1: not JSON", {"broken line": 1}),
    (
        "a.jsonl",
        b'{"body": "x", "n": 1}\n',
        "a.jsonl:1: no text in field 'text'; its fields: body, n .--text_field",
        {},
    ),
    ("a.jsonl", b'[1]\n3\nnull\n"x"\n', "a.jsonl:1: no text in field 'text'; its fields: none", {"missing field": 4}),
    ("a.jsonl", b'{"text": 3}\n{"text": ["x"]}', "a.jsonl:1: no text in field 'text'", {"missing field": 2}),
    ("a.csv", b"body,n\nx,1,2\n", "a.csv:2: no text in field 'text'; its fields: body, n, None", {}),
    ("a.csv", b"n,text\n1\n", "a.csv:2: no text in field 'text'", {}),
    ("a.csv", b'text,n\n"a"b,1\nx,2\n', "a.csv:2: not CSV", {"broken line": 1}),
    ("a.csv", b'text,n\nx,1\n"a,2\ny,3\n', "a.csv:.*: not CSV: unexpected end", {"broken line": 1}),
    ("a.parquet", b"", "a.parquet is cut or damaged", {}),
    ("a.parquet", b"PAR1" + bytes(50), "a.parquet is cut or damaged", {}),
    *((f"a.txt{suffix}", COMPRESSORS[suffix](SOME)[:-9], "is cut or damaged", {}) for suffix in (*COMPRESSORS,)[1:]),
    *((f"a.txt{suffix}", b"something else", "is cut or damaged", {}) for suffix in (*COMPRESSORS,)[1:]),
    *(
        (f"a.txt{suffix}", (data := COMPRESSORS[suffix](SOME))[:12] + b"\xff" * 40 + data[52:], "cut or damaged", {})
        for suffix in (*COMPRESSORS,)[1:]
    ),
]


@pytest.mark.parametrize("name, content, message, counts", BAD, ids=[f"{row[0]}: {row[2]}" for row in BAD])
def test_bad_input_is_refused_or_skipped_and_counted(tmp_path, name, content, message, counts):
    path, good = write(tmp_path / name, content), write(tmp_path / "good.txt", GOOD)
    fails(message + ".*--on_error=skip would go on without it", prepared, tmp_path, path)
    assert names(tmp_path / "data") == [".mine.lock"]
    counts = counts or {"missing field" if "no text" in message else "damaged file": 1}
    manifest, texts = prepared(tmp_path, f"{path},{good}", on_error="skip")
    assert manifest["documents"]["dropped"] == counts and len("".join(texts)) - len(GOOD) in (0, 1)
    report = (tmp_path / "data" / "mine" / "report.md").read_text(encoding="utf-8")
    for reason, count in counts.items():
        assert f"| dropped: {reason} | {count} | 0 |" in report and f"## dropped: {reason}\n\n- `{path}" in report


def test_damaged_parquet_is_refused(tmp_path):
    whole = write_parquet(tmp_path / "whole.parquet", ["some text"] * 9).read_bytes()
    for damaged in (whole[:-3], whole[: len(whole) // 2], whole[:4] + b"\xff" * 50 + whole[54:]):
        path = write(tmp_path / "a.parquet", damaged)
        fails("a.parquet is cut or damaged", read, path)
        assert skipped(path) == {"damaged file": 1}
    fails(
        "whole.parquet: no text in field 'body'; its fields: text", read, tmp_path / "whole.parquet", text_field="body"
    )
    path = write_parquet(tmp_path / "a.parquet", ["one", None, "three"])
    fails("a.parquet:2: no text in field 'text'", read, path)
    assert read(path, on_error="skip") == ["one", "three"] and skipped(path) == {"missing field": 1}


def test_parquet_with_invalid_text_is_refused(tmp_path):
    offsets = pyarrow.py_buffer(np.array([0, 2, 4], dtype=np.int32))
    path = write_parquet(
        tmp_path / "a.parquet", pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"ok\xff\xff"))
    )
    fails("a.parquet", read, path)


@pytest.mark.parametrize("content", ["", " \n\t \r\n\u00a0"])
def test_a_source_without_text_is_refused(tmp_path, content):
    path, good = write(tmp_path / "a.txt", content), write(tmp_path / "good.txt", GOOD)
    fails("a.txt: no text is left: {'empty': 1}", prepared, tmp_path, path)
    assert prepared(tmp_path, f"{path},{good}")[0]["documents"] == {"in": 2, "kept": 1, "dropped": {"empty": 1}}


def test_text_that_cannot_be_split_is_refused(tmp_path):
    fails("too little text for a training and a validation", prepared, tmp_path, write(tmp_path / "a.txt", "x"))
    assert names(tmp_path / "data") == [".mine.lock"]


def test_a_binary_file_is_refused_where_it_was_named_and_counted_in_a_folder(tmp_path):
    path = write(tmp_path / "texts" / "a.png", b"\x89PNG\r\n\0\0")
    write(tmp_path / "texts" / "good.txt", GOOD)
    for source in (path, tmp_path / "texts" / "*"):
        fails("a.png is binary, not text", prepared, tmp_path, source)
        assert skipped(source) == {"binary": 1}
    manifest, texts = prepared(tmp_path, tmp_path / "texts")
    assert manifest["documents"]["dropped"] == {"binary": 1}
    assert "".join(texts) == GOOD
    assert f"- `{path}`" in (tmp_path / "data" / "mine" / "report.md").read_text(encoding="utf-8")


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a\\ud83db"}\n{"text": "\\ud83d\\ude00"}\n{"text": "\\ude00"}\n')
    assert read(path) == ["a?b", "😀", "?"]


@pytest.mark.parametrize(
    "name, line", [("a.jsonl", '{"\\ud83d": 1}'), (os.fsdecode(b"\xff.txt"), " ")], ids=["field", "file"]
)
def test_a_report_can_name_what_is_no_unicode(tmp_path, name, line):
    try:
        path = write(tmp_path / name, line)
    except OSError:
        pytest.skip("no such names on this disk")
    manifest, texts = prepared(tmp_path, f"{path},{write(tmp_path / 'good.txt', GOOD)}", on_error="skip")
    assert "".join(texts) == GOOD and manifest["documents"]["in"] == 2


def test_links_in_a_folder_are_not_followed(tmp_path):
    write(tmp_path / "outside" / "secret.txt", "outside")
    folder = write(tmp_path / "texts" / "inside.txt", GOOD).parent
    for number, target in enumerate([folder, "loop4", tmp_path / "outside", "../outside/secret.txt", "loop4", "none"]):
        (folder / f"loop{number}").symlink_to(target)
    manifest, texts = prepared(tmp_path, folder)
    assert manifest["documents"]["dropped"] == {"symbolic link": 6} and "".join(texts) == GOOD
    assert read(folder / "loop3") == ["outside"]  # what is named is read
    (folder / "inside.txt").unlink()
    fails("a folder without text .6 symbolic links were not followed; name them, as in", read, folder)


def test_a_pattern_goes_through_no_link_in_a_circle(tmp_path):
    write(tmp_path / "texts" / "a.txt", "text")
    (tmp_path / "texts" / "circle").symlink_to(tmp_path / "texts")
    assert read(tmp_path / "texts" / "**" / "*.txt") == ["text"]


def test_a_dangling_link_is_a_missing_file(tmp_path):
    (tmp_path / "a.txt").symlink_to("nowhere")
    write(tmp_path / "b.txt", "text")
    fails("a.txt: there is no such file", read, tmp_path / "a.txt")
    assert read(tmp_path / "*.txt", on_error="skip") == ["text"] and sum(skipped(tmp_path / "*.txt").values()) == 1


@pytest.mark.parametrize(
    "source",
    [
        "none.txt",
        "*.none",
        "a.txt,none",
        "**/none/*",
        "empty",
        "~nobody-of-that-name/a.txt",
        "**.none",
    ],
)
def test_what_is_missing_is_refused(tmp_path, monkeypatch, source):
    write(tmp_path / "a.txt", GOOD)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    fails(f"--source={re.escape(source.split(',')[-1])}: there is no such file", prepared, tmp_path, source)


def test_what_may_not_be_read_is_refused_or_skipped(tmp_path):
    write(tmp_path / "texts" / "good.txt", "good")
    file = write(tmp_path / "texts" / "deeper" / "a.txt", "text")
    for path in (file, file.parent):
        path.chmod(0)
        try:
            if os.access(path, os.R_OK):
                pytest.skip("root can read all")
            fails(f"{path}: Permission denied; --on_error=skip", read, tmp_path / "texts", code=INPUT_OUTPUT)
            assert skipped(tmp_path / "texts") == {"unreadable": 1}
        finally:
            path.chmod(0o700)


def test_a_disk_that_cannot_be_read_is_reported_or_skipped(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    path = write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(prepare_data, "open", fail, raising=False)
    fails("a.txt: Input/output error; --on_error=skip", read, path, code=INPUT_OUTPUT)
    assert skipped(path) == {"unreadable": 1}


def test_a_file_that_vanishes_meanwhile_can_be_skipped(tmp_path):
    for name in "ab":
        write(tmp_path / name, name)
    reader = Reader(PrepareConfig("mine", on_error="skip"), str(tmp_path))
    (tmp_path / "a").unlink()
    assert [text for text, _ in reader] == ["b"] and reader.tally.documents == {"unreadable": 1}


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, name):
    if name.endswith(".zst") and sys.version_info >= (3, 14):
        pytest.skip("Python itself reads it")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = write(tmp_path / name, zst(b"text"))
    assert fails("needs pyarrow: pip install pyarrow", prepared, tmp_path, path)


def test_a_tokenizer_that_is_missing_is_noticed_before_any_text_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Reader, "read_file", lambda *_: pytest.fail("text is read"))
    path, tokenizer = write(tmp_path / "a.txt", GOOD), tmp_path / "none.tiktoken"
    for name in (f"{tokenizer}", f"{tokenizer}:gpt4"):
        fails(f"--tokenizer={name}: there is no file {tokenizer}", prepared, tmp_path, path, tokenizer=name)
    fails(
        "there is no file ~nobody-of-that-name", prepared, tmp_path, path, tokenizer="~nobody-of-that-name/a.tiktoken"
    )
    write(tokenizer, "no tokenizer")
    fails("none.tiktoken: not a .tiktoken file", prepared, tmp_path, path, tokenizer=str(tokenizer))


def test_what_stands_under_the_name_already_is_kept(tmp_path, capsys):
    path, folder = write(tmp_path / "a.txt", GOOD), tmp_path / "data" / "mine"
    prepared(tmp_path, path)
    before = contents(folder)
    fails("was made with val_fraction 0.1 and not 0.2; delete it", prepared, tmp_path, path, val_fraction=0.2)
    prepare_data.prepare(settings_for(tmp_path, path, processes=2))
    assert "is there already" in capsys.readouterr().out and contents(folder) == before
    write(tmp_path / "data" / "other" / "notes.txt", "mine")
    write(tmp_path / "data" / "file", "mine")
    for name in ("other", "file"):
        fails(f"{name} holds something else already; choose another", prepared, tmp_path, path, name=name)
    assert names(tmp_path / "data" / "other") == ["notes.txt"]


@pytest.mark.parametrize("manifest", ['{"name": "an app"}', '{"name', "[]", '{"made_from": "x"}'])
def test_a_manifest_of_something_else_is_refused(tmp_path, manifest):
    write(tmp_path / "data" / "mine" / "manifest.json", manifest)
    fails("mine holds something else already", prepared, tmp_path, write(tmp_path / "a.txt", GOOD))


@pytest.mark.parametrize(
    "name, content, message",
    [("a.jsonl", '{"text": "x"}\n{', "a.jsonl:2: not JSON"), ("b.txt", "", "a.jsonl: there is no such file")],
)
def test_errors_reach_the_command_line_as_a_line_and_a_code(tmp_path, name, content, message):
    write(tmp_path / name, content)
    code, _, errors = finish(start(tmp_path, "--source=a.jsonl"))
    assert code == 2 and errors.startswith("prepare_data.py: ") and message in errors
    assert len(errors.splitlines()) == 1 and names(tmp_path / "data") == [".mine.lock"]


# ---- nothing half-written


@pytest.mark.parametrize(
    "where", ["ShardFile.write", "ShardFile.close", "clean", "write_tokenizer", "report", "compress", "Path.rename"]
)
def test_a_failure_leaves_neither_a_dataset_nor_what_it_was_made_in(tmp_path, monkeypatch, capsys, where):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"prepare_data.{where}", fail)
    with pytest.raises(SystemExit) as exit_, config.exit_codes():
        prepared(tmp_path, write(tmp_path / "a.txt", GOOD))
    assert exit_.value.code == INPUT_OUTPUT and "No space left on device" in capsys.readouterr().err
    assert names(tmp_path / "data") == [".mine.lock"]


def test_a_full_disk_ends_with_a_line_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    write(tmp_path / "a.txt", GOOD * 200)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code, _, errors = finish(start(tmp_path, "--source=a.txt", preexec_fn=limit))
    assert code == INPUT_OUTPUT and "File too large" in errors and len(errors.splitlines()) == 1
    assert names(tmp_path / "data") == [".mine.lock"]


DEALINGS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree")


def killed_at(settings: PrepareConfig, dealing: int) -> bool:
    """Prepare in a process that is killed before its n-th dealing with the disk; return whether that came."""

    def work():
        left = iter(range(dealing - 1, -1, -1))
        sys.addaudithook(lambda event, _: event in DEALINGS and not next(left) and os.kill(os.getpid(), signal.SIGKILL))
        prepare_data.prepare(settings)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_run_killed_at_any_moment_leaves_nothing_or_all_and_the_next_one_succeeds(tmp_path):
    source = write(tmp_path / "a.jsonl", json_lines(f"document {number}" for number in range(30)))
    calm = settings_for(tmp_path, source, data_dir=str(tmp_path / "calm"))
    whole = contents(prepare_data.prepare(calm))
    settings, dealing = settings_for(tmp_path, source, shard_tokens=100_000_000), 0
    folder = Path(settings.data_dir, "mine")
    while not folder.exists():
        dealing += 1
        killed_at(settings, dealing)
    assert contents(folder) == whole and dealing > 12
    shutil.rmtree(folder)
    assert prepare_data.prepare(settings) == folder and contents(folder) == whole
    assert names(folder.parent) == [".mine.lock", "mine"]


def test_what_a_killed_run_left_beside_its_dataset_is_cleared(tmp_path):
    path = write(tmp_path / "a.txt", GOOD)
    prepared(tmp_path, path)
    write(tmp_path / "data" / ".mine" / "texts", GOOD)
    prepared(tmp_path, path)
    assert names(tmp_path / "data") == [".mine.lock", "mine"]


# ---- several processes


@pytest.fixture(scope="module")
def much_text(tmp_path_factory) -> Path:
    """A file that several processes share the work on: 80 documents of 60 kB."""
    chooser = random.Random(0)
    text = " ".join("".join(chooser.choices("abcdefghijé", k=5)) for _ in range(10_000))
    return write(tmp_path_factory.mktemp("much") / "much.jsonl", json_lines(f"{number} {text}" for number in range(80)))


def workers_of(process: subprocess.Popen) -> list[int]:
    table = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    return [int(row[0]) for row in rows if row[1] == str(process.pid) and "spawn_main" in row[2]]


def start_with_workers(folder: Path, source: Path) -> subprocess.Popen:
    """A run whose workers are on their way."""
    process = start(folder, f"--source={source}", "--processes=2")
    while not workers_of(process):
        assert process.poll() is None
        time.sleep(0.02)
    return process


def wait_for_work(folder: Path):
    """Return when the first worker has done something."""
    deadline = time.monotonic() + 20
    while not (folder / "data" / ".mine" / "texts").stat().st_size:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_a_run_and_its_workers_quietly(tmp_path, much_text, times):
    process = start_with_workers(tmp_path, much_text)
    for _ in range(times):
        time.sleep(0.1)  # the workers are still starting
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all of them
    code, _, errors = finish(process, seconds=10)
    assert code == 130 and errors == "prepare_data.py: interrupted\n"
    assert names(tmp_path / "data") == [".mine.lock"]


def test_a_killed_worker_ends_the_run(tmp_path, much_text):
    process = start_with_workers(tmp_path, much_text)
    wait_for_work(tmp_path)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    code, _, errors = finish(process, seconds=10)
    assert code == INPUT_OUTPUT and len(errors.splitlines()) == 1
    assert "a process was killed, for want of memory? try fewer --processes" in errors
    assert names(tmp_path / "data") == [".mine.lock"]


def test_workers_end_with_their_parent_and_the_next_run_succeeds(tmp_path, much_text):
    for moment in (lambda _: time.sleep(0.2), wait_for_work):
        process = start_with_workers(tmp_path, much_text)
        moment(tmp_path)
        process.kill()
        finish(process, seconds=10)
        assert names(tmp_path / "data") == [".mine", ".mine.lock"]
    source = write(tmp_path / "some.jsonl", b"".join(much_text.read_bytes().splitlines(True)[:55]))
    folder = prepare_data.prepare(settings_for(tmp_path, source, processes=2))
    assert names(folder.parent) == [".mine.lock", "mine"]
    calm = prepare_data.prepare(settings_for(tmp_path, source, data_dir=str(tmp_path / "calm")))
    assert contents(calm) == contents(folder)  # with any number of processes


def test_of_two_that_prepare_the_same_one_does_and_the_other_waits(tmp_path):
    write(tmp_path / "a.txt", GOOD)
    processes = [start(tmp_path, "--source=a.txt") for _ in range(2)]
    outcomes = [finish(process) for process in processes]
    assert [(code, errors) for code, _, errors in outcomes] == [(0, "")] * 2
    assert sum("is there already" in output for _, output, _ in outcomes) == 1
    assert names(tmp_path / "data") == [".mine.lock", "mine"]


# ---- any Unicode text


def tiktoken_file(path: Path, tokens: list[bytes]) -> Path:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    return write(path, "".join(lines))


BYTES = [bytes([byte]) for byte in range(256)]
PAIRS = [bytes(pair) for pair in combinations(b" \n\taeinorst\xc3\xe3\x81\xf0\x9f", 2)]


def any_texts(count: int) -> list[str]:
    """Strings of all planes, of many lengths, some with the name of end-of-text in them; none of white space alone."""
    chooser = random.Random(0)
    ranges = [range(0x80), range(0x800), range(0xD800), range(0xE000, 0x10000), range(0x10000, 0x110000)]
    texts = []
    for number in range(count):
        text = "".join(chr(chooser.choice(chooser.choice(ranges))) for _ in range(chooser.randrange(1, 30)))
        texts.append(text + ("<|endoftext|>" if number % 3 == 0 else "\r\n x"))
    return texts


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300", "x.tiktoken:gpt4"])
def test_shards_hold_any_documents_exactly(tmp_path, monkeypatch, tokenizer):
    texts = any_texts(2000)
    monkeypatch.chdir(tmp_path)
    tiktoken_file(tmp_path / "x.tiktoken", BYTES + PAIRS)
    source = write(tmp_path / "a.jsonl", json_lines(texts))
    manifest, found = prepared(tmp_path, source, tokenizer=tokenizer, clean="none", dedupe="none")
    assert Counter(found) == Counter(texts) and len(found) == 2000  # as many as there are end-of-text tokens
    assert manifest["documents"] == {"in": 2000, "kept": 2000, "dropped": {}}
    assert manifest["bytes"]["kept"] == sum(len(text.encode()) for text in texts)
    assert manifest["tokenizer"]["vocab_size"] == (300 if "bpe" in tokenizer else 257 + len(PAIRS) * ("x" in tokenizer))


@pytest.mark.parametrize("tokenizer", ["bytes", "x.tiktoken", "x.tiktoken:gpt4"])
def test_a_million_of_white_space_is_encoded(tmp_path, tokenizer):
    tiktoken_file(tmp_path / "x.tiktoken", BYTES + PAIRS)
    encoding = prepare_data.load_tokenizer(tokenizer.replace("x.", f"{tmp_path}/x."), tmp_path)
    mixed = "".join(random.Random(0).choices(" \n\t\r\u00a0\u2003\u2028", k=1_000_000))
    for text in (" " * 1_000_000, "x" + mixed + "x", ("x" + " " * 150_000) * 3):
        assert encoding.decode(prepare_data.encode(encoding, text).tolist()) == text


def test_a_vocabulary_above_65536_has_shards_of_32_bits(tmp_path):
    pairs = [first + second for first in BYTES for second in BYTES if first != b"x"]
    pairs += [b"x" + second for second in BYTES]  # with the highest ranks
    tokenizer = tiktoken_file(tmp_path / "x.tiktoken", BYTES + pairs)
    texts = [f"xx {number}" for number in range(1000, 1040)]
    path = write(tmp_path / "a.jsonl", json_lines(texts))
    manifest, found = prepared(tmp_path, path, tokenizer=str(tokenizer))
    tokens = tokens_of(tmp_path / "data" / "mine", "train")
    assert sorted(found) == texts and manifest["tokenizer"]["vocab_size"] == 65_793
    assert tokens.dtype == np.dtype("<u4") and len(np.unique(tokens[tokens > 65_535])) > 1


# ---- merging


def two_halves(tmp_path, tokenizer) -> list[str]:
    """Prepare the datasets `one` and `two`; return all their documents."""
    texts = [f"document {number} of them" for number in range(60)]
    for name, half in (("one", texts[:25]), ("two", texts[25:])):
        path = write(tmp_path / f"{name}.jsonl", json_lines([*half, " "]))
        prepared(tmp_path, path, name=name, tokenizer=str(tokenizer), shard_tokens=90, val_fraction=0.3)
    return texts


@pytest.mark.parametrize("links", [True, False])
def test_merged_datasets_hold_what_both_held(tmp_path, monkeypatch, links):
    texts = two_halves(tmp_path, tiktoken_file(tmp_path / "x.tiktoken", BYTES + PAIRS))
    if not links:
        monkeypatch.delattr(prepare_data.os, "link")
        monkeypatch.setattr(prepare_data.os, "link", lambda *_: (_ for _ in ()).throw(OSError()), raising=False)
    one, two, both = (tmp_path / "data" / name for name in ("one", "two", "mine"))
    manifest, found = prepared(tmp_path, merge=f"{one},{two}")
    assert sorted(found) == sorted(texts)
    for split in ("train", "val"):
        assert (tokens_of(both, split) == np.concatenate([tokens_of(one, split), tokens_of(two, split)])).all()
        assert manifest["splits"][split]["tokens"] == len(tokens_of(both, split))
        for shard in manifest["splits"][split]["shards"]:
            assert shard["sha256"] == hashlib.sha256((both / shard["file"]).read_bytes()).hexdigest()
    assert manifest["documents"] == {"in": 62, "kept": 60, "dropped": {"empty": 2}}
    size = sum(len(text) for text in texts)
    assert manifest["bytes"] == {"in": size + 2, "kept": size, "dropped": {"empty": 2}}
    assert len(Dataset(both, 8).train) >= len(Dataset(one, 8).train) + len(Dataset(two, 8).train)
    assert ((both / "mine_train_000000.bin").stat().st_nlink == 2) == links


def test_what_does_not_fit_is_not_merged(tmp_path):
    tokenizer = tiktoken_file(tmp_path / "x.tiktoken", BYTES + PAIRS)
    two_halves(tmp_path, tokenizer)
    one, other = (tmp_path / "data" / name for name in ("one", "other"))
    prepared(tmp_path, tmp_path / "one.jsonl", name="other")
    message = "other and .*one have different tokenizers; prepare one of them anew"
    fails(message, prepared, tmp_path, merge=f"{one},{other}")
    fails("holds no manifest.json, so it is no dataset", prepared, tmp_path, merge=f"{one},{tmp_path}")
    fails("holds no manifest.json, so it is no dataset", prepared, tmp_path, merge=f"{one},{tmp_path / 'none'}")
    fails("holds no manifest.json, so it is no dataset", prepared, tmp_path, merge="~nobody-of-that-name/one,")
    assert not {"mine", ".mine"} & set(names(tmp_path / "data"))


@pytest.mark.parametrize(
    "manifest", ['{"name": "an app"}', '{"name', "[]", '{"tokenizer": {"sha256": "x", "name": "x"}}']
)
def test_a_folder_with_a_manifest_of_something_else_is_not_merged(tmp_path, manifest):
    write(tmp_path / "app" / "manifest.json", manifest)
    fails("app holds", prepared, tmp_path, merge=str(tmp_path / "app"))


def test_tokenizers_that_split_text_differently_are_not_merged(tmp_path):
    tokenizer = tiktoken_file(tmp_path / "x.tiktoken", BYTES + PAIRS)
    two_halves(tmp_path, tokenizer)
    prepared(tmp_path, tmp_path / "one.jsonl", name="other", tokenizer=f"{tokenizer}:gpt4")
    folders = f"{tmp_path / 'data' / 'one'},{tmp_path / 'data' / 'other'}"
    fails("have different tokenizers", prepared, tmp_path, merge=folders)


# ---- named datasets, from a hub on this machine


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that holds `files`, by path in the one repository that it knows, and keeps the paths that are asked."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hub.asked.append(self.path)
            kind, folder = re.fullmatch(r"(?:/api)?/datasets/\w+/[\w-]+/(tree|resolve)/\w+/?(.*)", self.path).groups()
            if kind == "tree":
                folder = folder.removesuffix("?recursive=true")
                facts = [(path, data) for path, data in hub.files.items() if path.startswith(folder)]
                body = json.dumps([{"type": "file", "path": path, "size": len(data)} for path, data in facts]).encode()
            else:
                body = hub.files[folder]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as hub:
        hub.files, hub.asked = {"README.md": b"# about"}, []
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        hub.shutdown()


def shard_bytes(tokens) -> bytes:
    header = np.array([20240520, 1, len(tokens)] + [0] * 253, dtype="<i4")
    return header.tobytes() + np.array(tokens, dtype="<u2").tobytes()


@pytest.fixture
def small_gpt2(tmp_path, monkeypatch):
    """Let the tokenizer `gpt2` be one of 256 bytes."""
    path = tiktoken_file(tmp_path / "data" / "downloads" / "gpt2.tiktoken", BYTES)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(prepare_data, "GPT2_RANKS", ("http://127.0.0.1:9/", sha256, path.stat().st_size))


def test_shards_from_the_hub_become_a_dataset_as_they_are(tmp_path, hub, small_gpt2):
    shards = {
        "train_000001": [256, *b"one", 256, *b"two"],
        "train_000002": [256, *b"three"],
        "val_000000": [256, *b"x"],
    }
    hub.files |= {f"fineweb_{name}.bin": shard_bytes(tokens) for name, tokens in shards.items()}
    manifest, texts = prepared(tmp_path, name="fineweb-10b-gpt2")
    assert texts == ["one", "two", "three", "x"]
    assert manifest["documents"] == {"in": 4, "kept": 4, "dropped": {}} and manifest["bytes"]["kept"] == 12
    train = manifest["splits"]["train"]
    assert (train["documents"], train["bytes"], train["tokens"]) == (3, 11, 14) and len(train["shards"]) == 2
    folder = tmp_path / "data" / "fineweb-10b-gpt2"
    for shard in train["shards"]:
        assert (folder / shard["file"]).read_bytes() == hub.files[shard["file"]]
    assert "4 of 4 documents" in (folder / "report.md").read_text(encoding="utf-8")
    hub.files["fineweb_train_000003.bin"] = b"no shard"
    shutil.rmtree(folder)
    fails("train_000003.bin is not a shard", prepared, tmp_path, name="fineweb-10b-gpt2")
    assert not folder.exists() and not folder.with_name(f".{folder.name}").exists()


def test_a_hub_that_lists_no_files_is_refused(tmp_path, hub, small_gpt2):
    with pytest.raises(Failure):
        prepared(tmp_path, name="fineweb-10b-gpt2")


def test_shards_of_another_tokenizer_are_refused(tmp_path, hub, small_gpt2):
    hub.files |= {f"fineweb_{split}_000000.bin": shard_bytes([256, 65, 66, 300]) for split in ("train", "val")}
    fails("300", prepared, tmp_path, name="fineweb-10b-gpt2")


STORIES = [f"Once there was a cat with {number} toys.\nIt was happy." for number in range(40)]


def test_stories_from_the_hub(tmp_path, hub):
    hub.files["TinyStoriesV2-GPT4-train.txt"] = "\n<|endoftext|>\n".join(STORIES).encode()
    hub.files |= {"TinyStoriesV2-GPT4-valid.txt": b"held back", "TinyStories-train.txt": b"another version"}
    manifest, texts = prepared(tmp_path, name="tinystories", val_fraction=0.2, tokenizer="bpe:280")
    assert sorted(text.strip() for text in texts) == sorted(STORIES) and manifest["documents"]["in"] == 40
    assert names(tmp_path / "data" / "downloads" / "tinystories") == ["TinyStoriesV2-GPT4-train.txt"]


def test_a_tokenizer_that_is_missing_is_noticed_before_any_download(tmp_path, hub):
    tokenizer = str(tmp_path / "none.tiktoken")
    fails("there is no file", prepared, tmp_path, name="fineweb-edu-10b", tokenizer=tokenizer)
    assert hub.asked == []


def test_web_pages_from_the_hub(tmp_path, hub, small_gpt2, monkeypatch):
    for number in range(2):
        table = write_parquet(tmp_path / "a.parquet", STORIES[number::2])
        hub.files[f"sample/10BT/{number:03d}_00000.parquet"] = table.read_bytes()
    hub.files["sample/100BT/000_00000.parquet"] = b"another sample"
    name, downloads = "fineweb-edu-10b", tmp_path / "data" / "downloads" / "fineweb-edu-10b"
    size = sum(len(data) for path, data in hub.files.items() if "/10BT/" in path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=size - 1))
    fails("needs .* GB, but .* GB of the disk are free", prepared, tmp_path, name=name, code=INPUT_OUTPUT)
    assert len(hub.asked) == 1 and names(downloads) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=size))
    manifest, texts = prepared(tmp_path, name=name, val_fraction=0.2)
    assert sorted(texts) == sorted(STORIES) and manifest["tokenizer"]["name"] == "gpt2"
    assert names(downloads) == ["000_00000.parquet", "001_00000.parquet"]


# ---- the report

REPEATED = " ".join(f"word{number}" for number in range(80))


def varied_source(tmp_path) -> Path:
    """A folder in which something is wrong in each of many ways, and 40 good documents."""
    good = [f"Good document number {number}, " + "and more " * number for number in range(40)]
    folder = write(tmp_path / "texts" / "a.jsonl", json_lines([*good, good[7], good[7].upper(), " ", "\t"])).parent
    write(folder / "b.jsonl", json_lines([REPEATED, f"{REPEATED} more"]) + '{\n{"body": 1}\n{"text": 2}\n')
    write(folder / "c.bin", bytes(99))
    write(folder / "d.gz", b"no gzip")
    (folder / "link").symlink_to("a.jsonl")
    return folder


def test_the_numbers_of_manifest_and_report_agree(tmp_path):
    changes = {"on_error": "skip", "clean": "none", "dedupe": "near", "decontaminate": ""}
    manifest, texts = prepared(tmp_path, varied_source(tmp_path), **changes)
    documents, sizes, splits = manifest["documents"], manifest["bytes"], manifest["splits"]
    for counts in (documents, sizes):
        assert counts["in"] == counts["kept"] + sum(counts["dropped"].values())
    assert documents["kept"] == sum(split["documents"] for split in splits.values()) == len(texts)
    assert sizes["kept"] == sum(split["bytes"] for split in splits.values()) == sum(len(t.encode()) for t in texts)
    assert sum(manifest["lengths"].values()) == documents["kept"]
    dropped = {reason.removesuffix(" of validation text") for reason in documents["dropped"]}
    assert dropped == {
        *("exact duplicate", "near duplicate", "empty", "broken line", "missing field"),
        *("binary", "damaged file", "symbolic link"),
    }
    lines = (tmp_path / "data" / "mine" / "report.md").read_text(encoding="utf-8").splitlines()
    rows = {cells[1]: cells[2:4] for cells in (re.split(r" ?\| ?", line) for line in lines if line.startswith("|"))}
    assert rows["read"] == [f"{documents['in']:,}", f"{sizes['in']:,}"]
    assert rows["kept"] == [f"{documents['kept']:,}", f"{sizes['kept']:,}"]
    for reason, count in documents["dropped"].items():
        assert rows[f"dropped: {reason}"] == [f"{count:,}", f"{sizes['dropped'].get(reason, 0):,}"]
    for split, facts in splits.items():
        assert rows[f"{split}: {facts['tokens']:,} tokens"] == [f"{facts['documents']:,}", f"{facts['bytes']:,}"]
    for reason, count in documents["dropped"].items():
        first = lines.index(f"## dropped: {reason}") + 1
        end = next((place for place in range(first, len(lines)) if lines[place].startswith(("#", "Made"))), None)
        examples = [line for line in lines[first:end] if line]
        assert len(examples) == min(count, 3) and all(line.startswith("- `") for line in examples)


def test_what_is_cut_in_two_adds_up(tmp_path):
    path = write(tmp_path / "a.txt", "日" * 3335)
    manifest, texts = prepared(tmp_path, path)
    sizes = [split["bytes"] for split in manifest["splits"].values()]
    assert sum(sizes) == manifest["bytes"]["kept"] == 10_005 and sizes == [len(text.encode()) for text in texts]
    assert "".join(texts) == "日" * 3335 and manifest["documents_cut_in_two"]
    assert "No whole document could be spared" in (tmp_path / "data/mine/report.md").read_text(encoding="utf-8")


def test_lengths_are_drawn_where_matplotlib_is(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.undo()
    path = write(tmp_path / "a.txt", GOOD)
    prepared(tmp_path, path, name="drawn")
    assert (tmp_path / "data" / "drawn" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    prepared(tmp_path, path)
    drawn, plain = (names(tmp_path / "data" / name) for name in ("drawn", "mine"))
    assert {name.replace("drawn", "mine") for name in drawn} == {*plain, "lengths.png"}
