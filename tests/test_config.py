"""Settings: what a recipe may hold, what wins, and what a mistake costs."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

import config
from train import Ranks, TrainConfig

RECIPES = sorted((ROOT / "config").glob("[!_]*.py"))


@dataclass
class Toy:
    """A toy."""

    steps: int = 5  # how many
    rate: float = 0.5  # how fast
    loud: bool = False  # whether it shouts
    name: str = ""  # what it is called

    def check(self):
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} must be at least 1")


def recipe(folder: Path, text: str, name: str = "recipe.py") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_the_later_wins(tmp_path):
    first = recipe(tmp_path, '"""Doc."""\nsteps = 8 * 1024  # a comment\nrate = 1\nname = "first"\n', "first.py")
    second = recipe(tmp_path, 'name = "second"\nrate = -3e-4 / 2\n', "second.py")
    assert config.load(Toy, []) == Toy()
    assert config.load(Toy, ["--name=typed", first, second]) == Toy(8192, -1.5e-4, False, "typed")
    assert config.load(Toy, [second, first, "--loud=True"]) == Toy(8192, 1.0, True, "first")
    assert config.load(Toy, ["--steps=2*3", "--loud=true", "--name=a=b c"]) == Toy(6, 0.5, True, "a=b c")


@pytest.mark.parametrize(
    "text, message",
    [
        ("import os", "recipe.py:1: a recipe holds only lines of the form name = value"),
        ("steps = 3\nsteps += 1", "recipe.py:2: a recipe holds only"),
        ("if True:\n    steps = 3", "recipe.py:1: a recipe holds only"),
        ("steps = __import__('os').getpid()", "recipe.py:1: a value is a number"),
        ("steps = [1]", "recipe.py:1: a value is a number"),
        ("steps = 'a' * 3", "recipe.py:1: a value is a number"),
        ("steps = 1 / 0", "recipe.py:1: division by zero"),
        ("steps = 10 ** 10", "recipe.py:1: a value is a number"),
        ("steps = 1.5", "recipe.py:1: steps is a whole number, not 1.5"),
        ("steps = True", "recipe.py:1: steps is a whole number, not True"),
        ("loud = 1", "recipe.py:1: loud is True or False, not 1"),
        ("rate = 1e999", "recipe.py:1: rate is a finite number, not inf"),
        ("name = 3", "recipe.py:1: name is a string in quotes, not 3"),
        ("\n\nstep = 3", "recipe.py:3: there is no setting step; did you mean steps?"),
        ("steps = = 3", "recipe.py:1: "),
        ("steps = 0", "steps 0 must be at least 1"),
    ],
)
def test_a_bad_recipe_is_refused(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit) as exit_:
        config.load(Toy, [recipe(tmp_path, text)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--rat=1", "there is no setting rat; did you mean rate?"),
        ("--steps=many", "steps is a whole number, not 'many'"),
        ("--rate=nan", "rate is a finite number, not 'nan'"),
        ("--loud=yes", "loud is True or False, not 'yes'"),
        ("--steps", "write --name=value"),
        ("-steps=3", "write --name=value"),
        ("steps=3", "a recipe is a file"),
        ("config/smal.py", "there is no such recipe; did you mean config/small.py?"),
    ],
)
def test_a_bad_argument_is_refused(capsys, argument, message):
    with pytest.raises(SystemExit) as exit_:
        config.load(Toy, [argument])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help_tells_every_setting(capsys):
    with pytest.raises(SystemExit) as exit_:
        config.load(Toy, ["--help"], positional="name")
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    for text in ("A toy.", "[recipe.py ...]", "--steps=5", "how many", "--name=''", "what it is called"):
        assert text in printed


@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare_data.py"])
def test_help_of_the_scripts_explains_every_setting(script):
    printed = run(script, "--help").stdout
    settings = [line for line in printed.splitlines() if line.startswith("  --")]
    assert len(settings) >= 7
    for line in settings:
        assert len(line.split(maxsplit=1)) == 2, f"no meaning: {line}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_tells_what_it_is(path):
    settings = config.load(TrainConfig, [str(path)])
    assert settings.out_dir == f"out/{path.stem}"
    docstring = path.read_text(encoding="utf-8").split('"""')[1]
    assert "python train.py" in docstring or "torchrun" in docstring
    assert f"config/{path.name}" in docstring


BAD_SETTINGS = [
    ("--n_head=5", "n_embd 768 must be a multiple of n_head 5"),
    ("--batch_tokens=1000", "the nearest is 1024"),
    ("--micro_batch_size=3", "must be a multiple of 3072"),
    ("--n_layer=0", "n_layer is 0 and must be at least 1"),
    ("--block_size=-1", "block_size is -1 and must be at least 1"),
    ("--log_interval=0", "log_interval is 0"),
    ("--dropout=1.0", "dropout is 1.0 and must be below 1"),
    ("--learning_rate=-1", "learning_rate is -1.0"),
    ("--min_lr=1", "min_lr 1.0 must not exceed learning_rate 0.0006"),
    ("--warmup_steps=99999", "warmup_steps 99999 must not exceed max_steps 19073"),
    ("--beta2=1.0", "beta2 is 1.0 and must be below 1"),
    ("--device=gpu", "device is 'gpu' and must be one of auto, cpu, cuda, mps"),
    ("--dtype=float16", "dtype is 'float16'"),
    ("--compile=True", "compile is 'True' and must be one of auto, on, off"),
    ("--seed=-1", "seed is -1"),
    ("--max_step=5", "did you mean max_steps?"),
    ("--arch=llama", "arch is 'llama' and must be one of gpt2, qwen3"),
    ("--optimizer=sgd", "optimizer is 'sgd' and must be one of adamw, muon"),
    ("--decay=step", "decay is 'step' and must be one of cosine, linear"),
    ("--decay_steps=19000", "warmup_steps 700 and decay_steps 19000 are together more than max_steps 19073"),
    ("--muon_momentum=1.0", "muon_momentum is 1.0 and must be below 1"),
    ("--muon_learning_rate=-1", "muon_learning_rate is -1.0"),
    ("--n_kv_head=4", "n_kv_head, head_size, intermediate_size and tie_embeddings can be chosen for qwen3 only"),
    ("--tie_embeddings=False", "can be chosen for qwen3 only"),
    ("--arch=qwen3 --n_kv_head=5", "n_head 12 must be a multiple of n_kv_head 5"),
    ("--arch=qwen3 --head_size=63", "head_size 63 must be even"),
    ("--arch=qwen3 --rope_theta=0", "rope_theta is 0.0 and must be at least 1"),
]


@pytest.mark.parametrize("option, message", BAD_SETTINGS)
def test_train_refuses_bad_settings_before_torch_and_before_any_folder(tmp_path, option, message):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")  # stands before the real one
    result = run(ROOT / "train.py", *option.split(), cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr and "torch" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["torch.py"]


@pytest.mark.parametrize(
    "script, option, message",
    [
        ("sample.py", "--temperature=-1", "temperature is -1.0"),
        ("sample.py", "--top_p=0", "top_p is 0.0"),
        ("sample.py", "--num_samples=0", "num_samples is 0"),
        ("prepare_data.py", "--val_fraction=1", "val_fraction 1.0 must lie between 0 and 1"),
        ("prepare_data.py", "--tokenizer=gpt5", "'gpt5' is none of gpt2, bytes, bpe:N"),
        ("prepare_data.py", "--tokenizer=bpe:12", "from 257"),
        ("prepare_data.py", "--name=mine", "add --source=PATH"),
        ("prepare_data.py", "--name=../x", "plain name"),
        ("prepare_data.py", "--source=.", "names a dataset of its own"),
    ],
)
def test_the_other_scripts_refuse_bad_settings(tmp_path, script, option, message):
    name = [] if "--name" in option or script == "sample.py" else ["stdlib"]
    result = run(ROOT / script, *name, option, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank, said, waits", [("0", True, []), ("1", False, [10])])
@pytest.mark.parametrize("whose", ["an error of all", "an error of the first alone"])
def test_the_first_rank_speaks_before_another_ends(whose, rank, said, waits, monkeypatch, capsys):
    def fail():
        raise config.Failure("n_layer is 0")

    waited = []
    monkeypatch.setattr(config.time, "sleep", waited.append)
    monkeypatch.setattr(Ranks, "any", lambda ranks, flag: True)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended, config.exit_codes():
        if whose == "an error of all":
            config.load(TrainConfig, ["--n_layer=0"])
        else:
            Ranks(int(rank), 2, torch.device("cpu")).first_alone(fail)
    assert ended.value.code == 2 and ("n_layer" in capsys.readouterr().err) == said and waited == waits
