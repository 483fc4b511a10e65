"""Learning curves of several recipes on the same data, by step and by second, over seeds.

    python tests/bench_curves.py --train=True --dataset=books     train all on a GPU and draw them
    python tests/bench_curves.py                                  draw tests/curves.json again

The curves are kept in tests/curves.json and drawn as docs/curves.png. All runs of a seed see the
same tokens in the same order, and all are validated on the same windows. Seconds are those of
training: the steps times their median time, without start, compilation and validation.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import config
import log

ROOT = Path(__file__).parent.parent
CURVES, PICTURE = ROOT / "tests" / "curves.json", ROOT / "docs" / "curves.png"
BATCH_TOKENS = 65536
COMMON = f"--batch_tokens={BATCH_TOKENS} --micro_batch_size=64 --eval_tokens=2000000"
RUNS = {  # label: the settings of train.py besides COMMON
    "gpt2, AdamW, 700 steps": "config/gpt2_124m.py --max_steps=700 --eval_interval=100 "
    "--warmup_steps=450 --learning_rate=3.9e-3 --min_lr=3.9e-4 --grad_clip=0.25",  # tuned
    "qwen3, Muon, 160 steps": "config/qwen3_124m.py --max_steps=160 --eval_interval=25 "
    "--warmup_steps=45 --rope_theta=300 --muon_momentum=0.85 --beta1=0.8 "
    "--muon_learning_rate=5.6e-3",  # tuned for so few steps
    "qwen3, Muon, 700 steps": "config/qwen3_124m.py --max_steps=700 --eval_interval=25 "
    "--warmup_steps=45",
}


@dataclass
class CurvesConfig:
    """Train several recipes over several seeds, and draw their learning curves."""

    train: bool = False  # train first; False = draw what tests/curves.json has
    seeds: int = 3  # seeds of each recipe, from 1337 on
    only: str = ""  # train only the recipes whose label contains this
    dataset: str = "books"  # folder in data_dir
    data_dir: str = "data"  # folder of the datasets

    def check(self):
        """Raise ValueError where a value makes no sense."""
        config.check_bounds(self, 1, "seeds")


def main(settings: CurvesConfig):
    runs = json.loads(CURVES.read_text())
    if settings.train:
        runs = train_all(runs, settings)
    labels = dict.fromkeys(run["label"] for run in runs)
    by_label = {label: [run for run in runs if run["label"] == label] for label in labels}
    for label, same in by_label.items():
        print(f"{label}: {summary(same)}")
    draw(by_label)


def train_all(runs: list[dict], settings: CurvesConfig) -> list[dict]:
    """Train the recipes; return `runs` with theirs replaced, and write it to tests/curves.json."""
    labels = [label for label in RUNS if settings.only in label]
    if not labels:
        raise config.Failure(f"no label contains {settings.only!r}: {', '.join(RUNS)}")
    for label in labels:
        runs = [run for run in runs if run["label"] != label]
        for seed in range(1337, 1337 + settings.seeds):
            runs.append(train(label, seed, settings))
            CURVES.write_text(json.dumps(runs, indent=1) + "\n")
    return runs


def train(label: str, seed: int, settings: CurvesConfig) -> dict:
    """Train one run; return its validation losses by step and the seconds of a step."""
    with tempfile.TemporaryDirectory() as out_dir:
        options = [*RUNS[label].split(), *COMMON.split(), "--log_interval=25", f"--seed={seed}"]
        data = [f"--dataset={settings.dataset}", f"--data_dir={settings.data_dir}"]
        command = [sys.executable, "train.py", *options, f"--out_dir={out_dir}", *data]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise config.Failure(f"{label}, seed {seed}: train.py failed, see above")
        records = log.read_metrics(Path(out_dir))
    speeds = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
    losses = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
    step_seconds = BATCH_TOKENS / statistics.median(speeds)
    return {"label": label, "seed": seed, "seconds_per_step": step_seconds, "val_loss": losses}


def curve(run: dict) -> tuple[list[int], list[float]]:
    """The steps of a run's validations, which JSON has as text, and the losses."""
    return [int(step) for step in run["val_loss"]], list(run["val_loss"].values())


def summary(runs: list[dict]) -> str:
    """Where the runs of a recipe end: mean and standard deviation over seeds."""
    ends = [curve(run)[1][-1] for run in runs]
    steps = curve(runs[0])[0][-1]
    spread = f" ± {statistics.stdev(ends):.4f}" if len(ends) > 1 else ""
    seconds = statistics.mean(steps * run["seconds_per_step"] for run in runs)
    loss = f"validation loss {statistics.mean(ends):.4f}{spread} (seeds: {len(ends)})"
    return f"{loss} after {steps} steps, {seconds:.1f} s"


def draw(by_label: dict[str, list[dict]]):
    """Draw all curves as docs/curves.png."""
    from matplotlib.figure import Figure  # an optional package

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for number, (label, runs) in enumerate(by_label.items()):
        for run in runs:
            steps, losses = curve(run)
            name = label if run is runs[0] else None
            by_step.plot(steps, losses, f"C{number}", label=name, linewidth=1)
            seconds = [step * run["seconds_per_step"] for step in steps]
            by_second.plot(seconds, losses, f"C{number}", linewidth=1)
    by_step.set(xlabel=f"step of {BATCH_TOKENS:,} tokens", ylabel="validation loss, nats per token")
    by_step.set_ylim(top=6.5)  # the steep start is left out
    by_second.set(xlabel="seconds of training")
    by_step.legend()
    for axes in (by_step, by_second):
        axes.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    with config.exit_on_failure():
        main(config.load(CurvesConfig, sys.argv[1:]))
