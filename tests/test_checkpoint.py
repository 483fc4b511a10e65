"""Checkpoints: files that prove their integrity, and what a name of a model opens."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import KINDS, ROOT, run_inside

import checkpoint
import train
from config import INPUT_OUTPUT, NO_CHECKPOINT, Failure

FIXTURES = ROOT / "tests" / "fixtures"  # written by groundup 0.1


def some_state() -> dict:
    weights = {"a": torch.arange(600.0), "b": torch.ones(3, 2, dtype=torch.bfloat16)}
    weights["scalar"] = torch.zeros(())
    return {"step": 3, "loss": 0.25, "model": weights, "names": ["x", "y"], "nothing": None}


def test_what_is_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path / "c.pt", some_state())
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert checkpoint.checksum(loaded) == checkpoint.checksum(some_state())
    assert torch.equal(loaded["model"]["a"], torch.arange(600.0)) and loaded["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_the_checksum_depends_on_every_name_value_type_and_shape():
    sums, state = {checkpoint.checksum(some_state())}, some_state()
    changes = [("step", 4), ("step", "3"), ("names", ["xy"]), ("names", ["x", "y", ""])]
    for key, value in [*changes, ("nothing", 0)]:
        sums.add(checkpoint.checksum(state | {key: value}))
    a = state["model"]["a"]
    for changed in (a + 1, a.view(2, 300), a.view(torch.int32)):
        sums.add(checkpoint.checksum(state | {"model": state["model"] | {"a": changed}}))
    assert len(sums) == 9


def test_any_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, some_state())
    content = path.read_bytes()
    start = content.index(torch.arange(600.0).numpy().tobytes())
    for index in (start, start + 1111, len(content) // 2, 40, len(content) - 5):
        path.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        try:
            loaded = checkpoint.load(path)
        except Failure as failure:
            assert failure.code == NO_CHECKPOINT
        else:  # the byte is of nothing that was saved
            assert checkpoint.checksum(loaded) == checkpoint.checksum(some_state())
            assert index not in (start, start + 1111)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "c.pt is not a checkpoint, or is damaged"),
        (b"PK\x03\x04 nothing", "c.pt is not a checkpoint, or is damaged"),
        ({"model": Evil()}, "c.pt is not a checkpoint.*more than tensors and plain types"),
        (some_state() | {"checksum": "0" * 64}, "does not match its checksum"),
        ([1, 2], "does not match its checksum"),
        (None, "there is no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused_and_runs_no_code(tmp_path, capsys, content, message):
    path = tmp_path / "c.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(Failure, match=message) as failure:
        checkpoint.load(path)
    assert failure.value.code == NO_CHECKPOINT and "code ran" not in capsys.readouterr().out


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path):
    checkpoint.save(tmp_path / "c.pt", some_state() | {"format_version": 99})
    with pytest.raises(Failure, match="has format_version 99; this version reads 1"):
        checkpoint.load(tmp_path / "c.pt")
    checkpoint.save(tmp_path / "c.pt", some_state())
    with pytest.raises(Failure, match="c.pt does not fit this version") as failure:
        checkpoint.open_model(str(tmp_path / "c.pt"), "")
    assert failure.value.code == NO_CHECKPOINT


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_version_0_1_continues(tmp_path, kind):
    shutil.copytree(FIXTURES / "dataset", tmp_path / "data" / "stories")
    (tmp_path / "run").mkdir()
    shutil.copy(FIXTURES / f"{kind}.pt", tmp_path / "run" / "latest.pt")
    saved = checkpoint.load(FIXTURES / f"{kind}.pt")
    values = saved["settings"] | {"out_dir": tmp_path / "run", "data_dir": tmp_path / "data"}
    values |= {"init_from": "resume", "eval_interval": 5, "max_steps": 5, "learning_rate": 0}
    values |= {"min_lr": 0}
    options = [f"--{name}={value}" for name, value in values.items()]
    result = run_inside(train.main, train.TrainConfig, options)
    assert result.returncode == 0, result.stderr
    state = checkpoint.load(tmp_path / "run" / "latest.pt")
    assert state["step"] == 5 and state["val_loss"] == pytest.approx(saved["val_loss"], abs=1e-5)


def test_the_names_of_a_model(tmp_path, capsys):
    pytest.importorskip("safetensors")
    for name, file in (("old", "latest.pt"), ("young", "best.pt")):
        (tmp_path / "out" / name).mkdir(parents=True)
        shutil.copy(
            FIXTURES / f"{'qwen3' if name == 'old' else 'gpt2'}.pt", tmp_path / "out" / name / file
        )
    out_dir = str(tmp_path / "out")
    for name, arch in (
        ("", "gpt2"),
        (f"{out_dir}/old", "qwen3"),
        (str(FIXTURES / "gpt2.pt"), "gpt2"),
        (str(FIXTURES / "hf"), "qwen3"),
    ):
        model, tokenizer = checkpoint.open_model(name, out_dir)
        assert model.config.arch == arch and tokenizer.vocab_size == model.config.vocab_size == 300
    assert "step 4, validation loss" in capsys.readouterr().err
    for name, code, message in (("none", NO_CHECKPOINT, ""), ("", NO_CHECKPOINT, "")):
        with pytest.raises(Failure, match="there is no checkpoint"):
            checkpoint.open_model(name, str(tmp_path / "nowhere"))
