"""FSDP2 and DeepSpeed, from outside the model: a rank keeps a share of weights and moments.

Rajbhandari et al. 2020, "ZeRO"; Zhao et al. 2023, "PyTorch FSDP". FSDP2 splits a parameter by rows:
each rank keeps its rows in fp32, and all gather a block's parameters while they compute with it.
DeepSpeed owns flat copies of all parameters and the update. Imports are late: they take seconds.
"""

import importlib.util
import math
import os
import warnings
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import files
from checkpoint import MOMENTS
from config import Failure
from muon import Muon, orthogonalize


def check(settings: dict):
    """Raise Failure where settings of train.py, by name, do not go together."""
    parallel, dtype = settings["parallel"], settings["dtype"]
    needs = [("compile blocks, or off: the model is not whole", settings["compile"] != "model")]
    needs += [("a micro_batch_size: 0 tries the whole model", settings["micro_batch_size"] > 0)]
    needs += [("another dtype: float16 needs the norm of whole gradients", dtype != "float16")]
    if parallel == "deepspeed":
        needs += [("optimizer adamw: it knows no matrices", settings["optimizer"] == "adamw")]
        needs += [("another dtype: float8 has not been tried with it", dtype != "float8")]
        needs += [("pip install deepspeed", importlib.util.find_spec("deepspeed"))]
        needs += [("torchrun, also for one process", "LOCAL_RANK" in os.environ)]
    missing = [name for name, is_there in needs if not is_there]
    if settings["deepspeed_config"] and parallel != "deepspeed":
        raise Failure(f"deepspeed_config has no effect: parallel is {parallel}, not deepspeed")
    if missing and parallel != "ddp":
        raise Failure(f"parallel {parallel} needs {missing[0]}")


def shard_model(model, device: torch.device, reshard_after_forward: bool):
    """Split each block's parameters, then the others', over the ranks; the model is changed.

    The order: activation checkpointing is the model's own and calls whole blocks, with the hooks
    that gather their weights; a block is compiled before it is split, and its hooks are not.

    Weights are gathered in the type of the residual stream, and gradients are summed in fp32, after
    each micro-step: whole ones would need the memory that sharding is for. Embedding and head can
    be one tensor, so both are the model's own. The model is moved to the device block by block.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* a view")  # no one changes the losses
    dtype = model.dtype if model.dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)  # nor RoPE's
    options = dict(mesh=init_device_mesh(device.type, (dist.get_world_size(),)), mp_policy=policy)
    for block in model.h:
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=False, **options)  # the backward needs it at once
    model.keeps_weights = not reshard_after_forward


def announce(forward, is_last: bool):
    """Tell the model, as the loop calls it, whether the next micro-step is the last of its step."""
    forward.require_backward_grad_sync = is_last  # DDP averages the gradients in its backward
    if getattr(forward, "keeps_weights", False):  # FSDP frees the gathered weights after it
        forward.set_reshard_after_backward(is_last)


def shard_like(parameter, values: torch.Tensor):
    """This rank's part of values that each rank has, if the parameter is sharded, else all."""
    if not hasattr(parameter, "device_mesh"):
        return values
    from torch.distributed.tensor import distribute_tensor

    sharding = parameter.device_mesh, parameter.placements
    return distribute_tensor(values, *sharding, src_data_rank=None)  # nothing is sent


def shard_state(state, model):
    """A loaded state whose tensors are sharded as the parameters of the model are, if they are."""
    like, tree_map_only = next(model.parameters()), torch.utils._pytree.tree_map_only
    return tree_map_only(torch.Tensor, lambda t: shard_like(like, t) if t.dim() else t, state)


def save(forward, writer, name: str, state: dict, started: float):
    """Have all ranks gather a state, tensor by tensor, and rank 0's checkpoint.Writer write it."""
    if hasattr(forward, "zero_optimization_stage"):  # DeepSpeed's engine
        state = state | {"model": whole_weights(forward)}
    if writer:
        return writer.start(name, state, started)
    for value in torch.utils._pytree.tree_leaves(state):
        if hasattr(value, "full_tensor"):
            value.full_tensor()


def clip_grad_norm(forward, max_norm: float) -> torch.Tensor:
    """The norm of the gradient, which is clipped. DeepSpeed clips and updates in one."""
    if hasattr(forward, "zero_optimization_stage"):  # DeepSpeed's engine
        forward.step()
        return torch.as_tensor(forward.get_global_grad_norm(), device=forward.device)
    parameters = list(forward.parameters())
    if not hasattr(parameters[0], "device_mesh"):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    gradients = [parameter.grad.to_local() for parameter in parameters]
    squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
    dist.all_reduce(squares)
    torch._foreach_mul_(gradients, (max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0))
    return squares.sqrt()


def make_muon(matrices: list, momentum: float, weight_decay: float) -> Muon:
    """Muon for weights that are whole, or for sharded ones."""
    muon_class = ShardedMuon if hasattr(matrices[0][0], "device_mesh") else Muon
    return muon_class(matrices, momentum, weight_decay)


class ShardedMuon(Muon):
    """Muon for sharded weights: each rank gathers, once, its share of the weights of a shape.

    It makes their matrices orthogonal and returns each rank its rows. Momentum is sharded, too.
    """

    @torch.no_grad()
    def step(self):
        """Move the matrices by their gradients; if found_inf is 1, change nothing."""
        by_shape = defaultdict(list)
        for weight, count in zip(self.param_groups[0]["params"], self.counts):
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            by_shape[weight.shape, count].append(weight)
        for (shape, count), weights in by_shape.items():
            rows = [weight.to_local() for weight in weights]
            gradients = [weight.grad.to_local() for weight in weights]
            moments = [self.state[weight]["momentum"].to_local() for weight in weights]
            updates = torch.stack(self.advance(rows, gradients, moments))
            orthogonal = orthogonalize_rows(updates, shape, count)
            self.move(rows, orthogonal, max(shape[0] // count, shape[1]))


def orthogonalize_rows(rows: torch.Tensor, shape, count: int) -> torch.Tensor:
    """Orthogonalize N weights, of which each rank has its rows (N, its rows, C); return the same.

    shape: of a whole weight, (R, C), in which `count` matrices are stacked. n is N / ranks and r is
    R / ranks, rounded up: zeros are added. Weight i is made whole on rank i modulo ranks.
    """
    ranks, (number, own, _) = dist.get_world_size(), rows.shape
    height = math.ceil(shape[0] / ranks)  # r; the last ranks can have fewer rows
    padded = F.pad(rows, (0, 0, 0, height - own, 0, -number % ranks))
    received = exchange(padded.unflatten(0, (-1, ranks)).transpose(0, 1))  # (ranks, n, r, C)
    whole = received.transpose(0, 1).flatten(1, 2)[:, : shape[0]]  # (n, R, C)
    whole = orthogonalize(whole.reshape(-1, shape[0] // count, shape[1])).view(whole.shape)
    padded = F.pad(whole, (0, 0, 0, height * ranks - shape[0]))
    received = exchange(padded.unflatten(1, (ranks, -1)).transpose(0, 1))  # (ranks, n, r, C)
    return received.transpose(0, 1).flatten(0, 1)[:number, :own]


def exchange(parts: torch.Tensor) -> torch.Tensor:
    """Send parts[i] to rank i; return what each rank sent to this one, in the ranks' order."""
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous())
    return received


def start_deepspeed(run):
    """Give the model and AdamW, on the CPU, to DeepSpeed's engine, if asked to. Raises Failure."""
    if run.settings.parallel != "deepspeed":
        return
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
    options = read_options(settings.deepspeed_config, ours)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments, optimizer.state = optimizer.state, defaultdict(dict)
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
    options, objects = without_auto(options), ("optimizer", "zero_optimization", "fp16", "bf16")
    if not all(isinstance(options.get(name, {}), dict) for name in objects):
        raise Failure(f"{path}: {', '.join(objects)} must be objects")
    kind = options.pop("optimizer", {}).get("type", "AdamW")  # its values are the recipe's
    options.pop("scheduler", None)
    if kind not in ("Adam", "AdamW"):
        raise Failure(f"{path}: optimizer {kind} is not supported, only AdamW is")
    if options.get("zero_optimization", {}).get("stage") not in (1, 2, 3):
        raise Failure(f"{path}: the stage of zero_optimization must be 1, 2 or 3")
    if options.get("fp16", {}).get("enabled"):
        raise Failure(f"{path}: fp16 is not supported; dtype bfloat16 needs no option")
    for name in ("train_micro_batch_size_per_gpu", "gradient_clipping"):  # the loop accumulates
        options[name] = ours[name]
    options |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    options["bf16"] = {"check_grad_overflow": True} | options.get("bf16", {})
    return options | {"managed_gradient_accumulation": False, "steps_per_print": 10**9}


def without_auto(options: dict) -> dict:
    """Options without those that are "auto": DeepSpeed has defaults for them."""
    nested = {k: without_auto(v) if isinstance(v, dict) else v for k, v in options.items()}
    return {name: value for name, value in nested.items() if value != "auto"}


class EngineOptimizer:
    """The AdamW inside an engine as the loop knows it."""

    def __init__(self, optimizer, parameters: list):
        self.optimizer, self.parameters = optimizer, parameters
        self.param_groups = optimizer.param_groups

    def step(self):
        """If the step of `clip_grad_norm` was not finite, and so skipped, skip later ones."""
        for state in self.optimizer.state.values():  # which can be on the host
            self.optimizer.found_inf = self.found_inf.to(state["exp_avg"].device)

    def state_dict(self) -> dict:
        """AdamW's, with moments by parameter, which are gathered when they are saved."""
        from deepspeed.utils import safe_get_full_optimizer_state as get

        steps, moments = [state["step"] for state in self.optimizer.state.values()], {}
        for number, parameter in enumerate(self.parameters if any(steps) else []):
            whole = {name: Gathered(get, parameter, name) for name in MOMENTS["AdamW"]}
            moments[number] = whole | {"step": steps[0].clone()}  # AdamW adds to each
        return {"state": moments, "param_groups": []}


def set_moments(run, optimizer, moments: dict):
    """Give an engine AdamW's moments, of a resumed run after a step of gradient and rate 0.

    DeepSpeed looks for all groups' moments once the first has some, so they are made before.
    """
    for flat in [flat for group in optimizer.param_groups for flat in group["params"]]:
        optimizer.state[flat]["step"] = torch.zeros((), device=flat.device)
        optimizer.state[flat] |= {name: torch.zeros_like(flat) for name in MOMENTS["AdamW"]}
    if not moments:
        return
    shape, device = (run.settings.micro_batch_size, run.settings.block_size), run.ranks.device
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    (run.forward(tokens, tokens).mean() * 0).backward()
    run.forward.step()
    for parameter, state in moments.items():
        for name in MOMENTS["AdamW"]:
            set_moment(parameter, name, state[name].to(device))
    for state in optimizer.state.values():
        state["step"].fill_(float(next(iter(moments.values()))["step"]))


def set_moment(parameter, name: str, value: torch.Tensor):
    """Give an engine one of a parameter's moments."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not hasattr(parameter, "ds_tensor"):
        return safe_set_full_optimizer_state(parameter, value, name)
    size, rank = parameter.ds_tensor.numel(), dist.get_rank()  # ZeRO 3: parts of equal size
    value = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    safe_set_local_optimizer_state(parameter, value[rank * size :][:size], name)


class Gathered:
    """A parameter or moment of which each rank has a part, as checkpoint.snapshot wants it."""

    def __init__(self, gather, parameter, *name):
        self.full_tensor, self.to_local = lambda: gather(parameter, *name), lambda: self
        self.shape, self.data_ptr = parameter.shape, lambda: id(self)


def whole_weights(engine) -> dict:
    """The weights by name, which are gathered when they are saved."""
    from deepspeed.utils import safe_get_full_fp32_param as get

    weights = {parameter: Gathered(get, parameter) for parameter in engine.module.parameters()}
    named = engine.module.named_parameters(remove_duplicate=False)
    return {name: weights[parameter] for name, parameter in named}
