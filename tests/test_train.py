"""Training: the optimizer and its schedule, exact resume, and what a run leaves behind."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from types import ModuleType, SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import (
    FIXTURES,
    KINDS,
    UNTIED,
    full_disk,
    make_model,
    metrics,
    refused,
    tiny_run,
    write_texts,
)

import checkpoint
import files
import hardware
import hf
import log
import prepare_data
import ranks
import train
from config import IN_USE, INPUT_OUTPUT, NO_CHECKPOINT, NOT_FINITE
from dataset import Dataset
from model import GPT, GPTConfig
from ranks import Ranks
from tokenizer_files import load_tokenizer, save_hf_tokenizer
from train import TrainConfig

ALONE = Ranks(0, 1, torch.device("cpu"))
RESUME = "--init_from=resume"
FINE_TUNE = ["--n_layer=12", "--n_head=12", "--n_embd=768"]  # the defaults, so none is chosen
FIXED = [*FINE_TUNE, "--warmup_steps=0", "--learning_rate=0", "--min_lr=0"]  # nothing is learned
shapes = pytest.mark.parametrize("shape", [{}, UNTIED], ids=["gpt2", "qwen3"])


def weights(out_dir, name="latest.pt") -> dict:
    return checkpoint.load(out_dir / name)["model"]


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The folder and the output of an uninterrupted run. Tests leave it as it is."""
    out_dir = tmp_path_factory.mktemp("finished") / "run"
    result = tiny_run(data_dir, out_dir, "--sample_prompt=Chapter")
    assert result.returncode == 0, result.stderr
    return out_dir, result.stdout


def test_the_learning_rate_warms_up_and_decays():
    settings = TrainConfig(learning_rate=2.0, min_lr=0.2, warmup_steps=10, max_steps=110)
    shares = [train.schedule(step, settings) for step in range(111)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert [shares[n] for n in (10, 35, 60, 110)] == pytest.approx([1.0, quarter, 0.55, 0.1])
    for decay, wanted in (("linear", 0.775), ("cosine", quarter)):
        late = replace(settings, decay=decay, decay_steps=40)
        shares = [train.schedule(step, late) for step in range(111)]
        assert shares[9:71] == [1.0] * 62
        assert (shares[80], shares[110]) == pytest.approx((wanted, 0.1))
        longer = replace(late, max_steps=1110)  # so a run can continue from its plateau
        assert [train.schedule(step, longer) for step in range(71)] == shares[:71]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_kind_of_parameter_has_its_learning_rate(kind):
    """And a place in AdamW that does not depend on settings, as they may change on resume."""
    model, places = make_model(**UNTIED), []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for own, decay in (((0.0, 0.0, 0.0), 0.1), ((6.0, 8.0, 4.0), 0.1), ((6.0, 8.0, 8.0), 0.0)):
        rates = (f"{name}_learning_rate" for name in ("muon", "embedding", "head"))
        rates = dict(zip(rates, own), learning_rate=2.0, warmup_steps=4, weight_decay=decay)
        settings = TrainConfig(optimizer=kind, **rates)
        optimizers = train.make_optimizers(model, settings)
        train.set_learning_rates(train.Run(settings, ALONE, None, None, None, optimizers), 1)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        places.append([id(p) for group in optimizers[0].param_groups for p in group["params"]])
        found = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
        muon, embedding, head = ((rate or 2.0) / 2 for rate in own)  # half-way in the warm-up
        assert (found["wte.weight"], found["lm_head.weight"]) == (embedding, head)
        assert found["ln_f.weight"] == found["h.0.attn.q_norm.weight"] == 1.0
        assert found["h.0.mlp.c_fc.weight"] == (muon if kind == "muon" else 1.0)
    assert places[0] == places[1] == places[2]


@shapes
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_weight_has_one_optimizer_and_matrices_decay(shape, kind):
    model = make_model(**shape)
    settings = TrainConfig(optimizer=kind, weight_decay=0.3, beta1=0.8, beta2=0.9)
    optimizers = train.make_optimizers(model, settings)
    assert optimizers[0].defaults["betas"] == (0.8, 0.9)
    found = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            treatment = (type(optimizer).__name__, group["weight_decay"])
            found += [(id(parameter), treatment) for parameter in group["params"]]
    wanted = []
    for name, parameter in model.named_parameters():
        is_muon = kind == "muon" and name.startswith("h.") and parameter.dim() == 2
        treatment = ("Muon" if is_muon else "AdamW", 0.3 if parameter.dim() == 2 else 0.0)
        wanted.append((id(parameter), treatment))
    assert sorted(found) == sorted(wanted)


def test_a_step_is_that_of_the_plain_optimizer(data_dir, tmp_path):
    """One step of the loop, with accumulation and clipping, against the textbook."""
    options = ["--max_steps=1", "--warmup_steps=0", "--grad_clip=0.5", "--beta2=0.9"]
    assert tiny_run(data_dir, tmp_path / "run", *options).returncode == 0
    state = checkpoint.load(tmp_path / "run" / "latest.pt")
    model = GPT(GPTConfig(**state["model_config"]))
    model.init_weights(1337)
    rows = torch.from_numpy(Dataset(data_dir / "tiny", 32).batch(1337, 0, 8))
    loss = model(rows[:, :-1], rows[:, 1:]).mean()
    loss.backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters())).item()
    assert metrics(tmp_path / "run", "loss", "grad_norm") == [pytest.approx((loss.item(), norm))]
    for name, parameter in model.named_parameters():
        gradient = parameter.grad * min(1, 0.5 / norm)
        decayed = parameter.detach() * (1 - 1e-2 * (0.1 if parameter.dim() == 2 else 0))
        wanted = decayed - 1e-2 * gradient / (gradient.abs() + 1e-8)
        is_close = (state["model"][name] - wanted).abs() < 1e-5
        assert is_close[gradient.abs() > 1e-6].all(), name


def test_a_run_learns_and_leaves_what_it_promises(finished, data_dir):
    out_dir, printed = finished
    assert {path.name for path in out_dir.iterdir()} >= {"latest.pt", "metrics.jsonl", "lock"}
    steps, losses = zip(*metrics(out_dir, "step", "loss"))
    assert list(steps) == list(range(1, 13))
    assert losses[0] == pytest.approx(math.log(257), abs=0.1) and losses[-1] < losses[0] - 0.5
    steps, val_losses, bits = zip(*metrics(out_dir, "step", "val_loss", "bits_per_byte"))
    assert steps == (4, 8, 12)
    best = checkpoint.load(out_dir / "best.pt")
    assert best["val_loss"] == min(val_losses) and "optimizers" not in best
    split = Dataset(data_dir / "tiny", 32).manifest["splits"]["val"]
    bits_per_token = val_losses[-1] / math.log(2)
    assert bits[-1] == pytest.approx(bits_per_token * split["tokens"] / split["bytes"])
    loss = f"loss {val_losses[-1]:.4f} nats per token, perplexity {math.exp(val_losses[-1]):.2f}"
    score = f"{bits[-1]:.3f} bits per byte of validation text; lzma -9 needs"
    command = f"python sample.py --checkpoint={out_dir / 'latest.pt'}"
    assert loss in printed and score in printed and command in printed
    assert "Chapter" in printed.split(command)[1]


def test_validation_is_the_mean_over_its_windows(finished, data_dir):
    state = checkpoint.load(finished[0] / "latest.pt")
    model = checkpoint.restore_model(state).eval()
    windows = Dataset(data_dir / "tiny", 32).val
    count = 1000 // 32  # of eval_tokens; odd, so that the last batch of two is not full
    indices = np.linspace(0, len(windows) - 1, count).round().astype(int)
    rows = torch.from_numpy(windows[indices])
    wanted = model(rows[:, :-1], rows[:, 1:]).mean().item()
    assert state["val_loss"] == pytest.approx(wanted, abs=1e-5) and count % 2


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_and_activation_checkpointing(data_dir, tmp_path, kind):
    """Dropout depends on the seed and the step alone, so checkpointing changes nothing."""
    found = []
    name = "activation_checkpointing"
    for option in ("seed=1337", f"{name}=selective", f"{name}=full", "dropout=0"):
        options = [*KINDS[kind], "--dropout=0.2", f"--{option}"]
        assert tiny_run(data_dir, tmp_path / option, *options).returncode == 0
        found.append(weights(tmp_path / option))
    assert same(found[0], found[1]) and same(found[0], found[2]) and not same(found[0], found[3])
    result = tiny_run(data_dir, tmp_path / "other", f"--{name}=True")
    assert "must be one of off, selective, full" in result.stderr


def test_micro_batch_and_dtype_change_only_rounding(finished, data_dir, tmp_path):
    for option, message, close in (
        ("--micro_batch_size=8", "8 sequences of 32 x 1 micro-steps", 1e-4),
        ("--micro_batch_size=0", "8 sequences of 32 x 1 micro-steps", 1e-4),  # found by the program
        ("--dtype=bfloat16", "in bfloat16", 0.05),
        ("--dtype=float16", "in float16", 0.01),
    ):
        result = tiny_run(data_dir, tmp_path / option, option, "--sample_prompt=Chapter")
        assert result.returncode == 0 and message in result.stdout
        assert "Chapter" in result.stdout.split("sample.py")[1]
        losses = [metrics(folder, "loss") for folder in (finished[0], tmp_path / option)]
        assert losses[0] != losses[1] and np.allclose(*losses, atol=close)


def test_shards_made_elsewhere_train_with_a_named_tokenizer(finished, data_dir, tmp_path):
    without = shutil.ignore_patterns("*.json", "*.tiktoken")
    shutil.copytree(data_dir / "tiny", tmp_path / "shards", ignore=without)
    result = tiny_run(tmp_path, tmp_path / "foreign", "--dataset=shards", "--tokenizer=bytes")
    assert result.returncode == 0, result.stderr
    assert same(weights(finished[0]), weights(tmp_path / "foreign"))
    assert not metrics(tmp_path / "foreign", "bits_per_byte")


def send_when(monkeypatch, name: str, step: int, *signals):
    """Have this process get signals when train.py's function `name` begins at `step`."""
    function = getattr(train, name)

    def with_signals(run, *arguments):
        for number in signals if run.step == step else ():
            os.kill(os.getpid(), number)
        return function(run, *arguments)

    monkeypatch.setattr(train, name, with_signals)


STOPS = [("gpt2", "validate", signal.SIGTERM, 8, 4), ("qwen3", "log_step", signal.SIGINT, 6, 4)]
STOPS.append(("gpt2", "validate", signal.SIGUSR1, 12, 8))  # in the last validation


@pytest.mark.parametrize("kind, name, number, step, val_step", STOPS)
def test_a_stop_saves(data_dir, tmp_path, monkeypatch, kind, name, number, step, val_step):
    """Also during a validation, which the resumed run makes up for. Resuming is exact."""
    options = [*KINDS[kind], "--dropout=0.2", "--checkpoint_interval=100"]
    assert tiny_run(data_dir, tmp_path / "whole", *options).returncode == 0
    with monkeypatch.context() as patch:
        send_when(patch, name, step, number)
        result = tiny_run(data_dir, tmp_path / "parts", *options)
    assert result.returncode == 0, result.stderr
    assert f"stopped at step {step}; to continue:" in result.stdout
    state = checkpoint.load(tmp_path / "parts" / "latest.pt")
    assert (state["step"], state["val_step"]) == (step, val_step)
    assert metrics(tmp_path / "parts", "step", "val_loss")[-1] == (val_step, state["val_loss"])
    shutil.copytree(tmp_path / "parts", tmp_path / "ended")
    assert tiny_run(data_dir, tmp_path / "parts", *options, RESUME).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    ended = [*options, RESUME, f"--max_steps={step}"]  # where it was stopped: it is validated there
    assert tiny_run(data_dir, tmp_path / "ended", *ended).returncode == 0
    assert checkpoint.load(tmp_path / "ended" / "latest.pt")["val_step"] == step


def assert_same_run(*folders, steps=range(1, 100)):
    """Assert that runs have the same weights, optimizers and metrics at some steps."""
    for name in ("latest.pt", "best.pt"):
        left, right = (checkpoint.load(folder / name) for folder in folders)
        assert same(left["model"], right["model"]) and left["step"] == right["step"]
        moments = [[o["state"] for o in s.get("optimizers", [])] for s in (left, right)]
        assert checkpoint.checksum(moments[0]) == checkpoint.checksum(moments[1])
    for keys in (("step", "loss", "grad_norm", "learning_rate"), ("step", "val_loss")):
        lines = [[line for line in metrics(f, *keys) if line[0] in steps] for f in folders]
        assert lines[0] == lines[1]


def test_a_mixture_validates_each_dataset_and_resumes_exactly(data_dir, tmp_path, monkeypatch):
    source = write_texts(
        tmp_path / "x.jsonl", [f"{n} and {n} are {2 * n}. " * 60 for n in range(40)]
    )
    settings = dict(name="other", source=str(source), tokenizer="bytes", data_dir=str(tmp_path))
    prepare_data.prepare(prepare_data.PrepareConfig(**settings, processes=1))
    mixture = f"--dataset={data_dir / 'tiny'}:3,{tmp_path / 'other'}:1"
    result = tiny_run(data_dir, tmp_path / "whole", mixture)
    assert result.returncode == 0, result.stderr
    assert "training tokens of tiny (0.0" in result.stdout and "of other (0.0" in result.stdout
    names = ("val_loss", "val_loss_tiny", "val_loss_other", "bits_per_byte")
    for mean, tiny, other, bits in metrics(tmp_path / "whole", *names):
        assert mean == pytest.approx(0.75 * tiny + 0.25 * other) and tiny != other
        assert bits == pytest.approx(mean / math.log(2), rel=0.01)  # but for the end-of-texts
        assert f"val_loss_other {other:.4f}" in result.stdout
    with monkeypatch.context() as patch:
        send_when(patch, "validate", 8, signal.SIGTERM)
        assert tiny_run(data_dir, tmp_path / "parts", mixture).returncode == 0
    other_weights = tiny_run(data_dir, tmp_path / "parts", mixture.replace(":3", ":2"), RESUME)
    assert other_weights.returncode == 2 and "weights or files of dataset" in other_weights.stderr
    assert tiny_run(data_dir, tmp_path / "parts", mixture, RESUME).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_only_a_later_interrupt_ends_at_once(data_dir, tmp_path, monkeypatch):
    send_when(monkeypatch, "log_step", 6, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    send_when(monkeypatch, "log_step", 6, signal.SIGINT)
    result = tiny_run(data_dir, tmp_path / "run")
    assert result.returncode == 0 and "stopped at step 6" in result.stdout
    times, log_step = iter([10.0, 13.0]), train.log_step
    monkeypatch.setattr(ranks, "time", SimpleNamespace(monotonic=times.__next__))

    def wait(run, *rest):  # for the checkpoint of step 4
        run.writer.finish()
        return log_step(run, *rest)

    monkeypatch.setattr(train, "log_step", wait)
    result = tiny_run(data_dir, tmp_path / "other")
    assert result.returncode == 130 and result.stderr.endswith("interrupted\n")
    assert checkpoint.load(tmp_path / "other" / "latest.pt")["step"] == 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def break_at(monkeypatch, step: int, place: str):
    """Make the loss, or only one gradient, not finite in the second micro-step of a step."""
    forward, calls = GPT.forward, iter(range(10**9))

    def broken(model, tokens, targets):
        losses, is_now = forward(model, tokens, targets), model.training
        if not is_now or next(calls) != 4 * step + 1:
            return losses
        if place == "loss":
            return losses * math.inf

        def once(gradient):
            hook.remove()
            return gradient * math.nan

        hook = model.ln_f.weight.register_hook(once)
        return losses

    monkeypatch.setattr(GPT, "forward", broken)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(data_dir, tmp_path, monkeypatch, kind, place):
    """Found three steps later, the state before it is saved, from which the run can continue."""
    options = [*KINDS[kind], "--dropout=0.2", "--eval_interval=8", "--log_interval=4"]
    assert tiny_run(data_dir, tmp_path / "whole", *options).returncode == 0
    with monkeypatch.context() as patch:
        break_at(patch, 5, place)
        result = tiny_run(data_dir, tmp_path / "parts", *options, "--checkpoint_interval=100")
    what = "the loss of rank 0" if place == "loss" else "the gradient"
    assert f"step 6: {what} is not finite (windows at positions 40 to 47)" in result.stderr
    assert result.returncode == NOT_FINITE and result.stderr.count("\n") == 2
    assert checkpoint.load(tmp_path / "parts" / "latest.pt")["step"] == 5
    assert tiny_run(data_dir, tmp_path / "parts", *options, RESUME).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts", steps=[4, 8, 12])


def test_float16_ends_where_its_scale_cannot_help(data_dir, tmp_path, monkeypatch):
    step = train.update_weights

    def broken(run, loss):
        run.model.ln_f.weight.grad *= math.nan
        return step(run, loss)

    monkeypatch.setattr(train, "update_weights", broken)
    result = tiny_run(data_dir, tmp_path / "run", "--dtype=float16", "--max_steps=20")
    assert result.returncode == NOT_FINITE and "step 17: the gradient is not" in result.stderr


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_float16_skips_an_update_that_overflows(data_dir, tmp_path, monkeypatch, kind):
    """Then it continues with half the scale, which a resumed run keeps."""
    whole, parts, options = tmp_path / "whole", tmp_path / "parts", [*KINDS[kind]]
    options += ["--dtype=float16", "--checkpoint_interval=100"]
    for folder in (whole, parts):
        with monkeypatch.context() as patch:
            break_at(patch, 4, "gradient")
            if folder == parts:
                send_when(patch, "log_step", 6, signal.SIGTERM)
            result = tiny_run(data_dir, folder, *options)
        assert result.returncode == 0, result.stderr
    saved = checkpoint.load(parts / "latest.pt")
    assert saved["scaler"]["scale"] == 2**15  # of 2**16
    assert (saved["step"], saved["optimizers"][0]["state"][0]["step"]) == (6, 5)
    assert tiny_run(data_dir, parts, *options, RESUME).returncode == 0
    assert_same_run(whole, parts)


def test_a_damaged_checkpoint_is_set_aside(finished, data_dir, tmp_path):
    out_dir = shutil.copytree(finished[0], tmp_path / "run")
    flip_a_byte(out_dir / "latest.pt")
    damaged = (out_dir / "latest.pt").read_bytes()
    result = tiny_run(data_dir, out_dir, RESUME)
    assert result.returncode == 0 and "the run continues from step 8" in result.stderr
    assert_same_run(finished[0], out_dir)
    [aside] = out_dir.glob("latest.pt.damaged.*")
    assert aside.read_bytes() == damaged
    assert checkpoint.load(out_dir / "previous.pt")["step"] == 8
    for name in ("latest.pt", "previous.pt"):
        flip_a_byte(out_dir / name)
    before = {path: path.read_bytes() for path in out_dir.iterdir()}
    assert tiny_run(data_dir, out_dir, RESUME).returncode == NO_CHECKPOINT
    assert before == {path: path.read_bytes() for path in out_dir.iterdir()}


def test_one_command_line_starts_continues_and_finishes(finished, data_dir, tmp_path, monkeypatch):
    out_dir, auto = tmp_path / "run", "--init_from=auto"
    for step, saved in ((2, 2), (7, 7), (None, 12), (None, 12)):
        with monkeypatch.context() as patch:
            if step:
                send_when(patch, "log_step", step, signal.SIGTERM)
            assert tiny_run(data_dir, out_dir, auto).returncode == 0
        assert checkpoint.load(out_dir / "latest.pt")["step"] == saved
    assert_same_run(finished[0], out_dir)
    for path in out_dir.glob("[lp]*.pt"):  # as if it had been killed before its first latest.pt
        path.unlink()
    assert tiny_run(data_dir, out_dir, auto).returncode == 0
    assert_same_run(finished[0], out_dir)
    result = tiny_run(data_dir, out_dir, auto, "--overwrite=True")
    assert result.returncode == 2 and "choose one" in result.stderr


def test_what_is_not_needed_cannot_stop_training(finished, data_dir, tmp_path, monkeypatch):
    def save(path, *arguments, save=checkpoint.save):
        if path.name == "best.pt":
            raise OSError(f"{path}: no")
        save(path, *arguments)

    def fail(path):
        raise OSError(f"{path}: no")

    out_dir = tmp_path / "run"
    (out_dir / ".partial").mkdir(parents=True)
    for name in (".partial/of a killed run", "mine.txt"):
        (out_dir / name).touch()
    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(log, "naming", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    result = tiny_run(data_dir, out_dir)
    assert result.returncode == 0 and f"warning: {out_dir}/best.pt: no" in result.stdout
    assert "warning: a line of the log is lost" in result.stdout
    assert "three checkpoints need" in result.stdout.split("step      1")[0]
    assert same(weights(out_dir), weights(finished[0]))
    assert (out_dir / "mine.txt").exists() and not (out_dir / ".partial").exists()


class Wandb(ModuleType):
    """Stands in for wandb: keeps what it is sent, by run, until it fails."""

    def __init__(self, sent: dict, fails_at=math.inf):
        super().__init__("wandb")
        self.sent, self.fails_at = sent, fails_at

    def init(self, id, **options):
        lines = self.sent.setdefault(id, [])

        def log(values, step):
            if step >= self.fails_at:
                raise ConnectionError("gone")
            assert values["step"] == step
            lines.append(values)

        return SimpleNamespace(log=log, finish=lambda: None)


def test_wandb_gets_the_lines_of_the_log_and_cannot_stop_training(data_dir, tmp_path, monkeypatch):
    sent, out_dir = {}, tmp_path / "run"
    for fails_at, options in ((math.inf, ["--max_steps=6"]), (9, [RESUME])):
        monkeypatch.setitem(sys.modules, "wandb", Wandb(sent, fails_at))
        result = tiny_run(data_dir, out_dir, "--log_to=wandb", *options)
        assert result.returncode == 0, result.stderr
        assert ("ConnectionError('gone')" in result.stdout) == (fails_at == 9)
    [lines] = sent.values()  # one run, which continues
    assert lines == [line for line in log.read_metrics(out_dir) if line["step"] < 9]
    assert tiny_run(data_dir, out_dir, "--log_to=wandb", "--overwrite=True").returncode == 0
    assert len(sent) == 2
    monkeypatch.setattr(Wandb, "init", lambda *_, **__: 1 / 0)
    result = tiny_run(data_dir, tmp_path / "other", "--log_to=wandb")
    assert result.returncode == INPUT_OUTPUT and "log_to wandb: ZeroDivisionError" in result.stderr
    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
        result = tiny_run(data_dir, tmp_path / "none", f"--log_to={name}")
        assert result.returncode == 2 and f"pip install {name}" in result.stderr
        assert not (tmp_path / "none").exists()


def test_tensorboard_gets_the_lines_of_the_log(data_dir, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for options in (["--max_steps=6"], [RESUME]):
        assert tiny_run(data_dir, tmp_path, "--log_to=tensorboard", *options).returncode == 0
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for key in ("loss", "val_loss", "learning_rate"):
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [pytest.approx(line) for line in metrics(tmp_path, "step", key)]


@pytest.mark.parametrize("code", [INPUT_OUTPUT, 0], ids=["full disk", "| head -1"])
def test_no_standard_output_stops_training(data_dir, tmp_path, code):
    arguments = conftest.tiny_arguments(data_dir, tmp_path / "run")
    command = [sys.executable, conftest.ROOT / "train.py", *arguments]
    environment = os.environ | conftest.ONE_THREAD | {"PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        pipes = dict(stdout=full if code else subprocess.PIPE, stderr=subprocess.PIPE)
        process = subprocess.Popen(command, env=environment, **pipes)
    with process:
        if process.stdout:
            assert process.stdout.readline().startswith(b"model")
            process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == code and error.count(b"\n") == (code > 0)
    assert checkpoint.load(tmp_path / "run" / "latest.pt")["step"] == 12


def test_a_killed_run_continues_from_its_last_checkpoint(data_dir, tmp_path):
    intervals = "--max_steps=60 --checkpoint_interval=7 --eval_interval=20 --log_interval=5"
    options = [*KINDS["qwen3"], "--dropout=0.2", *intervals.split()]
    assert tiny_run(data_dir, tmp_path / "whole", *options).returncode == 0
    out_dir = tmp_path / "parts"
    arguments = [*conftest.tiny_arguments(data_dir, out_dir), *options]
    command = [sys.executable, conftest.ROOT / "train.py", *arguments]
    environment = os.environ | conftest.ONE_THREAD
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (out_dir / "best.pt").exists():
            time.sleep(0.002)
        process.kill()
    killed = checkpoint.load(out_dir / "latest.pt")["step"]
    assert process.returncode == -signal.SIGKILL and 14 <= killed < 60 and killed % 7 == 0
    assert tiny_run(data_dir, out_dir, *options, RESUME).returncode == 0
    assert_same_run(tmp_path / "whole", out_dir)


def test_a_finished_run_can_be_continued(data_dir, tmp_path):
    """To its end, which changes nothing, and further; from a plateau as if it had never stopped."""
    cooled = ["--decay=linear", "--decay_steps=4"]
    assert tiny_run(data_dir, tmp_path / "whole", *cooled).returncode == 0
    plateau = ["--max_steps=8", "--min_lr=1e-2"]
    assert tiny_run(data_dir, tmp_path / "run", *plateau).returncode == 0
    result = tiny_run(data_dir, tmp_path / "run", *plateau, RESUME)
    assert result.returncode == 0 and "validation loss" in result.stdout
    assert tiny_run(data_dir, tmp_path / "run", *cooled, RESUME).returncode == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert metrics(tmp_path / "whole", "step", "loss") == metrics(tmp_path / "run", "step", "loss")
    other = [*cooled, RESUME, "--eval_tokens=500", "--learning_rate=1", "--max_steps=16"]
    assert tiny_run(data_dir, tmp_path / "run", *other).returncode == 0
    assert checkpoint.load(tmp_path / "run" / "best.pt")["step"] == 12  # of another text, so anew


def test_what_was_found_automatically_stays_so(data_dir, tmp_path, monkeypatch):
    options = ["--dtype=auto", "--micro_batch_size=0", "--max_steps=4"]
    for dtype, size in (("bfloat16", 4), ("float32", 8)):
        monkeypatch.setattr(hardware, "best_dtype", lambda device, dtype=dtype: dtype)
        monkeypatch.setattr(hardware, "fitting_micro_batch_size", lambda *_, size=size: size)
        result = tiny_run(data_dir, tmp_path / "run", *options)
        assert "4 sequences of 32 x 2 micro-steps" in result.stdout and "bfloat16" in result.stdout
        options += [RESUME, "--max_steps=5"]
    monkeypatch.setattr(hardware, "fitting_micro_batch_size", lambda *_: 0)
    result = tiny_run(data_dir, tmp_path / "large", "--micro_batch_size=0")
    assert result.returncode == 2 and "not one sequence fits" in result.stderr


def test_resume_refuses_every_change_but_those_that_are_listed(finished, data_dir):
    saved, dataset = checkpoint.load(finished[0] / "latest.pt"), Dataset(data_dir / "tiny", 32)
    settings = TrainConfig(**saved["settings"])
    check, may_change = partial(checkpoint.check_same_run, saved), checkpoint.MAY_CHANGE.split()
    check(asdict(settings), dataset)
    assert TrainConfig.__dataclass_fields__.keys() >= {*may_change}
    for name in TrainConfig.__dataclass_fields__:
        old = getattr(settings, name)
        new = f"other {old}" if isinstance(old, str) else type(old)(old + 1)
        changed = replace(settings, **{name: new if new != old else not old})
        if name in may_change:
            check(asdict(changed), dataset)
        else:
            refused(f"{name} was {old}, is ", check, asdict(changed), dataset)


def test_a_run_is_neither_lost_nor_mixed_with_another(finished, data_dir, tmp_path):
    out_dir = shutil.copytree(finished[0], tmp_path / "run")
    before = weights(out_dir)
    for options, message in (
        ([], "(latest.pt, previous.pt, best.pt, metrics.jsonl, loss.png);\ncontinue it: "),
        (["--dataset=nothing"], "already has a run"),  # before a dataset is made
        ([*FINE_TUNE, "--init_from=a/b"], "already has a run"),  # or a model downloaded
        ([RESUME, "--n_embd=32"], "n_embd was 16, is 32"),
        ([RESUME, "--max_steps=11"], "is at step 12, and max_steps is 11"),
        (["--overwrite=True", "--dataset=nothing"], "python prepare_data.py nothing"),
    ):
        result = tiny_run(data_dir, out_dir, *options)
        assert (result.returncode, message in result.stderr) == (2, True), result.stderr
    with files.locked(out_dir / "lock"):
        result = tiny_run(data_dir, out_dir, RESUME)
        assert result.returncode == IN_USE and "in use by another run" in result.stderr
    assert same(weights(out_dir), before)
    shutil.copy(out_dir / "best.pt", out_dir / "latest.pt")
    result = tiny_run(data_dir, out_dir, RESUME)
    assert result.returncode == NO_CHECKPOINT and "no optimizers' state" in result.stderr
    (out_dir / "latest.pt").unlink()  # as if the run had been killed before its first checkpoint
    assert "already has a run" in tiny_run(data_dir, out_dir).stderr
    for name in ("previous.pt", "best.pt", "lock", "loss.png"):
        (out_dir / name).unlink()
    assert "already has a run (metrics.jsonl)" in tiny_run(data_dir, out_dir).stderr
    assert [path.name for path in out_dir.iterdir()] == ["metrics.jsonl"]  # which can be another's
    assert tiny_run(data_dir, out_dir, "--overwrite=True", "--seed=3").returncode == 0
    assert not same(weights(out_dir), before)


ELSEWHERE = [*FINE_TUNE, "--dataset=stdlib"]
FAILURES = [
    ([RESUME], NO_CHECKPOINT, "there is no checkpoint"),
    (["--dataset=nothing"], 2, "python prepare_data.py nothing"),
    (["--dataset=data/a b"], 2, "make it: python prepare_data.py 'a b' --data_dir="),
    (["--dataset=/no/where"], 2, "prepare_data.py where --data_dir=/no (with"),
    (["--dataset=unmakeable"], 2, "the dataset unmakeable could not be made"),
    (["--dataset=damaged"], 2, "manifest.json is damaged"),
    (["--block_size=8192", "--batch_tokens=16384"], 2, "one window of 8193 val tokens"),
    (["--device=mps"], 2, "finds none here"),
    ([*ELSEWHERE, "--init_from=a/b"], INPUT_OUTPUT, "could not download a/b"),
    ([*ELSEWHERE, "--init_from=config/b"], NO_CHECKPOINT, "config/b: there is no"),
    ([*ELSEWHERE, "--init_from=a/b.pt"], NO_CHECKPOINT, "a/b.pt: there is no"),
]


@pytest.mark.parametrize("options, code, message", FAILURES)
def test_what_cannot_run_says_so(data_dir, tmp_path, monkeypatch, options, code, message):
    def offline(**_):
        raise OSError("no network")

    monkeypatch.setattr(train, "MADE_WHEN_MISSING", ("stdlib", "unmakeable"))
    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "snapshot_download", offline)
    shutil.copytree(data_dir, tmp_path / "data")
    shutil.copytree(data_dir / "tiny", tmp_path / "data" / "damaged")
    (tmp_path / "data" / "damaged" / "manifest.json").write_text('{"splits": {"train": 3}')
    result = tiny_run(tmp_path / "data", tmp_path / "run", *options)
    assert result.returncode == code and message in result.stderr, result.stderr
    assert result.stderr.count("\n") <= 3 and "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "latest.pt").exists()
    assert not (tmp_path / "data" / "stdlib").exists()  # made only once the model is there


def test_a_dataset_whose_making_was_killed_is_a_failure(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train.subprocess, "run", lambda _: SimpleNamespace(returncode=-9))
    result = tiny_run(data_dir, tmp_path / "run", "--dataset=stdlib")
    assert (result.returncode, "stdlib could not be made" in result.stderr) == (9, True)


def test_checkpoints_do_not_count_for_the_speed(data_dir, tmp_path, monkeypatch):
    save = train.parallel.save
    monkeypatch.setattr(train.parallel, "save", lambda *state: time.sleep(0.3) or save(*state))
    assert tiny_run(data_dir, tmp_path, "--max_steps=6").returncode == 0
    assert (tmp_path / "best.pt").exists()
    assert all(speed > 256 / 0.3 for (speed,) in metrics(tmp_path, "tokens_per_second"))


@pytest.mark.parametrize("log_interval", [1, 12])
def test_numbers_that_are_not_finite_reach_no_checkpoint(data_dir, tmp_path, log_interval):
    options = ["--learning_rate=1e15", "--min_lr=0", "--checkpoint_interval=1"]
    result = tiny_run(data_dir, tmp_path / "run", *options, f"--log_interval={log_interval}")
    assert result.returncode == NOT_FINITE and "Try a lower --learning_rate" in result.stderr
    for path in (tmp_path / "run").glob("*.pt"):
        assert all(tensor.isfinite().all() for tensor in checkpoint.load(path)["model"].values())


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(finished, data_dir, tmp_path):
    out_dir = shutil.copytree(finished[0], tmp_path / "run")
    before = (out_dir / "latest.pt").read_bytes(), (out_dir / "best.pt").read_bytes()
    with full_disk(20_000):
        result = tiny_run(data_dir, out_dir, RESUME, "--max_steps=14")
    assert result.returncode == INPUT_OUTPUT and "is the disk full?" in result.stderr
    assert result.stderr.count("\n") == 1 and "warning" in result.stdout  # about best.pt
    assert before == ((out_dir / "latest.pt").read_bytes(), (out_dir / "best.pt").read_bytes())
    assert not [path for path in out_dir.iterdir() if path.name.startswith(".")]


@shapes
def test_fine_tuning_starts_from_a_hugging_face_folder(data_dir, tmp_path, shape):
    pytest.importorskip("safetensors")
    model = make_model(**shape, vocab_size=257, block_size=64)
    hf.save(model, tmp_path / "hf", 256)
    save_hf_tokenizer(load_tokenizer("bytes", "", tmp_path), tmp_path / "hf")
    start = [f"--init_from={tmp_path / 'hf'}", "--max_steps=1", *FIXED]
    result = tiny_run(data_dir, tmp_path / "run", *start)
    assert result.returncode == 0, result.stderr
    trained = weights(tmp_path / "run")
    for name, tensor in model.state_dict().items():
        assert torch.equal(trained[name][:257], tensor[:257])  # the rest is padding
    assert tiny_run(data_dir, tmp_path / "run", RESUME, "--max_steps=2", *FIXED).returncode == 0
    result = tiny_run(data_dir, tmp_path / "long", *start, "--block_size=128")
    assert result.returncode == 2 and "block_size 128 exceeds the 64 of" in result.stderr
    shutil.copytree(FIXTURES / "dataset", tmp_path / "data" / "tiny")
    result = tiny_run(tmp_path / "data", tmp_path / "other", *start)
    assert result.returncode == 2 and f"--tokenizer={tmp_path / 'hf'}" in result.stderr
    printed = tiny_run(tmp_path / "data", tmp_path / "run", RESUME, *FIXED).stderr
    assert "tokenizer was bytes, is bpe:300" in printed and "the files of dataset tiny" in printed


def test_a_run_starts_from_another_runs_weights(finished, data_dir, tmp_path):
    for start in (finished[0], finished[0] / "latest.pt"):
        options = [f"--init_from={start}", "--max_steps=1", "--overwrite=True", *FIXED]
        options.append("--dropout=0.5")
        assert tiny_run(data_dir, tmp_path / "run", *options).returncode == 0
        state = checkpoint.load(tmp_path / "run" / "latest.pt")
        assert same(state["model"], weights(finished[0])) and state["step"] == 1
        assert state["model_config"]["dropout"] == 0.5
    shutil.copytree(FIXTURES / "dataset", tmp_path / "data" / "tiny")
    result = tiny_run(tmp_path / "data", tmp_path / "other", f"--init_from={start}", *FINE_TUNE)
    assert "--tokenizer=data/ITS_DATASET/tokenizer.tiktoken" in result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("kind, close", [("gpt2", 1e-3), ("qwen3", 0.03)])  # Muon is in bfloat16
def test_a_gpu_trains_as_the_cpu_does(data_dir, tmp_path, kind, close):
    assert tiny_run(data_dir, tmp_path / "cpu", *KINDS[kind]).returncode == 0
    choices = [(compiled, "float32", close) for compiled in ("off", "model", "blocks")]
    for compiled, dtype, atol in (*choices, ("auto", "auto", 0.05)):
        options = ["--device=auto", f"--dtype={dtype}", f"--compile={compiled}"]
        options += [*KINDS[kind], "--micro_batch_size=0", "--overwrite=True", "--sample_prompt=a"]
        result = tiny_run(data_dir, tmp_path / "gpu", *options)
        assert result.returncode == 0 and "8 sequences of 32 x 1" in result.stdout, result.stderr
        assert f"compile {compiled.replace('auto', 'blocks')}" in result.stdout
        assert ("in bfloat16" in result.stdout) == (dtype == "auto")
        losses = [metrics(tmp_path / name, "loss") for name in ("cpu", "gpu")]
        assert np.allclose(*losses, atol=atol)
        assert weights(tmp_path / "cpu").keys() == weights(tmp_path / "gpu").keys()


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU")
def test_an_apple_gpu_trains(data_dir, tmp_path):
    result = tiny_run(data_dir, tmp_path / "run", "--device=mps", "--sample_prompt=Chapter")
    assert result.returncode == 0 and "on mps in float32" in result.stdout, result.stderr
