"""Properties of decoding, of text, of scoring, and the command line that gives them."""

import io
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, ROOT, run, tiny_run

import config
import prepare_data
import sample
from model import GPT, GPTConfig
from sample import KVCache, SampleConfig, choose, generate

VOCAB, CONTEXT = 97, 24


GROUPED = dict(n_kv_head=1, head_size=24, tie_embeddings=False)  # each query head has the same keys and values


@pytest.fixture(scope="module", params=["gpt2", "qwen3"])
def model(request) -> GPT:
    shape = GROUPED if request.param == "qwen3" else {}
    return make_model(
        GPTConfig(request.param, vocab_size=VOCAB, block_size=CONTEXT, n_layer=2, n_head=2, n_embd=32, **shape)
    )


def make_model(shape: GPTConfig) -> GPT:
    """A model whose choices are far from even."""
    torch.manual_seed(0)
    model = GPT(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A folder of runs with one tiny model in it."""
    out_dir = tmp_path_factory.mktemp("out")
    assert tiny_run(data_dir, out_dir / "tiny", "--dropout=0.5").returncode == 0
    return out_dir


def speak(trained, capsys, *options) -> tuple[str, str]:
    """What sample.py prints, started in this process."""
    sample.main(config.load(SampleConfig, [f"--out_dir={trained}", "--device=cpu", *options]))
    return capsys.readouterr()


def decode(model, prompts, new, samples=None, vocab_size=VOCAB, **options) -> list[list[int]]:
    """The tokens that follow each prompt."""
    settings = SampleConfig(max_new_tokens=new, **options)
    samples = samples or [0] * len(prompts)
    noise = np.stack([sample.noise_for(settings.seed, number, new) for number in samples])
    rows = [[] for _ in prompts]
    for tokens, _ in generate(model, prompts, noise, vocab_size, settings):
        for row, more in zip(rows, tokens):
            row += more
    return rows


@torch.no_grad()
def plainly(model, prompt, new, uniform=None, **options) -> list[int]:
    """The same, one row alone, each token from a whole forward."""
    settings, context, device = SampleConfig(**options), model.config.block_size, model.wte.weight.device
    seen, found = list(prompt[-context:]), []
    for number in range(new):
        logits = model(torch.tensor([seen], device=device))[:, -1]
        number = torch.tensor([0.0 if uniform is None else uniform[number]], device=device)
        token = int(choose(logits, number, settings))
        found.append(token)
        seen = (seen if len(seen) < context else seen[-(context // 2) + 1 :]) + [token]
    return found


# ---- decoding


@torch.no_grad()
def test_cached_logits_equal_the_full_forward(model):
    tokens = torch.randint(VOCAB, (3, CONTEXT))
    full, cache = model(tokens), KVCache(model.config, 3, CONTEXT, tokens.device, torch.float32)
    with cache.fill(torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1])):
        logits = model(tokens[:, :10], cache=cache)
    assert logits.shape == (3, 1, VOCAB) and torch.allclose(logits[:, 0], full[:, 9], atol=1e-5)
    cache.held.fill_(10)
    for place in range(10, CONTEXT):
        logits = model(tokens[:, place : place + 1], cache=cache)
        assert torch.allclose(logits[:, 0], full[:, place], atol=1e-5)


@torch.no_grad()
def test_the_cache_keeps_its_shape_and_hides_what_is_empty(model):
    cache = KVCache(model.config, 2, CONTEXT, torch.device("cpu"), torch.float32)
    before, shape = cache.layers[0].k.data_ptr(), (2, model.config.n_kv_head, CONTEXT, model.config.head_size)
    with cache.fill(torch.tensor([0, 1]), torch.tensor([0, 0])):
        model(torch.tensor([[1, 2, 3]]), cache=cache)
    cache.held.copy_(torch.tensor([3, 1]))
    model(torch.tensor([[4], [4]]), cache=cache)
    assert cache.layers[0].k.data_ptr() == before and cache.layers[0].k.shape == shape
    assert cache.held.tolist() == [4, 2]
    assert (cache.mask[:, 0, 0] == 0).tolist() == [[True] * 4 + [False] * 20, [True] * 2 + [False] * 22]


def test_a_batch_equals_each_prompt_alone_past_the_context_too(model):
    prompts = [[5, 6, 7], [9], list(range(20)), [5, 6, 7], [3] * 11, list(range(60)), list(range(CONTEXT))]
    for row, prompt in zip(decode(model, prompts, 50, temperature=0), prompts):
        assert row == plainly(model, prompt, 50, temperature=0)


def test_samples_equal_those_drawn_alone(model):
    options = dict(temperature=1.3, top_k=40, top_p=0.9, seed=7)
    rows = decode(model, [[5, 6, 7], [5, 6, 7], [8]], 30, samples=[0, 3, 1], **options)
    for row, prompt, number in zip(rows, ([5, 6, 7], [5, 6, 7], [8]), (0, 3, 1)):
        assert row == plainly(model, prompt, 30, sample.noise_for(7, number, 30), **options)
        assert row == decode(model, [prompt], 30, samples=[number], **options)[0]
    assert rows[0] != rows[1]


def test_equal_prompts_are_read_once(model, monkeypatch):
    shapes, forward = [], GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda self, tokens, **more: shapes.append(tokens.shape) or forward(self, tokens, **more)
    )
    decode(model, [[1, 2, 3, 4]] * 5 + [[1, 2, 3, 9]], 2)
    assert [tuple(shape) for shape in shapes] == [(1, 3), (6, 1), (6, 1)]


@pytest.mark.parametrize("together", [1, 2 * CONTEXT])
def test_many_prompts_are_read_in_parts(model, monkeypatch, together):
    shapes, forward = [], GPT.forward
    note = lambda self, tokens, **more: shapes.append(tokens.shape) or forward(self, tokens, **more)  # noqa: E731
    monkeypatch.setattr(GPT, "forward", note)
    monkeypatch.setattr(sample, "PREFILL_TOKENS", together)
    prompts = [[number, number + 1, *range(number % 7)] for number in range(9)]
    rows = decode(model, prompts, 4, temperature=0)
    assert max(shape[0] for shape in shapes[:-4]) == max(1, together // CONTEXT)
    assert rows == [plainly(model, prompt, 4, temperature=0) for prompt in prompts]


@torch.no_grad()
def test_a_model_made_ready_computes_the_same():
    plain = make_model(GPTConfig(vocab_size=VOCAB, block_size=CONTEXT, n_layer=1, n_head=2, n_embd=32, dropout=0.5))
    wanted = plain(torch.arange(8)[None])
    ready = sample.prepare_to_decode(plain.train(), torch.device("cpu"), torch.float32)
    assert torch.allclose(ready(torch.arange(8)[None]), wanted, atol=1e-5) and ready.lm_head.weight is ready.wte.weight
    assert ready.h[0].mlp.c_fc.weight.T.is_contiguous() and ready.h[0].mlp.c_proj.weight.is_contiguous()


def test_a_context_of_one_token(model):
    short = make_model(GPTConfig(vocab_size=VOCAB, block_size=1, n_layer=1, n_head=2, n_embd=32))
    tokens, token = [], 5
    for _ in range(4):
        token = int(short(torch.tensor([[token]]))[0, -1].argmax())
        tokens.append(token)
    assert decode(short, [[5], [1, 2, 5]], 4, temperature=0) == [tokens, tokens]


def test_padded_entries_and_those_without_a_name_are_never_sampled(model):
    drawn = {
        token for row in decode(model, [[1]] * 40, 20, samples=list(range(40)), temperature=100.0) for token in row
    }
    assert max(drawn) < VOCAB and len(drawn) > 0.9 * VOCAB
    rows = decode(model, [[1]] * 40, 20, samples=list(range(40)), vocab_size=90, temperature=100.0, top_k=0)
    assert max(map(max, rows)) == 89


def test_a_penalty_counts_prompt_and_answer_but_not_what_leads_them(model):
    prompt, new, penalty = [96, 3, 5, 3], 12, 5.0
    found, seen = decode(model, [prompt], new, temperature=0, repetition_penalty=penalty)[0], list(prompt)
    for token in found:
        logits = model(torch.tensor([seen]))[0, -1]
        there = torch.tensor(sorted(set(seen[1:])))
        logits[there] = torch.where(logits[there] > 0, logits[there] / penalty, logits[there] * penalty)
        assert token == int(logits.argmax())
        seen.append(token)
    assert found != decode(model, [prompt], new, temperature=0)[0]


def test_what_leads_a_prompt_is_not_penalized_and_what_the_model_no_longer_sees_is(model):
    prompts = [[96, 3, 5, 3], [96, 7, *[8] * CONTEXT]]
    batch = sample.Batch(model, prompts, np.zeros((2, 2), np.float32), VOCAB, SampleConfig())
    assert batch.is_there.nonzero().tolist() == [[0, 3], [0, 5], [1, 7], [1, 8]]


@torch.no_grad()
def test_log_probabilities_are_the_models_own(model):
    settings = SampleConfig(max_new_tokens=8, temperature=2.0, top_k=5, repetition_penalty=3.0, json=True)
    prompt, tokens, logprobs = [1, 2, 3], [], []
    for more in generate(model, [prompt], sample.noise_for(1, 0, 8)[None], VOCAB, settings):
        tokens, logprobs = tokens + more[0][0], logprobs + more[1][0]
    wanted = F.log_softmax(model(torch.tensor([prompt + tokens]))[0], dim=-1)
    assert logprobs == pytest.approx([float(wanted[2 + n, token]) for n, token in enumerate(tokens)], abs=1e-5)


# ---- choosing


def by_the_papers(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> dict[int, float]:
    """The probabilities after all filters, computed token by token."""
    weights = {token: math.exp(logit / temperature) for token, logit in enumerate(logits)}
    order = sorted(weights, key=weights.get, reverse=True)[: top_k or None]
    total, reached, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if reached < top_p:
            kept.append(token)
        reached += weights[token] / total
    kept = [token for token in kept if weights[token] >= min_p * weights[kept[0]]]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.5),
        dict(temperature=3.0),
        dict(top_k=1),
        dict(top_k=3),
        dict(top_k=99),
        dict(top_p=0.3),
        dict(top_p=0.9),
        dict(top_p=1e-9),
        dict(min_p=0.2),
        dict(min_p=1.0),
        dict(top_k=5, top_p=0.7),
        dict(temperature=2.0, top_k=9, top_p=0.8, min_p=0.3),
    ],
)
def test_filters_follow_their_papers(options):
    generator = torch.Generator().manual_seed(0)
    settings = SampleConfig(**(dict(temperature=1.0, top_k=0) | options))
    uniform = (torch.arange(4000) + 0.5) / 4000  # every share of the way once
    for _ in range(5):
        logits = 2 * torch.randn(12, generator=generator)
        shares = torch.bincount(choose(logits.expand(4000, 12), uniform, settings), minlength=12) / 4000
        wanted = by_the_papers(logits.tolist(), **options)
        drawn = set(torch.nonzero(shares).flatten().tolist())
        assert {token for token, share in wanted.items() if share > 1 / 4000} <= drawn <= set(wanted)
        assert shares.tolist() == pytest.approx([wanted.get(token, 0) for token in range(12)], abs=1e-3)


def test_ties_at_the_bounds_of_filters():
    options = dict(temperature=1.0, top_k=0)
    even = choose(torch.zeros(100, 4), torch.arange(100) / 100, SampleConfig(**options, top_p=0.5))
    assert len(set(even.tolist())) == 2  # two of four quarters reach a half
    lowest = choose(torch.tensor([[0.0, 5.0]]), torch.zeros(1), SampleConfig(**options, min_p=0.5))
    assert lowest.tolist() == [1]  # 0 draws nothing that is filtered out


def test_without_temperature_the_likeliest_is_chosen():
    logits = torch.randn(5, 12)
    assert choose(logits, torch.rand(5), SampleConfig(temperature=0)).tolist() == logits.argmax(1).tolist()


def test_transformers_filters_the_same():
    from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

    logits, tokens = 2 * torch.randn(4, 50), torch.randint(50, (4, 9))
    is_there = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, tokens, True)
    assert torch.equal(
        sample.penalize(logits, is_there, 1.7), RepetitionPenaltyLogitsProcessor(1.7)(tokens, logits.clone())
    )
    for ours, theirs in (
        (dict(top_k=7), TopKLogitsWarper(7)),
        (dict(top_p=0.8), TopPLogitsWarper(0.8)),
        (dict(min_p=0.1), MinPLogitsWarper(0.1)),
    ):
        settings = SampleConfig(**(dict(temperature=1.0, top_k=0) | ours))
        drawn = choose(logits.repeat_interleave(2000, 0), ((torch.arange(2000) + 0.5) / 2000).repeat(4), settings)
        for row, kept in enumerate(torch.isfinite(theirs(tokens, logits.clone()))):
            likely = F.softmax(logits[row], 0) > 1 / 1000  # else the even numbers may miss it
            mine = torch.bincount(drawn[row * 2000 : row * 2000 + 2000], minlength=50) > 0
            assert torch.equal(mine[likely], kept[likely])


def test_random_numbers_depend_on_seed_and_sample_alone():
    assert np.array_equal(sample.noise_for(1, 2, 50)[:20], sample.noise_for(1, 2, 20))
    assert not np.array_equal(sample.noise_for(1, 2, 20), sample.noise_for(2, 1, 20))
    assert 0 <= sample.noise_for(1, 0, 10000).min() and sample.noise_for(1, 0, 10000).max() < 1


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-1.0),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(min_p=-0.1),
        dict(min_p=1.1),
        dict(repetition_penalty=0.0),
        dict(num_samples=0),
        dict(batch_size=0),
        dict(max_new_tokens=0),
        dict(stride=-1),
        dict(device="tpu"),
        dict(dtype="float16"),
        dict(interactive=True, prompt="x"),
        dict(prompts="x", prompt="x"),
        dict(score="x", export_hf="x"),
    ],
)
def test_settings_without_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SampleConfig(**options).check()


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_no_setting_is_nan(name):
    result = run("sample.py", f"--{name}=nan")
    assert result.returncode == 2 and name in result.stderr and "Traceback" not in result.stderr


# ---- text

BYTES = prepare_data.load_tokenizer("bytes", None)


def reply_to(text: bytes, ends: bool = False, **options) -> tuple[list[str], sample.Reply]:
    """What is shown, token by token, of bytes that a model says."""
    reply, shown = sample.Reply(BYTES, SampleConfig(**options)), []
    for token in [*text, *([256] if ends else [])]:
        if not reply.ended:
            reply.add(token, -1.0)
            shown.append(reply.news())
    return shown, reply


def test_half_a_character_is_never_printed():
    shown, reply = reply_to("é日".encode() + b"\xe6", ends=True)
    assert shown == ["", "é", "", "", "日", "", "\ufffd"] and reply.ended == "end of text"
    assert "".join(reply_to("x日".encode()[:-1], max_new_tokens=3)[0]) == "x\ufffd"


def test_a_text_to_stop_at_is_not_shown_not_even_its_beginning():
    shown, reply = reply_to(b"one\nUser: two", stop="\\nUser:|###")
    assert shown == ["o", "n", "e", *[""] * 6] and reply.text == "one" and reply.ended == "stop"
    assert "".join(reply_to(b"one\nUs two\nUs", ends=True, stop="\\nUser:")[0]) == "one\nUs two\nUs"
    shown, reply = reply_to(b"ab##c###d", stop="###")
    assert "".join(shown) == reply.text == "ab##c"
    assert reply_to(b"xaab", stop="aab|b")[1].text == "x"
    assert reply_to(b"###x", stop="###")[1].facts()["text"] == ""


def test_an_id_without_a_meaning_says_nothing():
    gap = prepare_data.make_encoding({bytes([byte]): byte for byte in range(256)}, 400, "gap")
    reply = sample.Reply(gap, SampleConfig())
    for token in (97, 300, 98):
        reply.add(token, -1.0)
    assert reply.news() == "ab" and len(reply.tokens) == 3


def test_a_reply_ends_at_its_length_or_at_end_of_text():
    assert reply_to(b"abcdef", max_new_tokens=4)[1].facts()["ended"] == "length"
    facts = reply_to(b"ab", ends=True)[1].facts()
    assert (facts["text"], facts["tokens"], facts["ended"], facts["mean_logprob"]) == ("ab", 2, "end of text", -1.0)
    assert reply_to(b"", ends=True)[1].facts()["mean_logprob"] is None


def test_no_prompt_has_a_character_that_is_unknown():
    assert sample.encode(BYTES, "é\udcff") == [256, *"é\ufffd".encode()]


# ---- the command line


def test_the_command_line_streams_from_the_newest_run(trained):
    result = run("sample.py", f"--out_dir={trained}", "--prompt=Chapter é", "--max_new_tokens=20")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Chapter é") and "tiny" in result.stderr and "step 12" in result.stderr
    again = run("sample.py", f"--checkpoint={trained / 'tiny'}", "--prompt=Chapter é", "--max_new_tokens=20")
    other = run("sample.py", f"--out_dir={trained}", "--prompt=Chapter é", "--max_new_tokens=20", "--seed=2")
    assert again.stdout == result.stdout != other.stdout


def test_a_run_without_a_latest_checkpoint_speaks_from_its_best(trained, tmp_path):
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "best.pt").write_bytes((trained / "tiny" / "best.pt").read_bytes())
    found = sample.newest_checkpoint(SampleConfig(out_dir=str(tmp_path)))
    assert found == tmp_path / "young" / "best.pt"
    assert sample.newest_checkpoint(SampleConfig(out_dir=str(trained))) == trained / "tiny" / "latest.pt"


def test_several_samples_differ_and_do_not_depend_on_the_batch(trained, capsys):
    options = ["--num_samples=3", "--max_new_tokens=30", "--prompt=Chapter"]
    together = speak(trained, capsys, *options).out
    samples = together.split("-" * 20 + "\n")
    assert len(samples) == 3 and len(set(samples)) == 3 and all(text.startswith("Chapter") for text in samples)
    assert speak(trained, capsys, *options, "--batch_size=2").out == together


def test_a_file_of_prompts(trained, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffChapter 1\r\n\r\n  two é\r\n".encode())  # as Windows writes it
    options = ["--max_new_tokens=9", "--temperature=0"]
    text = speak(trained, capsys, f"--prompts={tmp_path / 'prompts.txt'}", *options).out
    assert text == (
        speak(trained, capsys, "--prompt=Chapter 1", *options).out
        + "-" * 20
        + "\n"
        + speak(trained, capsys, "--prompt=  two é", *options).out
    )
    lines = [{"prompt": "Chapter 1", "id": "a"}, {"prompt": ""}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = speak(
        trained, capsys, f"--prompts={tmp_path / 'prompts.jsonl'}", "--json=True", "--num_samples=2", *options
    ).out
    found = [json.loads(line) for line in output.splitlines()]
    assert [(line["id"], line["sample"]) for line in found] == [("a", 0), ("a", 1), (2, 0), (2, 1)]
    assert "Chapter 1" + found[0]["text"] == text.split("\n" + "-" * 20)[0].removesuffix("\n")
    assert found[0]["tokens"] == 9 and found[0]["ended"] == "length"
    assert found[0]["mean_logprob"] < 0 < found[0]["tokens_per_second"]


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"prompt": 3}', '"x"', '{"prompt": "\\ud800"}', '{"prompt":' + "[" * 100000]
)
def test_a_bad_line_of_prompts_is_named(tmp_path, line):
    (tmp_path / "x.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(config.Failure, match="x.jsonl:2"):
        sample.read_prompts(SampleConfig(prompts=str(tmp_path / "x.jsonl")))
    (tmp_path / "one.jsonl").write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")  # a line's end, but not a file's
    assert sample.read_prompts(SampleConfig(prompts=str(tmp_path / "one.jsonl")))[0]["prompt"] == "a\u2028b"
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(config.Failure, match="no prompt"):
        sample.read_prompts(SampleConfig(prompts=str(tmp_path / "empty.txt")))


def test_long_prompts_and_long_answers_say_so(trained, capsys):
    warning = speak(trained, capsys, "--prompt=" + "x" * 50, "--max_new_tokens=2").err
    assert "of the prompt's 51 tokens the model sees the last 32" in warning
    warning = speak(trained, capsys, "--prompt=x", "--max_new_tokens=60", "--temperature=0").err
    assert "past 32 tokens the model goes on from the last 16" in warning
    for prompt, new in (("x" * 31, 1), ("x" * 30, 2)):
        assert "the model" not in speak(trained, capsys, f"--prompt={prompt}", f"--max_new_tokens={new}").err


def test_without_a_checkpoint_it_says_how_to_get_one(tmp_path):
    result = run("sample.py", f"--out_dir={tmp_path}")
    assert result.returncode == 4 and "python train.py config/small.py" in result.stderr
    (tmp_path / "x.pt").write_bytes(b"x")
    result = run("sample.py", f"--checkpoint={tmp_path / 'x.pt'}")
    assert result.returncode == 4 and "is not a checkpoint" in result.stderr and "Traceback" not in result.stderr


def pipe_of(*options, stdout=subprocess.PIPE) -> subprocess.Popen:
    """sample.py with an output that is buffered, as a user's is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "sample.py", "--device=cpu", *options]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE)


@pytest.mark.parametrize("is_scored", [False, True])
def test_a_closed_pipe_ends_quietly(trained, text_file, is_scored):
    process = pipe_of(f"--out_dir={trained}", f"--score={text_file}" if is_scored else "--max_new_tokens=3000")
    if not is_scored:
        process.stdout.read(5)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(60) == 0 and "Error" not in errors and "Broken" not in errors


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_full_disk_is_said(trained):
    with open("/dev/full", "w") as full:
        process = pipe_of(f"--out_dir={trained}", "--max_new_tokens=5", stdout=full)
        errors = process.stderr.read().decode()
    assert process.wait(60) == 6 and "No space left" in errors and "Traceback" not in errors


def test_the_newest_run_speaks(tmp_path):
    for name, when in (("a", 1), ("b", 3), ("c", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latest.pt").write_bytes(b"")
        os.utime(tmp_path / name / "latest.pt", (when, when))
    assert sample.newest_checkpoint(SampleConfig(out_dir=str(tmp_path))).parent.name == "b"


def test_a_loop_goes_on_from_what_was_said_and_an_empty_line_starts_anew(trained, monkeypatch, capsys):
    prompts, encode = [], sample.encode
    monkeypatch.setattr(sample, "encode", lambda tokenizer, text: prompts.append(text) or encode(tokenizer, text))
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nthree\n"))
    output = speak(trained, capsys, "--interactive=True", "--max_new_tokens=5").out
    answers = [line.removeprefix("> ") for line in output.split("> ")][1:]
    assert prompts[0] == "one" and prompts[2] == "three"
    assert prompts[1].startswith("one") and prompts[1].endswith("\ntwo") and len(prompts[1]) > len("one\ntwo")
    assert len(answers) == 5


def test_interrupting_an_answer_goes_back_to_the_prompt(trained, monkeypatch, capsys):
    def interrupted(*arguments):
        [reply] = next(answer(*arguments))
        yield [reply]
        raise KeyboardInterrupt

    answer = sample.answer
    monkeypatch.setattr(sample, "answer", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert speak(trained, capsys, "--interactive=True").out.count("> ") == 3


# ---- scoring


def test_windows_score_each_token_once_with_the_context_stated():
    for count in (1, 5, 10, 11, 14, 37):
        for stride in (1, 3, 10):
            tokens, scored = np.arange(count + 1), []
            for seen, targets in sample.windows_of(tokens, 10, stride):
                assert len(seen) == len(targets) <= 10
                for token, target in zip(seen, targets):
                    if target >= 0:
                        assert target == token + 1
                        assert target == len(scored) + 1 and (seen[0] == 0 or target - seen[0] > 10 - stride)
                        scored.append(target)
            assert scored == list(range(1, count + 1))


@torch.no_grad()
def by_hand(model, tokens, stride) -> float:
    """Nats of a document by whole forwards over each window."""
    total, scored, context = 0.0, 0, model.config.block_size
    while scored < len(tokens) - 1:
        start = max(0, min(scored - context + stride, len(tokens) - 1 - context))
        end = min(start + context, len(tokens) - 1)
        losses = -F.log_softmax(model(torch.tensor([tokens[start:end]]))[0], dim=-1)
        total += sum(float(losses[place - start, tokens[place + 1]]) for place in range(scored, end))
        scored = end
    return total


@pytest.mark.parametrize("stride", [0, 5, CONTEXT, 1000])
def test_scores_equal_those_by_hand(model, stride, monkeypatch):
    monkeypatch.setitem(sample.SCORED_TOKENS, "cpu", 3 * CONTEXT)
    documents = [
        (f"document {n}", np.random.default_rng(n).integers(0, VOCAB, n), 3 * n) for n in (2, 90, 1, 24, 25, 7, 8)
    ]
    scores = sample.score(model, documents, SampleConfig(stride=stride, dtype="float32"))
    assert [score.where for score in scores] == [f"document {n}" for n in (2, 90, 24, 25, 7, 8)]
    for score, (_, tokens, size) in zip(scores, [document for document in documents if len(document[1]) > 1]):
        assert score.nats == pytest.approx(
            by_hand(model, tokens.tolist(), min(stride or CONTEXT // 2, CONTEXT)), rel=1e-5
        )
        assert (score.tokens, score.bytes) == (len(tokens) - 1, size)


def test_figures_and_their_errors():
    scores = [sample.Score(f"{n}", n, 2 * n, n * loss) for n, loss in ((10, 1.0), (20, 2.0), (30, 4.0))]
    found = sample.summarize(scores)
    loss, error = found["nats_per_token"]
    assert loss == pytest.approx(170 / 60) and found["bits_per_byte"][0] == pytest.approx(170 / 120 / math.log(2))
    wanted = math.sqrt(sum((n * (value - loss)) ** 2 for n, value in ((10, 1), (20, 2), (30, 4))) * 3 / 2) / 60
    assert error == pytest.approx(wanted) and found["perplexity"] == pytest.approx(
        (math.exp(loss), math.exp(loss) * error)
    )
    assert [one["where"] for one in found["worst"]] == ["30", "20", "10"]
    scores = [sample.Score("long", 1000, 1000, 1000.0), sample.Score("short", 10, 10, 50.0)]
    assert [one["where"] for one in sample.summarize(scores)["worst"]] == ["short", "long"]
    assert sample.summarize(scores[:1])["nats_per_token"] == (1.0, None)


def test_a_standard_error_is_that_of_repeated_draws():
    generator, means, errors = np.random.default_rng(0), [], []
    for _ in range(400):
        sizes = generator.integers(5, 100, 60)
        mean, error = sample.ratio(list(sizes * (3 + generator.normal(size=60))), list(sizes))
        means.append(mean)
        errors.append(error)
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.15)


def test_text_and_datasets_score_from_the_command_line(trained, data_dir, text_file, capsys):
    found = json.loads(speak(trained, capsys, f"--score={text_file}", "--json=True").out)
    assert found["documents"] == 40 and len(found["worst"]) == 10 and str(text_file) in found["worst"][0]["where"]
    split = json.loads(speak(trained, capsys, f"--score={data_dir / 'tiny'}:train", "--json=True").out)
    held_out = json.loads(speak(trained, capsys, f"--score={data_dir / 'tiny'}", "--json=True").out)
    assert split["documents"] + held_out["documents"] >= 40
    assert (
        split["tokens"] + held_out["tokens"] == found["tokens"] and split["bytes"] + held_out["bytes"] == found["bytes"]
    )
    text = speak(trained, capsys, f"--score={text_file}").out
    assert f"{found['nats_per_token'][0]:.4f} ± " in text and "perplexity" in text and "bits per byte" in text


def test_a_long_context_makes_no_large_batch_of_short_documents(monkeypatch):
    long, shapes = make_model(GPTConfig("qwen3", 97, block_size=8192, n_layer=1, n_head=2, n_embd=16)), []
    forward = long.forward
    monkeypatch.setattr(
        long, "forward", lambda tokens, *rest, **more: shapes.append(tokens.shape) or forward(tokens, *rest, **more)
    )
    documents = [("", np.arange(n) % VOCAB, n) for n in [100] * 100 + [5000]]
    assert len(sample.score(long, documents, SampleConfig(dtype="float32"))) == 101
    assert (1, 4999) in shapes and max(rows * length for rows, length in shapes if rows > 1) <= 2048


def test_documents_are_scored_as_they_come(model, monkeypatch):
    class Stop(Exception):
        """The first forward."""

    def documents():
        for _ in range(2000):
            taken.append(1)
            yield "", np.arange(CONTEXT + 1), 1

    taken, refuse = [], lambda *_, **__: (_ for _ in ()).throw(Stop)
    monkeypatch.setitem(sample.SCORED_TOKENS, "cpu", CONTEXT)
    monkeypatch.setattr(GPT, "forward", refuse)
    with pytest.raises(Stop):
        sample.score(model, documents(), SampleConfig(dtype="float32"))
    assert 60 <= len(taken) <= 66


def test_bfloat16_computes_where_it_is_asked_for(trained, model, monkeypatch):
    found = []
    monkeypatch.setattr(sample, "speak", lambda model, *_: found.append(model.wte.weight.dtype))
    for dtype in ("float32", "bfloat16"):
        sample.main(SampleConfig(out_dir=str(trained), device="cpu", dtype=dtype))
    assert found == [torch.float32, torch.bfloat16]
    document = ("", np.random.default_rng(1).integers(0, VOCAB, 90), 1)
    full, half = (sample.score(model, [document], SampleConfig(dtype=kind))[0].nats for kind in ("float32", "bfloat16"))
    assert full != half == pytest.approx(full, rel=1e-2)


def test_a_model_and_a_dataset_that_are_no_pair_are_refused(trained, text_file, tmp_path, capsys):
    other = prepare_data.PrepareConfig(name="x", source=str(text_file), tokenizer="bpe:300", data_dir=str(tmp_path))
    prepare_data.prepare(other)
    with pytest.raises(config.Failure, match="another tokenizer"):
        speak(trained, capsys, f"--score={tmp_path / 'x'}")


def test_what_cannot_be_scored_is_refused(trained, data_dir, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    for path, message in (
        (tmp_path / "none.txt", "none.txt"),
        (f"{data_dir / 'tiny'}:test", "train, val"),
        (tmp_path / "empty.txt", "empty.txt"),
    ):
        with pytest.raises((config.Failure, OSError), match=message):
            speak(trained, capsys, f"--score={path}")


# ---- Hugging Face


@pytest.fixture(scope="module", params=KINDS)
def exported(request, data_dir, tmp_path_factory):
    """A Hugging Face folder of a tiny model, beside its run."""
    folder = tmp_path_factory.mktemp("exported")
    assert tiny_run(data_dir, folder / "run", *KINDS[request.param]).returncode == 0
    sample.main(SampleConfig(out_dir=str(folder), export_hf=str(folder / "hf")))
    return folder / "hf"


@torch.no_grad()
def test_transformers_continues_an_export_the_same_way(exported, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer("Chapter é").input_ids]])
    new = 32 - tokens.size(1)
    found = theirs.generate(tokens, max_new_tokens=new, do_sample=False)[0, tokens.size(1) :]
    text = tokenizer.decode(found, skip_special_tokens=True)
    options = ["--prompt=Chapter é", "--temperature=0", f"--max_new_tokens={new}"]
    assert speak(exported.parent, capsys, *options).out == f"Chapter é{text}\n"
    assert speak(exported, capsys, f"--checkpoint={exported}", *options).out == f"Chapter é{text}\n"


@torch.no_grad()
def test_transformers_scores_an_export_the_same(exported, text_file, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    found = json.loads(speak(exported, capsys, f"--checkpoint={exported}", f"--score={text_file}", "--json=True").out)
    nats, count = 0.0, 0
    for line in text_file.read_text().splitlines():
        tokens = [tokenizer.bos_token_id, *tokenizer(json.loads(line)["text"]).input_ids]
        for seen, targets in sample.windows_of(np.array(tokens), 32, 16):
            logits = theirs(torch.from_numpy(seen)[None]).logits[0]
            nats += float(F.cross_entropy(logits, torch.from_numpy(targets), ignore_index=-1, reduction="sum"))
        count += len(tokens) - 1
    assert found["tokens"] == count and found["nats_per_token"][0] == pytest.approx(nats / count, abs=1e-4)


def test_an_export_names_its_end_of_text_and_fits_its_tokenizer(exported, tmp_path):
    facts = json.loads((exported / "config.json").read_text())
    assert facts["bos_token_id"] == facts["eos_token_id"] == 256
    small = tmp_path / "small"
    shutil.copytree(exported, small)
    tokenizer = json.loads((small / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["id"] = tokenizer["model"]["vocab"]["<|endoftext|>"] = 300
    (small / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(config.Failure, match="no pair"):
        sample.main(SampleConfig(checkpoint=str(small)))


def test_an_export_in_bfloat16_has_half_the_size_and_overwrites_nothing(exported, tmp_path):
    half = SampleConfig(out_dir=str(exported.parent), export_hf=str(tmp_path / "half"), dtype="bfloat16")
    sample.main(half)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (exported, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]
    with pytest.raises(config.Failure, match="is there already"):
        sample.main(half)


def test_a_folder_without_a_tokenizer_and_a_run_that_is_not_there(exported, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((exported / name).read_bytes())
    with pytest.raises(config.Failure, match="tokenizer.json"):
        sample.main(SampleConfig(checkpoint=str(bare)))
    with pytest.raises(config.Failure) as failure:
        sample.main(SampleConfig(checkpoint=str(tmp_path / "none")))
    assert failure.value.code == 4


# ---- GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [{}, GROUPED | dict(arch="qwen3")], ids=["gpt2", "qwen3"])
def test_the_graph_equals_the_plain_forward(compiled, shape):
    model = make_model(GPTConfig(vocab_size=VOCAB, block_size=64, n_layer=2, n_head=2, n_embd=64, **shape)).cuda()
    prompts = [[5, 6, 7], [9], list(range(40)), [5, 6, 7]]
    for options in (dict(temperature=0), dict(temperature=1.0, top_k=20, top_p=0.9, min_p=0.01)):
        rows = decode(model, prompts, 100, samples=[0, 1, 2, 3], compile=compiled, **options)
        for number, (row, prompt) in enumerate(zip(rows, prompts)):
            assert row == plainly(model, prompt, 100, sample.noise_for(1337, number, 100), **options)


@pytest.mark.gpu
def test_compiled_scores_equal_plain_ones():
    model = make_model(GPTConfig(vocab_size=VOCAB, block_size=64, n_layer=2, n_head=2, n_embd=64)).cuda()
    documents = [("", np.random.default_rng(n).integers(0, VOCAB, n), n) for n in (200, 3, 64, 65, 1000)]
    plain, compiled = (
        sample.score(model, documents, SampleConfig(dtype="float32", compile=compile)) for compile in (False, True)
    )
    for one, other in zip(plain, compiled):
        assert one.nats == pytest.approx(other.nats, rel=1e-4)
        assert (
            one.nats == pytest.approx(by_hand(model.cpu(), documents[0][1].tolist(), 32), rel=1e-4) or one.tokens != 199
        )
        model.cuda()
