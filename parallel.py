"""FSDP2, from outside the model: each rank keeps a share of the weights, gradients and moments.

Rajbhandari et al. 2020, "ZeRO"; Zhao et al. 2023, "PyTorch FSDP". A parameter is split by rows:
each rank keeps its rows in fp32, and all gather a block's parameters while they compute with it.
Optimizers, norms and checkpoints work on the rows. What is torch's is imported where it is used:
that takes seconds, which other runs do not need.
"""

import math
import warnings
from collections import defaultdict

import torch
import torch.distributed as dist

from muon import Muon, orthogonalize


def check(parallel: str, compiled: str, micro_batch_size: int):
    """Raise ValueError where settings do not go together."""
    if parallel != "ddp" and not micro_batch_size:
        reason = "0 tries what fits, on a GPU that holds all weights"
        raise ValueError(f"parallel {parallel} needs a micro_batch_size: {reason}")
    if parallel != "ddp" and compiled == "model":
        reason = "the model is split between its blocks"
        raise ValueError(f"parallel {parallel} needs compile blocks or off, not model: {reason}")


def shard_model(model, device: torch.device, reshard_after_forward: bool):
    """Split each block's parameters, then the others', over the ranks; the model is changed.

    The order: activation checkpointing is the model's own and calls whole blocks, with the hooks
    that gather their weights; a block is compiled before it is split, and its hooks are not.

    Where the model computes in bfloat16, weights are gathered in it, and gradients are summed in
    fp32. Embedding and head, which can be one tensor, are in the group of the model itself.
    Gradients are summed after each micro-step: between them whole ones would need the memory that
    sharding is for. A model on the CPU is moved to the device block by block.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* a view")  # no one changes the losses
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    dtype = model.dtype if model.dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)  # nor RoPE's
    for block in model.h:
        options = dict(mesh=mesh, mp_policy=policy)
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=False, **options)  # the backward needs it at once


def rows_of(values: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a parameter's values."""
    parts = values.chunk(dist.get_world_size())  # fewer, where there are fewer rows
    return parts[dist.get_rank()] if dist.get_rank() < len(parts) else values[:0]


def copy_rows(parameter: torch.Tensor, values: torch.Tensor):
    """Give a parameter its values, of which a sharded one keeps this rank's rows."""
    if hasattr(parameter, "to_local"):
        parameter, values = parameter.to_local(), rows_of(values)
    parameter.copy_(values)


def shard_state(state, model):
    """A loaded state whose tensors are sharded as the parameters of the model are."""
    from torch.distributed.tensor import DTensor

    like = next(model.parameters())
    device = like.device

    def shard(value):
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        rows = rows_of(value).to(device, copy=True)
        shape = dict(shape=value.shape, stride=value.stride())
        return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, **shape)

    return torch.utils._pytree.tree_map(shard, state)


def save(writer, name: str, state: dict, started: float):
    """Start to write a state, see checkpoint.Writer. Other ranks help to gather what is sharded.

    Each tensor is gathered by itself, on the device, and then copied to the host of rank 0, whose
    memory must hold the whole state.
    """
    if writer:
        writer.start(name, state, started)
        return
    for value in torch.utils._pytree.tree_leaves(state):
        if hasattr(value, "full_tensor"):
            value.full_tensor()


def clip_grad_norm(parameters, max_norm: float) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_, or the same for sharded gradients: one sum over the ranks."""
    parameters = list(parameters)
    if not hasattr(parameters[0], "to_local"):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    gradients = [parameter.grad.to_local() for parameter in parameters]
    squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
    dist.all_reduce(squares)
    norm = squares.sqrt()
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


class ShardedMuon(Muon):
    """Muon for sharded weights: each rank gathers its share of the matrices, once, in turn.

    Of the weights of a shape the n-th belongs to rank n modulo their number. Its rows, of which
    each rank keeps the momentum, go to that rank, which makes its matrices orthogonal and returns
    the rows. That takes memory of about three times a rank's share of the weights of a shape.
    """

    @torch.no_grad()
    def step(self):
        """Move the matrices by their gradients; if found_inf is 1, change nothing."""
        [group] = self.param_groups
        for weight in group["params"]:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        by_shape = defaultdict(list)
        for weight, count in zip(group["params"], self.counts):
            by_shape[weight.shape, count].append(weight)
        for (shape, count), weights in by_shape.items():
            self.move(weights, shape, count)

    def move(self, weights: list, shape, count: int):
        """Move weights of one shape, each of which stacks `count` matrices."""
        [group] = self.param_groups
        momentum, lr = group["momentum"], group["lr"] * (1 - self.found_inf)
        gradients = [weight.grad.to_local() for weight in weights]
        moments = [self.state[weight]["momentum"].to_local() for weight in weights]
        if isinstance(self.found_inf, torch.Tensor):  # a moment does not move towards itself
            pairs = zip(moments, gradients)
            gradients = [torch.where(self.found_inf > 0, m, gradient) for m, gradient in pairs]
        torch._foreach_lerp_(moments, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, moments, momentum)  # Nesterov's look ahead
        orthogonal = orthogonalize_rows(torch.stack(updates), shape, count)
        scale = 0.2 * math.sqrt(max(shape[0] // count, shape[1]))
        rows = [weight.to_local() for weight in weights]
        torch._foreach_mul_(rows, 1 - lr * group["weight_decay"])
        torch._foreach_add_(rows, (orthogonal.to(rows[0].dtype) * (-lr * scale)).unbind())


def orthogonalize_rows(rows: torch.Tensor, shape, count: int) -> torch.Tensor:
    """This rank's rows of weights (N, its rows, C), as `orthogonalize` changes whole weights.

    shape: of a whole weight, (R, C), in which `count` matrices are stacked.
    """
    ranks, rank, columns = dist.get_world_size(), dist.get_rank(), shape[1]
    heights = [len(part) for part in torch.empty(shape[0], 0).chunk(ranks)]
    heights += [0] * (ranks - len(heights))  # a rank's rows of a weight
    owned = [len(rows[owner::ranks]) for owner in range(ranks)]  # a rank's weights
    sent = torch.cat([rows[owner::ranks].flatten() for owner in range(ranks)])
    here = [number * heights[rank] * columns for number in owned]
    there = [owned[rank] * height * columns for height in heights]
    parts = exchange(sent, here, there)
    parts = [part.view(-1, height, columns) for part, height in zip(parts, heights) if height]
    whole = torch.cat(parts, dim=1)  # (this rank's weights, R, C)
    whole = orthogonalize(whole.view(-1, shape[0] // count, columns)).view_as(whole)
    sent = torch.cat([part.flatten() for part in whole.split(heights, dim=1)])
    result = torch.empty_like(rows, dtype=sent.dtype)
    for owner, part in enumerate(exchange(sent, there, here)):
        result[owner::ranks] = part.view_as(result[owner::ranks])
    return result


def exchange(values: torch.Tensor, sent: list[int], received: list[int]):
    """Send the first sent[0] numbers to rank 0, the next sent[1] to rank 1; received likewise."""
    result = values.new_empty(sum(received))
    dist.all_to_all_single(result, values, received, sent)
    return result.split(received)
