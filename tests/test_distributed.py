"""Several processes train as one."""

import numpy as np
import pytest
import torch
from conftest import KINDS, metrics, tiny_run

import checkpoint

FAST = ["--compile=on", "--activation_checkpointing=True"]  # compiled ranks that keep fewer activations


def losses(out_dir):
    return metrics(out_dir, "loss") + metrics(out_dir, "val_loss")


@pytest.mark.parametrize("kind, ranks", [("gpt2", 2), ("qwen3", 2), ("qwen3", 4)])
def test_several_gloo_ranks_equal_one_process(data_dir, tmp_path, kind, ranks):
    assert tiny_run(data_dir, tmp_path / "one", *KINDS[kind]).returncode == 0
    result = tiny_run(data_dir, tmp_path / "two", *KINDS[kind], processes=ranks)
    assert result.returncode == 0, result.stderr
    assert f"x {ranks} ranks" in result.stdout and result.stdout.count("validation loss") == 4  # one rank speaks
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=1e-5)
    one, two = (checkpoint.load(tmp_path / name / "latest.pt")["model"] for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_may_change_its_number_of_ranks(data_dir, tmp_path, kind):
    assert tiny_run(data_dir, tmp_path / "one", *KINDS[kind]).returncode == 0
    half = [*KINDS[kind], "--max_steps=12", "--checkpoint_interval=6"]
    assert tiny_run(data_dir, tmp_path / "both", *half, processes=2).returncode == 0
    on = [*KINDS[kind], "--init_from=resume", "--max_steps=16"]
    assert tiny_run(data_dir, tmp_path / "both", *on).returncode == 0
    assert tiny_run(data_dir, tmp_path / "one", *on).returncode == 0
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "both"), atol=1e-4)


def test_a_failure_speaks_once(data_dir, tmp_path):
    result = tiny_run(data_dir, tmp_path / "run", "--batch_tokens=64", processes=2)
    assert result.returncode != 0
    assert result.stderr.count("must be a multiple of 128: block_size 32 x 2 ranks x micro_batch_size 2") == 1
    assert not (tmp_path / "run").exists()


def test_what_fails_on_the_first_rank_ends_the_others_quietly(data_dir, tmp_path):
    result = tiny_run(data_dir, tmp_path / "run", "--dataset=nothing", processes=2)
    assert result.returncode != 0 and result.stderr.count("python prepare_data.py nothing --source=PATH") == 1
    assert "rank 1:" not in result.stderr
    assert "Traceback" not in result.stderr.split("torch/distributed")[0] and not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("kind, fast", [("gpt2", []), ("qwen3", []), ("gpt2", FAST)])
def test_two_gpus_equal_one(data_dir, tmp_path, kind, fast):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert tiny_run(data_dir, tmp_path / "one", *KINDS[kind], "--device=cuda").returncode == 0
    result = tiny_run(data_dir, tmp_path / "two", *KINDS[kind], "--device=cuda", *fast, processes=2)
    assert result.returncode == 0, result.stderr
    close = 1e-4 if kind == "gpt2" else 1e-2  # Muon computes in bfloat16 on a GPU
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=close)
