"""Every way to train on several devices gives the same losses and the same checkpoints."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import KINDS, ROOT, refused, run, run_inside, tiny_arguments, tiny_run
from test_distributed import losses, run_patched

import checkpoint
import config
import train

FSDP = "--parallel=fsdp"
GPU_RUNS = {  # options that change only rounding
    "plain": [],
    "blocks": ["--compile=blocks", "--reshard_after_forward=False"],
    "bfloat16": ["--dtype=bfloat16", "--activation_checkpointing=True"],
}
RUNS = """
import json, os, sys, config, train
train_loop = train.train
def train_and_tell(run):
    weights = [w.to_local() if hasattr(w, "to_local") else w for w in run.model.parameters()]
    run.print(f"numbers on rank 0: {sum(w.numel() for w in weights)}")
    return train_loop(run)
train.train = train_and_tell
for number, arguments in enumerate(json.loads(sys.argv[1])):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # its own part of the launcher's store
    train.main(config.load(train.TrainConfig, arguments))
config.end_process(0)
"""


def run_all(runs: list[list], tmp_path, processes: int) -> str:
    """Several runs of train.py, each on as many processes, started only once."""
    (tmp_path / "runs.py").write_text(RUNS)
    arguments = [tmp_path / "runs.py", json.dumps(runs)]
    result = run(*arguments, processes=processes, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    return result.stdout


PARTS = [  # one run, continued under another engine and on other numbers of ranks
    (4, 2, [FSDP, "--reshard_after_forward=False", "--sample_prompt=Chapter"]),
    (8, 2, ["--parallel=ddp"]),
    (12, 4, [FSDP, "--micro_batch_size=1", "--activation_checkpointing=True"]),
    (16, 1, [FSDP]),  # which has nothing to split
]


def test_engines_and_numbers_of_ranks_are_equal_and_can_change(data_dir, tmp_path):
    """Losses, weights and moments; a rank keeps its share; tied weights are in a file once."""
    steps = ["--max_steps=16", "--min_lr=1e-2", "--checkpoint_interval=4", "--init_from=auto"]
    runs = {1: [], 2: [], 4: []}
    for kind in KINDS:
        assert tiny_run(data_dir, tmp_path / kind, *KINDS[kind], *steps).returncode == 0
        for step, processes, options in PARTS:
            arguments = tiny_arguments(data_dir, tmp_path / f"{kind}-parts")
            runs[processes].append([*arguments, *KINDS[kind], *steps, *options])
            runs[processes][-1].append(f"--max_steps={step}")
    printed = run_all(runs[2], tmp_path, 2)
    assert printed.count("Chapter") == 2
    numbers = [int(number) for number in re.findall("on rank 0: (.*)", printed)]
    assert numbers[0] < 0.52 * numbers[1] and numbers[2] < 0.52 * numbers[3]
    run_all(runs[4], tmp_path, 4)
    for arguments in runs[1]:
        assert run_inside(train.main, train.TrainConfig, arguments).returncode == 0
    for kind in KINDS:
        folders = tmp_path / kind, tmp_path / f"{kind}-parts"
        wanted, found = (losses(folder) for folder in folders)
        assert len(found) == 20 and np.allclose(found, wanted, atol=1e-5)
        left, right = (checkpoint.load(folder / "latest.pt") for folder in folders)
        for part in ("model", "optimizers"):
            torch.testing.assert_close(left[part], right[part], atol=1e-4, rtol=0)
        sizes = {(folder / "latest.pt").stat().st_size // 1000 for folder in folders}
        assert len(sizes) == 1


REFUSED = [
    ([FSDP, "--micro_batch_size=0"], "needs a micro_batch_size"),
    ([FSDP, "--compile=model"], "needs compile blocks or off"),
    (["--parallel=pipeline"], "must be one of ddp, fsdp"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_what_does_not_go_together_is_refused(options, message):
    arguments = ["--micro_batch_size=4", *options]
    refused(message, config.load, train.TrainConfig, arguments)


STOP = ("os.kill(os.getpid(), signal.SIGTERM)", "stopped at step 6; to continue", 6)
ON_RANK_1 = [  # what rank 1 does in the sixth step, what is printed once, and the step saved
    ("losses *= math.nan", "rank 1 is not finite (windows at positions 40 to 47)", 5),
    pytest.param(*STOP, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("action, message, step", ON_RANK_1)
def test_what_happens_on_one_rank_ends_all(data_dir, tmp_path, action, message, step):
    result = run_patched(action, data_dir, tmp_path / "run", FSDP, *KINDS["qwen3"])
    assert (result.stdout + result.stderr).count(message) == 1, result.stderr
    state = checkpoint.load(tmp_path / "run" / "latest.pt")
    assert state["step"] == step
    assert all(weight.isfinite().all() for weight in state["model"].values())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus_equal_one(data_dir, tmp_path, kind):
    """Uncompiled and compiled, in fp32; and a killed run continues from its shards' checkpoint."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    options = [*KINDS[kind], "--device=cuda", "--compile=off", "--min_lr=1e-2"]
    assert tiny_run(data_dir, tmp_path / "one", *options).returncode == 0
    close = 1e-5 if kind == "gpt2" else 1e-2  # on a GPU Muon computes in bfloat16
    for name, changes in GPU_RUNS.items():
        arguments = [*options, FSDP, *changes]
        result = tiny_run(data_dir, tmp_path / name, *arguments, "--max_steps=8", processes=2)
        assert result.returncode == 0, result.stderr
        result = tiny_run(data_dir, tmp_path / name, *arguments, "--init_from=auto", processes=2)
        assert result.returncode == 0, result.stderr
        atol = 0.05 if "bfloat16" in name else close
        assert np.allclose(losses(tmp_path / name), losses(tmp_path / "one"), atol=atol), name
