"""Properties of training: the order of the data, the schedule, exact resume, and what a run leaves behind."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import KINDS, ROOT, metrics, run, tiny_arguments, tiny_run
from test_download import model_hub, serving
from test_model import shard

import checkpoint
import prepare_data
import train
from config import IN_USE, NO_CHECKPOINT, NOT_FINITE
from model import GPT, GPTConfig, save_hf
from train import TrainConfig


def weights(out_dir, name="latest.pt"):
    return checkpoint.load(out_dir / name)["model"]


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The folder and the output of an uninterrupted run, with dropout."""
    out_dir = tmp_path_factory.mktemp("finished") / "run"
    result = run("train.py", *tiny_arguments(data_dir, out_dir), "--dropout=0.2", "--sample_prompt=Chapter")
    assert result.returncode == 0, result.stderr
    return out_dir, result.stdout


# ---- the order of the data


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000])
def test_a_shuffle_holds_everything_once(count):
    orders = [train.shuffled(np.arange(count), count, key).tolist() for key in (1, 2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(count))
    assert count < 7 or orders[0] != orders[1] != list(range(count))


def test_a_shuffle_looks_random():
    order = train.shuffled(np.arange(20_000), 20_000, 5).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03
    steps = np.abs(np.diff(order)).mean() / 20_000
    assert steps == pytest.approx(1 / 3, abs=0.01)  # the mean distance of two points on a line


def test_a_shuffle_of_a_trillion_needs_no_memory():
    found = train.shuffled(np.arange(10**12 - 50, 10**12), 10**12, 5)
    assert len(set(found.tolist())) == 50 and found.min() >= 0 and found.max() < 10**12


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_window_once_an_epoch_and_the_same_batch_on_any_ranks(world_size):
    class Windows:  # gives back which windows were asked for
        def __len__(self):
            return 48

        def __getitem__(self, indices):
            return np.repeat(indices[:, None], 5, axis=1)

    settings = TrainConfig(block_size=4, batch_tokens=64, micro_batch_size=2)
    micro_steps = 64 // (4 * 2 * world_size)
    batches = []
    for step in range(6):
        rows = []
        for rank in range(world_size):
            ranks = train.Ranks(rank, world_size, torch.device("cpu"))
            for micro_step in range(micro_steps):
                tokens, targets = train.micro_batch(Windows(), settings, ranks, step, micro_step)
                assert tokens.shape == targets.shape == (2, 4)
                rows += tokens[:, 0].tolist()
        batches.append(sorted(rows))
    epochs = [sorted(sum(batches[:3], [])), sorted(sum(batches[3:], []))]
    assert epochs[0] == epochs[1] == list(range(48))
    assert batches[:3] != batches[3:]
    alone = [sorted(train.window_indices(step * 16, 16, 48, settings.seed).tolist()) for step in range(6)]
    assert batches == alone


def test_an_epoch_may_end_inside_a_batch():
    indices = train.window_indices(0, 25, 10, seed=3)
    assert sorted(indices[:10]) == sorted(indices[10:20]) == list(range(10))
    assert (train.window_indices(8, 4, 10, seed=3) == indices[8:12]).all()
    assert (train.window_indices(0, 25, 10, seed=4) != indices).any()


# ---- the optimizer and its schedule


def test_learning_rate():
    settings = TrainConfig(learning_rate=2.0, min_lr=0.2, warmup_steps=10, max_steps=110)
    shares = [train.schedule(step, settings) for step in range(111)]
    assert shares[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert shares[10] == 1.0 and shares[60] == pytest.approx(0.55) and shares[110] == pytest.approx(0.1)
    assert shares[35] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert all(later < earlier for earlier, later in zip(shares[10:], shares[11:]))


@pytest.mark.parametrize("decay, quarter", [("linear", 0.775), ("cosine", 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)])
def test_the_learning_rate_stays_at_its_peak_until_it_falls(decay, quarter):
    settings = TrainConfig(learning_rate=2.0, min_lr=0.2, warmup_steps=10, max_steps=110, decay=decay, decay_steps=40)
    shares = [train.schedule(step, settings) for step in range(111)]
    assert shares[9:71] == [1.0] * 62 and shares[80] == pytest.approx(quarter) and shares[110] == pytest.approx(0.1)
    longer = replace(settings, max_steps=1110)
    assert [train.schedule(step, longer) for step in range(71)] == shares[:71]  # so a run can go on from a plateau


@pytest.mark.parametrize("muon_learning_rate, wanted", [(0.0, 1.0), (3.0, 1.5)])
def test_each_optimizer_has_its_learning_rate(muon_learning_rate, wanted):
    settings = TrainConfig(optimizer="muon", learning_rate=2.0, warmup_steps=4, muon_learning_rate=muon_learning_rate)
    optimizers = train.make_optimizers(small_model("qwen3"), settings, ALONE)
    run = train.Run(settings, ALONE, None, None, optimizers)
    assert train.set_learning_rates(run, 1) == 1.0
    assert [{group["lr"] for group in optimizer.param_groups} for optimizer in optimizers] == [{1.0}, {wanted}]


ALONE = train.Ranks(0, 1, torch.device("cpu"))


def small_model(arch: str) -> GPT:
    shape = dict(n_kv_head=1, tie_embeddings=False) if arch == "qwen3" else {}
    return GPT(GPTConfig(arch=arch, vocab_size=97, block_size=8, n_layer=2, n_head=2, n_embd=16, **shape))


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_weight_has_one_optimizer_and_matrices_decay(arch, kind):
    model, settings = small_model(arch), TrainConfig(optimizer=kind, weight_decay=0.3, beta1=0.8, beta2=0.9)
    optimizers = train.make_optimizers(model, settings, ALONE)
    groups = [(type(optimizer).__name__, group) for optimizer in optimizers for group in optimizer.param_groups]
    found = [(id(p), (name, group["weight_decay"])) for name, group in groups for p in group["params"]]
    decay = dict(found)
    assert len(decay) == len(found)
    for name, parameter in model.named_parameters():
        muon = kind == "muon" and name.startswith("h.") and parameter.dim() == 2
        wanted = ("Muon" if muon else "AdamW", 0.3 if parameter.dim() == 2 else 0.0)
        assert decay.pop(id(parameter)) == wanted, name
    assert not decay and optimizers[0].defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("shape", [(3, 6, 9), (3, 9, 6), (2, 7, 7)])
def test_orthogonalizing_is_a_polynomial_of_the_singular_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices / matrices.norm(dim=(1, 2), keepdim=True), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert torch.allclose(train.orthogonalize(matrices), left * values[:, None] @ right)
    assert not train.orthogonalize(torch.zeros(shape)).any()


@pytest.mark.gpu
def test_orthogonalizing_on_a_gpu_is_close_to_that_in_fp32():
    matrices = torch.randn(5, 64, 96)
    close, wanted = train.orthogonalize(matrices.cuda()), train.orthogonalize(matrices)
    assert close.dtype == torch.bfloat16 and (close.float().cpu() - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_muon_is_the_muon_of_torch(arch, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # theirs computes in it everywhere
    model, settings = small_model(arch), TrainConfig(weight_decay=0.3, muon_momentum=0.9)
    ours, copies = train.Muon(model, settings, ALONE), []
    for weight, count in model.matrices():  # theirs gets each matrix as a parameter of its own
        copies.append([torch.nn.Parameter(part.clone()) for part in weight.detach().chunk(count)])
    flat = [copy for parts in copies for copy in parts]
    theirs = torch.optim.Muon(flat, lr=0.1, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    ours.param_groups[0]["lr"] = 0.1
    for _ in range(4):
        for (weight, count), parts in zip(model.matrices(), copies):
            weight.grad = torch.randn_like(weight)
            for part, gradient in zip(parts, weight.grad.chunk(count)):
                part.grad = gradient.clone()
        ours.step()
        theirs.step()
    for (weight, _), parts in zip(model.matrices(), copies):
        assert torch.allclose(weight, torch.cat(list(parts)), atol=1e-5)


def test_a_step_is_the_one_of_the_plain_optimizer(data_dir, tmp_path):
    """One step of the loop, with accumulation and clipping, against the textbook in a few lines."""
    shape = ["--max_steps=1", "--warmup_steps=0", "--grad_clip=0.5", "--batch_tokens=256", "--beta2=0.9"]
    assert tiny_run(data_dir, tmp_path / "run", *shape).returncode == 0
    state = checkpoint.load(tmp_path / "run" / "latest.pt")
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**state["model_config"]))
    windows = train.prepare_data.Dataset(data_dir / "tiny", 32).train
    rows = torch.from_numpy(windows[train.window_indices(0, 8, len(windows), 1337)])
    loss = model(rows[:, :-1], rows[:, 1:])
    loss.backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    ((logged_loss, logged_norm),) = metrics(tmp_path / "run", "loss", "grad_norm")
    assert logged_loss == pytest.approx(loss.item(), abs=1e-5) and logged_norm == pytest.approx(norm.item(), abs=1e-4)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad * min(1, 0.5 / norm)
        decayed = parameter.detach() * (1 - 1e-2 * (0.1 if parameter.dim() == 2 else 0))
        wanted = decayed - 1e-2 * gradient / (
            gradient.abs() + 1e-8
        )  # at the first step both moments are the gradient's
        close = (state["model"][name] - wanted).abs() < 1e-5
        assert close[gradient.abs() > 1e-6].all(), name


# ---- a run


def test_a_run_learns_and_leaves_what_it_promises(finished):
    out_dir, printed = finished
    assert {path.name for path in out_dir.iterdir()} >= {"latest.pt", "best.pt", "metrics.jsonl", "lock"}
    losses = metrics(out_dir, "step", "loss")
    assert [step for step, _ in losses] == list(range(1, 13))
    assert losses[0][1] == pytest.approx(math.log(257), abs=0.1) and losses[-1][1] < losses[0][1] - 0.5
    evals = metrics(out_dir, "step", "val_loss", "bits_per_byte")
    assert [step for step, _, _ in evals] == [4, 8, 12]
    best = checkpoint.load(out_dir / "best.pt")
    assert best["val_loss"] == min(loss for _, loss, _ in evals) and "optimizers" not in best
    val_loss, bits = evals[-1][1:]
    for text in (
        f"validation loss {val_loss:.4f}",
        f"perplexity {math.exp(val_loss):.2f}",
        f"{bits:.3f}",
        "lzma -9 needs",
    ):
        assert text in printed
    assert f"python sample.py --checkpoint={out_dir / 'latest.pt'}" in printed
    assert "Chapter" in printed.split("python sample.py")[1]


def test_the_curve_is_drawn_where_matplotlib_is_installed(finished, monkeypatch, capsys):
    out_dir, printed = finished
    pytest.importorskip("matplotlib")
    assert f"drawn in {out_dir / 'loss.png'}" in printed
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train.draw_losses(out_dir)
    assert "pip install matplotlib" in capsys.readouterr().out


def test_bits_per_byte_counts_every_byte_of_the_text(finished, data_dir):
    out_dir, _ = finished
    dataset = train.prepare_data.Dataset(data_dir / "tiny", 32)
    facts = dataset.manifest["splits"]["val"]
    ((val_loss, bits),) = metrics(out_dir, "val_loss", "bits_per_byte")[-1:]
    assert bits == pytest.approx(val_loss * facts["tokens"] / math.log(2) / facts["bytes"])


def test_evaluation_is_the_mean_over_its_windows(data_dir, tmp_path):
    out_dir = tmp_path / "run"
    assert tiny_run(data_dir, out_dir, "--micro_batch_size=8").returncode == 0
    state = checkpoint.load(out_dir / "latest.pt")
    model = GPT(GPTConfig(**state["model_config"])).eval()
    model.load_state_dict(state["model"])
    windows = train.prepare_data.Dataset(data_dir / "tiny", 32).val
    count = 1000 // 32
    rows = windows[np.linspace(0, len(windows) - 1, count).round().astype(int)]
    rows = torch.from_numpy(rows)
    with torch.no_grad():
        wanted = model(rows[:, :-1], rows[:, 1:]).item()
    assert state["val_loss"] == pytest.approx(wanted, abs=1e-5)
    assert count % 8 == 7  # the last batch is not a full one


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_is_spread_over_the_ranks(data_dir, world_size):
    class Windows(train.prepare_data.Windows):
        def __getitem__(self, indices):
            asked.append(np.unique(indices))
            return super().__getitem__(indices)

    dataset, seen = train.prepare_data.Dataset(data_dir / "tiny", 32), []
    dataset.val = Windows(dataset.val.paths, 32, 257)
    settings = TrainConfig(block_size=32, micro_batch_size=4, eval_tokens=1000, device="cpu", dtype="float32")
    for rank in range(world_size):
        asked = []
        ranks = train.Ranks(rank, world_size, torch.device("cpu"))
        ranks.sum = lambda values: values
        model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=1, n_head=1, n_embd=8))
        train.evaluate(train.Run(settings, ranks, dataset, model, None))
        seen.append(np.concatenate(asked).tolist())
    assert len(sum(seen, [])) == len(set(sum(seen, []))) == 1000 // 32
    assert max(map(len, seen)) - min(map(len, seen)) <= 1


def interrupt(data_dir, out_dir, number: int, at_step: int, *options) -> int:
    """Start a run, send it the signal once it has logged `at_step`, and return its exit code."""
    command = [sys.executable, "train.py", *tiny_arguments(data_dir, out_dir), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if (out_dir / "metrics.jsonl").exists() and max([0, *sum(metrics(out_dir, "step"), ())]) >= at_step:
                process.send_signal(number)
                break
            time.sleep(0.002)
        return process.wait(60)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals")
@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_a_run_stopped_and_killed_and_resumed_equals_an_uninterrupted_one(data_dir, tmp_path, kind):
    options = [*KINDS[kind], "--dropout=0.2", "--max_steps=120", "--checkpoint_interval=7", "--eval_interval=20"]
    assert tiny_run(data_dir, tmp_path / "whole", *options).returncode == 0
    out_dir = tmp_path / "parts"
    assert interrupt(data_dir, out_dir, signal.SIGTERM, 25, *options) == 0
    stopped = checkpoint.load(out_dir / "latest.pt")["step"]
    assert stopped == metrics(out_dir, "step", "loss")[-1][0] < 120
    assert interrupt(data_dir, out_dir, signal.SIGKILL, stopped + 25, *options, "--init_from=resume") == -signal.SIGKILL
    killed = checkpoint.load(out_dir / "latest.pt")["step"]
    assert stopped < killed < 120 and killed % 7 == 0
    assert tiny_run(data_dir, out_dir, *options, "--init_from=resume").returncode == 0
    for name in ("latest.pt", "best.pt"):
        whole, parts = (checkpoint.load(folder / name) for folder in (tmp_path / "whole", out_dir))
        assert same(whole["model"], parts["model"]) and whole["step"] == parts["step"]
    moments = [checkpoint.load(folder / "latest.pt")["optimizers"] for folder in (tmp_path / "whole", out_dir)]
    assert checkpoint.checksum(moments[0]) == checkpoint.checksum(moments[1])
    for keys in (("step", "loss", "grad_norm", "learning_rate"), ("step", "val_loss", "bits_per_byte")):
        assert metrics(tmp_path / "whole", *keys) == metrics(out_dir, *keys)


def test_dropout_is_there_and_depends_on_the_seed_and_the_step(finished, data_dir, tmp_path):
    with_dropout = metrics(finished[0], "loss")
    assert tiny_run(data_dir, tmp_path / "none").returncode == 0
    assert tiny_run(data_dir, tmp_path / "again", "--dropout=0.2").returncode == 0
    assert metrics(tmp_path / "none", "loss") != with_dropout == metrics(tmp_path / "again", "loss")


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_activation_checkpointing_trains_the_same(data_dir, tmp_path, kind):
    for name in ("False", "True"):
        options = [*KINDS[kind], "--dropout=0.2", f"--activation_checkpointing={name}"]
        assert tiny_run(data_dir, tmp_path / name, *options).returncode == 0
    assert same(weights(tmp_path / "False"), weights(tmp_path / "True"))


def test_the_micro_batch_changes_only_rounding(finished, data_dir, tmp_path):
    assert tiny_run(data_dir, tmp_path / "two").returncode == 0
    for size in (8, 0):  # the whole batch at once, and found by the program
        out_dir = tmp_path / f"other{size}"
        result = tiny_run(data_dir, out_dir, f"--micro_batch_size={size}")
        assert result.returncode == 0 and "8 sequences of 32 x 1 micro-steps" in result.stdout
        assert np.allclose(metrics(out_dir, "loss"), metrics(tmp_path / "two", "loss"), atol=1e-4)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_fine_tuning_starts_from_a_hugging_face_folder(data_dir, tmp_path, arch):
    pytest.importorskip("safetensors")
    torch.manual_seed(5)
    model = GPT(GPTConfig(arch, vocab_size=257, block_size=64, n_layer=1, n_head=1, n_embd=8))
    save_hf(model, tmp_path / "hf", 256)
    start = [f"--init_from={tmp_path / 'hf'}", "--max_steps=1", "--warmup_steps=0", "--learning_rate=0", "--min_lr=0"]
    result = tiny_run(data_dir, tmp_path / "run", *start)
    assert result.returncode == 0, result.stderr
    trained, wanted = weights(tmp_path / "run"), model.state_dict()
    assert all(torch.equal(trained[name][:257], wanted[name][:257]) for name in wanted)  # the rest is padding
    result = tiny_run(data_dir, tmp_path / "run", "--init_from=resume", "--max_steps=2")
    assert result.returncode == 0, result.stderr
    result = tiny_run(data_dir, tmp_path / "long", *start, "--block_size=128")
    assert result.returncode == 2 and "contexts of 64" in result.stderr and "block_size is 128" in result.stderr


@pytest.fixture
def published(tmp_path):
    """A loopback hub with the model who/what and the tokenizer `bytes`, that model, and the environment to find it."""
    pytest.importorskip("safetensors")
    torch.manual_seed(5)
    model = GPT(GPTConfig(vocab_size=300, block_size=64, n_layer=1, n_head=1, n_embd=8))  # more than the tokenizer has
    save_hf(model, tmp_path / "hf", 256)
    shard(tmp_path / "hf")
    prepare_data.save_hf_tokenizer(prepare_data.load_tokenizer("bytes", tmp_path), tmp_path / "hf")
    with serving() as hub:
        hub.answers = [model_hub({path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()})]
        yield hub, model, {"HF_ENDPOINT": hub.host, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": ""}


STILL = ["--init_from=who/what", "--max_steps=1", "--warmup_steps=0", "--learning_rate=0", "--min_lr=0"]


def test_fine_tuning_starts_from_a_model_of_the_hub(data_dir, tmp_path, published, monkeypatch):
    hub, model, environment = published
    result = run("train.py", *tiny_arguments(data_dir, tmp_path / "run"), *STILL, **environment)
    assert result.returncode == 0, result.stderr
    trained, wanted = weights(tmp_path / "run"), model.state_dict()
    assert all(torch.equal(trained[name][:300], wanted[name][:300]) for name in wanted)
    for name, value in (environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}).items():
        monkeypatch.setenv(name, value)
    assert tiny_run(data_dir, tmp_path / "again", *STILL).returncode == 0  # from the cache


def test_a_model_and_a_dataset_of_different_tokenizers_are_refused(text_file, tmp_path, published, monkeypatch):
    for name, value in published[2].items():
        monkeypatch.setenv(name, value)
    settings = prepare_data.PrepareConfig("tiny", str(text_file), tokenizer="bpe:280", data_dir=str(tmp_path / "data"))
    prepare_data.prepare(settings)
    result = tiny_run(tmp_path / "data", tmp_path / "run", *STILL)
    assert result.returncode == 2 and "bpe:280" in result.stderr and "--tokenizer=who/what" in result.stderr
    settings = prepare_data.replace(settings, name="fixed", tokenizer="who/what")
    settings.check()
    prepare_data.prepare(settings)
    result = tiny_run(tmp_path / "data", tmp_path / "run", *STILL, "--dataset=fixed")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "name, code, message", [("typo", 2, "is not scratch, resume, a folder, gpt2"), ("who/what", 6, "put config.json")]
)
def test_a_model_that_is_not_to_be_had_is_told_before_a_dataset_is_made(tmp_path, name, code, message, monkeypatch):
    monkeypatch.setattr(prepare_data, "OFFLINE_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    result = tiny_run(tmp_path / "data", tmp_path / "run", "--dataset=stdlib", f"--init_from={name}")
    assert result.returncode == code and message in result.stderr and result.stderr.count("\n") <= 2
    assert not (tmp_path / "data").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--init_from=resume", "--out_dir=none"], NO_CHECKPOINT, "there is no checkpoint"),
        (["--init_from=nowhere"], 2, "is not scratch, resume, a folder, gpt2"),
        (["--dataset=nothing"], 2, "python prepare_data.py nothing --source=PATH"),
        (["--block_size=8192", "--batch_tokens=16384"], 2, "less than one window of 8193 val tokens"),
        (["--device=mps"], 2, "finds none here"),
        (["--learning_rate=1e15", "--min_lr=0"], NOT_FINITE, "Try a lower --learning_rate"),
    ],
)
def test_what_cannot_run_says_so(data_dir, tmp_path, options, code, message):
    options = [option.replace("none", str(tmp_path / "none")) for option in options]
    result = tiny_run(data_dir, tmp_path / "run", *options)
    assert result.returncode == code, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr and result.stderr.count("\n") <= 3
    assert not (tmp_path / "run" / "latest.pt").exists() or code == NOT_FINITE


def test_numbers_that_are_lost_reach_no_checkpoint(data_dir, tmp_path):
    options = ["--learning_rate=1e15", "--min_lr=0", "--checkpoint_interval=1", "--log_interval=12"]
    assert tiny_run(data_dir, tmp_path / "run", *options).returncode == NOT_FINITE
    for path in (tmp_path / "run").glob("*.pt"):
        assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run", path.name).values())


def test_a_run_is_neither_lost_nor_mixed_with_another(finished, data_dir, tmp_path):
    out_dir = tmp_path / "run"
    assert tiny_run(data_dir, out_dir).returncode == 0
    before = weights(out_dir)
    for options, message in (
        ([], "holds a run already"),
        (["--init_from=resume", "--n_embd=32"], "n_embd (was 16, now 32)"),
        (["--init_from=resume", "--beta2=0.5"], "beta2 (was 0.95, now 0.5)"),
        (
            ["--init_from=resume", "--arch=qwen3", "--optimizer=muon"],
            "arch (was gpt2, now qwen3), optimizer (was adamw",
        ),
        (["--init_from=resume", "--max_steps=11"], "is at step 12 already; max_steps is 11"),
        (["--init_from=resume", "--seed=3", "--batch_tokens=512"], "batch_tokens (was 256, now 512), seed (was 1337"),
    ):
        result = tiny_run(data_dir, out_dir, *options)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    with checkpoint.locked(out_dir / "lock"):
        result = tiny_run(data_dir, out_dir, "--init_from=resume")
        assert result.returncode == IN_USE and "in use by another run" in result.stderr
    assert tiny_run(data_dir, out_dir, "--overwrite=True", "--dataset=nothing").returncode == 2
    assert same(weights(out_dir), before)
    (out_dir / "latest.pt").rename(tmp_path / "latest.pt")  # as if it had been killed before its first checkpoint
    printed = tiny_run(data_dir, out_dir).stderr
    assert "holds a run already" in printed and "resume" not in printed
    (tmp_path / "latest.pt").rename(out_dir / "latest.pt")
    assert tiny_run(data_dir, out_dir, "--overwrite=True", "--seed=3").returncode == 0
    assert not same(weights(out_dir), before)


def test_a_finished_run_can_be_taken_further(data_dir, tmp_path):
    assert tiny_run(data_dir, tmp_path / "run").returncode == 0
    result = tiny_run(data_dir, tmp_path / "run", "--init_from=resume")
    assert result.returncode == 0 and "validation loss" in result.stdout
    assert tiny_run(data_dir, tmp_path / "run", "--init_from=resume", "--max_steps=14").returncode == 0
    assert [step for step, _ in metrics(tmp_path / "run", "step", "loss")] == list(range(1, 15))


def test_a_checkpoint_of_an_older_version_is_told(data_dir, tmp_path):
    assert tiny_run(data_dir, tmp_path / "run").returncode == 0
    state = checkpoint.load(tmp_path / "run" / "latest.pt")
    state["optimizer"] = state.pop("optimizers")[0]
    checkpoint.save(tmp_path / "run" / "latest.pt", state)
    result = tiny_run(data_dir, tmp_path / "run", "--init_from=resume")
    assert result.returncode == 4 and "was written by an older version" in result.stderr
    state["optimizers"] = [state.pop("optimizer")]
    state["model"]["h.0.mlp.c_up.weight"] = state["model"].pop("h.0.mlp.c_fc.weight")
    checkpoint.save(tmp_path / "run" / "latest.pt", state)
    for result in (
        tiny_run(data_dir, tmp_path / "run", "--init_from=resume"),
        run("sample.py", f"--checkpoint={tmp_path / 'run'}"),
    ):
        assert result.returncode == 4 and "was written by an older version" in result.stderr


def test_a_run_on_the_plateau_can_be_cooled_down(data_dir, tmp_path):
    cooled = ["--decay=linear", "--decay_steps=4"]
    assert tiny_run(data_dir, tmp_path / "whole", *cooled).returncode == 0
    assert tiny_run(data_dir, tmp_path / "plateau", "--max_steps=8", "--min_lr=1e-2").returncode == 0
    shutil.copytree(tmp_path / "plateau", tmp_path / "branch")
    assert tiny_run(data_dir, tmp_path / "branch", *cooled, "--init_from=resume").returncode == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "branch"))
    assert metrics(tmp_path / "whole", "step", "loss") == metrics(tmp_path / "branch", "step", "loss")


def test_what_was_found_automatically_stays_so(data_dir, tmp_path, monkeypatch):
    options = ["--dtype=auto", "--micro_batch_size=0", "--checkpoint_interval=4", "--max_steps=4"]
    monkeypatch.setattr(train, "fast_in_bfloat16", lambda device: True)
    monkeypatch.setattr(train, "fitting_micro_batch_size", lambda *_: 4)
    assert "in bfloat16" in tiny_run(data_dir, tmp_path / "run", *options).stdout
    monkeypatch.setattr(train, "fast_in_bfloat16", lambda device: False)
    monkeypatch.setattr(train, "fitting_micro_batch_size", lambda *_: 8)
    printed = tiny_run(data_dir, tmp_path / "run", *options, "--init_from=resume", "--max_steps=5").stdout
    assert "4 sequences of 32 x 2 micro-steps" in printed and "in bfloat16" in printed


def test_bf16_follows_fp32(data_dir, tmp_path):
    assert tiny_run(data_dir, tmp_path / "fp32").returncode == 0
    assert tiny_run(data_dir, tmp_path / "bf16", "--dtype=bfloat16").returncode == 0
    assert np.allclose(metrics(tmp_path / "fp32", "loss"), metrics(tmp_path / "bf16", "loss"), atol=0.05)
    assert metrics(tmp_path / "fp32", "loss") != metrics(tmp_path / "bf16", "loss")


@pytest.mark.gpu
@pytest.mark.parametrize("kind, close", [("gpt2", 1e-3), ("qwen3", 0.03)])  # Muon computes in bfloat16 on a GPU
def test_a_gpu_trains_as_the_cpu_does(data_dir, tmp_path, kind, close):
    assert tiny_run(data_dir, tmp_path / "cpu", *KINDS[kind]).returncode == 0
    for name, options, tolerance in (
        ("plain", ["--dtype=float32", "--compile=off"], close),
        ("compiled", ["--dtype=float32", "--compile=on"], close),
        ("auto", ["--dtype=auto", "--compile=auto"], 0.05),
    ):
        result = tiny_run(data_dir, tmp_path / name, *KINDS[kind], "--device=auto", *options)
        assert result.returncode == 0, result.stderr
        assert ("compiling" in result.stdout) == (name != "plain") and ("in bfloat16" in result.stdout) == (
            name == "auto"
        )
        assert np.allclose(metrics(tmp_path / "cpu", "loss"), metrics(tmp_path / name, "loss"), atol=tolerance)
        assert same_names(tmp_path / "cpu", tmp_path / name)
    result = tiny_run(data_dir, tmp_path / "found", "--device=cuda", "--micro_batch_size=0")
    assert result.returncode == 0 and "8 sequences of 32 x 1 micro-steps" in result.stdout


def same_names(left, right) -> bool:
    return weights(left).keys() == weights(right).keys()
