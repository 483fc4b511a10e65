"""What a plan counts and estimates, against the tensors of a model that trains."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from conftest import QWEN3, make_model, random_tokens, refused, run_inside, tiny_arguments, write

import hardware
import plan
import train
from model import GPT, GPTConfig

MODES = ("off", "selective", "full")
CHOSEN = dict(optimizer="adamw", micro_batch_size=2, block_size=512, dtype="bfloat16")


def kept_bytes(model: GPT, tokens: torch.Tensor) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward pass, but parameters."""
    storages, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x  # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(tokens, tokens)
    return sum(x.untyped_storage().nbytes() for key, x in storages.items() if key not in own)


SLOW = [pytest.param("model", dtype, marks=pytest.mark.slow) for dtype in ("bfloat16", "float8")]


@pytest.mark.parametrize("compiled, dtype", [("off", "bfloat16"), *SLOW])
@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("shape", [{}, QWEN3 | dict(head_size=32)], ids=["gpt2", "qwen3"])
def test_activations_grow_by_layer_as_estimated(shape, recompute, compiled, dtype):
    if dtype == "float8":
        pytest.importorskip("torchao")
    found, estimated = [], []
    for n_layer in (2, 6):
        sizes = dict(n_layer=n_layer, n_embd=128, n_head=4, block_size=512)
        model = make_model(**shape | sizes | dict(intermediate_size=352 if shape else 0))
        hardware.set_dtype(model, dtype, torch.device("cpu"))
        model.activation_checkpointing = recompute
        if compiled == "model":
            torch._dynamo.reset()
            model.compile()
        settings = CHOSEN | dict(compile=compiled, activation_checkpointing=recompute, dtype=dtype)
        estimated.append(plan.activation_bytes(model, settings))
        found.append(kept_bytes(model, random_tokens(2, 512)))
    assert estimated[1] - estimated[0] == pytest.approx(found[1] - found[0], rel=0.16)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_moments_are_counted_exactly(optimizer):
    model, tokens = make_model(**QWEN3), random_tokens(2, 24)
    model(tokens, tokens).mean().backward()
    optimizers = train.make_optimizers(model, train.TrainConfig(optimizer=optimizer))
    for one in optimizers:
        one.step()
    states = [state for one in optimizers for state in one.state.values()]
    moments = [x for state in states for name, x in state.items() if name != "step"]
    settings = asdict(train.TrainConfig(optimizer=optimizer, block_size=24, micro_batch_size=2))
    counted = plan.memory(model, settings, count=1)
    tensors = {"weights": [*model.parameters()], "moments": moments}
    tensors["gradients"] = [parameter.grad for parameter in model.parameters()]
    for name, group in tensors.items():
        assert counted[name] == sum(x.nbytes for x in group), name
    halves = plan.memory(model, settings | dict(parallel="fsdp"), count=2)
    assert all(2 * halves[name] == counted[name] for name in tensors)


def planned(arguments: list[str]):
    return run_inside(train.main, train.TrainConfig, [*arguments, "--plan=True"])


def test_a_plan_makes_nothing_and_warns(data_dir, tmp_path):
    arguments = tiny_arguments(data_dir, tmp_path / "run")
    result = planned([*arguments, "--max_steps=10000"])
    assert result.returncode == 0 and not (tmp_path / "run").exists(), result.stderr
    for text in ("vocabulary of 257\n", "epochs of", "2 sequences of 32 x 4 micro-steps x 1 CPU"):
        assert text in result.stdout
    assert (
        "fifth epoch" in result.stdout
        and "no estimate, as a CPU has no known peak in float32" in result.stdout
    )
    card = ["--device=auto", "--dtype=auto", "--plan_gpus=3 x A100 40GB", "--dataset=nothing"]
    result = planned([*arguments, *card, "--n_embd=8192", "--n_layer=40"])
    assert "a multiple of block_size x micro_batch_size x 3 = 192" in result.stdout
    assert "A100 40GB has 40.00 GiB; --micro_batch_size=1 or --act" in result.stdout
    assert "hours at 40% of 936 TFLOP/s" in result.stdout and "(assumed)" in result.stdout
    for mixture in ("tiny:3,nothing:1", "nothing:1,tiny:3"):
        printed = planned([*arguments, f"--dataset={mixture}"]).stdout
        assert "epochs of" in printed and "nothing has no manifest.json" in printed
        assert "vocabulary of 257\n" in printed
    manifest = json.loads((data_dir / "tiny" / "manifest.json").read_text())
    folder = shutil.copytree(data_dir / "tiny", tmp_path / "changed")
    manifest["tokenizer"]["vocab_size"] = "a"  # not used: a run asks the tokenizer
    write(folder / "manifest.json", json.dumps(manifest))
    assert "vocabulary of 257\n" in planned([*arguments, f"--dataset={folder}"]).stdout
    result = planned(["--init_from=gpt2"])
    assert result.returncode == 2 and "gpt2 has its own shape" in result.stderr


@pytest.mark.parametrize(
    "card, parallel, chosen",
    [
        ("", "ddp", "CPU; bfloat16, compile off"),  # one with units for it
        ("2 x A100 40GB", "ddp", "2 A100 40GB; bfloat16, compile model"),
        ("V100-SXM2 32GB", "ddp", "1 V100-SXM2 32GB; float16, compile model"),
        ("2 x H100 80GB", "fsdp", "2 H100 80GB; bfloat16, compile blocks"),
    ],
)
def test_a_plan_chooses_what_a_run_would(monkeypatch, card, parallel, chosen):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = [f"--plan_gpus={card}", f"--parallel={parallel}", "--micro_batch_size=1"]
    assert chosen in planned([*options, "--dataset=nothing"]).stdout


@pytest.mark.parametrize("text", ["0 x H100 80GB", "8", "H100\n80GB"])
def test_what_are_no_gpus_is_refused(text):
    refused("is not like", plan.find_gpus, text, "auto")


def test_rules_at_sizes_that_their_papers_name():
    """DeepSeek LLM 7B: 2T tokens, about 4.2e-4 and 9.4M tokens a step (table 2 there)."""
    shape = dict(arch="qwen3", n_layer=30, n_head=32, n_embd=4096, block_size=4096)
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape, vocab_size=102400, tie_embeddings=False))
    settings = asdict(train.TrainConfig(block_size=4096))
    text = "\n".join(plan.rule_lines(model, settings, 2 * 10**12))
    batch, _, rate = text.split("choose\n  ")[1].split(":")[0].split()
    assert int(batch.replace(",", "")) == pytest.approx(9.4e6, rel=0.1)
    assert float(rate) == pytest.approx(4.2e-4, rel=0.05)
    assert text.count("outside") == 2 and "compute is used best at about 20" in text


def test_a_plan_for_a_cpu_is_one_also_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert plan.find_gpus("", "cpu")[1] == ""
