"""Properties of the model."""

import math

import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig, load_hf, save_hf

SHAPE = dict(vocab_size=97, block_size=24, n_layer=2, n_head=2, n_embd=32)


def make_model(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | changes))
    with torch.no_grad():  # the fresh weights are so small that much of what could go wrong would hide
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def some_tokens(*shape) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def test_later_tokens_change_no_earlier_logit():
    model, tokens = make_model().eval(), some_tokens(2, 24)
    logits = model(tokens)
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % SHAPE["vocab_size"]
    assert torch.equal(model(changed)[:, :15], logits[:, :15])
    assert not torch.equal(model(changed)[:, 15:], logits[:, 15:])


def test_each_logit_depends_on_every_token_up_to_its_own():
    model, tokens = make_model().eval(), some_tokens(1, 24)
    embedded = model.wte(tokens).detach().requires_grad_()
    model.wte.register_forward_hook(lambda module, inputs, output: embedded)
    (gradient,) = torch.autograd.grad(model(tokens)[0, 10].square().sum(), embedded)
    reached = gradient[0].abs().sum(-1) > 0
    assert reached.tolist() == [True] * 11 + [False] * 13


@pytest.mark.parametrize("bias", [True, False])
def test_loss_at_initialisation_is_that_of_a_guess(bias):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1000, block_size=64, n_layer=4, n_head=4, n_embd=64, bias=bias))
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


def test_loss_is_the_cross_entropy_of_the_logits():
    model, tokens = make_model(), some_tokens(3, 25)
    targets = tokens[:, 1:].clone()
    targets[0, :20] = -1  # not asked
    logits = model(tokens[:, :-1])
    wanted = F.cross_entropy(logits.reshape(-1, 97)[20:], targets.reshape(-1)[20:])
    assert torch.allclose(model(tokens[:, :-1], targets), wanted, atol=1e-6)


def test_padding_of_the_vocabulary_counts_for_nothing():
    model, tokens = make_model(), some_tokens(2, 24)
    assert model.wte.weight.shape == (128, 32)  # 97, padded
    assert model(tokens).shape == (2, 24, 97)
    before = model(tokens, tokens).item()
    with torch.no_grad():
        model.wte.weight[97:] = 100.0
    loss = model(tokens, tokens)
    assert loss.item() == before
    loss.backward()
    assert (model.wte.weight.grad[97:] == 0).all()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_no_gradient(dropout):
    gradients = []
    for activation_checkpointing in (False, True):
        model = make_model(dropout=dropout)
        model.activation_checkpointing = activation_checkpointing
        torch.manual_seed(2)
        model(some_tokens(2, 24), some_tokens(2, 24)).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients))


def test_activation_checkpointing_keeps_less():
    kept = []
    for activation_checkpointing in (False, True):
        model, sizes = make_model(n_layer=4), []
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
    assert model.flops_per_token() == 6 * parameters + 12 * 12 * 768 * 1024


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


@pytest.mark.parametrize("bias", [True, False])
def test_a_folder_of_ours_loads_in_transformers_and_here(tmp_path, bias):
    transformers = pytest.importorskip("transformers")
    ours, tokens = make_model(bias=bias).eval(), some_tokens(2, 24)
    save_hf(ours, tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-4)
    assert torch.allclose(ours(tokens), load_hf(tmp_path).eval()(tokens), atol=1e-6)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_that_is_no_gpt2_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    save_hf(make_model(), tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("gelu_new", "relu"))
    with pytest.raises(ValueError, match="activation_function is 'relu'"):
        load_hf(tmp_path)
    save_hf(make_model(), tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"n_embd": 32', '"n_embd": 64')
    )
    with pytest.raises(ValueError, match="wte.weight has shape"):
        load_hf(tmp_path)
    save_hf(make_model(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="no whole shape"):
        load_hf(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("fast", ["compiled", "bf16", "compiled bf16"])
def test_fast_paths_agree_with_the_plain_one(fast):
    model, tokens = make_model(block_size=64, n_embd=64).cuda(), some_tokens(4, 64).cuda()
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
