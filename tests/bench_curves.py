"""Learning curves of several recipes on the same data, by step and by second, with their spread over seeds.

    python tests/bench_curves.py --train=True --dataset=books     train all runs on a GPU, keep their curves, draw them
    python tests/bench_curves.py                                  draw tests/curves.png again from tests/curves.json

All runs of a seed see the same tokens in the same order, and all are scored on the same validation windows. A second is
one of training, by the median time of a step: starting, compiling and evaluating are left out.
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

ROOT = Path(__file__).parent.parent
BATCH_TOKENS = 65536
SAME = f"--batch_tokens={BATCH_TOKENS} --micro_batch_size=64 --eval_tokens=2000000 --log_interval=25"
GPT2 = "config/gpt2_124m.py --max_steps=700 --eval_interval=100"
QWEN3 = "config/qwen3_124m.py --warmup_steps=45 --eval_interval=25 --rope_theta=300"
SHORT = f"{QWEN3} --muon_momentum=0.85 --beta1=0.8 --muon_learning_rate=5.6e-3"
RUNS = {  # a label: what train.py gets beside SAME
    "gpt2, AdamW, 1e-3": f"{GPT2} --warmup_steps=100 --learning_rate=1e-3 --min_lr=1e-4",
    "gpt2, AdamW, tuned": f"{GPT2} --warmup_steps=450 --learning_rate=3.9e-3 --min_lr=3.9e-4 --grad_clip=0.25",
    "qwen3, Muon, 168 steps": f"{SHORT} --max_steps=168",
    "qwen3, Muon, 211 steps": f"{SHORT} --max_steps=211",
    "qwen3, Muon, 700 steps": f"{QWEN3} --max_steps=700",
}


@dataclass
class CurvesConfig:
    """Train several recipes over several seeds, and draw their learning curves."""

    train: bool = False  # train first; otherwise draw what tests/curves.json holds
    seeds: int = 3  # runs of each recipe
    only: str = ""  # train only the recipes whose label holds this
    dataset: str = "books"  # a folder in data_dir
    data_dir: str = "data"

    def check(self):
        """Raise ValueError where a value makes no sense."""
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds} and must be at least 1")


def train(label: str, seed: int, settings: CurvesConfig) -> dict:
    """Train one run; return its validation losses by step, and the seconds a step took."""
    with tempfile.TemporaryDirectory() as out_dir:
        options = [*RUNS[label].split(), *SAME.split(), f"--seed={seed}", f"--out_dir={out_dir}"]
        data = [f"--dataset={settings.dataset}", f"--data_dir={settings.data_dir}"]
        subprocess.run([sys.executable, ROOT / "train.py", *options, *data], check=True)
        records = [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(record["tokens_per_second"] for record in records if "tokens_per_second" in record)
    losses = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    return {"label": label, "seed": seed, "seconds_per_step": BATCH_TOKENS / speed, "val_loss": losses}


def report(runs: list[dict]):
    """Print what each recipe ends at, and draw all curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for number, label in enumerate(dict.fromkeys(run["label"] for run in runs)):
        ends, seconds = [], []
        for run in (run for run in runs if run["label"] == label):
            steps, losses = [int(step) for step in run["val_loss"]], list(run["val_loss"].values())
            ends.append(losses[-1])
            seconds.append(steps[-1] * run["seconds_per_step"])
            name = label if len(ends) == 1 else None
            by_step.plot(steps, losses, f"C{number}", label=name, linewidth=1)
            by_second.plot([step * run["seconds_per_step"] for step in steps], losses, f"C{number}", linewidth=1)
        spread = f" ± {statistics.stdev(ends):.4f}" if len(ends) > 1 else ""
        print(
            f"{label}: validation loss {statistics.mean(ends):.4f}{spread} (seeds: {len(ends)}) after {steps[-1]} "
            f"steps, {statistics.mean(seconds):.1f} s"
        )
    by_step.set(xlabel=f"step of {BATCH_TOKENS:,} tokens", ylabel="validation loss, nats a token", ylim=(None, 6.5))
    by_second.set(xlabel="seconds of training")
    by_step.legend()
    for axes in (by_step, by_second):
        axes.grid(alpha=0.3)
    figure.savefig(ROOT / "tests" / "curves.png", dpi=110)


def main(settings: CurvesConfig):
    path = ROOT / "tests" / "curves.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    if settings.train:
        labels = [label for label in RUNS if settings.only in label]
        if not labels:
            raise config.Failure(f"no recipe's label holds {settings.only!r}: {', '.join(RUNS)}")
        for label in labels:
            runs = [run for run in runs if run["label"] != label]
            for seed in range(settings.seeds):
                runs.append(train(label, 1337 + seed, settings))
                path.write_text(json.dumps(runs, indent=1) + "\n")
    if not runs:
        raise config.Failure(f"{path} holds no curves yet; --train=True makes them, on a GPU")
    report(runs)


if __name__ == "__main__":
    with config.exit_codes():
        main(config.load(CurvesConfig, sys.argv[1:]))
