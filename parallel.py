"""FSDP2 and DeepSpeed, from outside the model: a rank keeps a share of weights and moments.

Rajbhandari et al. 2020, "ZeRO"; Zhao et al. 2023, "PyTorch FSDP". FSDP2 splits a parameter by rows:
each rank keeps its rows in fp32, and all gather a block's parameters while they compute with it.
Optimizers, norms and checkpoints work on the rows. DeepSpeed owns its flat copies of all
parameters and the update; checkpoints are still ours. What is torch's or DeepSpeed's is imported
where it is used: that takes seconds, which other runs do not need.
"""

import importlib.util
import math
import os
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import files
from config import Failure
from muon import Muon, orthogonalize

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


def check(parallel: str, compiled: str, micro_batch_size: int, optimizer: str):
    """Raise ValueError where settings do not go together."""
    is_deepspeed = parallel == "deepspeed"
    has_package = not is_deepspeed or importlib.util.find_spec("deepspeed")
    needs = [
        (micro_batch_size, "a micro_batch_size: 0 tries what fits on a GPU with all weights"),
        (compiled != "model", "compile blocks, or off: gathering weights splits the model"),
        (not is_deepspeed or optimizer == "adamw", "optimizer adamw: it has no matrices"),
        (has_package, "a package: pip install deepspeed"),
        (not is_deepspeed or "LOCAL_RANK" in os.environ, "torchrun, also for one process"),
    ]
    missing = [name for is_there, name in needs if not is_there and parallel != "ddp"]
    if missing:
        raise ValueError(f"parallel {parallel} needs {missing[0]}")


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


def save(forward, writer, name: str, state: dict, started: float):
    """Start to write a state, see checkpoint.Writer. Other ranks help to gather what is sharded.

    Each tensor is gathered by itself, on the device, and then copied to the host of rank 0, whose
    memory must hold the whole state.
    """
    if is_engine(forward):
        state = state | {"model": whole_weights(forward)}
    if writer:
        writer.start(name, state, started)
        return
    for value in torch.utils._pytree.tree_leaves(state):
        if hasattr(value, "full_tensor"):
            value.full_tensor()


def clip_grad_norm(forward, max_norm: float) -> torch.Tensor:
    """The norm of the gradient, which is clipped. DeepSpeed clips and updates in one."""
    if is_engine(forward):
        forward.step()
        return torch.as_tensor(forward.get_global_grad_norm(), device=forward.device)
    parameters = list(forward.parameters())
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
        by_shape = defaultdict(list)
        for weight, count in zip(group["params"], self.counts):
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            by_shape[weight.shape, count].append(weight)
        for (shape, count), weights in by_shape.items():
            self.move(weights, shape, count, **group)

    def move(self, weights: list, shape, count: int, lr, momentum, weight_decay, **_):
        """Move weights of one shape, each of which stacks `count` matrices."""
        lr = lr * (1 - self.found_inf)
        rows = [weight.to_local() for weight in weights]
        gradients = [weight.grad.to_local() for weight in weights]
        moments = [self.state[weight]["momentum"].to_local() for weight in weights]
        if isinstance(self.found_inf, torch.Tensor):  # a moment does not move towards itself
            pairs = zip(moments, gradients)
            gradients = [torch.where(self.found_inf > 0, m, gradient) for m, gradient in pairs]
        torch._foreach_lerp_(moments, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, moments, momentum)  # Nesterov's look ahead
        orthogonal = orthogonalize_rows(torch.stack(updates), shape, count).to(rows[0].dtype)
        scale = 0.2 * math.sqrt(max(shape[0] // count, shape[1]))  # as Muon's
        torch._foreach_mul_(rows, 1 - lr * weight_decay)
        torch._foreach_add_(rows, (orthogonal * (-lr * scale)).unbind())


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


# DeepSpeed


def start_deepspeed(run):
    """Give a run's model and AdamW, on the CPU, to DeepSpeed's engine. Raises Failure."""
    import deepspeed

    deepspeed.logger.setLevel("WARNING")
    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    settings, model, [optimizer] = run.settings, run.model, run.optimizers
    ours = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_clipping": settings.grad_clip,
        "gradient_accumulation_steps": run.micro_steps,
        "train_batch_size": settings.step_sequences,
    }
    options, moments = read_options(settings.deepspeed_config, ours), dict(optimizer.state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    try:
        if options["zero_optimization"]["stage"] == 3:  # else the device has to hold all weights
            deepspeed.zero.Init(module=model, config_dict_or_path=options)
        arguments = dict(model=model, optimizer=optimizer, config=options)
        run.forward, *_ = deepspeed.initialize(**arguments, dist_init_required=False)
    except (AssertionError, ValueError) as error:
        raise Failure(f"DeepSpeed refuses {options}: {error!r:.300}") from None
    for buffer in model.buffers():
        buffer.data = buffer.to(run.ranks.device)
    set_moments(run, optimizer, moments)
    run.optimizers = [EngineOptimizer(optimizer, parameters)]


def read_options(path: str, ours: dict) -> dict:
    """A DeepSpeed JSON file's options with ours, where it has "auto" or nothing. Raises Failure."""
    options = files.read_json(Path(path)) if path else {"zero_optimization": {"stage": 2}}
    for name, value in ours.items():
        if options.pop(name, "auto") not in ("auto", value):
            raise Failure(f'{path}: {name} must be {value}, as the settings have it, or "auto"')
    options = without_auto(options)
    kind = options.pop("optimizer", {}).get("type", "AdamW")  # its values are the recipe's
    options.pop("scheduler", None)
    if kind not in ("Adam", "AdamW"):
        raise Failure(f"{path}: optimizer {kind} is not supported, only AdamW is")
    if options.get("zero_optimization", {}).get("stage") not in (1, 2, 3):
        raise Failure(f"{path}: the stage of zero_optimization must be 1, 2 or 3")
    if options.get("fp16", {}).get("enabled"):
        raise Failure(f"{path}: fp16 is not supported; dtype bfloat16 needs no option")
    options |= dict(list(ours.items())[:2])  # the loop accumulates
    options |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    options["bf16"] = {"check_grad_overflow": True} | options.get("bf16", {})
    return options | {"managed_gradient_accumulation": False, "steps_per_print": 10**9}


def without_auto(options: dict) -> dict:
    """Options without those that are "auto": DeepSpeed has defaults for them."""
    nested = {k: without_auto(v) if isinstance(v, dict) else v for k, v in options.items()}
    return {name: value for name, value in nested.items() if value != "auto"}


def is_engine(forward) -> bool:
    return hasattr(forward, "zero_optimization_stage")


class EngineOptimizer:
    """The AdamW inside an engine as the loop knows it."""

    def __init__(self, optimizer, parameters: list):
        self.optimizer, self.parameters = optimizer, parameters
        self.param_groups = optimizer.param_groups

    def step(self):
        """Have later steps skipped if this one, which `clip_grad_norm` has made, was not finite.

        DeepSpeed itself skips the first, as it has waited for the norm.
        """
        device = next(iter(self.optimizer.state.values()))["exp_avg"].device  # can be the host
        self.optimizer.found_inf = self.found_inf.to(device)

    def state_dict(self) -> dict:
        """AdamW's, with moments by parameter, which are gathered when they are saved."""
        from deepspeed.utils import safe_get_full_optimizer_state as get

        steps, moments = [state["step"] for state in self.optimizer.state.values()], {}
        for number, parameter in enumerate(self.parameters if steps else []):
            whole = {name: Gathered(get, parameter, name) for name in MOMENTS}
            moments[number] = whole | {"step": steps[0].clone()}  # AdamW adds to each
        return {"state": moments, "param_groups": []}


def set_moments(run, optimizer, moments: dict):
    """Make room for AdamW's moments in an engine, and give it those of a resumed run.

    DeepSpeed looks for all groups' moments once the first has some, so they are made before. It
    takes them after a step, which is one of gradient and rate 0.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    for flat in [flat for group in optimizer.param_groups for flat in group["params"]]:
        optimizer.state[flat]["step"] = torch.zeros((), device=flat.device)
        optimizer.state[flat] |= {name: torch.zeros_like(flat) for name in MOMENTS}
    if not moments:
        return
    shape, device = (run.settings.micro_batch_size, run.settings.block_size), run.ranks.device
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    (run.forward(tokens, tokens).mean() * 0).backward()
    run.forward.step()
    for parameter, state in moments.items():
        for name in MOMENTS:
            safe_set_full_optimizer_state(parameter, state[name].to(device), name)
    for state in optimizer.state.values():
        state["step"].fill_(float(next(iter(moments.values()))["step"]))


class Gathered:
    """A parameter or moment of which each rank has a part, as checkpoint.snapshot wants it."""

    def __init__(self, gather, parameter, *name):
        self.full_tensor = partial(gather, parameter, *name)
        self.shape = getattr(parameter, "ds_shape", parameter.shape)

    def to_local(self):
        return self

    def data_ptr(self) -> int:
        return id(self)


def whole_weights(engine) -> dict:
    """The weights by name, which are gathered when they are saved."""
    from deepspeed.utils import safe_get_full_fp32_param as get

    named = list(engine.module.named_parameters(remove_duplicate=False))
    weights = {parameter: Gathered(get, parameter) for _, parameter in named}
    return {name: weights[parameter] for name, parameter in named}
