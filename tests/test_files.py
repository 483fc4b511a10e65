"""Files are complete or absent, locks have one holder, downloads are what they should be."""

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import files
from config import BAD_INPUT, IN_USE, INPUT_OUTPUT, Failure

ROOT = Path(__file__).parent.parent
BODY = b"to be or not to be" * 5000
SHA256 = hashlib.sha256(BODY).hexdigest()
COMMIT = "a" * 40


def test_mix64_is_splitmix64_and_keeps_the_shape():
    """The first numbers of the generator with seed 1234567, as its authors publish them."""
    states = np.uint64(1234567) + np.arange(2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert files.mix64(states).tolist() == [6457827717110365317, 3203168211198807973]
    table = np.arange(6, dtype=np.uint64).reshape(2, 3)
    assert files.mix64(table).shape == (2, 3) and files.mix64(table).dtype == np.uint64
    assert files.mix64(table)[1, 2] == files.mix64(np.uint64(5))


def test_json_survives_its_file_and_bad_json_is_a_failure(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, {"name": "né", "list": [1, 2.5, None]})
    assert files.read_json(path) == {"name": "né", "list": [1, 2.5, None]}
    for content in ("{", "[" * 100_000, "[1]", "3", "\ud800", '{"a": 1'):
        path.write_bytes(content.encode(errors="surrogatepass"))
        with pytest.raises(Failure, match="x.json") as failure:
            files.read_json(path)
        assert failure.value.code == BAD_INPUT and "\n" not in str(failure.value)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
    path.write_text('{"a": 100000}')
    with pytest.raises(Failure, match="x.json has 13 bytes, more than the 10"):
        files.read_json(path)
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
    with files.locked(path, "busy"):
        with pytest.raises(Failure, match="busy") as failure, files.locked(path, "busy"):
            pass
        assert failure.value.code == IN_USE
    entered = threading.Event()

    def wait():
        with files.locked(path):
            entered.set()

    with files.locked(path, "busy"):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.5)
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
    for _ in range(2):
        assert files.fetch(f"{server.url}/f", path, SHA256, len(BODY)) == path
    assert path.read_bytes() == BODY and server.requests == ["/f"]
    assert os.listdir(path.parent) == ["f"]
    path.write_bytes(b"other")
    with pytest.raises(Failure, match=f"f does not have SHA-256 {SHA256}; delete it"):
        files.fetch(f"{server.url}/f", path, SHA256, len(BODY))


@pytest.mark.parametrize(
    "answer, max_bytes, message",
    [
        ((200, BODY[:-1] + b"x"), len(BODY), "it has SHA-256"),
        ((200, BODY), len(BODY) - 1, "it has more than 89,999 bytes"),
        ((500, BODY), len(BODY), "500 Server Error"),
        (None, len(BODY), "Connection"),
    ],
)
def test_a_failed_fetch_leaves_nothing_and_says_what_to_do(
    tmp_path, server, answer, max_bytes, message
):
    url = f"{server.url}/f"
    if answer is None:
        url = "http://127.0.0.1:9/f"  # nobody listens
    server.answers["/f"] = answer
    with pytest.raises(Failure, match=message) as failure:
        files.fetch(url, tmp_path / "f", SHA256, max_bytes)
    assert failure.value.code == INPUT_OUTPUT and "\n" not in str(failure.value)
    assert all(part in str(failure.value) for part in (url, str(tmp_path / "f"), SHA256))
    assert os.listdir(tmp_path) == []


def test_names_of_models_on_the_hub():
    assert files.hub_repo("gpt2") == "openai-community/gpt2"
    assert files.hub_repo("distilgpt2") == "distilbert/distilgpt2"
    assert files.hub_repo("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    for name in ("", "typo", "a/b/c", "./none", "../x", "a/..", "/etc/passwd"):
        assert files.hub_repo(name) == ""


def test_a_local_folder_is_complete_or_refused(tmp_path):
    def is_complete(folder):
        return (folder / "a").exists()

    with pytest.raises(Failure, match="is incomplete: a model's folder holds a, b"):
        files.model_folder(str(tmp_path), ["a", "b"], is_complete)
    (tmp_path / "a").touch()
    assert files.model_folder(str(tmp_path), ["a", "b"], is_complete) == tmp_path
    with pytest.raises(Failure, match="typo is neither a folder nor OWNER/NAME"):
        files.model_folder("typo", ["a", "b"], is_complete)


def hub(tmp_path, endpoint: str, folder: str | None = None) -> str:
    """Call hub_snapshot in a process of its own, as the library reads its variables at import."""
    pytest.importorskip("huggingface_hub")
    code = (
        "import sys, files, pathlib\n"
        "folder = pathlib.Path(sys.argv[1]) if sys.argv[1] else None\n"
        "complete = lambda f: (f / 'config.json').exists()\n"
        "try: print(files.hub_snapshot('me/tiny', ['*.json'], complete, folder=folder))\n"
        "except files.Failure as failure: print(failure.code, failure)\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint}
    command = [sys.executable, "-c", code, folder or ""]
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    result = subprocess.run(command, **options)
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
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    assert hub(tmp_path, server.url) == str(snapshot) and server.requests == []


@pytest.mark.parametrize("is_local", [False, True])
def test_a_snapshot_arrives_verified_and_once(tmp_path, server, is_local):
    folder = str(tmp_path / "folder") if is_local else None
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
    assert hub(tmp_path, server.url, folder) == str(snapshot) and server.requests == []


def test_a_repository_without_the_files_or_a_network_is_a_failure(tmp_path, server):
    output = hub(tmp_path, "http://127.0.0.1:9").splitlines()
    assert output[0].startswith("6 could not download me/tiny: ") and len(output) == 2
    serve_repo(server, {"other.json": b"{}"})
    assert hub(tmp_path, server.url) == "2 me/tiny lacks files that are needed: *.json"
