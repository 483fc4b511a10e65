"""Properties of the model: causality, the loss, initial weights, shapes, RoPE, FLOPs."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import QWEN3, SHAPES, SIZES, UNTIED, make_model, random_tokens

from model import GPT, GPTConfig, apply_rope, rope_cache

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def gradients(model, tokens, targets) -> list[torch.Tensor]:
    model.zero_grad()
    model(tokens, targets).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@shapes
def test_each_logit_depends_on_the_tokens_up_to_its_own_and_on_no_other(shape):
    model, tokens = make_model(**shape), random_tokens(2, 24)
    embedded = model.wte(tokens).detach().requires_grad_()
    model.wte.register_forward_hook(lambda *_: embedded)
    logits = model.logits(tokens)
    for t in range(24):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embedded, retain_graph=True)
        is_used = gradient.abs().sum(-1) > 0
        assert is_used.tolist() == [[True] * (t + 1) + [False] * (23 - t), [False] * 24]


@shapes
def test_the_loss_is_the_cross_entropy_of_the_logits_and_0_without_a_target(shape):
    model, tokens = make_model(**shape), random_tokens(3, 25)
    targets = tokens[:, 1:].clone()
    targets[0, :20] = -1
    logits = model.logits(tokens[:, :-1])
    expected = -logits.log_softmax(-1).gather(2, targets.clamp(0)[..., None])[..., 0]
    losses = model(tokens[:, :-1], targets)
    assert logits.shape == (3, 24, 97)
    assert torch.allclose(losses, expected.masked_fill(targets < 0, 0), atol=1e-5)


@shapes
def test_the_padding_of_the_vocabulary_takes_no_part(shape):
    model, tokens = make_model(**shape), random_tokens(2, 24)
    assert model.wte.weight.shape == (128, 32)
    before = model(tokens, tokens)
    with torch.no_grad():
        model.wte.weight[97:] = model.lm_head.weight[97:] = 100.0
    losses = model(tokens, tokens)
    losses.sum().backward()
    assert torch.equal(losses, before)
    assert not model.wte.weight.grad[97:].any() and not model.lm_head.weight.grad[97:].any()


@shapes
def test_many_logits_are_computed_in_parts_with_the_same_result(shape, monkeypatch):
    model, tokens, sizes = make_model(**shape), random_tokens(2, 24), []
    model.lm_head.register_forward_hook(lambda *call: sizes.append(call[2].numel()))
    targets = torch.where(torch.arange(24) < 7, -1, tokens.roll(-1, 1))
    expected = [model(tokens, targets), *gradients(model, tokens, targets)]
    monkeypatch.setattr("model.MAX_LOGITS", 2048)
    results = [model(tokens, targets), *gradients(model, tokens, targets)]
    assert max(sizes[2:]) <= 2048
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(expected, results))


@shapes
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_keeps_less_and_changes_no_gradient(shape, dropout):
    model = make_model(**shape | dict(n_layer=4), dropout=dropout)
    tokens, results, kept = random_tokens(2, 24), [], []
    for model.activation_checkpointing in ("off", "selective", "full"):
        torch.manual_seed(2)
        results.append(gradients(model, tokens, tokens))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
            model(tokens, tokens)
        kept.append(sum(x.numel() for x in saved))
    assert all(torch.equal(*pair) for result in results for pair in zip(results[0], result))
    assert kept[2] < kept[1] < 0.8 * kept[0] and kept[2] < 0.5 * kept[0]


@shapes
def test_dropout_acts_in_training_alone(shape):
    model, tokens = make_model(**shape, dropout=0.5), random_tokens(2, 24)
    plain = make_model(**shape)
    assert not torch.allclose(model.logits(tokens), plain.logits(tokens))
    assert torch.equal(model.eval().logits(tokens), plain.logits(tokens))


def fresh(seed=1, embedding_std=0.02, **changes) -> dict[str, torch.Tensor]:
    """The weights of a model after init_weights, by name."""
    model = GPT(GPTConfig(**SIZES | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # what an initialiser leaves out shows
    model.init_weights(seed, embedding_std=embedding_std)
    return dict(model.named_parameters())


@shapes
def test_initial_weights_depend_on_seed_and_name_alone(shape):
    shallow, deep, other = fresh(**shape), fresh(**shape, n_layer=4), fresh(2, **shape)
    torch.manual_seed(5)
    again = fresh(**shape)
    for name, weight in shallow.items():
        assert torch.equal(weight, again[name]), name
        if "arch" in shape or not name.endswith("c_proj.weight"):  # whose scale is n_layer's
            assert torch.equal(weight, deep[name]), name
        assert weight.std() == 0 or not torch.equal(weight, other[name]), name
    drawn = [weight.flatten()[:8] for weight in deep.values() if weight.std() > 0]
    assert len(torch.stack(drawn).unique(dim=0)) == len(drawn)  # no two names share their numbers


@shapes
def test_initial_scales(shape):
    for name, weight in fresh(**shape | dict(n_layer=8, n_embd=128), embedding_std=0.6).items():
        if name.endswith("c_proj.weight") and "arch" not in shape:
            std = 0.02 / 4  # 4 is the root of the 2 x 8 additions to the residual stream
        else:
            std = 0.0 if name.endswith(("c_proj.weight", "lm_head.weight")) else 0.02
            std = {"wte.weight": 0.6}.get(name, std)
        if weight.dim() == 2:
            assert weight.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(weight.mean().item()) <= std / 10, name
        else:
            assert (weight == (0.0 if name.endswith("bias") else 1.0)).all(), name


def test_a_longer_context_and_a_parameter_without_an_initialiser_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="25 tokens exceed the block_size of 24"):
        model.logits(random_tokens(1, 25))
    model.scale = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="scale has no initialiser"):
        model.init_weights(0)


@shapes
def test_training_starts_at_the_loss_of_a_guess_and_reaches_every_weight(shape):
    model, tokens = GPT(GPTConfig(**SIZES | shape)), random_tokens(4, 25)
    model.init_weights(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = model(tokens[:, :-1], tokens[:, 1:]).mean().item()
    assert loss == pytest.approx(math.log(97), abs=0.1)
    for _ in range(3):  # of zeros the head moves first, then what feeds it, then the rest
        gradients(model, tokens[:, :-1], tokens[:, 1:])
        optimizer.step()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n_embd=33), "n_embd 33 must be a multiple of n_head 2"),
        (dict(n_layer=0), "n_layer is 0 and must be at least 1"),
        (dict(dropout=1.0), "dropout is 1.0 and must be at least 0 and below 1"),
        (dict(arch="llama"), "arch is 'llama' and must be one of gpt2, qwen3"),
        (dict(n_kv_head=1), "can be chosen for qwen3 only"),
        (dict(tie_embeddings=False), "can be chosen for qwen3 only"),
        (dict(arch="qwen3", n_head=4, n_kv_head=3), "n_head 4 must be a multiple of n_kv_head 3"),
        (dict(arch="qwen3", head_size=15), "head_size 15 must be even"),
        (dict(arch="qwen3", rope_theta=math.nan), "rope_theta is nan and must be at least 1"),
    ],
)
def test_shapes_that_no_model_can_have_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**SIZES | changes)


def test_derived_sizes_follow_what_was_given_and_fields_keep_it():
    config = GPTConfig("qwen3", **SIZES)
    assert (config.kv_heads, config.head_width, config.mlp_width) == (2, 16, 128)
    wider = replace(config, n_embd=64, n_head=4)
    assert (wider.kv_heads, wider.head_width, wider.mlp_width) == (4, 16, 192)
    assert wider.n_kv_head == wider.head_size == wider.intermediate_size == 0
    given = GPTConfig(**SIZES | QWEN3)
    assert (given.kv_heads, given.head_width, given.mlp_width) == (2, 16, 40)
    assert GPTConfig(**SIZES).mlp_width == 128 == GPTConfig(**SIZES).padded_vocab_size


def test_flops_follow_the_formula():
    model = GPT(GPTConfig())
    positions, count = 1024 * 768, sum(parameter.numel() for parameter in model.parameters())
    assert count == 124_475_904  # GPT-2 124M, its vocabulary padded to 50304
    assert model.flops_per_token(1024) == 6 * (count - positions) + 12 * 12 * 768 * 1024
    model = make_model(**UNTIED)  # has a head of its own, so wte is only looked up
    matrices = 128 * 32 + 2 * (32 * (4 + 2 + 2) * 16 + 4 * 16 * 32 + 3 * 32 * 40)
    assert model.flops_per_token(24) == 6 * (matrices + 5 * 32 + 4 * 16) + 12 * 2 * 4 * 16 * 24


def test_rope_turns_each_pair_by_position_times_its_frequency():
    config = GPTConfig(**SIZES | QWEN3, rope_theta=100.0)
    x = torch.randn(2, 24, 4, 16, generator=torch.Generator().manual_seed(0))
    pairs = torch.complex(x[..., :8], x[..., 8:])
    angles = torch.arange(24)[:, None, None] * 100.0 ** (-2 * torch.arange(8) / 16)
    turned = pairs * torch.polar(torch.ones(()), angles)
    expected = torch.cat((turned.real, turned.imag), -1)
    assert torch.allclose(apply_rope(x, rope_cache(config)), expected, atol=1e-5)


@pytest.mark.gpu
@shapes
@pytest.mark.parametrize("fast", ["compiled", "bf16", "compiled bf16"])
def test_fast_paths_agree_with_the_plain_one(fast, shape):
    model = make_model(**shape, block_size=100, n_embd=200, vocab_size=257).cuda()
    tokens = random_tokens(3, 100).cuda()
    losses, expected = model(tokens, tokens), gradients(model, tokens, tokens)
    if "compiled" in fast:
        model.compile()
    model.dtype = torch.bfloat16 if "bf16" in fast else torch.float32
    fast_losses, results = model(tokens, tokens), gradients(model, tokens, tokens)
    tolerance = 2e-2 if "bf16" in fast else 1e-4
    assert fast_losses.mean().item() == pytest.approx(losses.mean().item(), rel=tolerance)
    bound = 6e-2 if "bf16" in fast else 2e-4  # of norms' weights: 0.047 on a GPU, 0.038 on a CPU
    for gradient, plain in zip(results, expected):
        assert (gradient - plain).norm() <= bound * plain.norm()
