"""Settings: what a recipe may hold, which value wins, and how a mistake ends a program."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.distributed.run
from conftest import ROOT, refused, run_inside, write

import config
import evaluate
import prepare_data
import sample
import train

RECIPES = sorted((ROOT / "config").glob("[!_]*.py"))
SCRIPTS = {  # module, settings, positional
    "train": (train, train.TrainConfig, ""),
    "sample": (sample, sample.SampleConfig, ""),
    "evaluate": (evaluate, evaluate.EvaluateConfig, ""),
    "prepare_data": (prepare_data, prepare_data.PrepareConfig, "name"),
}


def start(script: str, *arguments):
    module, settings, positional = SCRIPTS[script]
    return run_inside(module.main, settings, arguments, positional)


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


def test_the_later_value_wins(tmp_path):
    text = '\ufeff"""Doc."""\nsteps = 8 * 1024  # a comment\nrate = 1\nname = "first"\n'
    first = str(write(tmp_path / "first.py", text))
    second = str(write(tmp_path / "second.py", 'name = "second"\nrate = -3e-4 / 2 + 0\n'))
    for arguments, wanted in (
        ([], Toy()),
        (["--name=typed", first, second], Toy(8192, -1.5e-4, False, "typed")),
        ([second, first, "--loud=True"], Toy(8192, 1.0, True, "first")),
        (["--steps=2*3-1", "--loud=true", "--name=a=b c"], Toy(5, 0.5, True, "a=b c")),
        (["--rate=7//2"], Toy(rate=3.0)),
        (["--steps=+2**10", "--rate=+1e-3"], Toy(1024, 1e-3)),
    ):
        assert config.load(Toy, arguments) == wanted
    assert config.load(Toy, ["--steps=3", "x"], positional="name") == Toy(3, name="x")


def error_of(arguments: list[str], positional="") -> str:
    with pytest.raises(config.Failure) as failure:
        config.load(Toy, arguments, positional)
    return str(failure.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("name = '\\ud800'", "recipe.py:1: name is '\\ud800'; no file name"),
        ("name = '\\0'", "recipe.py:1: name is '\\x00'; no file name"),
        ("import os", "recipe.py:1: a recipe holds only lines of the form name = value"),
        ("steps = 3\nsteps += 1", "recipe.py:2: a recipe holds only"),
        ("steps, rate = 3", "recipe.py:1: a recipe holds only"),
        ("steps = __import__('os').getpid()", "recipe.py:1: a value is a number"),
        ("steps = 'a' * 3", "recipe.py:1: a value is a number"),
        ("steps = 1 / 0", "recipe.py:1: division by zero"),
        ("steps = 9**9**9", "recipe.py:1: 9 ** 387420489 is too large"),
        ("steps = -'a'", "recipe.py:1: bad operand"),
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
def test_a_bad_recipe_is_refused_at_its_line(tmp_path, text, message):
    assert message in error_of([str(write(tmp_path / "recipe.py", text))])


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_recipe_is_a_file(tmp_path, make):
    make(tmp_path / "recipe.py")
    refused("recipe.py is not a file", config.load, Toy, [str(tmp_path / "recipe.py")])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--rat=1", "there is no setting rat; did you mean rate?"),
        ("--zzzz=1", "there is no setting zzzz"),
        ("--steps=many", "steps is a whole number, not 'many'"),
        ("--rate=nan", "rate is a finite number, not 'nan'"),
        ("--loud=yes", "loud is True or False, not 'yes'"),
        ("--steps", "a setting is --name=value"),
        ("steps=3", "a recipe is a file"),
        ("one two", "two: a recipe is a file"),
        ("one --name two", "--name: a recipe is a file like config/small.py, a setting is --name="),
    ],
)
def test_a_bad_argument_is_refused(arguments, message):
    error = error_of(arguments.split(), "name" if arguments.startswith("one") else "")
    assert message in error and ("mean" in error) == ("mean" in message)


def test_a_mistyped_recipe_is_answered_with_those_that_exist():
    names = ", ".join(path.name for path in RECIPES)
    assert error_of(["x/smal.py"]) == f"x/smal.py: there is no such recipe; config/ has {names}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_paths_are_expanded_and_not_empty(script, monkeypatch):
    monkeypatch.setenv("HOME", "/me")
    settings = SCRIPTS[script][1]
    for name in config.PATHS.split() & settings.__dataclass_fields__.keys():
        assert config.convert(settings, name, "~/a b") == "/me/a b"
        if getattr(settings, name):  # else "" is off
            with pytest.raises(ValueError, match=f"{name} is empty"):
                config.convert(settings, name, "", from_text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_setting(script):
    result = start(script, "--help")
    lines = [line for line in result.stdout.splitlines() if line.startswith("  --")]
    names = [line.split("=")[0].removeprefix("  --") for line in lines]
    assert result.returncode == 0 and names == list(SCRIPTS[script][1].__dataclass_fields__)
    for line in lines:
        name, comment = line.split("  ", 2)[1:]
        assert comment.strip(), f"{name} has no comment"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_is(path):
    settings = config.load(train.TrainConfig, [str(path)])
    assert settings.out_dir == f"out/{path.stem}"
    docstring = path.read_text(encoding="utf-8").split('"""')[1]
    assert f"train.py config/{path.name}" in docstring


BAD_SETTINGS = [
    ("train --n_head=5", "n_embd 768 must be a multiple of n_head 5"),
    ("train --batch_tokens=1000", "the nearest is 1024"),
    ("train --micro_batch_size=3", "must be a multiple of 3072"),
    ("train --seed=9223372036854775808", "below 9223372036854775808"),
    ("train --learning_rate=-1", "learning_rate is -1.0"),
    ("train --min_lr=1", "min_lr 1.0 exceeds learning_rate 0.0006"),
    ("train --warmup_steps=99999", "exceed max_steps 19073"),
    ("train --decay_steps=19000", "warmup_steps 700 + decay_steps 19000 exceed max_steps"),
    ("train --beta2=1.0", "beta2 is 1.0 and must be at least 0 and below 1"),
    ("train --device=gpu", "device is 'gpu' and must be one of auto, cpu, cuda, mps"),
    ("train --optimizer=sgd", "optimizer is 'sgd' and must be one of adamw, muon"),
    ("train --init_from=gpt2 --n_layer=2", "n_layer has no effect: gpt2 has its own shape"),
    ("train --init_from=gpt2 --embedding_std=1.0", "embedding_std has no effect: gpt2 has its own"),
    ("sample --temperature=-1", "temperature is -1.0 and must be at least 0"),
    ("sample --top_p=1.1", "top_p is 1.1, min_p 0.0: both must be at most 1"),
    ("sample --min_p=-0.1", "min_p is -0.1 and must be at least 0"),
    ("sample --repetition_penalty=0", "repetition_penalty is 0.0 and must be at least 1e-09"),
    ("sample --interactive=True --prompt=x", "prompt and interactive exclude"),
    ("sample --prompt=x --export_hf=y", "prompt and export_hf exclude"),
    ("sample --prompt=x --prompts=y", "name one of them"),
    ("evaluate", "name a text"),
    ("evaluate --text=x --stride=-1", "stride is -1"),
    ("prepare_data ../up", "give the dataset a plain name"),
    ("prepare_data m\udce9", "give the dataset a plain name"),  # not text, as a manifest is
    ("prepare_data a:b --source=x", "give the dataset a plain name"),  # else a mixture of train.py
    ("prepare_data mine", "mine is not one of stdlib"),
    ("prepare_data stdlib --source=.", "a named dataset; give your own text another name"),
    ("prepare_data mine --source=x --merge=a", "source x and merge a: give one of the two"),
    ("prepare_data mine --source=- --decontaminate=-", "cannot both be standard input"),
    ("prepare_data fineweb-10b-gpt2 --tokenizer=gpt2", "tokenizer has no effect"),
    (
        "prepare_data stdlib --val_fraction=1",
        "val_fraction is 1.0 and must be at least 0 and below 1",
    ),
    ("prepare_data stdlib --near_threshold=0", "near_threshold 0.0 must be above 0"),
    ("prepare_data stdlib --shard_tokens=2147483648", "at least 1 and below 2147483648"),
    ("prepare_data stdlib --web_off=sentences,typo", "web_off: typo is not one of word_count"),
    ("prepare_data stdlib --tokenizer=typo", "tokenizer 'typo' is none of"),
]


@pytest.mark.parametrize("command, message", BAD_SETTINGS)
def test_bad_settings_are_refused_before_a_folder_is_made(tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    result = start(*command.split())
    assert result.returncode == 2 and message in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank, message", [(0, "rate is a"), (1, ", rank 1: rate is a")])
def test_an_error_of_all_ranks_is_printed_by_the_first(rank, message, monkeypatch, capsys):
    """The others wait, in which time torchrun ends them if rank 0 has ended."""
    slept = []
    monkeypatch.setattr(config.time, "sleep", slept.append)
    monkeypatch.setattr(config, "RANK", rank)
    with pytest.raises(SystemExit, match="2"), config.exit_on_failure():
        config.load(Toy, ["--rate=x"])
    assert message in capsys.readouterr().err and slept == [10 * rank]


SYSTEM_ERRORS = [(OSError("disk"), 6), (KeyboardInterrupt(), 130), (MemoryError(), 2)]
SYSTEM_ERRORS += [(torch.OutOfMemoryError("CUDA out of memory"), 2)]
SYSTEM_ERRORS += [(RuntimeError("MPS backend out of memory"), 2), (None, 2)]  # None: on a CPU


@pytest.mark.parametrize("error, code", SYSTEM_ERRORS)
def test_errors_of_the_system_have_their_exit_code(error, code, capsys):
    with pytest.raises(SystemExit) as exit_, config.exit_on_failure("lower --x"):
        raise error or torch.empty(1 << 50)
    printed = capsys.readouterr().err
    assert exit_.value.code == code and printed.count("\n") == 1
    assert printed.endswith("memory is full; lower --x\n") == (code == 2)


SCRIPT = """
import config, dataclasses, sys
@dataclasses.dataclass
class Toy:
    def check(self):
        print(sys.stdin.readline(), chr(0x4E2D), chr(0xD800), flush=True)
        raise ValueError(chr(0x4E2D))
config.run(print, Toy, "")
"""


@pytest.mark.parametrize("closed", ["", "<&- >&- 2>&-"])
def test_any_text_is_printed_in_any_encoding_and_to_closed_streams(closed):
    """Also text that was typed and is none in the encoding."""
    command = f"PYTHONIOENCODING=cp1252 {sys.executable} -c '{SCRIPT}' {closed}"
    result = subprocess.run(command, input=b"\x81\n", capture_output=True, cwd=ROOT, shell=True)
    printed = result.returncode, result.stdout.decode(), result.stderr.decode()
    lines = ("", "") if closed else ("\\x81\n \u4e2d \\ud800\n", "-c: \u4e2d\n")
    assert printed == (2, *lines)
    assert all("config.run(main" in (ROOT / f"{name}.py").read_text("utf-8") for name in SCRIPTS)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_one_line_that_a_short_task_does_not_print(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    now = [0.0]
    monkeypatch.setattr(config.time, "monotonic", lambda: now[0])
    with config.Progress("bytes", 100) as progress:
        for now[0], done in ((1, 10), (4, 20), (4.1, 30)):
            progress.update(done)
    printed = capsys.readouterr().err
    assert printed.count("20 of 100 bytes, 16 s left") == printed.count("left") == 1
    assert printed.count("\n") == (not is_terminal)


def test_torchrun_takes_no_setting_for_a_short_form_of_its_own_options():
    parser = torch.distributed.run.get_args_parser()
    for name in train.TrainConfig.__dataclass_fields__:
        assert parser.parse_args(["train.py", f"--{name}=1"]).training_script_args == [
            f"--{name}=1"
        ]
