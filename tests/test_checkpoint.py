"""Checkpoints: files that prove their integrity, and what a name of a model opens."""

import shutil

import pytest
import torch
from conftest import FIXTURES, refused

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


def signed(**state) -> dict:
    return state | {"checksum": checkpoint.checksum(state)}


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


FOREIGN = [
    (b"PK\x03\x04 nothing", "c.pt is damaged or no checkpoint"),
    ({"model": Evil()}, "c.pt is damaged or holds more than plain data"),
    (some_state() | {"checksum": "0" * 64}, "does not match its checksum"),
    ([1, 2], "c.pt is damaged or no checkpoint"),
    (signed(step=1), "c.pt lacks an entry of a checkpoint"),
    (signed(**some_state() | {"model_config": {"n_layer": "x"}}), "c.pt does not fit this version"),
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
