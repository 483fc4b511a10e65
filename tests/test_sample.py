"""Properties of decoding: the cache, the filters, the edges of the context, and the command line."""

import math

import pytest
import torch
from conftest import run, tiny_run

import sample
from model import GPT, GPTConfig
from sample import KVCache, choose, generate

VOCAB = 97


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=VOCAB, block_size=24, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A folder of runs with one tiny model in it."""
    out_dir = tmp_path_factory.mktemp("out")
    assert tiny_run(data_dir, out_dir / "tiny").returncode == 0
    return out_dir


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[24], [1] * 24, [10, 1, 1, 1, 1, 10], [5, 9, 10]])
def test_cached_logits_equal_the_full_forward(model, pieces):
    tokens = torch.randint(VOCAB, (3, 24))
    full, cache, done = model(tokens), KVCache(model.config, 3, 24, tokens.device), 0
    for piece in pieces:
        logits = model(tokens[:, done : done + piece], cache=cache)
        done += piece
        assert logits.shape == (3, 1, VOCAB)
        assert torch.allclose(logits[:, 0], full[:, done - 1], atol=1e-5)


@torch.no_grad()
def test_greedy_text_equals_the_uncached_one(model):
    tokens = [5, 6, 7]
    found = list(generate(model, tokens, 21, lambda logits: int(logits.argmax()), end_of_text=-1))
    for token in found:
        assert token == int(model(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
    assert len(tokens) == 24


@torch.no_grad()
def test_past_the_context_it_goes_on_from_the_second_half(model):
    tokens = list(range(20))
    found = list(generate(model, tokens, 40, lambda logits: int(logits.argmax()), end_of_text=-1))
    seen = tokens
    for token in found:
        assert token == int(model(torch.tensor([seen]))[0, -1].argmax())
        seen = (seen if len(seen) < 24 else seen[-11:]) + [token]
    assert len(found) == 40


def test_of_a_long_prompt_the_model_sees_the_end(model):
    seen = []
    for tokens in (list(range(90)), list(range(66, 90)), list(range(24))):
        list(generate(model, tokens, 1, lambda logits: seen.append(logits) or 0, -1))
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(seen[0], seen[2])


def test_it_stops_at_end_of_text(model):
    script = iter([3, 4, 96, 5])
    assert list(generate(model, [1], 10, lambda logits: next(script), end_of_text=96)) == [3, 4]


def test_padded_entries_are_never_sampled(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]]))[0, -1]
    drawn = {choose(logits, 100.0, 0, 1.0, generator) for _ in range(3000)}
    assert max(drawn) < VOCAB and len(drawn) == VOCAB


def frequencies(logits, temperature=1.0, top_k=0, top_p=1.0, draws=4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([choose(logits, temperature, top_k, top_p, generator) for _ in range(draws)])
    return torch.bincount(drawn, minlength=len(logits)) / draws


@pytest.mark.parametrize(
    "options, wanted",
    [
        (dict(), [0.1, 0.4, 0.2, 0.3]),
        (dict(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (dict(temperature=0.0), [0, 1, 0, 0]),
        (dict(top_k=1), [0, 1, 0, 0]),
        (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_k=99), [0.1, 0.4, 0.2, 0.3]),
        (dict(top_p=0.3), [0, 1, 0, 0]),
        (dict(top_p=0.69), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (dict(top_k=3, top_p=0.7), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_p=1e-9), [0, 1, 0, 0]),
    ],
)
def test_filters_follow_their_definitions(options, wanted):
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log() + 3
    assert frequencies(logits, **options).tolist() == pytest.approx(wanted, abs=0.03)
    assert all((share == 0) == (want == 0) for share, want in zip(frequencies(logits, **options), wanted))


def test_the_command_line_streams_from_the_newest_run(trained, data_dir, tmp_path):
    result = run("sample.py", f"--out_dir={trained}", "--prompt=Chapter é", "--max_new_tokens=20")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Chapter é") and "tiny" in result.stderr and "step 12" in result.stderr
    again = run("sample.py", f"--checkpoint={trained / 'tiny'}", "--prompt=Chapter é", "--max_new_tokens=20")
    other = run("sample.py", f"--out_dir={trained}", "--prompt=Chapter é", "--max_new_tokens=20", "--seed=2")
    assert again.stdout == result.stdout != other.stdout


def test_a_run_without_a_latest_checkpoint_speaks_from_its_best(trained, tmp_path):
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "best.pt").write_bytes((trained / "tiny" / "best.pt").read_bytes())
    found = sample.newest_checkpoint(sample.SampleConfig(out_dir=str(tmp_path)))
    assert found == tmp_path / "young" / "best.pt"
    assert sample.newest_checkpoint(sample.SampleConfig(out_dir=str(trained))) == trained / "tiny" / "latest.pt"


def test_several_samples_differ(trained):
    result = run("sample.py", f"--out_dir={trained}", "--num_samples=3", "--max_new_tokens=30")
    samples = result.stdout.split("-" * 20)
    assert len(samples) == 3 and len(set(samples)) == 3


def test_long_prompts_and_long_answers_say_so(trained):
    result = run("sample.py", f"--out_dir={trained}", "--prompt=" + "x" * 50, "--max_new_tokens=2")
    assert "of the prompt's 51 tokens the model sees the last 32" in result.stderr
    result = run("sample.py", f"--out_dir={trained}", "--prompt=x", "--max_new_tokens=60", "--temperature=0")
    assert "past 32 tokens the model goes on from the last 16" in result.stderr


def test_without_a_checkpoint_it_says_how_to_get_one(tmp_path):
    result = run("sample.py", f"--out_dir={tmp_path}")
    assert result.returncode == 4 and "python train.py config/small.py" in result.stderr
    (tmp_path / "x.pt").write_bytes(b"x")
    result = run("sample.py", f"--checkpoint={tmp_path / 'x.pt'}")
    assert result.returncode == 4 and "is not a checkpoint" in result.stderr and "Traceback" not in result.stderr


def test_half_a_character_is_never_printed(trained, monkeypatch, capsys):
    letters = iter([*"é".encode(), *"日".encode(), 0xE6, 256])
    monkeypatch.setattr(sample, "choose", lambda *_: next(letters))
    shown = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: shown.append("".join(text)))
    sample.main(sample.SampleConfig(out_dir=str(trained), device="cpu", max_new_tokens=9))
    assert [text for text in shown[1:] if text] == ["é", "日", "\ufffd"]


def test_the_cache_keeps_its_shape(model):
    cache = KVCache(model.config, 1, 24, torch.device("cpu"))
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), cache=cache)
        before = cache.k.data_ptr()
        model(torch.tensor([[4]]), cache=cache)
    assert cache.k.data_ptr() == before and cache.k.shape == (2, 1, 2, 24, 16) and cache.held == 4
    assert cache.mask.tolist() == [[True] * 4 + [False] * 20] and math.prod(cache.mask.shape) == 24
