"""What several test files share: a tiny dataset, and scripts run as a user runs them."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config
import prepare_data
import train

torch.set_num_threads(1)  # the models here are so small that two threads would mostly wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # scripts hear Ctrl-C, though a shell's `&` had it ignored

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Forty documents that a model can learn something from in a few steps."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [
        {"text": f"Chapter {n}. " + " ".join(f"{n * k % 97} comes before {n * k % 97 + 1}." for k in range(60))}
        for n in range(1, 41)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data_dir(text_file) -> Path:
    """A folder that holds the dataset `tiny`: those documents, as bytes."""
    folder = text_file.parent / "data"
    settings = prepare_data.PrepareConfig(
        name="tiny", source=str(text_file), tokenizer="bytes", shard_tokens=20_000, data_dir=str(folder)
    )
    settings.check()
    prepare_data.prepare(settings)
    return folder


def run(*command, cwd=ROOT, processes=1, **environment):
    """Run a script as a user would and return the finished process, its output as text."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launcher, *map(str, command)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


KINDS = {  # what the options of tiny runs add to make them of one architecture and optimizer or the other
    "gpt2": [],
    "qwen3": ["--arch=qwen3", "--n_kv_head=1", "--tie_embeddings=False", "--optimizer=muon"],
}


def tiny_arguments(data_dir: Path, out_dir: Path) -> list[str]:
    """What train.py needs to train a tiny model on `tiny` for a few steps."""
    shape = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_tokens=256"]
    steps = ["--max_steps=12", "--warmup_steps=2", "--learning_rate=1e-2", "--min_lr=1e-3", "--micro_batch_size=2"]
    evals = ["--eval_interval=4", "--eval_tokens=1000", "--checkpoint_interval=4", "--log_interval=1"]
    where = [f"--data_dir={data_dir}", "--dataset=tiny", f"--out_dir={out_dir}", "--device=cpu", "--dtype=float32"]
    return [*shape, *steps, *evals, *where]


def tiny_run(data_dir: Path, out_dir: Path, *options, processes=1):
    """Train a tiny model on `tiny`; one process trains in this one, which saves the seconds of importing torch."""
    arguments = [*tiny_arguments(data_dir, out_dir), *options]
    if processes > 1:
        return run("train.py", *arguments, processes=processes)
    code, stdout, stderr = 0, io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), config.exit_codes():
            train.main(config.load(train.TrainConfig, arguments))
    except SystemExit as exit_:
        code = exit_.code
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


def metrics(out_dir: Path, *keys) -> list[tuple]:
    """The values of `keys` in each line of metrics.jsonl that has them all, but for one that is being written."""
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [tuple(record[key] for key in keys) for record in records if all(key in record for key in keys)]
