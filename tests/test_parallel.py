"""Every way to train on several devices gives the same losses and the same checkpoints."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import KINDS, ROOT, make_model, refused, run, run_inside, tiny_arguments, tiny_run
from test_distributed import losses, run_patched

import checkpoint
import config
import hardware
import parallel
import train
from ranks import Ranks

FSDP = "--parallel=fsdp"
GPU_RUNS = {  # options that change only rounding
    "plain": [],
    "blocks": ["--compile=blocks", "--reshard_after_forward=False"],
    "bfloat16": ["--dtype=bfloat16", "--activation_checkpointing=full"],
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
    (12, 4, [FSDP, "--micro_batch_size=1", "--activation_checkpointing=full"]),
    (16, 1, [FSDP]),  # which has nothing to split
]


def assert_same_run(left, right, count: int):
    """Assert that two runs had the same losses, so many, and left the same checkpoint."""
    wanted, found = losses(left), losses(right)
    assert len(found) == count and np.allclose(found, wanted, atol=1e-5)
    states = [checkpoint.load(folder / "latest.pt") for folder in (left, right)]
    torch.testing.assert_close(states[0]["model"], states[1]["model"], atol=1e-4, rtol=0)
    moments = [[optimizer["state"] for optimizer in state["optimizers"]] for state in states]
    torch.testing.assert_close(*moments, atol=1e-4, rtol=0)
    sizes = [path.stat().st_size for path in (left / "latest.pt", right / "previous.pt")]
    assert abs(sizes[0] - sizes[1]) < 2000  # tied weights are in a file once, whoever wrote it


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
        assert_same_run(tmp_path / kind, tmp_path / f"{kind}-parts", 20)


def with_options(tmp_path, **options) -> str:
    """The setting of a DeepSpeed JSON file."""
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    path.write_text(json.dumps(options))
    return f"--deepspeed_config={path}"


def test_deepspeed_equals_one_rank_and_its_checkpoints_continue_elsewhere(data_dir, tmp_path):
    """A run that is in stages 1 to 3 and offloaded in turn, and at last on one rank without it."""
    pytest.importorskip("deepspeed")
    steps = ["--max_steps=16", "--min_lr=1e-2", "--checkpoint_interval=4", "--init_from=auto"]
    assert tiny_run(data_dir, tmp_path / "one", *steps).returncode == 0
    offload = {"offload_optimizer": {"device": "cpu"}}
    for stage, options in ((1, {}), (2, {"reduce_bucket_size": "auto"}), (3, offload)):
        zero = {"stage": stage} | options
        option = with_options(tmp_path, zero_optimization=zero, gradient_clipping="auto")
        part = [*steps, "--parallel=deepspeed", option, f"--max_steps={4 * stage}"]
        result = tiny_run(data_dir, tmp_path / "parts", *part, "--sample_prompt=a", processes=2)
        assert result.returncode == 0 and "to sample from it" in result.stdout, result.stderr
    assert tiny_run(data_dir, tmp_path / "parts", *steps).returncode == 0
    assert_same_run(tmp_path / "one", tmp_path / "parts", 20)


def test_what_deepspeed_raises_is_not_the_checkpoints_fault(data_dir, tmp_path, monkeypatch):
    def start_deepspeed(run):
        raise TypeError("no compiler")

    assert tiny_run(data_dir, tmp_path / "run", "--max_steps=2").returncode == 0
    monkeypatch.setattr(parallel, "start_deepspeed", start_deepspeed)
    with pytest.raises(TypeError, match="no compiler"):
        tiny_run(data_dir, tmp_path / "run", "--init_from=resume", "--max_steps=2")


BAD_OPTIONS = [
    (dict(zero_optimization={"stage": 0}), "must be 1, 2 or 3"),
    (dict(gradient_clipping=0.5), "gradient_clipping must be 1.0, as the settings have it"),
    (dict(optimizer={"type": "Lamb"}), "optimizer Lamb is not supported"),
    (dict(fp16={"enabled": True}), "fp16 is not supported"),
    (dict(bf16=True), "bf16 must be objects"),
]


@pytest.mark.parametrize("options, message", BAD_OPTIONS)
def test_options_that_do_not_fit_the_recipe_are_refused(tmp_path, options, message):
    path = with_options(tmp_path, **{"zero_optimization": {"stage": 2}} | options)
    path = path.partition("=")[2]
    refused(message, parallel.read_options, path, {"gradient_clipping": 1.0})


REFUSED = [
    ([FSDP, "--micro_batch_size=0"], "needs a micro_batch_size"),
    ([FSDP, "--compile=model"], "needs compile blocks, or off"),
    (["--parallel=deepspeed", "--optimizer=muon"], "needs optimizer adamw"),
    (["--parallel=deepspeed"], "needs (torchrun|pip install)"),
    (["--deepspeed_config=zero.json"], "has no effect: parallel is ddp, not deepspeed"),
    (["--parallel=pipeline"], "must be one of ddp, fsdp"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_what_does_not_go_together_is_refused(options, message):
    arguments = ["--micro_batch_size=4", *options]
    refused(message, config.load, train.TrainConfig, arguments)


def test_a_dtype_found_on_the_device_is_refused_as_a_chosen_one_is(monkeypatch):
    monkeypatch.setattr(hardware, "best_training_dtype", lambda _: "float16")  # as on a T4
    settings = config.load(train.TrainConfig, [FSDP, "--micro_batch_size=4"])
    arguments = settings, Ranks(0, 2, torch.device("cpu")), make_model(), {}
    refused("fsdp needs another dtype: float16", train.resolve_auto, *arguments)


STOP = ("os.kill(os.getpid(), signal.SIGTERM)", "stopped at step 6; to continue", 6)
ON_RANK_1 = [  # what rank 1 does in the sixth step, what is printed once, and the step saved
    ("losses *= math.nan", "rank 1 is not finite (windows at positions 40 to 47)", 5),
    pytest.param(*STOP, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("deepspeed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("action, message, step", ON_RANK_1)
def test_what_happens_on_one_rank_ends_all(data_dir, tmp_path, action, message, step, engine):
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    options = [f"--parallel={engine}", *(KINDS["qwen3"] if engine == "fsdp" else [])]
    result = run_patched(action, data_dir, tmp_path / "run", *options, "--log_interval=4")
    assert (result.stdout + result.stderr).count(message) == 1, result.stderr
    state = checkpoint.load(tmp_path / "run" / "latest.pt")
    assert state["step"] == step
    assert all(weight.isfinite().all() for weight in state["model"].values())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_a_run_of_which_a_rank_is_killed_continues(data_dir, tmp_path, engine):
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    options = [f"--parallel={engine}", "--dropout=0.2", "--init_from=auto"]
    assert tiny_run(data_dir, tmp_path / "whole", *options, processes=2).returncode == 0
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    assert run_patched(kill, data_dir, tmp_path / "parts", *options).returncode != 0
    assert checkpoint.load(tmp_path / "parts" / "latest.pt")["step"] == 4
    assert tiny_run(data_dir, tmp_path / "parts", *options, processes=2).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 15)


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
