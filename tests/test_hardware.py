"""float8, emulated on a CPU."""

import math
import sys

import numpy as np
import pytest
import torch
from conftest import KINDS, QWEN3, make_model, metrics, random_tokens, refused, tiny_run

import hardware
from model import GPT, GPTConfig
from ranks import Ranks
from train import TrainConfig, make_optimizers, parallelize

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPES = {"gpt2": {}, "qwen3": QWEN3 | dict(intermediate_size=48)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def trained(shape: dict, dtype: str, steps: int = 20) -> tuple[GPT, list[float]]:
    """A model after some steps on one batch, and its losses."""
    model, tokens, losses = make_model(**shape), random_tokens(2, 16), []
    hardware.set_dtype(model, dtype, CPU)
    [optimizer] = make_optimizers(model, TrainConfig())
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for _ in range(steps):
        loss = model(tokens, tokens.roll(-1, 1)).mean()
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return model, losses


@shapes
def test_float8_trains_as_bfloat16_and_leaves_the_weights_in_fp32(shape):
    pytest.importorskip("torchao")
    model, losses = trained(shape, "float8")
    plain, plain_losses = trained(shape, "bfloat16")
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if hasattr(m, "weight")}
    assert {kinds[name] for name in kinds if ".c_" in name} == {"Float8Linear"}
    assert kinds["lm_head"] == "Linear" and len(model.matrices()) == len(plain.matrices())
    assert losses != plain_losses and losses == pytest.approx(plain_losses, abs=0.1)
    assert losses[-1] < losses[0] - 0.2
    weights = model.state_dict()
    assert weights.keys() == plain.state_dict().keys()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    copy = GPT(GPTConfig(**vars(model.config)))
    copy.load_state_dict(weights)  # as a run or sample.py opens it, in bfloat16
    copy.dtype = torch.bfloat16
    tokens = random_tokens(2, 16)
    found, wanted = (m(tokens, tokens).mean().item() for m in (model, copy))
    assert found == pytest.approx(wanted, abs=0.1)


@shapes
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_float8_has_the_same_gradients_with_activation_checkpointing(shape, recompute):
    pytest.importorskip("torchao")
    model, tokens, results = make_model(**shape), random_tokens(2, 16), []
    hardware.set_dtype(model, "float8", CPU)
    for model.activation_checkpointing in ("off", recompute):
        model.zero_grad()
        model(tokens, tokens).mean().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_changes_between_float8_and_bfloat16(data_dir, tmp_path, monkeypatch, kind):
    """With validation, a sample at the end, and resuming in either."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(hardware, "check_dtype", lambda *_: None)  # this is a CPU
    options = [*KINDS[kind], "--sample_prompt=Chapter", "--activation_checkpointing=selective"]
    options += ["--head_size=16"] * (kind == "qwen3")
    results = {}
    for dtype, other in (("float8", "bfloat16"), ("bfloat16", "float8")):
        for steps, now, start in ((6, dtype, "scratch"), (12, other, "resume")):
            changes = [f"--max_steps={steps}", f"--dtype={now}", f"--init_from={start}"]
            result = tiny_run(data_dir, tmp_path / dtype, *options, *changes)
            assert result.returncode == 0 and f"on cpu in {now}" in result.stdout, result.stderr
        assert "Chapter" in result.stdout.split("sample.py")[1]
        results[dtype] = metrics(tmp_path / dtype, "val_loss")
    assert results["float8"] != results["bfloat16"]
    assert np.allclose(results["float8"], results["bfloat16"], atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["off", "model", "blocks"])
@shapes
def test_float8_on_a_gpu_has_the_gradients_of_bfloat16_up_to_rounding(shape, compiled):
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the card has no float8")
    tokens, found = random_tokens(4, 64).cuda(), {}
    for dtype in ("bfloat16", "float8"):
        model = make_model(**shape, block_size=64, n_embd=64).cuda()
        hardware.set_dtype(model, dtype, CPU)
        settings = TrainConfig(compile=compiled)
        forward = parallelize(model, settings, Ranks(0, 1, GPU))
        forward(tokens, tokens.roll(-1, 1)).mean().backward()
        found[dtype] = [parameter.grad for parameter in model.parameters()]
    for gradient, plain in zip(found["float8"], found["bfloat16"]):
        assert (gradient - plain).norm() <= 0.5 * plain.norm()


def test_float8_is_refused_in_one_line_where_it_cannot_be_had(data_dir, tmp_path, monkeypatch):
    result = tiny_run(data_dir, tmp_path / "run", "--dtype=float8")
    assert result.returncode == 2 and "L4, H100 or newer; this is cpu" in result.stderr
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    refused("this is NVIDIA A100-SXM4-40GB", hardware.check_dtype, "float8", GPU, 1024)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    refused("pip install torchao", hardware.check_dtype, "float8", GPU, 1024)
    monkeypatch.setitem(sys.modules, "torchao.float8", math)
    monkeypatch.setitem(sys.modules, "torchao", math)
    refused("multiple of 16, not 1000", hardware.check_dtype, "float8", GPU, 1000)
    hardware.check_dtype("float8", GPU, 1024)
    hardware.check_dtype("bfloat16", CPU, 1000)


def test_float8_needs_widths_of_16():
    pytest.importorskip("torchao")
    model = make_model(n_embd=40)
    refused("multiples of 16; 0.attn.c_attn.weight is", hardware.set_dtype, model, "float8", CPU)
