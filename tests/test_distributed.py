"""Several processes train as one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import KINDS, ONE_THREAD, ROOT, metrics, run, tiny_arguments, tiny_run

import checkpoint
import config
import files
import ranks
from config import INPUT_OUTPUT, NOT_FINITE

LAUNCHER = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
cuda = pytest.param("cuda", marks=[pytest.mark.gpu, two_gpus])
devices = pytest.mark.parametrize("device", ["cpu", cuda])


def losses(out_dir) -> list[tuple]:
    return metrics(out_dir, "loss") + metrics(out_dir, "val_loss")


@pytest.mark.parametrize("kind, count", [("gpt2", 2), ("qwen3", 4)])
def test_several_ranks_equal_one_and_a_run_may_change_their_number(data_dir, tmp_path, kind, count):
    one, several = tmp_path / "one", tmp_path / "several"
    assert tiny_run(data_dir, one, *KINDS[kind]).returncode == 0
    result = tiny_run(data_dir, several, *KINDS[kind], processes=count)
    assert result.returncode == 0, result.stderr
    assert f"x {count} ranks" in result.stdout and result.stdout.count("validation loss") == 4
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


def test_a_rank_lost_while_a_run_is_resumed_is_not_its_checkpoints_fault():
    with pytest.raises(RuntimeError) as lost, checkpoint.fitting(Path("out/run")):
        raise RuntimeError("[pair.cc] Connection closed by peer")
    message, code = config.explain(lost.value, "")
    assert code == INPUT_OUTPUT and "another rank ended or did not answer" in message


PATCHED = """
import checkpoint, config, math, os, signal, sys, time, train
forward, calls, here = train.GPT.forward, iter(range(10**9)), os.environ["RANK"] == "1"
def broken(model, tokens, targets):
    losses, is_now = forward(model, tokens, targets), model.training and next(calls) == 10 and here
    if is_now:
        {}
    return losses
def recorded(run, stop=train.stop_if_not_finite):
    state = [run.model.state_dict(), [o.state_dict()["state"] for o in run.optimizers]]
    copy = checkpoint.snapshot(state, {{}})
    if run.ranks.device.type == "cuda":  # else the copies may not be there yet
        train.torch.cuda.synchronize()
    with open(f"{{run.folder}}/rank {{run.ranks.rank}}", "a") as file:
        print(run.step, checkpoint.checksum(copy), file=file)
    stop(run)
train.GPT.forward, train.stop_if_not_finite = broken, recorded
config.run(train.main, train.TrainConfig, "")
"""
ON_RANK_1 = [  # what rank 1 does in the sixth step, what is printed once, and a rank's exit code
    ("raise OSError('x.bin: gone')", "patched.py, rank 1: OSError: x.bin: gone", INPUT_OUTPUT),
    (
        "raise RuntimeError('CUDA out of memory')",
        "rank 1: memory is full; --micro_batch_size=1 or",
        2,
    ),
    ("os.kill(os.getpid(), signal.SIGKILL)", "another rank ended or did not answer", -9),
    ("os.kill(os.getpid(), signal.SIGTERM)", "stopped at step 6; to continue", 0),
]


def run_patched(action: str, data_dir, out_dir, *options, restarts=0):
    """A tiny run of two ranks, of which rank 1 does this in the sixth step."""
    script = out_dir.with_name("patched.py")
    script.write_text(PATCHED.format(action))
    arguments = [f"--max-restarts={restarts}", script, *tiny_arguments(data_dir, out_dir)]
    return run("-m", *LAUNCHER, *arguments, *options, PYTHONPATH=str(ROOT))


@devices
@pytest.mark.parametrize("action, message, code", ON_RANK_1)
def test_what_happens_on_one_rank_ends_all(data_dir, tmp_path, action, message, code, device):
    started = time.monotonic()
    options = [f"--device={device}", "--compile=off"]
    result = run_patched(action, data_dir, tmp_path / "run", *options)
    assert time.monotonic() - started < 100
    printed = result.stdout + result.stderr.split("torch/distributed")[0]
    if (device, code) == ("cuda", -9):  # the other waits for its GPU until the launcher ends it
        message = "step      5 of 12"
    assert printed.count(message) == 1 and "Traceback" not in printed, printed
    assert f"exitcode  : {code} " in result.stderr or result.returncode == code == 0
    step = checkpoint.load(tmp_path / "run" / "latest.pt")["step"]
    assert step == (4 if code else 6)


@devices
@pytest.mark.parametrize("sign", ["*", "+"])  # the gradient, too, is not finite; or the loss alone
def test_a_step_not_finite_on_one_rank_changes_nothing_on_any(data_dir, tmp_path, sign, device):
    """Found by the log three steps later; the state at step 5, which was saved, is saved again."""
    options = ["--log_interval=4", "--checkpoint_interval=5", "--eval_interval=100"]
    options += ["--optimizer=muon", f"--device={device}", "--compile=off"]
    action, out_dir = f"losses {sign}= math.nan", tmp_path / "run"
    result = run_patched(action, data_dir, out_dir, *options)
    assert result.stderr.count("rank 1 is not finite (windows at positions 40 to 47)") == 1
    assert f"exitcode  : {NOT_FINITE} " in result.stderr
    assert checkpoint.load(out_dir / "latest.pt")["step"] == 5
    for rank in (0, 1):
        words = (out_dir / f"rank {rank}").read_text().split()
        steps, sums = words[::2], words[1::2]
        assert steps == ["1", "4", "5", "8", "5"] and sums[1] != sums[2] == sums[3] == sums[4]


def test_a_launcher_restarts_a_run_that_failed(data_dir, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fail = "0 if os.environ['TORCHELASTIC_RESTART_COUNT'] == '1' else os.kill(os.getpid(), 9)"
    assert tiny_run(data_dir, whole, processes=2).returncode == 0
    result = run_patched(fail, data_dir, parts, "--init_from=auto", restarts=1)
    assert result.returncode == 0, result.stderr
    assert losses(whole) == losses(parts)


@pytest.mark.slow
def test_a_frozen_rank_is_not_waited_for_longer_than_the_timeout(data_dir, tmp_path):
    action, option = "os.kill(os.getpid(), signal.SIGSTOP)", "--distributed_timeout=1"
    result = run_patched(action, data_dir, tmp_path / "run", option)
    assert result.stderr.count("another rank ended or did not answer") == 1
    assert checkpoint.load(tmp_path / "run" / "latest.pt")["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_random_kills_lose_no_more_than_an_interval(data_dir, tmp_path, processes):
    """The same command line until it finishes; then all is as without a kill."""
    options = ["--max_steps=2000", "--checkpoint_interval=7", "--eval_interval=50"]
    options += ["--init_from=auto", "--dropout=0.2"]
    assert tiny_run(data_dir, tmp_path / "whole", *options, processes=processes).returncode == 0
    arguments = ["train.py", *tiny_arguments(data_dir, tmp_path / "parts"), *options]
    command = [sys.executable, *(["-m", *LAUNCHER] if processes > 1 else []), *arguments]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kwargs = dict(cwd=ROOT, env=os.environ | ONE_THREAD, start_new_session=True)
    generator, kills, code = random.Random(0), 0, None
    while code != 0:
        with subprocess.Popen(command, **kwargs, **quiet) as process:
            try:
                code = process.wait(timeout=generator.uniform(2, 6))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
        for path in checkpoint.saved(tmp_path / "parts"):
            checkpoint.load(path)
    assert kills > 3
    states = [checkpoint.load(tmp_path / name / "latest.pt") for name in ("whole", "parts")]
    assert len({checkpoint.checksum(state["model"]) for state in states}) == 1
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_ranks_whose_launcher_is_killed_save_and_end(data_dir, tmp_path):
    long = ["--max_steps=100000", "--checkpoint_interval=100000", "--eval_interval=100000"]
    arguments = ["train.py", *tiny_arguments(data_dir, tmp_path / "run"), *long]
    command = [sys.executable, "-m", *LAUNCHER, *arguments]
    environment, log = os.environ | ONE_THREAD, tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: log.exists() and log.stat().st_size > 1000)
        process.kill()
    wait_until(lambda: (tmp_path / "run" / "latest.pt").exists(), seconds=10)
    with files.locked(tmp_path / "run" / "lock"):  # until the last rank has ended
        steps = metrics(tmp_path / "run", "step")
    assert checkpoint.load(tmp_path / "run" / "latest.pt")["step"] == steps[-1][0]


HASHING = """
import config, dataset, os, time, train
dataset.sha256_of = lambda path: os.write(1, b"hashing\\n") and time.sleep(25)
config.run(train.main, train.TrainConfig, "")
"""


def test_ranks_whose_launcher_is_killed_while_they_hash_end(data_dir, tmp_path):
    script, out_dir = tmp_path / "patched.py", tmp_path / "run"
    script.write_text(HASHING)
    command = [sys.executable, "-m", *LAUNCHER, script, *tiny_arguments(data_dir, out_dir)]
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert any(line == b"hashing\n" for line in process.stdout)
        process.kill()
        process.communicate(timeout=10)  # until the last rank has ended
    assert [path.name for path in out_dir.iterdir()] == ["lock"]


WAITING = """
import ranks, torch
print("waits for the other ranks", flush=True)
with ranks.start_ranks(torch.device("cpu"), 10, ""):
    pass
"""


def test_a_rank_that_waits_for_others_ends_with_its_launcher():
    """It is the launcher's child, and shares its standard output, which ends with the last one."""
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    variables = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    environment = os.environ | ONE_THREAD | variables | {"RANK": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", launcher, WAITING]
    options = dict(cwd=ROOT, env=environment, text=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as process:
        assert "waits" in process.stdout.readline()
        time.sleep(1)
        process.kill()
        process.communicate(timeout=10)


def wait_until(is_true, seconds=60):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_error_as_ranks_part_is_only_printed(monkeypatch, capsys):
    """All is saved by then."""

    def barrier():
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "rendezvous", lambda _, **options: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **options: None)
    monkeypatch.setattr(dist, "barrier", barrier)
    with ranks.start_ranks(torch.device("cpu"), 10, ""):
        pass
    assert "rank 0, after the training: RuntimeError" in capsys.readouterr().err


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("kind, compiled", [(k, "auto") for k in KINDS] + [("gpt2", "blocks")])
def test_two_gpus_equal_one(data_dir, tmp_path, kind, compiled):
    options = [*KINDS[kind], "--device=cuda"]
    assert tiny_run(data_dir, tmp_path / "one", *options).returncode == 0
    options.append(f"--compile={compiled}")
    result = tiny_run(data_dir, tmp_path / "two", *options, processes=2)
    assert result.returncode == 0, result.stderr
    close = 1e-4 if kind == "gpt2" else 1e-2  # on a GPU Muon computes in bfloat16
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=close)
