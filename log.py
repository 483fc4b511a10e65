"""What a run reports, and the folder it leaves: the speed meter, `metrics.jsonl`, `loss.png`."""

import contextlib
import importlib
import json
import math
import secrets
import shlex
import shutil
import time
from datetime import timedelta
from pathlib import Path

from config import BEFORE_EXIT, INPUT_OUTPUT, Failure, say
from files import PARTIAL, atomic_file, locked, naming


class Meter:
    """Speed, share of the hardware's peak, and time left, for the lines of the log.

    Validation and checkpoints count for the time left only, the compiling first step for neither.
    """

    def __init__(self, max_steps: int, step_tokens: int, flops_per_token: int, peak_flops: float):
        self.max_steps, self.step_tokens = max_steps, step_tokens
        self.peak_share = flops_per_token / peak_flops if peak_flops else 0.0  # per token/s
        self.first_step = self.first_time = self.last_step = self.last_time = 0

    @contextlib.contextmanager
    def paused(self):
        """The time inside does not count for the speed."""
        started = time.monotonic()
        yield
        self.last_time += time.monotonic() - started

    def measure(self, step: int) -> tuple[dict, list[str]]:
        """The speed since the last call as values for metrics.jsonl and as words for the screen."""
        now, values, words = time.monotonic(), {}, []
        if not self.first_time:
            self.first_step, self.first_time = step, now
        else:
            speed = (step - self.last_step) * self.step_tokens / (now - self.last_time)
            values["tokens_per_second"] = speed
            words.append(f"{speed:,.0f} tokens/s")
            if self.peak_share:
                values["share_of_peak"] = speed * self.peak_share
                words.append(f"{values['share_of_peak']:.1%} of peak")
            seconds = (now - self.first_time) / (step - self.first_step) * (self.max_steps - step)
            words.append(f"{timedelta(seconds=round(min(seconds, 1e12)))} left")
        self.last_step, self.last_time = step, now
        return values, words


RUN_FILES = ("latest.pt", "previous.pt", "best.pt", "metrics.jsonl", "loss.png", "wandb_id")


def check_folder(folder: Path, init_from: str, overwrite: bool):
    """Raise Failure where a new run would overwrite another, or files that are not ours."""
    found = ", ".join(name for name in RUN_FILES if (folder / name).exists())
    continues = init_from == "resume" or (init_from == "auto" and (folder / "lock").exists())
    if found and not continues and not overwrite:
        choices = "continue it: --init_from=resume, keep it: --out_dir=ANOTHER, lose it"
        raise Failure(f"{folder} already has a run ({found});\n{choices}: --overwrite=True")


@contextlib.contextmanager
def claimed_folder(folder: Path, init_from: str, overwrite: bool):
    """Hold the lock of a run's folder. Raises Failure as `check_folder` does."""
    with locked(folder / "lock", f"{folder} is in use by another run; choose another --out_dir"):
        check_folder(folder, init_from, overwrite)
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)  # of a run that was killed
        yield


def start_log(run):
    """Remove what an earlier run left, or a resumed one makes again; open log_to; print the run."""
    if run.settings.init_from == "resume":
        cut_metrics(run.folder, run.step, run.val_step)
    else:
        for name in RUN_FILES:
            (run.folder / name).unlink(missing_ok=True)
    run.send = open_backend(run.settings.log_to, run.folder, run.step)
    run.print(describe(run))


def describe(run) -> str:
    """The model, the data and the batch in three lines."""
    settings, tokens = run.settings, run.settings.max_steps * run.settings.batch_tokens
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    flops = run.model.flops_per_token(settings.block_size)
    data = [d.describe(n * tokens) for d, n in zip(run.dataset.parts, run.dataset.shares)]
    return (
        f"model: {parameters / 1e6:.1f}M parameters, {flops / 1e6:,.0f} MFLOP per token\n"
        f"data: {', '.join(data)} in {settings.max_steps:,} steps of {settings.batch_tokens:,}\n"
        f"batch: {settings.micro_batch_size} sequences of {settings.block_size} "
        f"x {run.micro_steps} micro-steps x {run.ranks.world_size} ranks, "
        f"on {settings.device} in {settings.dtype}, compile {settings.compile}"
        + warn_of_room(run.folder, 12 * parameters)
    )


def warn_of_room(folder: Path, checkpoint_bytes: int) -> str:
    """A line if the disk lacks room for latest.pt, previous.pt and the one that replaces them."""
    needed = 3 * checkpoint_bytes
    saved = [*folder.glob("latest.pt"), *folder.glob("previous.pt")]
    room = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in saved)
    if room >= needed:
        return ""
    sizes = f"three checkpoints need {needed / 1e9:.1f} GB, there is room for {room / 1e9:.1f}"
    return f"\nwarning: {folder}: {sizes}"


def check_backend(name: str):
    """Raise Failure where the package of a `log_to` setting is missing."""
    try:
        importlib.import_module(name or "json")
    except ImportError:
        raise Failure(f"log_to {name} needs a package: pip install {name}") from None


def open_backend(name: str, folder: Path, step: int):
    """A function that sends values to tensorboard or wandb, where `step` has been; "": None."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

        def send(values, step):
            for key in values:
                writer.add_scalar(key, values[key], step)
            writer.flush()

        return send
    if name == "wandb":
        import wandb

        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        names = dict(project="groundup", name=folder.name, id=id_file.read_text())
        try:
            run = wandb.init(**names, resume="allow", dir=folder)
        except Exception as error:  # of its own types, as without a key or a network
            raise Failure(f"log_to wandb: {error!r:.200}", INPUT_OUTPUT) from None
        BEFORE_EXIT.append(run.finish)
        return run.log


def append_metrics(folder: Path, values: dict, send=None):
    """Add one line to metrics.jsonl, without what is not finite. Training does not need it.

    send: a backend of `open_backend`, which gets the same.
    """
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    try:
        with naming(folder / "metrics.jsonl"), open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(known) + "\n")
    except OSError as error:
        say(f"warning: a line of the log is lost: {error}")
    try:
        if send:
            send(known, step=known["step"])
    except Exception as error:  # of any type that a package raises
        say(f"warning: the backend of the log failed: {error!r:.200}")


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, but those that a kill or a full disk left half-written."""
    records, path = [], folder / "metrics.jsonl"
    for line in path.read_text("utf-8", "replace").split("\n") if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and isinstance(r.get("step"), int)]


def cut_metrics(folder: Path, step: int, val_step: int):
    """Drop the lines after `step`, at which a run continues, and a validation to be made again."""
    records = [record for record in read_metrics(folder) if record["step"] <= step]
    if val_step < step:
        records = [r for r in records if r["step"] < step or "val_loss" not in r]
    try:
        with atomic_file(folder / "metrics.jsonl") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records).encode())
    except OSError as error:
        say(f"warning: the log has lines of steps that are made again: {error}")


def perplexity(loss: float) -> float:
    """How many equally likely tokens the model hesitates between, on average: exp(loss)."""
    return math.exp(min(loss, 700))  # exp of more exceeds a float


def print_report(folder: Path, val_loss: float, dataset):
    """Print what a run reached, beside the bits per byte of compressors, and draw its losses."""
    say(f"\nvalidation loss {val_loss:.4f} nats per token, perplexity {perplexity(val_loss):.2f}")
    if dataset.manifest:
        bits_per_byte = dataset.bits_per_byte(val_loss)
        compressors = dataset.manifest["splits"]["val"].get("compressed_bits_per_byte", {})
        bits = {name: value for name, value in compressors.items() if isinstance(value, float)}
        others = "".join(f"; {name} needs {value:.3f}" for name, value in bits.items())
        say(f"{bits_per_byte:.3f} bits per byte of validation text{others}")
    say(draw_losses(folder))
    checkpoint = shlex.quote(f"--checkpoint={folder / 'latest.pt'}")
    say(f"to sample from it: python sample.py {checkpoint}")


def draw_losses(folder: Path) -> str:
    """Draw metrics.jsonl as loss.png, if matplotlib can do it; return a line about it."""
    try:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
        axes.set_title(folder.name, parse_math=False)
        for key, label, marker in (("loss", "training", ""), ("val_loss", "validation", "o")):
            lines = [line for line in read_metrics(folder) if key in line]
            steps, losses = [line["step"] for line in lines], [line[key] for line in lines]
            axes.plot(steps, losses, marker=marker, label=label, linewidth=1)
        axes.legend()
        axes.grid(alpha=0.3)
        with atomic_file(folder / "loss.png") as file:
            figure.savefig(file, dpi=120, format="png")
    except ImportError:
        return "for a picture of the loss: pip install matplotlib"
    except Exception as error:  # of its many types none may undo a run that is done
        return f"no picture of the loss: {error!r:.200}"
    return f"the loss by step is drawn in {folder / 'loss.png'}"
