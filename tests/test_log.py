"""What a run reports about itself and about its machine."""

import math
import os
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import refused

import hardware
import log


def test_speed_and_time_left(monkeypatch):
    now = 0.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)
    meter = log.Meter(max_steps=11, step_tokens=100, flops_per_token=6, peak_flops=1200)
    now = 5.0
    assert meter.measure(1) == ({}, [])  # the first step compiles
    with meter.paused():
        now = 8.0  # a validation takes 3 s
    now = 10.0  # and two steps the other 2 s
    values, words = meter.measure(3)
    assert values == {"tokens_per_second": 100.0, "share_of_peak": 0.5}
    assert words == ["100 tokens/s", "50.0% of peak", "0:00:20 left"]


def test_metrics_are_cut_at_a_step_and_drawn(tmp_path, monkeypatch, capsys):
    for step in (1, 2, 3):
        values = {"step": step, "loss": 1 / step, "val_loss": 2.0}
        log.append_metrics(tmp_path, values | {"x": math.nan})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # by a run that was killed
    log.cut_metrics(tmp_path, 2, 2)
    records = [{"step": step, "loss": 1 / step, "val_loss": 2.0} for step in (1, 2)]
    assert log.read_metrics(tmp_path) == records and log.read_metrics(tmp_path / "none") == []
    figure = pytest.importorskip("matplotlib.figure").Figure
    folder = tmp_path.rename(tmp_path.with_name("a $b$ \\frac"))  # no mathematics
    assert str(folder / "loss.png") in log.draw_losses(folder)
    picture = (folder / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: 1 / 0)
    assert "no picture of the loss: ZeroDivisionError" in log.draw_losses(folder)
    log.print_report(folder, 1.0, SimpleNamespace(manifest={}))
    command = capsys.readouterr().out.splitlines()[-1].partition(": ")[2]
    assert shlex.split(command)[-1] == f"--checkpoint={folder / 'latest.pt'}"
    assert (folder / "loss.png").read_bytes() == picture and not [*folder.glob(".*")]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in log.draw_losses(folder)


def test_a_disk_without_room_for_three_checkpoints_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(log.shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000_000))
    for name, room in (("best.pt", "2.0"), ("latest.pt", "2.5")):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 500_000_000)
        warning = log.warn_of_room(tmp_path, 1_000_000_000)
        assert f"three checkpoints need 3.0 GB, there is room for {room}" in warning
    os.link(tmp_path / "latest.pt", tmp_path / "previous.pt")
    assert log.warn_of_room(tmp_path, 1_000_000_000) == ""


PEAKS = {  # in TFLOP/s, of names as the driver gives them; 0: not known, so no share is printed
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": 0,
    "NVIDIA GH200 480GB": 0,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA RTX A1000": 0,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 0,
    "NVIDIA A10-24Q": 0,
    "NVIDIA L4": 121,
    "NVIDIA L40": 0,
    "NVIDIA L40S": 362,
    "Tesla T4": 65,
    "NVIDIA T400 4GB": 0,
    "Tesla V100-SXM2-16GB": 125,
    "Tesla V100-PCIE-16GB": 0,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 3090 Ti": 0,
    "NVIDIA GeForce RTX 4090 Laptop GPU": 0,
    "NVIDIA GeForce RTX 4090 D": 0,
    "Other": 0,
}


def test_a_gpu_has_the_peak_of_its_own_name(monkeypatch):
    for name, peak in PEAKS.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert hardware.peak_flops(torch.device("cuda"), "bfloat16") == peak * 1e12, name
    assert hardware.peak_flops(torch.device("cpu"), "bfloat16") == 0
    assert hardware.named_peak_flops("H100", "float8") == 2 * 989e12
    for name, dtype in (("A100", "float8"), ("RTX 4090", "float8"), ("H100", "float32")):
        assert hardware.named_peak_flops(name, dtype) == 0


@pytest.mark.parametrize(
    "size, recompute, changes",
    [
        (16, "off", "--micro_batch_size=8 or --activation_checkpointing=selective needs less"),
        (9, "selective", "--micro_batch_size=3 or --activation_checkpointing=full needs less"),
        (1, "full", "a smaller --block_size needs less"),
    ],
)
def test_full_memory_names_what_to_change_and_to_which_value(size, recompute, changes):
    settings = dict(micro_batch_size=size, activation_checkpointing=recompute)

    def run_with(error):
        with hardware.naming_less_memory(settings):
            raise error

    wanted = f"^memory is full; {changes} .micro_batch_size is {size}, activation_ch.* {recompute}"
    for error in (torch.OutOfMemoryError("CUDA out of memory."), MemoryError()):
        refused(wanted, run_with, error)
    with pytest.raises(RuntimeError, match="another"):
        run_with(RuntimeError("another"))


@pytest.mark.parametrize("has_units, dtype", [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_trains_in_bfloat16_where_it_has_units_for_it(has_units, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_units)
    assert hardware.best_training_dtype(torch.device("cpu")) == dtype
    assert hardware.best_dtype(torch.device("cpu")) == "float32"
