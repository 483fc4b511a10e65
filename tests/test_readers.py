"""Reading: which files, in which order, in which formats and encodings, and what is refused."""

import bz2
import codecs
import gzip
import json
import lzma
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import refused, write

import readers
from config import BAD_INPUT, INPUT_OUTPUT
from readers import Reader


def parquet(texts) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def json_lines(texts, name: str = "text") -> str:
    return "".join(json.dumps({name: text}, ensure_ascii=False) + "\n" for text in texts)


def read(source, **options) -> list[str]:
    return [text for text, _ in Reader(str(source), **options)]


def skipped(source, **options) -> Counter:
    """What a reader counts that continues after errors."""
    reader = Reader(str(source), on_error="skip", **options)
    list(reader)
    return reader.tally.documents


def fails(message: str, source, code: int = BAD_INPUT, **options) -> str:
    return refused(message, read, source, code=code, **options)


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path):
    visible = ("b.txt", "a.md", "q/z", "q/deeper/x.py", "c/1.txt")
    for name in (*visible, ".hidden.txt", ".git/config", "q/.cache/x.txt"):
        write(tmp_path / name, name)
    reader = Reader(str(tmp_path))
    assert [text for text, _ in reader] == ["a.md", "b.txt", "c/1.txt", "q/z", "q/deeper/x.py"]
    assert reader.done == reader.total == sum(map(len, visible))


PATTERNS = [
    ("b.txt,a.txt", "b.txt a.txt"),
    ("b.txt,,*.txt,b.txt,.", "b.txt [1].txt a.txt one,two.txt q/a.txt q/r/b.txt"),
    ("**/a.txt", "a.txt q/a.txt"),
    ("q/**", "q/a.txt q/r/b.txt"),
    ("one,two.txt", "one,two.txt"),
    ("[1].txt", "[1].txt"),
    ("q/.r/*,.a.txt", "q/.r/a.txt .a.txt"),
    ("~/a.txt,~/q", "a.txt q/a.txt q/r/b.txt"),
]
MISSING = ["none.txt", "*.none", "a.txt,none", "empty", "~no-user/a.txt", "**.none"]


def test_patterns_name_each_file_once_and_in_order(tmp_path, monkeypatch):
    visible = ("a.txt", "b.txt", "one,two.txt", "[1].txt", "q/a.txt", "q/r/b.txt")
    for name in (*visible, ".a.txt", "q/.r/a.txt"):
        write(tmp_path / name, name)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for sources, expected in PATTERNS:
        assert read(sources) == expected.split()
    for sources in MISSING:
        missing = re.escape(sources.split(",")[-1])
        fails(f"--source={missing}: no such file", sources, on_error="skip")


def test_standard_input_is_a_source():
    program = "from readers import Reader; print(list(Reader('-', format='jsonl')))"
    data = json_lines(["one", "two"]).encode()
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input=data, stdout=-1, cwd=Path(readers.__file__).parent)
    assert done.stdout.split(b"\n")[0] == b"[('one', '-:1'), ('two', '-:2')]"


def test_links_in_a_folder_are_not_followed(tmp_path):
    write(tmp_path / "outside" / "secret.txt", "outside")
    folder = write(tmp_path / "texts" / "inside.txt", "inside").parent
    targets = [folder, "link4", tmp_path / "outside", "../outside/secret.txt", "link4", "none"]
    for number, target in enumerate(targets):
        (folder / f"link{number}").symlink_to(target)
    assert read(folder) == ["inside"] and skipped(folder) == {"symbolic link": 6}
    assert read(folder / "link3") == ["outside"]  # a link that is named is followed
    assert read(folder / "**" / "*.txt") == ["inside"]
    (folder / "inside.txt").unlink()
    fails("no such file, or an empty folder .links do not count", folder)
    assert skipped(folder / "link[35]") == {"unreadable": 1}


def test_a_file_that_cannot_be_opened_is_refused_or_skipped(tmp_path):
    for name in "ab":
        write(tmp_path / name, name)
    strict, lenient = Reader(str(tmp_path)), Reader(str(tmp_path), on_error="skip")
    (tmp_path / "a").unlink()
    refused("a: No such file.*--on_error=skip", list, strict, code=INPUT_OUTPUT)
    assert list(lenient) == [("b", str(tmp_path / "b"))]
    assert lenient.tally.documents == {"unreadable": 1}


def zst(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zst}
CSV = 'text,number\r\nplain,1\r\n"two\r\nlines, and ""quoted""",2\r\n'
ROWS = ["plain", 'two\r\nlines, and "quoted"']


@pytest.mark.parametrize("suffix", ["", *COMPRESSORS])
def test_each_format_is_read_in_each_compression(tmp_path, suffix):
    compress = COMPRESSORS.get(suffix, bytes)
    for name, text, documents in (
        ("a.txt", "one\n", ["one\n"]),
        ("README", CSV, [CSV]),
        ("x.tar.py", "{}\n{1: 2}\n", ["{}\n{1: 2}\n"]),
        ("b.jsonl", json_lines(ROWS) + "\n \n" + json_lines(["é"]), [*ROWS, "é"]),
        ("b.NDJSON", json_lines(ROWS).rstrip(), ROWS),
        ("c4.00000.json", json_lines(ROWS), ROWS),
        ("c.csv", CSV, ROWS),
        ("c.tsv", CSV.replace(",1", "\t1").replace(",2", "\t2").replace(",n", "\tn"), ROWS),
    ):
        path = write(tmp_path / (name + suffix.upper()), compress(text.encode()))
        reader = Reader(str(path))
        assert [text for text, _ in reader] == documents
        assert reader.done == reader.total == path.stat().st_size
    joined = compress(b"two parts ") + compress(b"one after another")
    assert read(write(tmp_path / f"joined{suffix}", joined)) == ["two parts one after another"]


def test_parquet_is_read_through_all_row_groups(tmp_path):
    texts = [f"text {number} é" for number in range(7)]
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary("int32", "string")):
        path = write(tmp_path / "a.parquet", parquet(pyarrow.array(texts).cast(kind)))
        assert list(Reader(str(path))) == [(text, f"{path}:{n}") for n, text in enumerate(texts, 1)]


def test_the_format_setting_overrides_the_name(tmp_path):
    lines, table = json_lines(ROWS, "body"), CSV.replace("text", "body")
    for name, file_format, text in (("b.csv", "jsonl", lines), ("c.jsonl", "csv", table)):
        path = write(tmp_path / name, text)
        assert read(path, format="text") == [text]
        assert read(path, format=file_format, text_field="body") == ROWS
    path = write(tmp_path / "a.txt", "one\r\n\ntwo\n" + "x" * 999)
    long = ("x" * 999, f"{path}:4")
    assert list(Reader(str(path), format="lines"))[2:] == [("two", f"{path}:3"), long]


STRUCTURED = [  # files that are not what their names say, and what they count as
    ("a.json", '{\n  "text": "one"\n}\n', "JSON"),
    ("a.JSON.gz", gzip.compress(b'[{"text": "one"}]\n'), "JSON"),
    ("one.json", '{"version": 1}\n', "JSON"),
    ("pandas.json", '{"text": {"0": "one"}}', "JSON"),
    ("notebook.ipynb", '{"cells": []}\n', "JSON"),
    ("c4.txt", json_lines(["one" * 999, "two"]), "JSON"),
    ("c4", b"\xef\xbb\xbf" + json_lines(["one"]).encode(), "JSON"),
    ("a.png", b"\x89PNG\r\n\0\0", "binary"),
    ("a.pdf", b"%PDF-1.5\n%\xd0\xd4\xc5\xd8\n3 0 obj", "binary"),
    ("a.docx", b"PK\3\4\x14", "binary"),
    ("a.jsonl", gzip.compress(b"two"), "binary"),
    ("a.txt", "without a mark".encode("utf-16-le"), "binary"),
]


@pytest.mark.parametrize("name, content, reason", STRUCTURED)
def test_what_is_not_text_is_refused_if_named_and_counted_in_a_folder(
    tmp_path, monkeypatch, name, content, reason
):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)  # the first line can be longer
    path = write(tmp_path / "texts" / name, content)
    write(tmp_path / "texts" / "good.txt", "good")
    for source in (path, tmp_path / "texts" / f"{name[:3]}*"):
        fails(f"{path.name} is {reason}.* --(format|encoding)=?.*--on_error=skip", source)
        assert skipped(source) == {reason: 1}
    reader = Reader(str(tmp_path / "texts"))
    assert [text for text, _ in reader] == ["good"] and reader.tally.documents == {reason: 1}
    assert reason == "binary" or len(read(path, format="text")) == 1


def test_a_separator_splits_a_file_into_documents(tmp_path):
    documents = ["Once.\n\nMore <|endoftext|> here.\n", "Twice.\n"]
    separators = "<|endoftext|>\r\n <|endoftext|> \n"
    for end in ("", "<|endoftext|>", "<|endoftext|>\n"):
        text = "<|endoftext|>\n" + documents[0] + separators + documents[1] + end
        path = write(tmp_path / "a.txt", text)
        assert read(path, separator="<|endoftext|>") == documents and read(path) == [text]
    path = write(tmp_path / "a.txt", "\n\none\nline\r\n \r\n\ntwo")
    assert read(path, separator=r"\n\n") == ["one\nline\r\n", "two"]


ENCODINGS = [  # the encoding, its byte-order mark, bytes that are no character in it
    ("utf-8", b"", b"\xff"),
    ("utf-8", codecs.BOM_UTF8, b"\xe6\x97"),  # half a character
    ("utf-16-le", codecs.BOM_UTF16_LE, b"\x00\xdc"),
    ("utf-16-be", codecs.BOM_UTF16_BE, b"\xdc\x00"),
    ("utf-32-le", codecs.BOM_UTF32_LE, b"\xff" * 4),
    ("utf-32-be", codecs.BOM_UTF32_BE, b"\xff" * 4),
]


@pytest.mark.parametrize("encoding, mark, bad", ENCODINGS)
def test_each_encoding_is_read_or_refused_wherever_blocks_end(
    tmp_path, monkeypatch, encoding, mark, bad
):
    text = "plain é 日本 😀\r\nx" * 3
    for size in range(5, 20):
        monkeypatch.setattr(readers, "BLOCK_BYTES", size)
        assert read(write(tmp_path / "a.txt", mark + text.encode(encoding))) == [text]
    for before in range(20):
        good = mark + ("é" * before).encode(encoding)
        path = write(tmp_path / "a.txt", good + bad + b"xyz" * (before % 2))
        message = fails(f"a.txt: not {encoding} text: .*--on_error=skip", path)
        assert int(re.search(r"at byte (\d+);", message)[1]) == len(good)
        assert skipped(path) == {"invalid bytes": 1} and read(path, on_error="skip") == []
    fails("--encoding=NAME", path)
    path = write(tmp_path / "a.jsonl", json_lines(["first"]) + " " * readers.BLOCK_BYTES)
    path.write_bytes(path.read_bytes() + b"\xff")
    assert read(path, on_error="skip") == ["first"]  # what was read before stays


def test_other_encodings_are_read_if_named(tmp_path):
    text = "plain é 日本\n"
    for encoding in ("gb18030", "utf-16-le", "euc_jis_2004"):
        path = write(tmp_path / "a.txt", text.encode(encoding))
        assert read(path, encoding=encoding) == [text] and sum(skipped(path).values()) == 1
    assert read(write(path, codecs.BOM_UTF8 + text.encode()), encoding="gb18030") == [text]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "separated"])
def test_a_long_text_becomes_several_documents(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "DOCUMENT_CHARACTERS", 100)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 64)
    generator = random.Random(0)
    for length in (0, 1, 99, 100, 101, 200, 1777):
        text = "".join(generator.choices("aé日    \n", k=length))
        path = write(tmp_path / name, json_lines([text]) if name == "a.jsonl" else text)
        pieces = read(path, separator="---" if name == "separated" else "")
        assert "".join(pieces) == text and max(map(len, pieces), default=0) <= 100
        assert all(piece[-1] in " \n" and len(piece) > 50 for piece in pieces[:-1])
    path = write(tmp_path / "a.txt", "white space early on does not count " + "日" * 314)
    assert [len(piece) for piece in read(path)] == [100, 100, 100, 50]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_that_is_too_long_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "LINE_CHARACTERS", 1000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)
    good = json_lines(["x" * 900]) if name == "a.jsonl" else f"text\n{'x' * 900}\n"
    assert read(write(tmp_path / name, good)) == ["x" * 900]
    path = write(tmp_path / name, good + good.splitlines()[-1].replace("x", "xx") + "\n")
    fails("a line of more than 1,000 characters", path)
    assert skipped(path) == {"damaged file": 1}


TEXT = "".join(random.Random(0).choices("abcdefgh \n", k=5000)).encode()
DAMAGE = [
    lambda data: data[:-9],
    lambda data: b"something else",
    lambda data: data[:12] + b"\xff" * 40 + data[52:],
]
MAKERS = COMPRESSORS | {".parquet": lambda data: parquet([data.decode()] * 9)}
NO_FIELD = {"missing field": 1}
BAD = [  # a file, the message, what is counted
    ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl:3: not JSON", {"broken line": 1}),
    ("a.jsonl", b"[" * 100_000 + b"\n{}}\n", "a.jsonl:1: not JSON", {"broken line": 2}),
    ("a.jsonl", b'{"text": "a\\ud83db"}', "surrogates not allowed", {"broken line": 1}),
    ("a.jsonl", b'{"b": "x"}\n', "a.jsonl:1: no field 'text'; its fields: ['b']", NO_FIELD),
    ("a.jsonl", b"[1]\n", "a.jsonl:1: [1] is not an object", NO_FIELD),
    ("a.jsonl", b"null\n", "a.jsonl:1: None is not an object", NO_FIELD),
    ("a.jsonl", b'{"text": ["x"]}', "a.jsonl:1: field 'text' holds ['x'], not text", NO_FIELD),
    ("a.csv", b"b,n\nx,1\n", "a.csv:2: no field 'text'; its fields: ['b', 'n']", NO_FIELD),
    ("a.csv", b'text,n\n"a"b,1\nx,2\n', "a.csv:2: not CSV", {"broken line": 1}),
    ("a.csv", b'text,n\nx,1\n"a,2\ny,3\n', "not CSV: unexpected end", {"broken line": 1}),
    ("a.csv", b"n,text\n1,a\n2,b, c\n", "a.csv:3: not CSV: 3 fields, but 2 in", {"broken line": 1}),
    ("a.csv", b"text,n\n\na\n", "a.csv:3: not CSV: 1 fields, but 2 in", {"broken line": 1}),
    ("a.TSV", b"n\ttext\n1\ta\tb\n", "a.TSV:2: not CSV: 3 fields", {"broken line": 1}),
]
# its header asks for a window of 2 GiB
BAD.append(("a.zst", b"\x28\xb5\x2f\xfd\0\xa8\1\0\0", "longer --long than 27", {"unreadable": 1}))
BAD += [
    (f"a.txt{suffix}", damage(make(TEXT)), "is cut or damaged", {"damaged file": 1})
    for suffix, make in MAKERS.items()
    for damage in DAMAGE
]


@pytest.mark.parametrize("name, content, message, counts", BAD)
def test_bad_input_is_refused_or_counted_with_an_example(tmp_path, name, content, message, counts):
    path, good = write(tmp_path / name, content), write(tmp_path / "good.txt", "good")
    fails(re.escape(message) + ".*--on_error=skip would continue", path)
    reader = Reader(f"{path},{good}", on_error="skip")
    assert [text for text, _ in reader][-1] == "good" and reader.tally.documents == counts
    assert message in reader.tally.examples[next(iter(counts))][0][0]


def test_parquet_without_text_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", parquet(["one"]))
    fails("a.parquet:1: no field 'body'; its fields: .'text'", path, text_field="body")
    fails("field 'text' holds b'one', not text", write(path, parquet([b"one"])))
    offsets = pyarrow.py_buffer(np.array([0, 2, 4], dtype=np.int32))
    texts = pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"ok\xff\xff"))
    fails("a.parquet: 'utf-8' codec can't decode", write(path, parquet(texts)))


def test_a_missing_cell_is_an_empty_document_in_each_format(tmp_path):
    texts = ["one", None, "three"]
    contents = {"a.parquet": parquet(texts), "a.jsonl": json_lines(texts)}
    contents["a.csv"] = "n,text\n1,one\n2,\n3,three\n"
    for name, content in contents.items():
        assert read(write(tmp_path / name, content)) == ["one", "", "three"]


def test_messages_advise_only_what_the_script_has(tmp_path):
    for name, content in (("a.jsonl", "{}"), ("a.json", "{"), ("a.txt", b"\xff"), ("b", b"\0")):
        message = fails("; advice$", write(tmp_path / name, content), advice="advice")
        assert "--" not in message


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name in ("a.parquet", "a.txt.zst"):
        fails("needs pyarrow: pip install pyarrow", write(tmp_path / name, b"text"))
