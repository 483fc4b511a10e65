"""Files that version 0.1 wrote, before the modules were rebuilt, are read as before."""

import json
import shutil

import pytest
from conftest import FIXTURES, KINDS, metrics, refused, run_inside, split_tokens, tiny_run

import checkpoint
import evaluate
import prepare_data
import sample
from dataset import Dataset, read_manifest

LOSSES = {  # training losses of steps 5 to 8, as the old code continued
    "gpt2": [5.4554595947265625, 5.381882667541504, 5.31976318359375, 5.312216758728027],
    "qwen3": [5.578086853027344, 5.517704486846924, 5.490918159484863, 5.456747055053711],
}
VAL_LOSSES = {"gpt2": 5.280642827351888, "qwen3": 5.452900171279907}  # at step 8
QWEN3_TEXT = "nk bridges the biregahilds onStk bridges the b"
TEXTS = {  # what the models generate after "Story"
    "gpt2.pt": "aa" + " while" * 8 + "aaaa" + " while" * 5 + "a",
    "qwen3.pt": QWEN3_TEXT,
    "hf": QWEN3_TEXT,
}
NATS_PER_TOKEN = {"gpt2.pt": 5.454949754657167, "qwen3.pt": 5.572591916581725}


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_a_run_continues_from_an_old_checkpoint(tmp_path, kind):
    (tmp_path / "run").mkdir()
    shutil.copy(FIXTURES / f"{kind}.pt", tmp_path / "run" / "latest.pt")
    options = "--dataset=dataset --n_layer=1 --n_embd=8 --block_size=16 --batch_tokens=64"
    options += " --max_steps=8 --warmup_steps=1 --eval_interval=2 --eval_tokens=200"
    options = [*options.split(), *KINDS[kind], "--init_from=resume"]
    result = tiny_run(FIXTURES, tmp_path / "run", *options)
    assert result.returncode == 0, result.stderr
    losses = dict(metrics(tmp_path / "run", "step", "loss"))
    assert [losses[step] for step in (5, 6, 7, 8)] == pytest.approx(LOSSES[kind], abs=1e-4)
    val_losses = dict(metrics(tmp_path / "run", "step", "val_loss"))
    assert val_losses[8] == pytest.approx(VAL_LOSSES[kind], abs=1e-4)


@pytest.mark.parametrize("name", TEXTS)
def test_old_models_generate_the_same_text(name):
    options = "--prompt=Story --max_new_tokens=20 --temperature=0 --device=cpu --dtype=float32"
    arguments = [f"--checkpoint={FIXTURES / name}", *options.split()]
    result = run_inside(sample.main, sample.SampleConfig, arguments)
    assert result.stdout == f"Story{TEXTS[name]}\n", result.stderr


@pytest.mark.parametrize("name", NATS_PER_TOKEN)
def test_old_models_score_the_same(name):
    arguments = [f"--text={FIXTURES / 'text.jsonl'}", f"--checkpoint={FIXTURES / name}"]
    arguments += ["--json=True", "--device=cpu", "--dtype=float32"]
    result = json.loads(run_inside(evaluate.main, evaluate.EvaluateConfig, arguments).stdout)
    assert (result["documents"], result["tokens"], result["bytes"]) == (24, 3102, 7242)
    assert result["nats_per_token"][0] == pytest.approx(NATS_PER_TOKEN[name], abs=1e-4)


def test_the_documents_have_the_tokens_that_are_made_today(tmp_path):
    options = "--tokenizer=bpe:300 --split_pattern=gpt4 --val_fraction=0.2 --processes=1"
    arguments = ["stories", f"--source={FIXTURES / 'text.jsonl'}", *options.split()]
    arguments.append(f"--data_dir={tmp_path}")
    result = run_inside(prepare_data.main, prepare_data.PrepareConfig, arguments, "name")
    assert result.returncode == 0, result.stderr
    old, new = Dataset(FIXTURES / "dataset", 16), Dataset(tmp_path / "stories", 16)
    assert old.tokenizer.same_ids(new.tokenizer) and old.tokenizer.pattern == "gpt4"
    assert (split_tokens(old, "val") == split_tokens(new, "val")).all()
    documents = [[tokens.tolist() for _, tokens in data.documents("train")] for data in (old, new)]
    assert sorted(documents[0]) == sorted(documents[1])  # 0.1 left them as they were read


def test_files_of_a_newer_version_are_refused(tmp_path):
    manifest = json.loads((FIXTURES / "dataset" / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 7}))
    refused("has format_version 7; this version reads 1", read_manifest, tmp_path)
    state = checkpoint.load(FIXTURES / "gpt2.pt")
    checkpoint.save(tmp_path / "new.pt", state | {"format_version": 7})
    refused(
        "has format_version 7; this version reads 1", checkpoint.load, tmp_path / "new.pt", code=4
    )
