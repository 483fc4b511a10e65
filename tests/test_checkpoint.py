"""Files that survive."""

import os

import pytest
import torch

import checkpoint
from config import IN_USE, NO_CHECKPOINT, Failure


def some_state() -> dict:
    weights = {"a": torch.arange(600.0), "b": torch.ones(3, 2, dtype=torch.bfloat16), "none": torch.zeros(())}
    return {"step": 3, "loss": 0.25, "model": weights, "names": ["x", "y"], "nothing": None}


def test_what_is_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path / "c.pt", some_state())
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert checkpoint.checksum(loaded) == checkpoint.checksum(some_state())
    assert torch.equal(loaded["model"]["a"], torch.arange(600.0)) and loaded["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_the_checksum_sees_every_change():
    sums = {checkpoint.checksum(some_state())}
    for key, value in (("step", 4), ("step", "3"), ("names", ["xy"]), ("names", ["x", "y", ""]), ("nothing", 0)):
        sums.add(checkpoint.checksum(some_state() | {key: value}))
    weights = some_state()["model"]
    for changed in (weights["a"] + 1, weights["a"].view(2, 300), weights["a"].view(torch.int32)):
        sums.add(checkpoint.checksum(some_state() | {"model": weights | {"a": changed}}))
    assert len(sums) == 9


def test_any_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, some_state())
    whole = path.read_bytes()
    place = whole.index(torch.arange(600.0).numpy().tobytes())
    for position in (place, place + 1111, len(whole) // 2, 40, len(whole) - 5):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            loaded = checkpoint.load(path)
        except Failure as failure:
            assert failure.code == NO_CHECKPOINT
        else:  # the byte belongs to nothing that was saved
            assert checkpoint.checksum(loaded) == checkpoint.checksum(some_state())
            assert position not in (place, place + 1111)


def test_a_wrong_checksum_is_noticed(tmp_path):
    torch.save(some_state() | {"checksum": "0" * 64}, tmp_path / "c.pt")
    with pytest.raises(Failure, match="does not match its checksum"):
        checkpoint.load(tmp_path / "c.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 nothing"])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(Failure, match="c.pt is not a checkpoint, or is damaged") as failure:
        checkpoint.load(tmp_path / "c.pt")
    assert failure.value.code == NO_CHECKPOINT
    with pytest.raises(Failure, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "other.pt")


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_no_code_runs_from_a_checkpoint(tmp_path, capsys):
    torch.save({"model": Evil()}, tmp_path / "c.pt")
    with pytest.raises(Failure, match="c.pt is not a checkpoint"):
        checkpoint.load(tmp_path / "c.pt")
    assert "code ran" not in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    checkpoint.save(tmp_path / "c.pt", {"step": 1})
    with pytest.raises(RuntimeError), checkpoint.atomic_file(tmp_path / "c.pt") as file:
        file.write(b"half of it")
        raise RuntimeError
    assert checkpoint.load(tmp_path / "c.pt") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows sets no such limits")
def test_a_full_disk_is_an_input_output_error(tmp_path):
    import resource

    checkpoint.save(tmp_path / "c.pt", {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, before[1])
    )  # a file may grow no larger, as if the disk were full
    try:
        with pytest.raises(OSError):
            checkpoint.save(tmp_path / "c.pt", {"step": 2, "weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.load(tmp_path / "c.pt") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_a_folder_belongs_to_one_run(tmp_path):
    with checkpoint.locked(tmp_path / "run" / "lock", "busy"):
        with pytest.raises(Failure, match="busy") as failure, checkpoint.locked(tmp_path / "run" / "lock", "busy"):
            pass
        assert failure.value.code == IN_USE
    with checkpoint.locked(tmp_path / "run" / "lock", "busy"):
        pass
