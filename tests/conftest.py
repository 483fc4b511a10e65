"""What several test files share: a tiny dataset, and scripts run as a user runs them."""

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import config
import prepare_data
import train
from model import GPT, GPTConfig

torch.set_num_threads(1)  # the models here are so small that two threads would wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` may have it ignored

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"  # written by groundup 0.1
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
KINDS = {  # options of tiny runs: one of each architecture and optimizer
    "gpt2": [],
    "qwen3": ["--arch=qwen3", "--n_kv_head=1", "--tie_embeddings=False", "--optimizer=muon"]
    + ["--embedding_learning_rate=1e-2"],
}
SIZES = dict(vocab_size=97, block_size=24, n_layer=2, n_head=2, n_embd=32)
QWEN3 = dict(arch="qwen3", n_head=4, n_kv_head=2, head_size=16, intermediate_size=40)
UNTIED = QWEN3 | dict(tie_embeddings=False)
SHAPES = {"gpt2": {}, "unbiased": dict(bias=False), "tied": QWEN3, "untied": UNTIED}


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def reset_compiler():
    """torch silently stops compiling after some variants of a function: each test starts anew."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def make_model(**changes) -> GPT:
    """A model whose weights are larger than fresh ones, so that no difference hides."""
    model, generator = GPT(GPTConfig(**SIZES | changes)), torch.Generator().manual_seed(0)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def random_tokens(*shape) -> torch.Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(1))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_texts(path: Path, texts, field: str = "text") -> Path:
    """A file of JSON, a document per line."""
    return write(path, "".join(json.dumps({field: text}) + "\n" for text in texts))


def split_tokens(dataset, split: str):
    """All tokens of one split."""
    return np.concatenate([s.read(0, s.count) for s in getattr(dataset, split).shards])


def refused(message: str, function, *arguments, code=config.BAD_INPUT, **options):
    """Assert that the call raises a Failure with this message and code, in at most three lines."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits, as for a pipe"))
    signal.alarm(20)
    with pytest.raises(config.Failure, match=message) as failure:
        function(*arguments, **options)
    signal.alarm(0)
    assert failure.value.code == code and str(failure.value).count("\n") < 3
    return str(failure.value)


@contextlib.contextmanager
def full_disk(max_bytes: int):
    """No file can grow beyond max_bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Forty documents that a model can learn something from in a few steps."""
    texts = []
    for n in range(1, 41):
        pairs = [f"{n * k % 97} comes before {n * k % 97 + 1}." for k in range(60)]
        texts.append(f"Chapter {n}. " + " ".join(pairs))
    return write_texts(tmp_path_factory.mktemp("text") / "text.jsonl", texts)


@pytest.fixture(scope="session")
def data_dir(text_file) -> Path:
    """A folder that holds the dataset `tiny`: those documents, as bytes."""
    folder = text_file.parent / "data"
    options = ["tiny", f"--source={text_file}", "--tokenizer=bytes", "--shard_tokens=20000"]
    arguments = [*options, "--processes=1", f"--data_dir={folder}"]
    prepare_data.main(config.load(prepare_data.PrepareConfig, arguments, positional="name"))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def trained(request, data_dir, tmp_path_factory) -> Path:
    """A folder of runs with one tiny model in it, of each kind in turn. Tests leave it as it is."""
    out_dir = tmp_path_factory.mktemp("out")
    result = tiny_run(data_dir, out_dir / "tiny", *KINDS[request.param])
    assert result.returncode == 0, result.stderr
    return out_dir


def run(*command, cwd=ROOT, processes=1, **environment):
    """Run a script as a user would and return the finished process, its output as text."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launcher, *map(str, command)],
        cwd=cwd,
        env=os.environ | ONE_THREAD | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


def run_inside(main, settings_class, arguments: list[str], positional=""):
    """Run a script's `main` in this process, which saves the seconds of importing torch."""
    result = subprocess.CompletedProcess(arguments, 0)
    with contextlib.ExitStack() as stack:
        stdout = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stderr = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            with config.exit_on_failure():
                main(config.load(settings_class, arguments, positional))
        except SystemExit as exit_:
            result.returncode = exit_.code
    result.stdout, result.stderr = stdout.getvalue(), stderr.getvalue()
    return result


def tiny_arguments(data_dir: Path, out_dir: Path) -> list[str]:
    """What train.py needs to train a tiny model on `tiny` for a few steps."""
    shape = "--n_layer=2 --n_head=2 --n_embd=16 --block_size=32 --batch_tokens=256"
    steps = "--max_steps=12 --warmup_steps=2 --learning_rate=1e-2 --min_lr=1e-3"
    intervals = "--eval_interval=4 --eval_tokens=1000 --checkpoint_interval=4 --log_interval=1"
    device = "--micro_batch_size=2 --device=cpu --dtype=float32"
    folders = [f"--data_dir={data_dir}", "--dataset=tiny", f"--out_dir={out_dir}"]
    return [*f"{shape} {steps} {intervals} {device}".split(), *folders]


def tiny_run(data_dir: Path, out_dir: Path, *options, processes=1):
    """Train a tiny model on `tiny`, in this process or with torchrun."""
    arguments = [*tiny_arguments(data_dir, out_dir), *options]
    if processes > 1:
        return run("train.py", *arguments, processes=processes)
    return run_inside(train.main, train.TrainConfig, arguments)


def metrics(out_dir: Path, *keys) -> list[tuple]:
    """The values of `keys` in each complete line of metrics.jsonl that has them all."""
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [tuple(record[key] for key in keys) for record in records if {*keys} <= record.keys()]
