"""Properties of the model."""

import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import run

import prepare_data
from model import GPT, GPTConfig, load_hf, save_hf

SHAPE = dict(vocab_size=97, block_size=24, n_layer=2, n_head=2, n_embd=32)
QWEN3 = dict(arch="qwen3", n_head=4, n_kv_head=2, head_size=16, intermediate_size=40)  # no two widths are equal
both = pytest.mark.parametrize("shape", [{}, QWEN3, QWEN3 | dict(tie_embeddings=False)], ids=["gpt2", "tied", "untied"])


def make_model(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | changes))
    with torch.no_grad():  # the fresh weights are so small that much of what could go wrong would hide
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def some_tokens(*shape) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


@both
def test_later_tokens_change_no_earlier_logit(shape):
    model, tokens = make_model(**shape).eval(), some_tokens(2, 24)
    logits = model(tokens)
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % SHAPE["vocab_size"]
    assert torch.equal(model(changed)[:, :15], logits[:, :15])
    assert not torch.equal(model(changed)[:, 15:], logits[:, 15:])


@both
def test_each_logit_depends_on_every_token_up_to_its_own(shape):
    model, tokens = make_model(**shape).eval(), some_tokens(1, 24)
    embedded = model.wte(tokens).detach().requires_grad_()
    model.wte.register_forward_hook(lambda module, inputs, output: embedded)
    (gradient,) = torch.autograd.grad(model(tokens)[0, 10].square().sum(), embedded)
    reached = gradient[0].abs().sum(-1) > 0
    assert reached.tolist() == [True] * 11 + [False] * 13


@pytest.mark.parametrize("shape", [dict(bias=True), dict(bias=False), QWEN3, QWEN3 | dict(tie_embeddings=False)])
def test_loss_at_initialisation_is_that_of_a_guess(shape):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(vocab_size=1000, block_size=64, n_layer=4, n_head=4, n_embd=64) | shape))
    tokens = torch.randint(1000, (8, 65))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    assert abs(loss.item() - math.log(1000)) < 0.1


def test_initial_scales():
    model = GPT(GPTConfig(vocab_size=1000, block_size=64, n_layer=8, n_head=4, n_embd=256))
    for name, parameter in model.named_parameters():
        wanted = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # 4 is the root of 2 x 8 additions to the stream
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name
        else:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name


def test_qwen3_starts_as_the_identity_and_every_weight_gets_a_gradient_soon():
    shape = SHAPE | QWEN3 | dict(tie_embeddings=False)
    model, tokens = GPT(GPTConfig(**shape)), some_tokens(4, 24)
    for name, parameter in model.named_parameters():
        if name.endswith(("c_proj.weight", "lm_head.weight")):
            assert not parameter.any(), name
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert (parameter == 1).all(), name
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):  # the head moves in the first step, then what feeds it, then the rest
        optimizer.zero_grad()
        model(tokens, tokens).backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in model.parameters())


@both
def test_loss_is_the_cross_entropy_of_the_logits(shape):
    model, tokens = make_model(**shape), some_tokens(3, 25)
    targets = tokens[:, 1:].clone()
    targets[0, :20] = -1  # not asked
    logits = model(tokens[:, :-1])
    wanted = F.cross_entropy(logits.reshape(-1, 97)[20:], targets.reshape(-1)[20:])
    assert torch.allclose(model(tokens[:, :-1], targets), wanted, atol=1e-6)


@both
def test_padding_of_the_vocabulary_counts_for_nothing(shape):
    model, tokens = make_model(**shape), some_tokens(2, 24)
    assert model.wte.weight.shape == (128, 32)  # 97, padded
    assert model(tokens).shape == (2, 24, 97)
    before = model(tokens, tokens).item()
    with torch.no_grad():
        model.wte.weight[97:] = model.lm_head.weight[97:] = 100.0
    loss = model(tokens, tokens)
    assert loss.item() == before
    loss.backward()
    assert (model.wte.weight.grad[97:] == 0).all() and (model.lm_head.weight.grad[97:] == 0).all()


@both
def test_many_logits_are_computed_in_parts(shape, monkeypatch):
    tokens, sizes, plain, results = some_tokens(2, 24), [], GPT.cross_entropy, []
    monkeypatch.setattr(GPT, "cross_entropy", lambda self, x, y: sizes.append(len(x)) or plain(self, x, y))
    targets = torch.where(torch.arange(24) < 7, -1, tokens.roll(-1, 1))
    for at_once in (48 * 128 + 1, 48 * 128 // 3):
        monkeypatch.setattr("model.LOGITS_AT_ONCE", at_once)
        model = make_model(**shape)
        loss = model(tokens, targets)
        loss.backward()
        results.append([loss, model(tokens, targets, reduction="none"), *(p.grad for p in model.parameters())])
    assert sizes == [48] * 2 + [12] * 8
    assert all(torch.allclose(whole, in_parts, atol=1e-6) for whole, in_parts in zip(*results))


@both
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_no_gradient(dropout, shape):
    gradients = []
    for activation_checkpointing in (False, True):
        model = make_model(dropout=dropout, **shape)
        model.activation_checkpointing = activation_checkpointing
        torch.manual_seed(2)
        model(some_tokens(2, 24), some_tokens(2, 24)).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients))


@both
def test_activation_checkpointing_keeps_less(shape):
    kept = []
    for activation_checkpointing in (False, True):
        model, sizes = make_model(**shape | dict(n_layer=4)), []
        model.activation_checkpointing = activation_checkpointing
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # noqa: B023
            model(some_tokens(2, 24), some_tokens(2, 24))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="25 tokens.*24"):
        make_model()(some_tokens(1, 25))


def test_flops_follow_the_formula():
    model = GPT(GPTConfig())
    parameters = 124_475_904 - 1024 * 768  # of GPT-2 124M with its vocabulary padded to 50304, without positions
    assert sum(p.numel() for p in model.parameters()) == 124_475_904
    assert model.flops_per_token(1024) == 6 * parameters + 12 * 12 * 768 * 1024
    model = make_model(**QWEN3 | dict(tie_embeddings=False))  # a head of its own, so that wte is only looked up
    matrices = 128 * 32 + 2 * (32 * (4 + 2 + 2) * 16 + 4 * 16 * 32 + 3 * 32 * 40)
    assert model.flops_per_token(24) == 6 * (matrices + 5 * 32 + 4 * 16) + 12 * 2 * 4 * 16 * 24


@both
def test_the_matrices_of_the_blocks_are_listed_with_how_many_lie_in_each(shape):
    model = make_model(**shape)
    found = {id(weight): count for weight, count in model.matrices()}
    names = {name: found.pop(id(weight), None) for name, weight in model.named_parameters()}
    attention = {"c_q": 1, "c_k": 1, "c_v": 1, "c_proj": 1} if shape else {"c_attn": 3, "c_proj": 1}
    mlp = ["c_gate", "c_fc", "c_proj"] if shape else ["c_fc", "c_proj"]
    parts = {f"attn.{part}": count for part, count in attention.items()} | {f"mlp.{part}": 1 for part in mlp}
    wanted = {f"h.{n}.{part}.weight": count for n in (0, 1) for part, count in parts.items()}
    assert {name: count for name, count in names.items() if count} == wanted
    assert not found


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(n_embd=33), "n_embd 33 is not a multiple of n_head 2"),
        (dict(arch="llama"), "must be one of gpt2, qwen3"),
        (dict(n_kv_head=1), "for qwen3 only"),
        (dict(tie_embeddings=False), "for qwen3 only"),
        (dict(arch="qwen3", n_head=4, n_kv_head=3), "n_head 4 is not a multiple of n_kv_head 3"),
        (dict(arch="qwen3", head_size=15), "head_size 15 is odd"),
    ],
)
def test_shapes_that_no_model_can_have_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_model(**wrong)


def test_attention_in_qwen3_depends_on_distances_and_not_on_places():
    model, tokens = make_model(**QWEN3 | dict(n_layer=1)).eval(), some_tokens(1, 12)
    rotated = model(tokens)
    with torch.no_grad():  # all positions seven further on
        model.cos, model.sin = (table.roll(-7, dims=0) for table in (model.cos, model.sin))
    assert torch.allclose(model(tokens), rotated, atol=1e-4)
    with torch.no_grad():
        model.cos, model.sin = torch.ones_like(model.cos), torch.zeros_like(model.sin)
    assert not torch.allclose(model(tokens), rotated, atol=1e-2)


def test_a_folder_of_transformers_loads_here(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=24, n_layer=2, n_head=2, n_embd=32, initializer_range=0.3
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path).eval()
    tokens = some_tokens(2, 24)
    assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-4)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("rope", [{}, {"rope_theta": 1e6}])
def test_a_qwen3_of_transformers_loads_here(tmp_path, is_tied, rope):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=97,
        max_position_embeddings=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        hidden_size=32,
        intermediate_size=40,
        tie_word_embeddings=is_tied,
        initializer_range=0.3,
        **rope,
    )
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = some_tokens(2, 24)
    ours = load_hf(tmp_path).eval()
    assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-4)
    assert ours.config.rope_theta == rope.get("rope_theta", 10000.0) and ours.config.tie_embeddings == is_tied
    facts = json.loads((tmp_path / "config.json").read_text())
    facts["rope_theta"] = facts.pop("rope_parameters")["rope_theta"]  # as before transformers 5, and as published
    (tmp_path / "config.json").write_text(json.dumps(facts))
    assert torch.equal(load_hf(tmp_path).eval()(tokens), ours(tokens))


@pytest.mark.parametrize("shape", [dict(bias=True), dict(bias=False), QWEN3, QWEN3 | dict(tie_embeddings=False)])
def test_a_folder_of_ours_loads_in_transformers_and_here(tmp_path, shape):
    transformers = pytest.importorskip("transformers")
    ours, tokens = make_model(**shape).eval(), some_tokens(2, 24)
    save_hf(ours, tmp_path, 96)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if "arch" in shape else "GPT2LMHeadModel")
    assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-4)
    assert torch.allclose(ours(tokens), load_hf(tmp_path).eval()(tokens), atol=1e-6)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama', and only gpt2 and qwen3 are known"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is {'rope_type': 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, "rotary positions are .*yarn"),
        ({"rope_parameters": "x"}, "rotary positions are x"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "rotary positions are"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"rope_theta": float("nan")}, "rope_theta is nan and must be at least 1"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false'"),
        ({"model_type": []}, "model_type is"),
        ({"num_key_value_heads": None}, "no whole shape"),
        ({"num_key_value_heads": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
    ],
)
def test_a_qwen3_that_is_another_is_refused(tmp_path, change, message):
    pytest.importorskip("safetensors")
    save_hf(make_model(**QWEN3), tmp_path, 96)
    facts = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=message):
        load_hf(tmp_path)


def test_a_folder_that_is_no_gpt2_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    save_hf(make_model(), tmp_path, 96)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("gelu_new", "relu"))
    with pytest.raises(ValueError, match="activation_function is 'relu'"):
        load_hf(tmp_path)
    save_hf(make_model(), tmp_path, 96)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"n_embd": 32', '"n_embd": 64')
    )
    with pytest.raises(ValueError, match="c_attn.bias has shape"):
        load_hf(tmp_path)
    save_hf(make_model(), tmp_path, 96)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="no whole shape"):
        load_hf(tmp_path)


def shard(folder, change=lambda name: name, dtype=torch.float32, extra=None, left_out=()):
    """Part the folder's model.safetensors into two files with an index, names, types and contents changed as asked."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors") | (extra or {})
    state = {change(name): tensor.to(dtype) for name, tensor in state.items() if name not in left_out}
    weight_map = {}
    for number in range(2):
        part = {name: state[name] for name in sorted(state)[number::2]}
        save_file(part, folder / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_shards_load_in_any_type_with_and_without_prefix(tmp_path, dtype, prefix):
    pytest.importorskip("safetensors")
    ours = make_model().eval()
    save_hf(ours, tmp_path, 96)
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24), "transformer.h.0.attn.masked_bias": torch.ones(())}
    masks |= {"lm_head.weight": torch.ones(97, 32)}
    shard(tmp_path, lambda name: name.replace("transformer.", prefix), dtype, masks)
    for name, weight in load_hf(tmp_path).named_parameters():
        wanted = dict(ours.named_parameters())[name]
        if name == "wte.weight":
            weight, wanted = weight[:97], wanted[:97]  # the rest is padding
        assert weight.dtype == torch.float32 and torch.equal(weight, wanted.to(dtype).float()), name


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux says it so")
def test_loading_holds_the_model_and_little_more(tmp_path):
    pytest.importorskip("safetensors")
    ours = make_model(n_layer=8, n_embd=512, vocab_size=1000)  # 103 MB
    save_hf(ours, tmp_path, 96)
    size = sum(p.numel() * 4 for p in ours.parameters())
    shard(tmp_path)
    code = (
        "import sys, pathlib, re, torch, model, safetensors.torch\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]) * 1024\n"
        "before, loaded = peak(), model.load_hf(pathlib.Path(sys.argv[1]))\n"
        "print(peak() - before)"
    )
    result = run("-c", code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 2.4 * size  # the model, and the pages of the files


def test_shards_that_are_not_whole_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    folders = [tmp_path / str(number) for number in range(5)]
    for folder in folders:
        save_hf(make_model(), folder, 96)
    shard(folders[0], left_out=["transformer.h.1.ln_1.weight"])
    with pytest.raises(ValueError, match="lack transformer.h.1.ln_1.weight, and 0 more"):
        load_hf(folders[0])
    shard(folders[1], extra={"transformer.h.1.ln_1.weight": torch.ones(33)})
    with pytest.raises(ValueError, match=r"h.1.ln_1.weight has shape \(33,\), and config.json wants \(32,\)"):
        load_hf(folders[1])
    shard(folders[2], dtype=torch.int8)
    with pytest.raises(ValueError, match="is of type torch.int8"):
        load_hf(folders[2])
    shard(folders[3])
    (folders[3] / "model-1.safetensors").unlink()
    with pytest.raises(OSError):
        load_hf(folders[3])
    shard(folders[4])
    for name in ("../0/model-0.safetensors", str(folders[0] / "model-0.safetensors"), "model.bin", 3):
        index = {"weight_map": {"a": name}}
        (folders[4] / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="is no file of weights beside it"):
            load_hf(folders[4])
    (folders[4] / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON"):
        load_hf(folders[4])


@both
def test_transformers_goes_on_as_our_model_does(tmp_path, shape):
    transformers = pytest.importorskip("transformers")
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the"]
    encoding, ours = prepare_data.make_tokenizer(tokens, "x"), make_model(**shape, vocab_size=260).eval()
    save_hf(ours, tmp_path, encoding.eot_token)
    prepare_data.save_hf_tokenizer(encoding, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer("the cat", return_tensors="pt")
    tokens = encoding.encode("the cat")
    found = theirs.generate(**prompt, do_sample=False, max_new_tokens=16)[0].tolist()
    with torch.no_grad():
        while len(tokens) < len(found):
            tokens.append(int(ours(torch.tensor([tokens]))[0, -1].argmax()))
    assert found == tokens and (len(found) == len(prompt["input_ids"][0]) + 16 or found[-1] == encoding.eot_token)


def test_an_export_in_bf16_is_half_as_large_and_says_so(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = make_model()
    save_hf(ours, tmp_path, 5, torch.bfloat16)
    assert transformers.AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16 and theirs.generation_config.eos_token_id == theirs.config.bos_token_id == 5
    assert torch.equal(theirs.transformer.wte.weight, ours.wte.weight[:97].bfloat16())
    assert torch.equal(load_hf(tmp_path).wpe.weight, ours.wpe.weight.bfloat16().float())


def test_an_export_that_breaks_off_leaves_what_was_there(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    save_hf(make_model(), tmp_path, 96)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(safetensors, "save_file", broken)
    with pytest.raises(OSError, match="disk is full"):
        save_hf(make_model(), tmp_path, 96)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.gpu
@both
@pytest.mark.parametrize("fast", ["compiled", "bf16", "compiled bf16"])
def test_fast_paths_agree_with_the_plain_one(fast, shape):
    model, tokens = make_model(**shape, block_size=64, n_embd=64).cuda(), some_tokens(4, 64).cuda()
    plain = model(tokens, tokens)
    plain.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    if "compiled" in fast:
        model.compile()
    with torch.autocast("cuda", torch.bfloat16, enabled="bf16" in fast):
        loss = model(tokens, tokens)
    loss.backward()
    tolerance = 2e-2 if "bf16" in fast else 1e-4
    assert loss.item() == pytest.approx(plain.item(), rel=tolerance)
    for parameter, gradient in zip(model.parameters(), wanted):
        assert (parameter.grad - gradient).norm() <= tolerance * 2 * gradient.norm()
