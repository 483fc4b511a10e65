"""Muon: momentum, made orthogonal before it moves a matrix. Jordan et al. 2024.

AdamW scales each weight's update by itself and never sees that the weights form a matrix. Muon
treats the gradient of a matrix as one: it replaces the momentum by the nearest matrix that
stretches no direction more than another, so that rare directions learn as fast as common ones.
"""

import math
from collections import defaultdict

import torch
import torch.distributed as dist


class Muon(torch.optim.Optimizer):
    """Muon for matrices; embeddings, head and vectors are AdamW's.

    matrices: (weight, count) pairs, count matrices stacked in a weight, as GPT.matrices returns
    them. The ranks of a process group, which all have the same gradients, split the work.

    An update's root mean square is 0.2 of the learning rate, about AdamW's, so both can share a
    learning rate and weight decay: Liu et al. 2025, "Muon is Scalable for LLM Training", section
    2.2. torch.optim.Muon, the reference in the tests, has neither stacked matrices nor ranks.
    """

    def __init__(self, matrices, momentum: float, weight_decay: float):
        weights, self.counts = zip(*matrices)
        self.found_inf = 0.0  # or a tensor, as GradScaler sets it: 1.0 skips an update
        super().__init__(weights, dict(lr=0.0, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        """Move the matrices by their gradients; if found_inf is 1, change nothing."""
        weights = self.param_groups[0]["params"]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        moments = [self.state[weight]["momentum"] for weight in weights]
        updates = self.advance(weights, [weight.grad for weight in weights], moments)
        for shape, pairs in self.by_shape(weights, updates).items():
            matrices, directions = zip(*pairs)
            dtype = torch.bfloat16 if matrices[0].is_cuda else matrices[0].dtype
            batch = matrices[0].new_empty(len(matrices), *shape, dtype=dtype)
            torch._foreach_copy_(batch.unbind(), directions)  # no batch in fp32 is needed
            self.move(matrices, orthogonalize_on_ranks(batch), max(shape))

    def advance(self, weights: list, gradients: list, moments: list) -> list:
        """Move the moments, shrink the weights by weight decay; return the updates."""
        [group] = self.param_groups
        momentum, lr = group["momentum"], group["lr"] * (1 - self.found_inf)
        if isinstance(self.found_inf, torch.Tensor):  # a step towards itself changes no moment
            pairs = zip(moments, gradients)
            gradients = [torch.where(self.found_inf > 0, m, gradient) for m, gradient in pairs]
        torch._foreach_lerp_(moments, gradients, 1 - momentum)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        return torch._foreach_lerp(gradients, moments, momentum)  # Nesterov's look ahead

    def move(self, weights: list, orthogonal: torch.Tensor, width: int):
        """Subtract orthogonal matrices, of which `width` is the longer side, from the weights."""
        lr = self.param_groups[0]["lr"] * (1 - self.found_inf)
        scale = 0.2 * math.sqrt(width)  # orthogonal: a mean square of 1 / width
        updates = orthogonal.to(weights[0].dtype).mul_(-lr * scale)  # one type: few kernels
        torch._foreach_add_(weights, updates.unbind())

    def by_shape(self, weights, updates) -> dict:
        """Pairs of a matrix and its update by their shape; stacked matrices are taken apart."""
        pairs = defaultdict(list)
        for weight, update, count in zip(weights, updates, self.counts):
            for pair in zip(weight.chunk(count), update.chunk(count)):
                pairs[pair[0].shape].append(pair)
        return pairs


def orthogonalize_on_ranks(batch: torch.Tensor) -> torch.Tensor:
    """orthogonalize(batch), of which each rank computes an equal part."""
    if not dist.is_initialized():
        return orthogonalize(batch)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    count = math.ceil(len(batch) / world_size)
    indices = torch.arange(count, device=batch.device) + rank * count
    part = orthogonalize(batch[indices % len(batch)]).contiguous()  # the first ones fill it up
    result = part.new_empty(count * world_size, *part.shape[1:])
    dist.all_gather_into_tensor(result, part)
    return result[: len(batch)]


@torch.no_grad()
def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of matrices (N, R, C) near 1 and keep their directions.

    Five steps of a Newton-Schulz iteration, in bfloat16 on a GPU: each maps a singular value s to
    3.4445 s - 4.7750 s^3 + 2.0315 s^5, coefficients by Jordan et al. 2024. Values of at least
    0.0015 of the matrix's norm end between 0.68 and 1.2, which trains as well as 1; smaller ones
    end lower.
    """
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x.mT.contiguous() if is_tall else x  # a product of wide ones is smaller
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        polynomial.diagonal(dim1=1, dim2=2).add_(3.4445)
        x = polynomial @ x
    return x.mT if is_tall else x
