"""Files are complete or absent, locks have one holder, downloads are what they should be."""

import contextlib
import hashlib
import http.server
import json
import os
import threading
from pathlib import Path

import pytest
from conftest import refused, run, write

import files
from config import IN_USE, INPUT_OUTPUT, Failure

BODY = b"to be or not to be" * 5000
SHA256 = hashlib.sha256(BODY).hexdigest()
COMMIT = "a" * 40


def test_json_survives_its_file_and_bad_json_is_a_failure(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"name": "né", "list": [1, 2.5, None]})
    assert files.read_json(path) == {"name": "né", "list": [1, 2.5, None]}
    for content in ("{", "[" * 100_000, "[1]", "3", "\ud800", '{"a": 1'):
        path.write_bytes(content.encode(errors="surrogatepass"))
        refused("x.json", files.read_json, path)
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "none.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "c"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), files.atomic_file(path) as file:
        file.write(b"half of it")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["c"]
    with files.atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["c"]


def test_a_lock_has_one_holder(tmp_path, capsys):
    path = tmp_path / "run" / "lock"
    entered = threading.Event()

    def wait():
        with files.locked(path):
            entered.set()

    with files.locked(path, "busy"):
        with pytest.raises(Failure, match="busy") as failure, files.locked(path, "busy"):
            pass
        assert failure.value.code == IN_USE
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.3)
    thread.join(10)
    assert entered.is_set() and capsys.readouterr().out.count("waiting for another process") == 1


@pytest.fixture
def server():
    """A local server: `answers[path]` is a status with a body; `requests` lists what was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            status, body = self.server.answers.get(self.path.partition("?")[0], (404, b""))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(self.path.encode()).hexdigest()}"')
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may have closed the connection
                self.wfile.write(b"" if self.command == "HEAD" else body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url, server.requests = f"http://127.0.0.1:{server.server_port}", []
        server.answers = {"/f": (200, BODY)}
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_fetch_brings_a_file_once(tmp_path, server):
    path = tmp_path / "new" / "f"
    arguments = f"{server.url}/f", path, SHA256, len(BODY)
    for _ in range(2):
        assert files.fetch(*arguments) == path
    assert path.read_bytes() == BODY and server.requests == ["/f"]
    assert os.listdir(path.parent) == ["f"]
    path.write_bytes(b"other")
    assert files.fetch(*arguments).read_bytes() == BODY


ANSWERS = [
    ((200, BODY[:-1] + b"x"), "it has another SHA-256"),
    ((200, BODY + b"x"), "it has more than 90,000 bytes"),
    ((500, BODY), "500 Server Error"),
    (None, "Connection"),
]


@pytest.mark.parametrize("answer, message", ANSWERS)
def test_a_failed_fetch_leaves_nothing_and_says_what_to_do(tmp_path, server, answer, message):
    server.answers["/f"] = answer
    url = f"{server.url if answer else 'http://127.0.0.1:9'}/f"  # there, nobody listens
    arguments = url, tmp_path / "f", SHA256, len(BODY)
    error = refused(message, files.fetch, *arguments, code=INPUT_OUTPUT)
    assert all(str(part) in error for part in arguments[:3])
    assert os.listdir(tmp_path) == []


def test_names_of_models_on_the_hub():
    assert files.hub_repo("gpt2") == "openai-community/gpt2"
    assert files.hub_repo("distilgpt2") == "distilbert/distilgpt2"
    assert files.hub_repo("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    names = ("", "typo", "a/b/c", "./none", "../x", "a/..", "/etc/passwd")
    for name in (*names, "config/x", "a/b.pt"):  # a folder here, a checkpoint
        assert files.hub_repo(name) == ""


def test_a_local_folder_is_complete_or_refused(tmp_path):
    is_complete = Path.is_file
    for name, message in ((tmp_path, "lacks some .*: a, b"), ("typo", "neither a folder")):
        refused(message, files.model_folder, str(name), ["a", "b"], is_complete)


HUB = """
import sys, files
try:
    if sys.argv[1]:
        print(files.hub_snapshot("me/tiny", ["*.json"], folder=files.Path(sys.argv[1])))
    else:
        complete = lambda folder: (folder / "config.json").exists()
        print(files.model_folder("me/tiny", ["config.json", "*.json"], complete))
except files.Failure as failure:
    print(failure.code, failure)
"""


def hub(tmp_path, endpoint: str, folder="") -> str:
    """Call hub_snapshot in a process of its own, as the library reads its variables at import."""
    pytest.importorskip("huggingface_hub")
    result = run("-c", HUB, folder, HF_HOME=f"{tmp_path}/home", HF_ENDPOINT=endpoint)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def serve_repo(server, content: dict[str, bytes]):
    """Have the server answer as the Hub does for the repository me/tiny."""
    tree = []
    for name, body in content.items():
        sha1 = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        tree.append({"type": "file", "path": name, "size": len(body), "oid": sha1})
        server.answers[f"/me/tiny/resolve/{COMMIT}/{name}"] = (200, body)
    info = json.dumps({"id": "me/tiny", "sha": COMMIT, "siblings": []}).encode()
    for path in ("/api/models/me/tiny", "/api/models/me/tiny/revision/main"):
        server.answers[path] = (200, info)
    for revision in (COMMIT, "main"):
        path = f"/api/models/me/tiny/tree/{revision}"
        server.answers[path] = (200, json.dumps(tree).encode())


def test_what_the_cache_holds_needs_no_request(tmp_path, server):
    repo = tmp_path / "home" / "hub" / "models--me--tiny"
    path = write(repo / "snapshots" / COMMIT / "config.json", "{}")
    write(repo / "refs" / "main", COMMIT)
    assert hub(tmp_path, server.url) == str(path.parent) and server.requests == []


@pytest.mark.parametrize("is_local", [False, True])
def test_a_snapshot_arrives_verified_and_once(tmp_path, server, is_local):
    folder = tmp_path / "folder" if is_local else ""
    serve_repo(server, {"config.json": b'{"a": 1}', "weights.bin": b"pickle"})
    path = f"/me/tiny/resolve/{COMMIT}/config.json"
    server.answers[path] = (200, b'{"a": 2}')
    message = "6 me/tiny: config.json came damaged; run this again"
    assert hub(tmp_path, server.url, folder) == message
    server.answers[path] = (200, b'{"a": 1}')
    snapshot = Path(hub(tmp_path, server.url, folder))
    assert (snapshot / "config.json").read_bytes() == b'{"a": 1}'
    assert not (snapshot / "weights.bin").exists()  # matches no pattern
    server.requests.clear()
    assert hub(tmp_path, server.url, folder) == str(snapshot) and path not in server.requests
    assert is_local or server.requests == []


def test_a_repository_without_the_files_or_a_network_is_a_failure(tmp_path, server):
    output = hub(tmp_path, "http://127.0.0.1:9").splitlines()
    assert output[0].startswith("6 could not download me/tiny: ") and len(output) == 2
    serve_repo(server, {"other.json": b"{}"})
    assert hub(tmp_path, server.url) == (
        "2 me/tiny lacks some of what save_pretrained writes: config.json, *.json"
    )
