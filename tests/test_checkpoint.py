"""Checkpoints: files that prove their integrity, and what a name of a model opens."""

import os
import shutil
import sys
import zipfile

import pytest
import torch
from conftest import FIXTURES, refused, run, tiny_run

import checkpoint
from config import NO_CHECKPOINT


def some_state() -> dict:
    weights = {"a": torch.arange(600.0), "b": torch.ones((), dtype=torch.bfloat16)}
    state = {"step": 3, "val_loss": 0.25, "model": weights, "names": ["x", "y"], "nothing": None}
    state |= {"tokenizer": {"name": "t", "text": ""}, "settings": {}, "model_config": {}}
    return state | {"best_val_loss": 0.25, "dataset": "", "world_size": 1}


def test_the_checksum_depends_on_every_name_value_type_and_shape():
    state = some_state()
    weights, a = state["model"], state["model"]["a"]
    changes = [{}, {"step": 4}, {"step": "3"}, {"names": ["xy"]}, {"nothing": 0}, {"other": None}]
    tensors = (a + 1, a.view(2, 300), a.view(torch.int32))
    changes += [{"model": weights | {"a": tensor}} for tensor in tensors]
    assert len({checkpoint.checksum(state | change) for change in changes}) == len(changes)


def test_what_is_saved_comes_back_and_any_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, some_state())
    loaded, content = checkpoint.load(path), path.read_bytes()
    assert torch.equal(loaded["model"]["a"], torch.arange(600.0)) and loaded["step"] == 3
    start = content.index(torch.arange(600.0).numpy().tobytes())
    for index in (start, start + 1111, content.index(b"names"), content.index(b"PK")):
        path.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        refused("damaged", checkpoint.load, path, code=NO_CHECKPOINT)


def signed(state: dict) -> dict:
    return state | {"checksum": checkpoint.checksum(state)}


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


SEEMS_LARGE = {"model": {"a": torch.ones(1).expand(10**9)}, "checksum": "x"}
FOREIGN = [
    (b"PK\x03\x04 nothing", "c.pt is damaged or no checkpoint"),
    ({"model": Evil()}, "c.pt is damaged or holds more than plain data"),
    (some_state() | {"checksum": "0" * 64}, "does not match its checksum"),
    ([1, 2], "c.pt is damaged or no checkpoint"),
    (signed({"step": 1}), "c.pt lacks an entry of a checkpoint"),
    (signed(some_state() | {"model_config": {"n_layer": "x"}}), "c.pt does not fit this version"),
    (some_state() | SEEMS_LARGE, "a tensor is not dense"),
    (None, "there is no checkpoint"),
]


@pytest.mark.parametrize("content, message", FOREIGN)
def test_what_is_no_checkpoint_is_refused_and_runs_no_code(tmp_path, capsys, content, message):
    path = tmp_path / "c.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    refused(message, checkpoint.open_model, str(path), "", code=NO_CHECKPOINT)
    assert "code ran" not in capsys.readouterr().out


def compressed(path):
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def odd(**changes):
    """A checkpoint of a run with some entries changed, and a checksum that fits."""

    def write(path):
        state = checkpoint.load(path)
        for name, change in changes.items():
            change(state[name])
        torch.save(signed(state), path.with_suffix(".new"))  # the state is views of the file
        path.with_suffix(".new").replace(path)

    return write


def replaced(write):
    def replace(path):
        path.unlink()
        write(path)

    return replace


MISFITS = [
    odd(model=lambda model: model.popitem()),
    odd(model_config=lambda shape: shape.update(n_layer=10**9)),
    odd(model_config=lambda shape: shape.update(n_embd=2**40)),
    odd(optimizers=lambda optimizers: optimizers.clear()),
    odd(optimizers=lambda optimizers: optimizers[0]["state"][0].update(exp_avg=torch.ones(3))),
    odd(optimizers=lambda optimizers: optimizers[0]["state"][0].update(exp_avg="x")),
    odd(settings=lambda settings: settings.update(dtype="nn")),
]
ODD = [(change, "does not fit this version") for change in MISFITS]
ODD += [
    (replaced(os.mkfifo), "there is no checkpoint"),
    (replaced(os.mkdir), "there is no checkpoint"),
    (compressed, "it is compressed"),
    (odd(model=lambda model: model.update({"ln_f.bias": torch.ones(8).double()})), "in float32"),
    (odd(settings=lambda settings: settings.update(device=[])), "cannot be continued"),
    (odd(settings=lambda settings: settings.clear()), "cannot be continued"),
]


@pytest.mark.parametrize("change, message", ODD)
def test_odd_checkpoints_are_one_line(data_dir, tmp_path, change, message):
    options = ["--dataset=dataset", "--n_layer=1", "--n_embd=8", "--block_size=16"]
    options += ["--batch_tokens=64", "--max_steps=8", "--warmup_steps=1", "--init_from=resume"]
    options.append("--dtype=auto")  # so that the checkpoint decides
    (tmp_path / "run").mkdir()
    shutil.copy(FIXTURES / "gpt2.pt", tmp_path / "run" / "latest.pt")
    change(tmp_path / "run" / "latest.pt")
    result = tiny_run(FIXTURES, tmp_path / "run", *options)
    assert result.returncode in (2, NO_CHECKPOINT) and message in result.stderr, result.stderr
    assert result.stderr.count("\n") <= 2


OPERATIONS = ["replace", "link", "fsync", "unlink", "open", "rmdir"]  # of os


def test_a_kill_at_any_file_operation_leaves_a_sound_checkpoint(tmp_path):
    """Three saves, and a child process that ends before its n-th operation on a file."""
    finished, count = False, 0
    while not finished:
        folder, count = tmp_path / str(count), count + 1
        folder.mkdir()
        pid = os.fork()
        if not pid:
            save_three(folder, count)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        finished = status == 0
        steps = [checkpoint.load(path)["step"] for path in checkpoint.saved(folder)]
        assert status in (0, 9)
        done = int((folder / "done").read_text() or 0) if (folder / "done").exists() else 0
        assert max(steps, default=0) >= done and len({*steps}) >= min(done, 2)
    assert steps == [3, 2] and count > 10


def save_three(folder, kill_at: int):
    """Runs in a child process: count operations, and end at one of them as if killed."""
    operations = iter(range(1, 10**6))

    def counted(function):
        def operation(*arguments, **options):
            if next(operations) == kill_at:
                os._exit(9)
            return function(*arguments, **options)

        return operation

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    try:
        for step in (1, 2, 3):
            state = some_state() | {"step": step}
            checkpoint.save(folder / "latest.pt", state, folder / "previous.pt")
            (folder / "done").write_text(str(step))
    finally:
        os._exit(0)


PEAK = """
import checkpoint, pathlib, sys
def peak():  # bytes; getrusage has the parent's, too
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
checkpoint.load(pathlib.Path(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_memory_of_the_file(tmp_path):
    path, weights = tmp_path / "c.pt", {str(n): torch.ones(5_000_000) for n in range(10)}
    checkpoint.save(path, some_state() | {"model": weights})
    assert 0.9 < int(run("-c", PEAK, path).stdout) / path.stat().st_size < 1.2


def test_the_names_of_a_model(tmp_path, capsys):
    pytest.importorskip("safetensors")
    for kind, name in (("qwen3", "latest.pt"), ("gpt2", "best.pt")):  # a young run has best.pt only
        (tmp_path / kind).mkdir()
        shutil.copy(FIXTURES / f"{kind}.pt", tmp_path / kind / name)
    for name, arch in (
        ("", "gpt2"),  # the newest
        (tmp_path / "qwen3", "qwen3"),
        (FIXTURES / "gpt2.pt", "gpt2"),
        (FIXTURES / "hf", "qwen3"),
    ):
        model, tokenizer = checkpoint.open_model(str(name), str(tmp_path))
        assert model.config.arch == arch
        assert tokenizer.vocab_size == model.config.vocab_size == 300
    assert "step 4, validation loss" in capsys.readouterr().err
    arguments = checkpoint.open_model, "", str(tmp_path / "gpt2")
    refused("there is no checkpoint in it", *arguments, code=NO_CHECKPOINT)
