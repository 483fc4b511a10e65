"""Weights in Hugging Face's layout: the same logits here and in transformers, both ways."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import QWEN3, SHAPES, full_disk, make_model, random_tokens, refused

import hf

safetensors = pytest.importorskip("safetensors.torch")
DERIVED = dict(arch="qwen3", n_embd=48)  # sizes that the config leaves at 0
shapes = pytest.mark.parametrize("shape", [*SHAPES.values(), DERIVED], ids=[*SHAPES, "derived"])


def edit_config(folder: Path, **changes):
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))


def split(folder: Path, rename=lambda name: name, dtype=torch.float32, extra=(), without=()):
    """Replace the folder's model.safetensors by two files and an index, changed as asked."""
    state = safetensors.load_file(folder / "model.safetensors") | dict(extra)
    state = {rename(name): t.to(dtype) for name, t in state.items() if name not in without}
    weight_map = {}
    for number in range(2):
        part = {name: state[name] for name in sorted(state)[number::2]}
        safetensors.save_file(part, folder / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def test_a_gpt2_of_transformers_loads_here(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, n_positions=24, n_layer=2, n_head=2, n_embd=32)
    config = transformers.GPT2Config(**sizes, initializer_range=0.3)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(2, 24)
    assert torch.allclose(hf.load(tmp_path).eval().logits(tokens), theirs(tokens).logits, atol=1e-4)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("rope", [{}, {"rope_theta": 1e6}])
def test_a_qwen3_of_transformers_loads_here(tmp_path, is_tied, rope):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, max_position_embeddings=24, num_hidden_layers=2, hidden_size=32)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=40)
    sizes |= dict(tie_word_embeddings=is_tied, initializer_range=0.3, **rope)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes)).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(hf.weight_files(tmp_path)) > 2 and hf.is_complete(tmp_path)
    tokens, ours = random_tokens(2, 24), hf.load(tmp_path).eval()
    assert torch.allclose(ours.logits(tokens), theirs(tokens).logits, atol=1e-4)
    assert ours.config.tie_embeddings == is_tied
    assert ours.config.rope_theta == rope.get("rope_theta", 10000.0)
    theta = ours.config.rope_theta  # where transformers wrote it before version 5
    edit_config(tmp_path, rope_parameters=None, rope_theta=theta)
    assert torch.equal(hf.load(tmp_path).eval().logits(tokens), ours.logits(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_split_files_load_in_any_type_with_and_without_prefix(tmp_path, dtype, prefix):
    ours = make_model()
    hf.save(ours, tmp_path, 96)
    ignored = {"transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24)}  # in older files
    ignored |= {"transformer.h.0.attn.masked_bias": torch.ones(())}
    ignored |= {"lm_head.weight": ours.wte.weight[:97].detach().clone()}  # the tied head
    split(tmp_path, lambda name: name.replace("transformer.", prefix), dtype, ignored)
    wanted = dict(ours.named_parameters())
    for name, weight in hf.load(tmp_path).named_parameters():
        rows = 97 if name == "wte.weight" else None
        assert weight.dtype == torch.float32
        assert torch.equal(weight[:rows], wanted[name][:rows].to(dtype).float()), name


@pytest.mark.parametrize("shape", ["gpt2", "tied"])
def test_a_tied_head_has_either_name(tmp_path, shape):
    """As safetensors' save_model writes it, which keeps one of the two names."""
    ours = make_model(**SHAPES[shape])
    hf.save(ours, tmp_path, 96)
    split(tmp_path, lambda name: "lm_head.weight" if name in hf.EMBEDDINGS else name)
    assert torch.equal(hf.load(tmp_path).wte.weight[:97], ours.wte.weight[:97])


@shapes
def test_a_folder_of_ours_loads_in_transformers_and_here(tmp_path, shape):
    transformers = pytest.importorskip("transformers")
    ours, tokens = make_model(**shape), random_tokens(2, 24)
    hf.save(ours, tmp_path, 96)
    assert hf.is_complete(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if "arch" in shape else "GPT2LMHeadModel")
    again = hf.load(tmp_path, dropout=0.5).eval()
    assert again.config.dropout == 0.5
    assert torch.allclose(ours.logits(tokens), theirs(tokens).logits, atol=1e-4)
    assert torch.allclose(ours.logits(tokens), again.logits(tokens), atol=1e-6)
    assert not again.lm_head.weight[97:].any()  # the padding, which the memory's garbage would fill
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == names


def test_an_export_in_bf16_says_so(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = make_model()
    hf.save(ours, tmp_path, 5, torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    assert not any(value for name, value in vars(theirs.config).items() if name.endswith("_pdrop"))
    assert theirs.generation_config.eos_token_id == theirs.config.bos_token_id == 5
    assert torch.equal(theirs.transformer.wte.weight, ours.wte.weight[:97].bfloat16())


def test_an_export_that_fails_leaves_what_was_there(tmp_path):
    hf.save(make_model(), tmp_path, 96)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(50_000), pytest.raises(OSError, match="is the disk full"):
        hf.save(make_model(), tmp_path, 96)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


YARN = {"rope_type": "yarn", "factor": 4.0}
CHANGES = [
    ({"model_type": "llama"}, "model_type 'llama' is not supported, only gpt2 and qwen3"),
    ({"model_type": []}, r"model_type \[\] is not supported"),
    ({"model_type": None}, "model_type None is not supported"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types other than"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config {'quant_method"),
    ({"rope_parameters": 3}, "RoPE 3 is not supported"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 is not supported"),
    ({"rope_scaling": YARN}, "rope_scaling {'rope_type': 'yarn"),
    ({"rope_parameters": YARN | {"rope_theta": 1e6}}, "RoPE .*yarn"),
    ({"rope_theta": None}, "RoPE {'rope_theta': None} is not supported"),
    ({"rope_theta": float("nan")}, "rope_theta is nan and must be at least 1"),
    ({"num_key_value_heads": None}, "sizes must be whole numbers above 0"),
    ({"num_key_value_heads": 3}, "n_head 4 must be a multiple of n_kv_head 3"),
]


@pytest.mark.parametrize("change, message", CHANGES)
def test_a_config_that_is_not_supported_is_refused(tmp_path, change, message):
    hf.save(make_model(**QWEN3), tmp_path, 96)
    edit_config(tmp_path, **change)
    refused(f"{tmp_path}/config.json: .*{message}", hf.load, tmp_path)


def test_a_folder_that_is_damaged_is_refused(tmp_path):
    hf.save(make_model(), tmp_path, 96)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    refused("model.safetensors is damaged", hf.load, tmp_path)
    path.unlink()
    assert not hf.is_complete(tmp_path)
    (tmp_path / "config.json").write_text("[")
    refused("config.json is damaged", hf.load, tmp_path)
    (tmp_path / "config.json").unlink()
    assert not hf.is_complete(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    name, other = (f"transformer.h.{layer}.ln_1.weight" for layer in (1, 2))
    head = {"lm_head.weight": torch.ones(97, 32)}
    for changes, message in (
        (dict(extra={other: torch.ones(32)}), "h.2.ln_1.weight is no weight"),
        (dict(extra={"score.weight": torch.ones(32)}), "score.weight is no weight of the model"),
        (dict(extra=head), "transformer.wte.weight is stored twice, as two tensors"),
        (dict(without=[name]), f"lacks 1 of .*: {name}"),
        (dict(extra={name: torch.ones(33)}), r"has shape \[33\], the model \[32\]"),
        (dict(dtype=torch.int8), "is torch.int8; float32, bfloat16, float16 are supported"),
    ):
        hf.save(make_model(), tmp_path, 96)
        split(tmp_path, **changes)
        refused(message, hf.load, tmp_path)


def test_an_index_names_files_beside_it_that_exist(tmp_path):
    hf.save(make_model(), tmp_path, 96)
    split(tmp_path)
    assert hf.is_complete(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    assert not hf.is_complete(tmp_path)
    outside = "../model-0.safetensors", "/model-0.safetensors", "model.bin", 3
    for name in outside:
        (tmp_path / hf.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        refused("and not a .safetensors file beside it", hf.load, tmp_path)
    (tmp_path / hf.INDEX).write_text('{"weight_map": ["a"]}')
    refused("has no object weight_map", hf.load, tmp_path)
