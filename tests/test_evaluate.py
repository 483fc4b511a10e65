"""Properties of scores: windows, sums, standard errors, and the script that prints them."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import QWEN3, make_model, run_inside, write

import checkpoint
import evaluate
import prepare_data
import sample
from evaluate import EvaluateConfig, Score, score, summarize, windows_of

shapes = pytest.mark.parametrize("shape", [{}, QWEN3], ids=["gpt2", "qwen3"])


def evaluated(out_dir, text, *options):
    """What evaluate.py prints, run in this process: the process, and its JSON if it has some."""
    arguments = [f"--out_dir={out_dir}", "--device=cpu", f"--text={text}", *options]
    result = run_inside(evaluate.main, EvaluateConfig, arguments)
    return result, json.loads(result.stdout) if result.stdout.startswith("{") else None


def random_documents(*lengths) -> list[tuple[str, np.ndarray, int]]:
    """Where each is, its tokens, and how many bytes they stand for."""
    generator = np.random.default_rng(1)
    return [(f"document {n}", generator.integers(0, 97, n), 3 * n) for n in lengths]


@pytest.mark.parametrize("count", [1, 5, 10, 11, 14, 37])
@pytest.mark.parametrize("stride", [1, 3, 10])
def test_windows_score_each_token_once_with_enough_context(count, stride):
    scored = []
    for _, tokens, targets in windows_of([("", np.arange(count + 1), 0)], [], 10, stride):
        assert len(tokens) == len(targets) <= 10
        for token, target in zip(tokens, targets):
            if target >= 0:
                assert target == token + 1 and (tokens[0] == 0 or target - tokens[0] > 10 - stride)
                scored.append(target)
    assert scored == [*range(1, count + 1)]


@torch.no_grad()
def nats_alone(logits_of, tokens, context, stride) -> float:
    """The nats of a document from the logits of each window by itself."""
    total = 0.0
    for _, window, targets in windows_of([("", tokens, 0)], [], context, stride):
        logits, targets = logits_of(torch.tensor(window)[None]).cpu()[0], torch.tensor(targets)
        total += F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum").item()
    return total


STRIDES = [(0, 12, "float32"), (5, 5, "float32"), (24, 24, "float32"), (1000, 24, "float32")]


@shapes
@pytest.mark.parametrize("stride, stride_used, dtype", [*STRIDES, (0, 12, "bfloat16")])
def test_scores_equal_those_of_each_window_alone(shape, stride, stride_used, dtype, monkeypatch):
    monkeypatch.setattr(evaluate, "CPU_TOKENS", 3 * 24)
    model, documents = make_model(**shape).eval(), random_documents(2, 90, 1, 24, 25, 7, 8)
    scores = score(model, documents, EvaluateConfig(stride=stride, dtype=dtype))
    documents.pop(2)  # has an end-of-text only
    model.dtype = None
    for result, (where, tokens, size) in zip(scores, documents, strict=True):
        assert (result.where, result.tokens, result.bytes) == (where, len(tokens) - 1, size)
        expected = nats_alone(model.logits, tokens, 24, stride_used)
        assert result.nats == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 3e-2)
        assert dtype == "float32" or result.nats != expected


def test_memory_is_bounded():
    """Documents are scored as they come, and short ones make no batch of the context's length."""
    model, batches, read = make_model(arch="qwen3", block_size=8192).eval(), [], []
    model.wte.register_forward_hook(lambda *call: batches.append((*call[2].shape, len(read))))
    documents = (read.append(d) or d for d in random_documents(*[100] * 100, 5000))
    assert len(score(model, documents, EvaluateConfig())) == 101
    assert max(rows * length for rows, length, _, _ in batches if rows > 1) <= evaluate.CPU_TOKENS
    assert (1, 4999) in [batch[:2] for batch in batches] and batches[0][-1] < 101


def test_figures_and_their_errors():
    pairs = [(10, 4.0), (20, 2.5), (30, 2.0)]  # tokens and nats per token
    result = summarize([Score(f"{n}", n, 2 * n, n * value) for n, value in pairs])
    loss, error = result["nats_per_token"]
    squares = sum((n * (value - loss)) ** 2 for n, value in pairs)
    assert (loss, error) == pytest.approx((150 / 60, math.sqrt(squares * 3 / 2) / 60))
    assert result["perplexity"] == pytest.approx((math.exp(loss), math.exp(loss) * error))
    assert result["bits_per_byte"][0] == pytest.approx(150 / 120 / math.log(2))
    assert [document["where"] for document in result["worst"]] == ["10", "20", "30"]
    assert summarize([Score("", 10, 10, 10.0)])["nats_per_token"] == (1.0, None)


def test_text_and_datasets_are_scored_alike(trained, data_dir, text_file, tmp_path):
    result = evaluated(trained, text_file, "--json=True")[1]
    assert result["documents"] == 40 and len(result["worst"]) == 10
    assert str(text_file) in result["worst"][0]["where"]
    names = [f"{data_dir / 'tiny'}{split}" for split in (":train", "")]
    train, val = (evaluated(trained, name, "--json=True")[1] for name in names)
    assert train["documents"] > val["documents"] > 0
    for name in ("tokens", "bytes"):
        assert train[name] + val[name] == result[name]
    write(tmp_path / "a.json", "{}")
    (tmp_path / "b.jsonl").symlink_to(text_file)
    (tmp_path / "c.jsonl").hardlink_to(text_file)
    folder, same = evaluated(trained, tmp_path, "--json=True")
    assert same["tokens"] == result["tokens"] and "skipped: 1 symbolic link" in folder.stderr
    text = evaluated(trained, text_file)[0].stdout
    assert f"nats per token  {result['nats_per_token'][0]:9.4f} ± " in text


@torch.no_grad()
def test_transformers_scores_an_export_the_same(trained, text_file, tmp_path):
    transformers = pytest.importorskip("transformers")
    sample.main(sample.SampleConfig(out_dir=str(trained), export_hf=str(tmp_path / "hf")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = text_file.read_text()[:100]
    (tmp_path / "x.txt").write_text(text)
    tokens = np.array(tokenizer(text).input_ids)
    nats = nats_alone(lambda x: theirs(x).logits, tokens, 32, 16)
    model = f"--checkpoint={tmp_path / 'hf'}"
    result = evaluated(trained, tmp_path / "x.txt", model, "--json=True")[1]
    assert result["tokens"] == len(tokens) - 1
    assert result["nats_per_token"][0] == pytest.approx(nats / result["tokens"], rel=1e-5)


def test_what_cannot_be_scored_is_refused(trained, data_dir, text_file, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    other = dict(name="other", source=str(text_file), tokenizer="bpe:300", data_dir=str(tmp_path))
    prepare_data.prepare(prepare_data.PrepareConfig(**other, processes=1))
    state = checkpoint.load(trained / "tiny" / "best.pt")
    state["model"]["wte.weight"].fill_(math.nan)
    checkpoint.save(tmp_path / "nan.pt", state)
    for text, model, code, message in (
        (tmp_path / "none.txt", "", 2, "none.txt"),
        (write(tmp_path / "a.jsonl", "{}"), "", 2, "no field 'text'; its fields: []; python prep"),
        (tmp_path / "empty.txt", "", 2, "empty.txt: there is no text to score"),
        (f"{data_dir / 'tiny'}:test", "", 2, "a split is one of train, val"),
        (tmp_path / "other", "", 2, "the tokenizer bpe:300, the model bytes: it cannot score"),
        (text_file, tmp_path / "nan.pt", 3, "losses are not finite"),
    ):
        result = evaluated(trained, text, f"--checkpoint={model}")[0]
        assert result.returncode == code and message in result.stderr and result.stdout == ""


@pytest.mark.gpu
@shapes
def test_compiled_scores_equal_plain_ones(shape):
    model = make_model(**shape, block_size=64, n_embd=64).eval().cuda()
    documents = random_documents(200, 3, 64, 65, 1000)
    for compile in (False, True):
        scores = score(model, documents, EvaluateConfig(dtype="float32", compile=compile))
        for result, (_, tokens, _) in zip(scores, documents, strict=True):
            expected = nats_alone(lambda x: model.logits(x.cuda()), tokens, 64, 32)
            assert result.nats == pytest.approx(expected, rel=1e-4)
