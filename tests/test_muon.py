"""Muon against its formula and against torch's own."""

import pytest
import torch

from model import GPT, GPTConfig
from muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 6, 9), (3, 9, 6), (2, 7, 7)])
def test_orthogonalizing_is_a_polynomial_of_the_singular_values(shape):
    matrices = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    normed = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    left, values, right = torch.linalg.svd(normed, full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert torch.allclose(orthogonalize(matrices), left * values[:, None] @ right)
    assert not orthogonalize(torch.zeros(shape)).any()


@pytest.mark.gpu
def test_orthogonalizing_on_a_gpu_is_close_to_that_in_fp32():
    matrices = torch.randn(5, 64, 96)
    close, wanted = orthogonalize(matrices.cuda()), orthogonalize(matrices)
    assert close.dtype == torch.bfloat16
    assert (close.float().cpu() - wanted).norm() < 0.05 * wanted.norm()


def test_each_head_of_queries_keys_and_values_is_a_matrix():
    gpt2s = {"c_attn": 12, "c_proj": 1, "c_fc": 1}
    qwen3s = {"c_q": 4, "c_k": 2, "c_v": 2, "c_proj": 1, "c_gate": 1, "c_fc": 1}
    for arch, n_kv_head, wanted in (("gpt2", 0, gpt2s), ("qwen3", 2, qwen3s)):
        model = GPT(GPTConfig(arch, n_layer=2, n_head=4, n_kv_head=n_kv_head, n_embd=16))
        names = {id(weight): name.split(".")[-2] for name, weight in model.named_parameters()}
        assert {names[id(weight)]: count for weight, count in model.matrices()} == wanted


@pytest.mark.parametrize("arch, n_kv_head", [("gpt2", 0), ("qwen3", 1)])
def test_muon_is_the_muon_of_torch(arch, n_kv_head, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's computes in it
    torch.manual_seed(0)
    shape = dict(block_size=8, n_layer=2, n_head=2, n_embd=16, n_kv_head=n_kv_head)
    model = GPT(GPTConfig(arch, vocab_size=97, **shape))
    model.init_weights(0)
    matrices, copies = model.matrices(), []
    for weight, count in matrices:  # torch's gets each stacked matrix as a parameter of its own
        copies.append([torch.nn.Parameter(part.clone()) for part in weight.detach().chunk(count)])
    ours = Muon(matrices, momentum=0.9, weight_decay=0.3)
    ours.param_groups[0]["lr"] = 0.1
    settings = dict(lr=0.1, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    theirs = torch.optim.Muon([copy for parts in copies for copy in parts], **settings)
    for _ in range(4):
        for (weight, count), parts in zip(matrices, copies):
            weight.grad = torch.randn_like(weight)
            for part, gradient in zip(parts, weight.grad.chunk(count)):
                part.grad = gradient.clone()
        ours.step()
        theirs.step()
    for (weight, _), parts in zip(matrices, copies):
        assert torch.allclose(weight, torch.cat(parts), atol=1e-5)
