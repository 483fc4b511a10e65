"""Downloads over a loopback server that injects faults: what arrives, what stands on the disk, what is asked again."""

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import prepare_data
from checkpoint import locked
from config import IN_USE, INPUT_OUTPUT, Failure

# ---- downloads

BODY = b"to be or not to be" * 5000
HALF = len(BODY) // 2
REST = f"bytes={HALF}-"  # the Range that asks for the other half
NEW = BODY[::-1]  # another version
SHA256 = hashlib.sha256(BODY).hexdigest()
WAITING = [".f.lock"]  # what a failed download leaves when nothing of it can be used again
KEPT = [".f.lock", ".f.partial", ".f.source"]  # and when something can


@contextlib.contextmanager
def serving():
    """A loopback server that gives its `answers` one by one, the last for good, and keeps the requests in `asked`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.server.asked.append(self)
            with contextlib.suppress(OSError):  # who asked may have gone
                (self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0])(self)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.host, server.asked, server.answers = f"http://127.0.0.1:{server.server_port}", [], [honest]
        server.url = f"{server.host}/f"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits a hundred times shorter than a user's."""
    for name in ("FIRST_WAIT_SECONDS", "OFFLINE_WAIT_SECONDS", "STALL_SECONDS"):
        monkeypatch.setattr(prepare_data, name, getattr(prepare_data, name) / 100)
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def start(handler, status: int = 200, **headers):
    """Send a status and headers, `Content_Length=5` for Content-Length: 5; None leaves one out."""
    handler.send_response(status)
    handler.send_header("Connection", "close")
    for name, value in headers.items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()


def whole(body: bytes = BODY, status: int = 200, **headers):
    """An answer that sends `body`, whatever part was asked for."""

    def answer(handler):
        start(handler, status, **{"Content_Length": len(body)} | headers)
        handler.wfile.write(body)

    return answer


def part(first: int, total: int | str = len(BODY), **headers):
    """The answer 206 with BODY from byte `first` on."""
    return whole(BODY[first:], 206, Content_Range=f"bytes {first}-{len(BODY) - 1}/{total}", **headers)


def honest(handler, etag: str = '"1"', body: bytes = BODY):
    """What a good server does, the part that is asked for included."""
    first = int(handler.headers.get("Range", "bytes=0-")[6:-1])
    if not first or handler.headers["If-Range"] != etag:
        whole(body, ETag=etag)(handler)
    elif first >= len(body):
        whole(b"", 416, Content_Range=f"bytes */{len(body)}")(handler)
    else:
        part(first, ETag=etag)(handler)


def cut(handler, **headers):
    """Half of the body and then the end, though the length says more."""
    start(handler, Content_Length=len(BODY), **{"ETag": '"1"'} | headers)
    handler.wfile.write(BODY[:HALF])


def cut_in_a_chunk(handler):
    start(handler, Transfer_Encoding="chunked", ETag='"1"')
    handler.wfile.write(b"%x\r\n%b\r\n%x\r\n%b" % (HALF - 9, BODY[: HALF - 9], HALF, BODY[HALF - 9 : HALF]))


def cut_and_reset(handler):
    cut(handler)
    time.sleep(0.05)  # a reset throws away what the other side has not read yet
    reset(handler)


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def stall(handler):
    cut(handler)
    time.sleep(3)


def silence(handler):
    time.sleep(3)


def drip(handler):
    cut(handler)
    for byte in BODY[HALF : HALF + 40]:
        time.sleep(0.05)
        handler.wfile.write(bytes([byte]))


def fetch(tmp_path, server, sha256: str = SHA256, size: int = len(BODY), **options) -> Path:
    return prepare_data.fetch(tmp_path / "f", server.url, sha256, size, **options)


def fails(tmp_path, server, message: str, *facts, **options) -> str:
    """Check that a download fails as expected errors do, and return the error's text."""
    with pytest.raises(Failure, match=message) as failure:
        fetch(tmp_path, server, *facts, **options)
    assert failure.value.code == INPUT_OUTPUT and len(str(failure.value).splitlines()) <= 2
    return str(failure.value)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ranges(server) -> list[str | None]:
    return [request.headers["Range"] for request in server.asked]


@pytest.mark.parametrize("facts", [(SHA256, len(BODY)), ("", 0)])
def test_a_download_arrives_whole_and_once(tmp_path, server, facts):
    for _ in range(2):
        assert fetch(tmp_path / "new" / "folder", server, *facts).read_bytes() == BODY
    assert len(server.asked) == 1 and names(tmp_path / "new" / "folder") == ["f"]
    assert server.asked[0].headers["Accept-Encoding"] == "identity"


def test_bytes_reach_the_disk_before_their_name(tmp_path, server, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    fetch(tmp_path, server)
    assert done == ["fsync", "replace"]


@pytest.mark.parametrize(
    "answer, facts, message, requests",
    [
        (whole(b"no", 404), (SHA256, len(BODY)), "the server answers 404", 1),
        (whole(BODY, 203), (SHA256, len(BODY)), "the server answers 203", 1),
        (part(0), (SHA256, len(BODY)), "the server answers 206", 1),
        (whole(BODY[:-5] + b"wrong"), (SHA256, len(BODY)), f"it has SHA-256 .*, not {SHA256}", 1),
        (whole(BODY[:-5]), ("", len(BODY)), "it has 89,995 bytes, not 90,000", 1),
        (whole(BODY + b"x"), ("", len(BODY)), "it has 90,001 bytes, not 90,000", 1),
        (whole(BODY + b"x", Content_Length=None), ("", len(BODY)), "it has more than 90,000 bytes", 1),
        (whole(Content_Encoding="gzip"), (SHA256, len(BODY)), "encoding 'gzip'", 1),
        (whole(b"", 302, Location="/f"), (SHA256, len(BODY)), "TooManyRedirects", 6),
        (whole(b"", 302, Location="file:///etc/passwd"), (SHA256, len(BODY)), "InvalidSchema", 1),
    ],
)
def test_what_no_repetition_mends_fails_at_once_and_leaves_nothing(tmp_path, server, answer, facts, message, requests):
    server.answers = [answer]
    assert f"put that file at {tmp_path / 'f'}" in fails(tmp_path, server, message, *facts)
    assert len(server.asked) == requests and names(tmp_path) == WAITING


@pytest.mark.parametrize("answer", [whole(b"", 500), whole(b"", 408), whole(b"", 429), reset, silence])
def test_a_passing_fault_is_tried_again(tmp_path, server, answer):
    server.answers, started = [answer, honest], time.monotonic()
    assert fetch(tmp_path, server).read_bytes() == BODY
    assert len(server.asked) == 2 and names(tmp_path) == ["f"] and time.monotonic() - started < 2


@pytest.mark.parametrize("answer", [cut, cut_in_a_chunk, cut_and_reset, stall, drip])
@pytest.mark.parametrize("facts", [(SHA256, len(BODY)), ("", 0)])
def test_a_broken_body_is_continued_where_it_stopped(tmp_path, server, answer, facts):
    server.answers, started = [answer, honest], time.monotonic()
    assert fetch(tmp_path, server, *facts).read_bytes() == BODY and time.monotonic() - started < 2
    first, second = ranges(server)
    assert first is None and HALF <= int(second[6:-1]) < HALF + 40 and server.asked[1].headers["If-Range"] == '"1"'
    assert names(tmp_path) == ["f"]


def test_a_body_without_a_length_that_breaks_is_not_taken_for_whole(tmp_path, server):
    server.answers = [cut_in_a_chunk]
    fails(tmp_path, server, "ProtocolError", "", 0)
    assert len(server.asked) == 5 and names(tmp_path) == KEPT


def test_a_later_run_goes_on_where_five_attempts_stopped(tmp_path, server):
    server.answers = [cut, whole(b"", 503)]
    fails(tmp_path, server, "the server answers 503")
    assert ranges(server) == [None] + 4 * [REST] and names(tmp_path) == KEPT
    assert (tmp_path / ".f.partial").read_bytes() == BODY[:HALF]
    server.answers = [honest]
    assert fetch(tmp_path, server).read_bytes() == BODY
    assert ranges(server)[5:] == [REST] and names(tmp_path) == ["f"]


@pytest.mark.parametrize(
    "answers",
    [
        [whole(NEW)],  # as servers do that know no ranges
        [lambda handler: honest(handler, '"2"', NEW)],  # another version
        [part(HALF, ETag='"2"'), whole(NEW)],
        [part(HALF - 1), whole(NEW)],
        [part(HALF, len(BODY) + 1), whole(NEW)],
        [whole(BODY[HALF:], 206), whole(NEW)],
        [whole(b"", 416), whole(NEW)],
        [whole(NEW, 200, Content_Range=f"bytes {HALF}-{HALF + len(NEW) - 1}/{HALF + len(NEW)}")],
    ],
    ids=[
        "ignored",
        "changed",
        "changed, yet 206",
        "wrong start",
        "wrong total",
        "no Content-Range",
        "416",
        "range of a 200",
    ],
)
@pytest.mark.parametrize("size", [len(BODY), 0])
def test_a_part_that_does_not_fit_is_not_used(tmp_path, server, answers, size):
    server.answers = [cut, *answers]
    assert fetch(tmp_path, server, "", size).read_bytes() == NEW
    assert ranges(server) == [None, REST, None][: 1 + len(answers)] and names(tmp_path) == ["f"]


@pytest.mark.parametrize(
    "headers, validator",
    [
        ({"ETag": None}, None),
        ({"ETag": 'W/"1"'}, None),
        ({"ETag": "1"}, None),
        ({"ETag": None, "Last_Modified": "then"}, "then"),
    ],
)
def test_only_a_part_whose_version_has_a_name_is_continued(tmp_path, server, headers, validator):
    server.answers = [lambda handler: cut(handler, **headers), whole()]
    assert fetch(tmp_path, server).read_bytes() == BODY
    assert ranges(server) == [None, validator and REST] and server.asked[1].headers["If-Range"] == validator
    assert names(tmp_path) == ["f"]


def test_a_part_of_a_file_of_another_length_is_not_used(tmp_path, server):
    longer = whole(BODY[HALF:] + b"x", 206, Content_Range=f"bytes {HALF}-{len(BODY)}/{len(BODY) + 1}")
    server.answers = [cut, longer, honest]
    assert fetch(tmp_path, server).read_bytes() == BODY
    assert ranges(server) == [None, REST, None] and names(tmp_path) == ["f"]


def test_a_part_from_another_url_is_not_used(tmp_path, server):
    server.answers = [cut, whole(b"", 503)]
    fails(tmp_path, server, "503")
    server.answers, server.url = [honest], f"{server.host}/other"
    assert fetch(tmp_path, server).read_bytes() == BODY and ranges(server)[5] is None and names(tmp_path) == ["f"]


def test_the_waits_double_and_heed_retry_after(tmp_path, server, monkeypatch):
    waits = []
    monkeypatch.setattr(prepare_data, "FIRST_WAIT_SECONDS", 1)
    monkeypatch.setattr(prepare_data.time, "sleep", waits.append)
    server.answers = [
        whole(b"", 500, Retry_After=9),
        whole(b"", 429, Retry_After=9),
        whole(b"", 503, Retry_After=10**9),
    ]
    fails(tmp_path, server, "the server answers 503")
    assert waits == [1, 9, 60, 60] and names(tmp_path) == WAITING
    waits.clear()
    server.answers = [whole(b"", 503, Retry_After="Fri, 31 Dec 2027 23:59:59 GMT")]
    fails(tmp_path, server, "the server answers 503")
    assert waits == [1, 2, 4, 8]
    waits.clear()
    server.answers = [whole(b"", 429, Retry_After=50)]
    fails(tmp_path, server, "the server answers 429", deadline_seconds=40)
    assert waits == []  # it would have been too late afterwards


def test_without_a_network_one_is_told_soon(tmp_path, server, monkeypatch):
    waits = []
    monkeypatch.setattr(prepare_data, "OFFLINE_WAIT_SECONDS", 0.5)
    monkeypatch.setattr(prepare_data, "FIRST_WAIT_SECONDS", 1)
    monkeypatch.setattr(prepare_data.time, "sleep", waits.append)
    server.url = "http://127.0.0.1:9/f"
    message = fails(tmp_path, server, f"could not download {server.url}: ConnectionError")
    assert f"put that file at {tmp_path / 'f'} (SHA-256 {SHA256})" in message
    assert len(waits) == 4 and sum(waits) <= 3 and names(tmp_path) == WAITING


def test_time_that_is_up_ends_a_download_that_can_go_on_later(tmp_path, server):
    def slowly(handler):
        start(handler, Content_Length=len(BODY), ETag='"1"')
        for first in range(0, len(BODY), 2000):
            handler.wfile.write(BODY[first : first + 2000])
            time.sleep(0.05)

    server.answers, started = [slowly], time.monotonic()
    fails(tmp_path, server, "the time for it is over", deadline_seconds=0.3)
    assert time.monotonic() - started < 1.5 and names(tmp_path) == KEPT
    server.answers = [honest]
    assert fetch(tmp_path, server).read_bytes() == BODY and ranges(server)[1] is not None


@pytest.mark.parametrize("facts, limit", [(("", 50_000), 50_000), (("", 0), 20_000)])
def test_a_body_without_end_is_stopped(tmp_path, server, monkeypatch, facts, limit):
    sent = []

    def endless(handler):
        start(handler)
        while True:
            handler.wfile.write(BODY)
            sent.append(len(BODY))

    monkeypatch.setattr(prepare_data, "MOST_BYTES", 20_000)
    server.answers = [endless]
    fails(tmp_path, server, f"it has more than {limit:,} bytes", *facts)
    assert sum(sent) < 20_000_000 and len(server.asked) == 1 and names(tmp_path) == WAITING


@pytest.mark.parametrize("size, there", [(len(BODY), 0), (0, 0), (len(BODY), HALF)])
def test_a_disk_that_is_too_small_is_noticed_before_writing(tmp_path, server, monkeypatch, size, there):
    if there:
        (tmp_path / ".f.partial").write_bytes(BODY[:there])
        (tmp_path / ".f.source").write_text(f'{server.url}\n"1"')
    need = len(BODY) - there
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=need - 1))
    fails(tmp_path, server, f"has {need - 1:,} bytes free, .* needs {need:,}", "", size)
    assert names(tmp_path) == (KEPT if there else WAITING)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=need))
    assert fetch(tmp_path, server, "", size).read_bytes() == BODY and ranges(server)[1] == (REST if there else None)


def test_progress_counts_what_is_still_to_come(tmp_path, server, monkeypatch):
    shown = []

    class Recorder(prepare_data.Progress):
        def __init__(self, what, total):
            super().__init__(what, total)
            shown.append((what, total))

        def update(self, done):
            shown[-1] = (self.what, self.total, done)

    monkeypatch.setattr(prepare_data, "Progress", Recorder)
    server.answers = [cut, honest]
    fetch(tmp_path, server)
    assert shown == [("bytes of f", len(BODY), HALF), ("more bytes of f", len(BODY) - HALF, len(BODY) - HALF)]


def test_of_many_at_once_one_downloads_and_the_others_wait(tmp_path, server):
    def slow_at_first(handler):
        start(handler, Content_Length=len(BODY))
        for piece in (BODY[:1], BODY[1:2], BODY[2:]):
            handler.wfile.write(piece)
            time.sleep(0.08)

    server.answers = [slow_at_first]
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch(tmp_path, server), range(4)))
    assert [path.read_bytes() for path in paths] == [BODY] * 4
    assert len(server.asked) == 1 and names(tmp_path) == ["f"]


def test_a_killed_download_is_continued_by_the_one_that_waited(tmp_path, server):
    def hang(handler):
        cut(handler)
        time.sleep(10)

    server.answers = [hang, honest]
    code = "import sys, pathlib, prepare_data; prepare_data.fetch(pathlib.Path(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", code, str(tmp_path / "f"), server.url]
    process = subprocess.Popen(command, cwd=Path(prepare_data.__file__).parent)
    partial = tmp_path / ".f.partial"
    while not partial.exists() or partial.stat().st_size < HALF:
        assert process.poll() is None
        time.sleep(0.01)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fetch, tmp_path, server)
        time.sleep(0.3)
        assert len(server.asked) == 1 and not waiting.done() and names(tmp_path) == KEPT
        process.kill()
        process.wait()
        assert waiting.result().read_bytes() == BODY
    assert ranges(server) == [None, REST] and names(tmp_path) == ["f"]


def test_a_wrong_file_in_place_is_noticed(tmp_path, server, monkeypatch):
    (tmp_path / "f").write_bytes(NEW)
    with pytest.raises(Failure, match=f"has SHA-256 .*, not {SHA256}; delete it to download it anew"):
        fetch(tmp_path, server)
    with pytest.raises(Failure, match="has 90,000 bytes, not 89,999; delete it to download it anew"):
        fetch(tmp_path, server, "", len(BODY) - 1)
    monkeypatch.setattr(prepare_data, "HASHED_BYTES", len(BODY))
    assert fetch(tmp_path, server).read_bytes() == NEW  # too large to hash each time
    with pytest.raises(Failure, match="has SHA-256"):
        fetch(tmp_path, server, SHA256, 0)
    assert names(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == NEW and not server.asked


# ---- the hub's listing

ITEMS = [
    {"type": "directory", "path": "sample/10BT/old", "size": 0},
    {"type": "file", "path": "sample/10BT/b 1.parquet", "size": 7, "lfs": {"oid": SHA256, "size": 7}},
    {"type": "file", "path": "sample/10BT/a.parquet", "size": 5, "lfs": {"oid": SHA256, "size": 5}},
    {"type": "file", "path": "sample/100BT/c.parquet", "size": 5},
]


@pytest.fixture
def hub(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"{server.host}/")
    return server


def listing(items, **headers):
    return whole(json.dumps(items).encode(), **headers)


def test_a_listing_has_all_pages_in_order(hub):
    following = f'<{hub.host}/next>; rel="next"'
    hub.answers = [whole(b"", 500), listing(ITEMS[:2], Link=following), listing(ITEMS[2:])]
    files = prepare_data.hub_files("who/what", "refs/x", "sample/10BT/")
    assert [(file.path, file.size, file.sha256) for file in files] == [
        ("sample/10BT/a.parquet", 5, SHA256),
        ("sample/10BT/b 1.parquet", 7, SHA256),
    ]
    assert files[1].url == f"{hub.host}/datasets/who/what/resolve/refs%2Fx/sample/10BT/b%201.parquet"
    first = "/api/datasets/who/what/tree/refs%2Fx/sample/10BT?recursive=true"
    assert [request.path for request in hub.asked] == [first, first, "/next"]
    hub.answers = [listing([{"type": "file", "path": "README.md", "size": 3}])]
    assert prepare_data.hub_files("who/what", "main", "")[0].sha256 == ""
    assert hub.asked[-1].path == "/api/datasets/who/what/tree/main?recursive=true"


@pytest.mark.parametrize("path", ["/etc/passwd", "a/../../b", "..", "..\\b", "C:b", "a\0"])
def test_a_path_out_of_the_folder_is_refused(hub, path):
    hub.answers = [listing([{"type": "file", "path": path, "size": 1}])]
    with pytest.raises(Failure, match="leads out of a folder") as failure:
        prepare_data.hub_files("who/what", "main", "")
    assert failure.value.code == INPUT_OUTPUT


@pytest.mark.parametrize(
    "answer, message, requests",
    [
        (whole(b"[{"), "not a listing", 1),
        (whole(b'{"error": 1}'), "not a listing", 1),
        (listing([{"type": "file", "path": 3, "size": 1}]), "not a listing", 1),
        (listing([{"type": "file", "path": "x", "size": "many"}]), "not a listing", 1),
        (listing(ITEMS * 1000), "not a listing", 1),
        (whole(b"[" * 4000), "not a listing", 1),
        (whole(b"", 401), "the server answers 401", 1),
        (whole(b"[", Content_Length=9), "ProtocolError", 5),
        (listing([], Link='</next>; rel="next"'), "MissingSchema", 1),
        (
            lambda handler: listing([], Link=f'<http://{handler.headers["Host"]}/n>; rel="next"')(handler),
            "than 7 pages",
            7,
        ),
    ],
)
def test_a_bad_listing_fails(hub, monkeypatch, answer, message, requests):
    monkeypatch.setattr(prepare_data, "MOST_PAGE_BYTES", 5000)
    monkeypatch.setattr(prepare_data, "MOST_PAGES", 7)
    hub.answers = [answer]
    with pytest.raises(Failure, match=message) as failure:
        prepare_data.hub_files("who/what", "main", "")
    assert failure.value.code == INPUT_OUTPUT and len(str(failure.value).splitlines()) <= 2
    assert len(hub.asked) == requests


def test_without_a_network_the_listing_says_so(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Failure, match="could not download http://127.0.0.1:9/api/.*: ConnectionError;\n.* who/what"):
        prepare_data.hub_files("who/what", "main", "")


def test_the_token_stays_with_the_hub(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serving() as other:
        hub.answers = [whole(b"", 302, Location=other.url)]
        assert fetch(tmp_path, hub).read_bytes() == BODY
        prepare_data.fetch(tmp_path / "g", other.url)
        hub.answers = [listing([], Link=f'<{other.host}/next>; rel="next"')]
        other.answers = [listing([])]
        prepare_data.hub_files("who/what", "main", "")
    assert [request.headers["Authorization"] for request in hub.asked] == ["Bearer secret"] * 2
    assert [request.headers["Authorization"] for request in other.asked] == [None] * 3


# ---- models of the hub

COMMIT = "0123456789" * 4
INDEX = "model.safetensors.index.json"
SHARDED = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    INDEX: json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode(),
    "model-1.safetensors": BODY,
    "model-2.safetensors": NEW,
}
LEFT_OUT = {"pytorch_model.bin": b"pickle", "onnx/model.safetensors": b"x", "README.md": b"x"}


def model_hub(files: dict[str, bytes], commit: str = COMMIT, elsewhere: str = ""):
    """An answer to all that is asked about the model who/what. elsewhere: the URL that weights are redirected to."""

    def item(name):
        lfs = {"lfs": {"oid": hashlib.sha256(files[name]).hexdigest()}} if name.endswith(".safetensors") else {}
        return {"type": "file", "path": name, "size": len(files[name])} | lfs

    pages = {
        "/api/models/who/what/revision/main": whole(json.dumps({"sha": commit}).encode()),
        f"/api/models/who/what/tree/{commit}": listing([item(name) for name in files]),
    }
    for name, content in files.items():
        moved = elsewhere and name.endswith(".safetensors")
        answer = whole(b"", 302, Location=elsewhere) if moved else whole(content)
        pages[f"/who/what/resolve/{commit}/{name}"] = answer
    return lambda handler: pages.get(handler.path.partition("?")[0], whole(b"", 404))(handler)


@pytest.fixture
def cache(hub, tmp_path, monkeypatch):
    """The folder of who/what in a hub's cache that is empty."""
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "models--who--what"


def test_a_model_arrives_once_and_in_the_hubs_own_layout(hub, cache, tmp_path, monkeypatch):
    hub.answers = [model_hub(SHARDED | LEFT_OUT)]
    for _ in range(2):
        folder = prepare_data.fetch_model("who/what")
        assert folder == cache / "snapshots" / COMMIT and names(folder) == sorted(SHARDED)
    assert all((folder / name).read_bytes() == content for name, content in SHARDED.items())
    assert (cache / "refs" / "main").read_bytes() == COMMIT.encode() and names(cache / "refs") == ["main"]
    assert len(hub.asked) == 2 + len(SHARDED)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    assert prepare_data.fetch_model("who/what").is_relative_to(tmp_path / "other")


def test_a_tokenizer_comes_without_the_weights_and_they_follow(hub, cache):
    hub.answers = [model_hub(SHARDED)]
    assert names(prepare_data.fetch_model("who/what", weights=False)) == ["config.json", "tokenizer.json"]
    assert names(prepare_data.fetch_model("who/what")) == sorted(SHARDED)
    assert [request.path for request in hub.asked].count(f"/who/what/resolve/{COMMIT}/tokenizer.json") == 1


def test_transformers_finds_what_was_fetched(hub, cache):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hub.answers = [model_hub(SHARDED)]
    folder = prepare_data.fetch_model("who/what")
    for name in SHARDED:
        assert huggingface_hub.try_to_load_from_cache("who/what", name, cache.parent) == str(folder / name)


def test_what_the_hubs_own_library_fetched_needs_no_network(cache, monkeypatch):
    snapshot = cache / "snapshots" / COMMIT
    for folder in (snapshot, cache / "blobs", cache / "refs"):
        folder.mkdir(parents=True)
    for number, name in enumerate(SHARDED):
        (cache / "blobs" / f"{number}").write_bytes(SHARDED[name])
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    (cache / "refs" / "main").write_text(COMMIT)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert prepare_data.fetch_model("who/what") == snapshot
    (cache / "blobs" / "4").unlink()
    with pytest.raises(Failure, match="ConnectionError"):
        prepare_data.fetch_model("who/what")


def test_the_token_goes_to_the_hub_and_not_where_weights_lie(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serving() as other:
        other.answers = [whole()]
        hub.answers = [model_hub({"config.json": b"{}", "model.safetensors": BODY}, elsewhere=other.url)]
        assert (prepare_data.fetch_model("who/what") / "model.safetensors").read_bytes() == BODY
    assert {request.headers["Authorization"] for request in hub.asked} == {"Bearer secret"}
    assert [request.headers["Authorization"] for request in other.asked] == [None]


def index_of(*shards) -> dict[str, bytes]:
    return SHARDED | {INDEX: json.dumps({"weight_map": dict(enumerate(shards))}).encode()}


@pytest.mark.parametrize(
    "answer, message, code",
    [
        (model_hub(SHARDED, elsewhere="/who/what/resolve/wrong"), "the server answers 404", INPUT_OUTPUT),
        (model_hub(index_of("../../../../evil.safetensors")), r"names \.\./.*evil", 2),
        (model_hub(index_of("/evil.safetensors")), "names /evil", 2),
        (model_hub(index_of("a/evil.safetensors")), "names a/evil", 2),
        (model_hub(index_of("evil.bin")), "names evil.bin", 2),
        (model_hub(index_of(3)), "names nothing", 2),
        (model_hub(index_of("model-3.safetensors")), "has no model-3.safetensors", 2),
        (model_hub(SHARDED | {INDEX: b"[" * 100_000}), "names nothing", 2),
        (model_hub({"config.json": b"{}"} | LEFT_OUT), "has no model.safetensors", 2),
        (model_hub(SHARDED, commit="../../../evil"), "is no commit", INPUT_OUTPUT),
        (whole(b"[]"), "it states no commit", INPUT_OUTPUT),
        (whole(b"", 401), "the server answers 401", INPUT_OUTPUT),
    ],
)
def test_a_model_that_is_not_as_it_should_be_fails(hub, cache, tmp_path, answer, message, code):
    hub.answers = [answer]
    with pytest.raises(Failure, match=message) as failure:
        prepare_data.fetch_model("who/what")
    assert failure.value.code == code and len(str(failure.value).splitlines()) <= 2
    assert not (cache / "refs").exists() and not list(tmp_path.rglob("*evil*")) and not list(tmp_path.rglob("*.bin"))


def test_weights_that_differ_from_their_hash_are_not_kept(hub, cache):
    with serving() as other:
        other.answers = [whole(NEW)]
        hub.answers = [model_hub({"config.json": b"{}", "model.safetensors": BODY}, elsewhere=other.url)]
        with pytest.raises(Failure, match=f"it has SHA-256 .*, not {SHA256}"):
            prepare_data.fetch_model("who/what")
    assert not (cache / "refs").exists() and not (cache / "snapshots" / COMMIT / "model.safetensors").exists()


def test_a_disk_too_small_for_a_model_is_noticed_first(hub, cache, monkeypatch):
    hub.answers = [model_hub({"config.json": b"{}", "model.safetensors": BODY})]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=len(BODY)))
    with pytest.raises(Failure, match="GB of the disk are free"):
        prepare_data.fetch_model("who/what")
    assert names(cache / "snapshots" / COMMIT) == []


def test_without_a_network_one_learns_which_files_to_put_where(cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    wanted = (
        "put config.json, model.safetensors and tokenizer.json of openai-community/gpt2 into a folder and name that"
    )
    with pytest.raises(Failure, match="put tokenizer.json of openai-community/gpt2"):
        prepare_data.fetch_model("gpt2", weights=False)
    with pytest.raises(Failure, match=wanted) as failure:
        prepare_data.fetch_model("gpt2")
    assert failure.value.code == INPUT_OUTPUT and len(str(failure.value).splitlines()) == 2


def test_a_folder_stays_a_folder(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "who/what"):
        (tmp_path / name).mkdir(parents=True)
        with pytest.raises(Failure, match="answers 404" if name == "gpt2" else "what holds no config.json"):
            hub.answers = [whole(b"", 404)]
            prepare_data.fetch_model(name)
        for file in ("config.json", "model.safetensors"):
            (tmp_path / name / file).touch()
        assert prepare_data.fetch_model(name) == Path(name)
    assert len(hub.asked) == 1
    known = ("distilgpt2", "gpt2-xl", "a/b", str(tmp_path))
    assert all(map(prepare_data.names_model, known))
    assert not any(map(prepare_data.names_model, ("typo", "a/b/c", "../b", "a/..", "./b", "a/b c", "/a/b", "a//b", "")))


# ---- the lock


def test_a_lock_is_held_by_one(tmp_path):
    path = tmp_path / "new" / "lock"
    with locked(path, "mine"):
        with pytest.raises(Failure, match="it is taken") as failure, locked(path, "it is taken"):
            pass
        assert failure.value.code == IN_USE
    with locked(path, "mine"):
        pass


def test_who_gives_no_message_waits(tmp_path):
    order = []

    def second():
        with locked(tmp_path / "lock"):
            order.append("second")

    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path / "lock"):
            waiting = pool.submit(second)
            time.sleep(0.2)
            order.append("first")
        waiting.result()
    assert order == ["first", "second"]
