"""Properties of scores: windows, sums, standard errors, and the script that prints them."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import QWEN3, make_model, refused, run_inside, write

import checkpoint
import evaluate
import prepare_data
import sample
from evaluate import EvaluateConfig, Score, score, summarize, windows_of
from tokenizer import Tokenizer

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


PROMPT = "Chapter 7. 7 comes before 8. 14 comes before "
QUESTIONS = [  # prompt, choices, answer; the third does not fit into the context of 32
    (PROMPT, ["15.", "banana", "é"], 0),
    ("", ["Chapter", " 9"], 1),
    (PROMPT * 3, ["15.", "16", "a bit longer"], 2),
    ("no space", [" x", "\n\ny"], 0),
    (" \n", ["x", "yy"], 0),
]


def write_questions(path, questions):
    entries = [dict(zip(("prompt", "choices", "answer"), question)) for question in questions]
    return write(path, "".join(json.dumps(line | {"id": 1}) + "\n\n" for line in entries))


def test_choices_are_scored_as_one_by_one_in_a_plain_loop(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "CPU_TOKENS", 100)
    path = write_questions(tmp_path / "x.jsonl", QUESTIONS)
    model, tokenizer = checkpoint.open_model(str(trained / "tiny"), "")
    model.eval()
    questions = evaluate.read_questions(path)
    windows = evaluate.windows_of_choices(questions, tokenizer, 32)
    evaluate.add_nats(model, windows, EvaluateConfig(dtype="float32"))
    rows = []
    for question, (prompt, choices, answer) in zip(questions, QUESTIONS, strict=True):
        stem = prompt.rstrip()
        for choice, scored in zip(choices, question.scores, strict=True):
            tokens = tokenizer.encode_document(prompt + choice).astype(np.int64)
            count = len((prompt + choice).encode()) - len(stem.encode())  # a token is a byte
            logits = model.logits(torch.tensor(tokens[-33:-1])[None])[0, -count:]
            targets = torch.tensor(tokens[-count:])
            expected = F.cross_entropy(logits, targets, reduction="sum").item()
            assert (scored.tokens, scored.bytes) == (count, len(choice.encode()))
            assert scored.nats == pytest.approx(expected, rel=1e-5)
        nats, sizes = zip(*[(scored.nats, scored.bytes) for scored in question.scores])
        by_bytes = [n / size for n, size in zip(nats, sizes)]
        best = [values.index(min(values)) == answer for values in (nats, by_bytes)]
        rows.append((*best, nats[answer], sizes[answer]))
    result = evaluated(trained, "", f"--choices={path}", "--dtype=float32", "--json=True")[1]
    right, right_by_bytes, nats, sizes = map(sum, zip(*rows))
    assert result["questions"] == 5 and result["chance"] == pytest.approx((2 / 3 + 3 / 2) / 5)
    for name, count in (("accuracy", right), ("accuracy_by_bytes", right_by_bytes)):
        p = count / 5
        assert result[name] == pytest.approx([p, math.sqrt(p * (1 - p) / 4)])
    assert result["bits_per_byte"][0] == pytest.approx(nats / sizes / math.log(2))
    text = evaluated(trained, "", f"--choices={path}", "--dtype=float32")[0].stdout
    assert f"accuracy           {right / 5:9.4f} ± " in text and "5 questions" in text


def test_a_choice_begins_where_its_own_tokens_do():
    """White space before a choice is scored with it; a prompt cannot swallow a whole choice."""
    tokenizer = Tokenizer.from_tokens(
        [*map(bytes, ([n] for n in range(256))), b" b", b"ab"], "x", "gpt2"
    )
    for prompt, choice, scored in (
        ("a ", "b", [b" b"]),
        ("a", " b", [b" b"]),
        ("a", "b", [b"ab"]),
        ("a  ", "c", [b" ", b" ", b"c"]),
    ):
        questions = [evaluate.Question("", prompt, [choice], 0)]
        ((score, _, targets),) = evaluate.windows_of_choices(questions, tokenizer, 9)
        found = [tokenizer.token_bytes(n) for n in targets[targets >= 0].tolist()]
        assert found == scored and (score.tokens, score.bytes) == (len(scored), len(choice))


BAD_QUESTIONS = [
    '{"prompt": "a", "choices": ["b"]}',
    '{"prompt": "a", "choices": "bc", "answer": 0}',
    '{"prompt": "a", "choices": ["b", ""], "answer": 0}',
    '{"prompt": "a", "choices": [], "answer": 0}',
    '{"prompt": "a", "choices": ["b", "c"], "answer": 2}',
    '{"prompt": "a", "choices": ["b", "c"], "answer": true}',
    '{"prompt": "a", "choices": ["b", "\\ud800"], "answer": 0}',
    "[" * 100_000,
    "not JSON",
    b"\xff",
]


@pytest.mark.parametrize("line", BAD_QUESTIONS)
def test_a_bad_question_is_refused_with_its_line(line, tmp_path):
    good = b'{"prompt": "a", "choices": ["b", "c"], "answer": 1}\n\n'
    path = write(tmp_path / "x.jsonl", good + (line if isinstance(line, bytes) else line.encode()))
    refused(r"x.jsonl:3: a question is {\"prompt\"", evaluate.read_questions, path)


def test_questions_that_cannot_be_answered_are_refused(trained, tmp_path):
    long = write_questions(tmp_path / "long.jsonl", [("a", ["b", "b" * 33], 0)])
    result = evaluated(trained, "", f"--choices={long}")[0]
    assert result.returncode == 2
    assert "long.jsonl:1: a choice has 33 tokens, the model's context 32" in result.stderr
    refused("has no question", evaluate.read_questions, write(tmp_path / "empty.jsonl", "\n"))
    for options in ({}, dict(text="a", choices="b"), dict(choices="b", stride=3)):
        with pytest.raises(ValueError, match="name a text or a file|stride has no effect"):
            EvaluateConfig(**options).check()


def test_what_cannot_be_scored_is_refused(trained, data_dir, text_file, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    other = dict(name="other", source=str(text_file), tokenizer="bpe:300", data_dir=str(tmp_path))
    prepare_data.prepare(prepare_data.PrepareConfig(**other, processes=1))
    state = checkpoint.load(trained / "tiny" / "best.pt")
    state["model"]["wte.weight"].fill_(math.nan)
    checkpoint.save(tmp_path / "nan.pt", state)
    damaged = shutil.copytree(data_dir / "tiny", tmp_path / "damaged")
    shard = damaged / "tiny_val_000000.bin"
    write(shard, shard.read_bytes()[:-1] + b"\xff")  # the last token has no embedding
    for text, model, code, message in (
        (tmp_path / "none.txt", "", 2, "none.txt"),
        (write(tmp_path / "a.jsonl", "{}"), "", 2, "no field 'text'; its fields: []; python prep"),
        (tmp_path / "empty.txt", "", 2, "empty.txt: there is no text to score"),
        (f"{data_dir / 'tiny'}:test", "", 2, "a split is one of train, val"),
        (tmp_path / "other", "", 2, "the tokenizer bpe:300, the model bytes: it cannot score"),
        (damaged, "", 2, "tiny_val_000000.bin is not the shard"),
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
