"""Several processes train as one."""

import numpy as np
import pytest
import torch
from conftest import KINDS, ROOT, metrics, run, tiny_arguments, tiny_run

import checkpoint
import train
from config import NOT_FINITE


def losses(out_dir) -> list[tuple]:
    return metrics(out_dir, "loss") + metrics(out_dir, "val_loss")


@pytest.mark.parametrize("kind, ranks", [("gpt2", 2), ("qwen3", 4)])
def test_several_ranks_equal_one_and_a_run_may_change_their_number(data_dir, tmp_path, kind, ranks):
    one, several = tmp_path / "one", tmp_path / "several"
    assert tiny_run(data_dir, one, *KINDS[kind]).returncode == 0
    result = tiny_run(data_dir, several, *KINDS[kind], processes=ranks)
    assert result.returncode == 0, result.stderr
    assert f"x {ranks} ranks" in result.stdout and result.stdout.count("validation loss") == 4
    for out_dir in (one, several):
        options = ["--init_from=resume", "--max_steps=16"]
        assert tiny_run(data_dir, out_dir, *KINDS[kind], *options).returncode == 0
    assert np.allclose(losses(one), losses(several), atol=1e-4)
    left, right = (checkpoint.load(folder / "latest.pt")["model"] for folder in (one, several))
    torch.testing.assert_close(left, right, atol=1e-4, rtol=0)


FAILURES = [  # of all ranks, and of rank 0 alone
    ("--batch_tokens=64", "a multiple of 128: block_size 32 x 2 ranks x micro_batch_size 2"),
    ("--dataset=nothing", "python prepare_data.py nothing"),
]


@pytest.mark.parametrize("option, message", FAILURES)
def test_a_failure_is_printed_once(data_dir, tmp_path, option, message):
    result = tiny_run(data_dir, tmp_path / "run", option, processes=2)
    assert result.stderr.count(message) == 1 and "train.py, rank 1:" not in result.stderr
    assert "Traceback" not in result.stderr.split("torch/distributed")[0]
    assert result.returncode != 0 and not (tmp_path / "run").exists()


BROKEN_ON_RANK_1 = """
import config, math, os, sys, train
forward = train.GPT.forward
def broken(model, tokens, targets):
    return forward(model, tokens, targets) * (math.nan if os.environ["RANK"] == "1" else 1.0)
train.GPT.forward = broken
with config.exit_on_failure():
    train.main(config.load(train.TrainConfig, sys.argv[1:]))
"""


def test_values_that_are_not_finite_on_one_rank_end_all(data_dir, tmp_path):
    script, arguments = tmp_path / "broken.py", tiny_arguments(data_dir, tmp_path / "run")
    script.write_text(BROKEN_ON_RANK_1)
    result = run(script, *arguments, processes=2, PYTHONPATH=str(ROOT))
    assert f"exitcode  : {NOT_FINITE} " in result.stderr, result.stderr
    assert result.stderr.count("step 1: the loss of rank 1 is not finite") == 1
    assert checkpoint.load(tmp_path / "run" / "latest.pt")["step"] == 0


def test_an_error_as_ranks_part_is_only_printed(monkeypatch, capsys):
    """All is saved by then."""

    def barrier():
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train.dist, "rendezvous", lambda _: iter([(None, 0, 2)]))
    monkeypatch.setattr(train.dist, "init_process_group", lambda *_, **options: None)
    monkeypatch.setattr(train.dist, "barrier", barrier)
    with train.start_ranks(train.TrainConfig(device="cpu")):
        pass
    assert "rank 0, after the training: RuntimeError" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("kind, fast", [("gpt2", []), ("qwen3", []), ("gpt2", ["--compile=on"])])
def test_two_gpus_equal_one(data_dir, tmp_path, kind, fast):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    options = [*KINDS[kind], "--device=cuda"]
    assert tiny_run(data_dir, tmp_path / "one", *options).returncode == 0
    result = tiny_run(data_dir, tmp_path / "two", *options, *fast, processes=2)
    assert result.returncode == 0, result.stderr
    close = 1e-4 if kind == "gpt2" else 1e-2  # on a GPU Muon computes in bfloat16
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=close)
