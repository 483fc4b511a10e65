"""Train a GPT: one process on a laptop, or one per GPU under torchrun.

    python train.py config/small.py                            from text to a sample, in minutes
    python train.py config/gpt2_124m.py --dataset=mine --max_steps=1000
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py
    python train.py config/small.py --init_from=resume         continue a stopped run

The invariant: the batch of a step is a pure function of (seed, step), and dropout of (seed, step,
rank, micro-batch size). With the weights, the optimizers' state and the step, latest.pt has all
that a run needs to continue exactly, with the same batches on any number of ranks (processes).
"""

import contextlib
import math
import os
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import config
import hardware
import log
import parallel
import plan
import sample
from config import NOT_FINITE, Failure
from dataset import Dataset, Windows, find_folder
from hashing import hash_numbers
from mixture import Mixture, parse_mixture
from model import GPT, GPTConfig, ModelShape
from ranks import Ranks, catch_stop_requests, launcher_is_gone, start_ranks

BUCKET_MB = 100  # of gradients that DDP sums at once, while the backward makes others
LESS_MEMORY = "a smaller --micro_batch_size or --activation_checkpointing=full needs less"
MADE_WHEN_MISSING = ("stdlib", "shakespeare")  # datasets of prepare_data.py that take seconds
MODELS_OWN = sorted({"embedding_std", *ModelShape.__dataclass_fields__} - {"block_size", "dropout"})


@dataclass
class TrainConfig(ModelShape):
    """Train a GPT on a dataset of data/ and keep it in out/. The defaults are GPT-2 124M's."""

    out_dir: str = "out/run"  # folder of the run: checkpoints, metrics.jsonl, loss.png
    init_from: str = "scratch"  # scratch, resume, auto (either), gpt2, .pt, folder or OWNER/NAME
    overwrite: bool = False  # start again although out_dir has a run, which is lost
    seed: int = 1337  # of the initial weights, the order of the data, and dropout
    dataset: str = "stdlib"  # folder in data_dir (stdlib, shakespeare: made), or a:0.7,b:0.3
    data_dir: str = "data"  # folder of the datasets
    tokenizer: str = ""  # of shards without a manifest: gpt2, bytes, a .tiktoken file, OWNER/NAME
    split_pattern: str = ""  # of a .tiktoken file in `tokenizer`: gpt2, gpt4 or qwen
    verify_data: bool = False  # hash the dataset at the start even if it has 2 GB or more
    batch_tokens: int = 512 * 1024  # tokens of an optimizer step, over all ranks
    micro_batch_size: int = 0  # sequences a device holds at once; 0 = found by trying on a GPU
    max_steps: int = 19073  # optimizer steps; 19,073 of 0.5M tokens are 10B
    learning_rate: float = 6e-4  # peak, after warm-up
    min_lr: float = 6e-5  # where learning_rate's decay ends; other rates fall by the same factor
    warmup_steps: int = 700  # steps of linear warm-up to learning_rate
    decay: str = "cosine"  # how the learning rate falls: cosine or linear
    decay_steps: int = 0  # steps of decay at the end, after a plateau; 0 = all after warm-up
    optimizer: str = "adamw"  # adamw, or muon: Muon for the blocks' matrices, AdamW for the rest
    weight_decay: float = 0.1  # of matrices and embeddings, not of biases and norms
    beta1: float = 0.9  # AdamW: decay of the gradient's mean
    beta2: float = 0.95  # AdamW: decay of the squared gradient's mean
    muon_learning_rate: float = 0.0  # peak for Muon's matrices; 0 = learning_rate
    muon_momentum: float = 0.95  # Muon: decay of the gradient's mean
    embedding_learning_rate: float = 0.0  # peak for the token embedding; 0 = learning_rate
    head_learning_rate: float = 0.0  # peak for the head, if it is not tied; 0 = learning_rate
    embedding_std: float = 0.02  # standard deviation of the token embedding's initial values
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = off
    eval_interval: int = 250  # steps between validations; one more follows the last step
    eval_tokens: int = 10 * 1024 * 1024  # tokens of each dataset that a validation scores
    checkpoint_interval: int = 1000  # steps between checkpoints; one more follows the last step
    log_interval: int = 10  # steps between lines of the log
    sample_prompt: str = ""  # text that the trained model continues; "" = off
    distributed_timeout: int = 10  # minutes after which a rank gives up waiting for the others
    device: str = "auto"  # cpu, cuda, mps, or auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32, bfloat16, float16, float8 (torchao; large models); auto: fast
    compile: str = "auto"  # model (fastest), blocks (starts sooner), off; auto: by the run's length
    activation_checkpointing: str = "off"  # recompute to save memory: off, selective (MLPs), full
    parallel: str = "ddp"  # over GPUs: ddp copies the model, fsdp or deepspeed split its state
    reshard_after_forward: bool = True  # fsdp: gather weights again in the backward; less memory
    deepspeed_config: str = ""  # deepspeed: its JSON file; "" is ZeRO stage 2
    log_to: str = ""  # also send the lines of metrics.jsonl to: tensorboard, wandb (pip install it)
    plan: bool = False  # print sizes, memory, time and what published rules say; train nothing
    plan_gpus: str = ""  # of a plan: the hardware, as in "8 x H100 80GB"; "" = this machine's

    def check(self):
        """Raise ValueError where a value, or two together, make no sense."""
        self.check_shape()
        parse_mixture(self.dataset)
        config.check_bounds(self, 1, "batch_tokens max_steps eval_interval eval_tokens")
        config.check_bounds(self, 1, "checkpoint_interval log_interval distributed_timeout")
        config.check_bounds(self, 0, "seed micro_batch_size warmup_steps decay_steps learning_rate")
        config.check_bounds(self, 0, "min_lr weight_decay grad_clip muon_learning_rate")
        config.check_bounds(self, 0, "embedding_learning_rate head_learning_rate embedding_std")
        config.check_bounds(self, 0, "beta1 beta2 muon_momentum", below=1)
        config.check_choices(self, optimizer="adamw muon", decay="cosine linear")
        config.check_choices(self, dtype="auto float32 bfloat16 float16 float8")
        config.check_choices(self, device="auto cpu cuda mps", log_to="tensorboard wandb")
        config.check_choices(self, compile="auto model blocks off", parallel="ddp fsdp deepspeed")
        config.check_choices(self, activation_checkpointing="off selective full")
        parallel.check(asdict(self))
        chosen = [n for n in MODELS_OWN if getattr(self, n) != getattr(TrainConfig, n)]
        if self.fine_tunes and chosen:
            reason = f"{self.init_from} has its own shape and weights; leave it out"
            raise ValueError(f"{chosen[0]} has no effect: {reason}")
        if self.plan and self.fine_tunes:
            raise ValueError(f"a plan is for a new model: {self.init_from} has its own shape")
        if self.init_from == "auto" and self.overwrite:
            raise ValueError("init_from auto continues a run, overwrite loses it: choose one")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr {self.min_lr} exceeds learning_rate {self.learning_rate}")
        if self.warmup_steps + self.decay_steps > self.max_steps:
            steps = f"warmup_steps {self.warmup_steps} + decay_steps {self.decay_steps}"
            raise ValueError(f"{steps} exceed max_steps {self.max_steps}")
        self.check_batch()

    def check_batch(self):
        """Raise ValueError unless every rank gets the same number of whole micro-batches."""
        ranks, size = int(os.environ.get("WORLD_SIZE", "1")), max(1, self.micro_batch_size)
        unit = self.block_size * ranks * size
        if self.batch_tokens % unit:
            product = f"block_size {self.block_size} x {ranks} ranks x micro_batch_size {size}"
            reason = f"batch_tokens {self.batch_tokens} must be a multiple of {unit}: {product}"
            nearest = max(1, round(self.batch_tokens / unit)) * unit
            raise ValueError(f"{reason}; the nearest is {nearest}")

    @property
    def fine_tunes(self) -> bool:
        """Whether the run starts from a model's weights, with new optimizers and at step 0."""
        return self.init_from not in ("scratch", "resume", "auto")

    @property
    def step_sequences(self) -> int:
        """Sequences of an optimizer step, over all ranks."""
        return self.batch_tokens // self.block_size


def main(settings: TrainConfig):
    """A run, from its data to its report. Raises Failure."""
    if settings.plan:
        plan.print_plan(asdict(settings))
        return
    log.check_backend(settings.log_to)
    folder, init_from = Path(settings.out_dir), settings.init_from
    log.check_folder(folder, init_from, settings.overwrite)  # first: what follows can take long
    if settings.fine_tunes:  # here, as a download can outlast the time-out of waiting ranks
        checkpoint.find_model(init_from)
    with contextlib.ExitStack() as stack:
        device = hardware.find_device(settings.device)
        hardware.check_dtype(settings.dtype, device, settings.block_size)
        with start_ranks(device, settings.distributed_timeout, LESS_MEMORY) as ranks:
            dataset = open_dataset(settings, ranks)
            claim = log.claimed_folder(folder, init_from, settings.overwrite)
            ranks.on_rank_0(lambda: stack.enter_context(claim))  # the lock is held until main ends
            run = start_run(settings, ranks, dataset)
            ranks.on_rank_0(lambda: log.start_log(run))
            with hardware.naming_less_memory(asdict(run.settings)):
                is_done = train(run)
        if is_done:
            report(run)
        else:
            run.print(f"stopped at step {run.step}; to continue: the same with --init_from=auto")


# The start of a run


@dataclass
class Run:
    """The state of a run: what `start_run` puts together and `train` advances."""

    settings: TrainConfig
    ranks: Ranks
    dataset: Dataset | Mixture
    model: GPT
    forward: torch.nn.Module  # the model as the loop calls it
    optimizers: list[torch.optim.Optimizer]
    step: int = 0  # optimizer steps done
    val_loss: float = math.inf  # of the last validation, nats per token
    val_step: int = 0  # the step of the last validation
    best_val_loss: float = math.inf
    is_best: bool = False  # whether best.pt is to be written
    stop_requested: float = 0.0  # the time of the first signal that asked to stop

    def __post_init__(self):
        device, self.folder = self.ranks.device, Path(self.settings.out_dir)
        self.writer = checkpoint.Writer(self.folder) if self.ranks.rank == 0 else None
        self.send = None  # the function that also sends metrics to the backend of log_to
        self.found_inf = torch.zeros((), device=device)  # 1 once a step was not finite
        self.bad_step = torch.zeros((), dtype=torch.int64, device=device)  # the first such step
        self.is_bad_here = torch.zeros((), dtype=torch.bool, device=device)  # by this rank's loss
        # small gradients are 0 in float16, unless the loss is scaled up for the backward pass
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.settings.dtype == "float16")

    @property
    def micro_steps(self) -> int:
        """Forward and backward passes of a rank in one optimizer step."""
        sequences = self.settings.micro_batch_size * self.ranks.world_size
        return self.settings.step_sequences // sequences

    def must_stop(self) -> bool:
        """Whether to save and end: asked to, or the launcher is gone, or a save has failed."""
        has_failed = self.writer and self.writer.has_failed()
        return bool(self.stop_requested or launcher_is_gone() or has_failed)

    def print(self, text: str):
        """Print on rank 0, where a closed pipe or a full disk does not stop the training."""
        if self.ranks.rank == 0:
            config.say(text)

    def record(self, **values):
        """Add a line to metrics.jsonl on rank 0."""
        if self.ranks.rank == 0:
            log.append_metrics(self.folder, values, self.send)


def open_dataset(settings: TrainConfig, ranks: Ranks) -> Dataset | Mixture:
    """Open the dataset, or the mixture of several. Raises Failure."""
    weights = parse_mixture(settings.dataset)
    datasets = [open_folder(name, settings, ranks) for name in weights]
    return Mixture(datasets, [*weights.values()]) if len(datasets) > 1 else datasets[0]


def open_folder(name: str, settings: TrainConfig, ranks: Ranks) -> Dataset:
    """Open a dataset; make it first where it is missing and takes seconds. Raises Failure."""
    folder = find_folder(name, settings.data_dir)

    def make():
        arguments = [folder.name, f"--data_dir={folder.parent}"]
        if name not in MADE_WHEN_MISSING:
            command = f"python prepare_data.py {shlex.join(arguments)}"
            hint = f"make it: {command} (with --source=PATH for your own text)"
            raise Failure(f"{folder} does not exist; {hint}")
        command = [sys.executable, Path(__file__).with_name("prepare_data.py"), *arguments]
        if code := abs(subprocess.run(command).returncode):  # of a signal it is negative
            raise Failure(f"the dataset {name} could not be made", code)

    ranks.on_rank_0(lambda: folder.exists() or make())
    return Dataset(folder, settings.block_size, settings.tokenizer, settings.split_pattern)


def start_run(settings: TrainConfig, ranks: Ranks, dataset: Dataset) -> Run:
    """The run at its first step, or as its checkpoint left it. Raises Failure."""
    if settings.init_from == "auto":
        has_checkpoint = ranks.any(bool(checkpoint.saved(Path(settings.out_dir))))
        settings = replace(settings, init_from="resume" if has_checkpoint else "scratch")
    saved = load_saved(settings, ranks, dataset) if settings.init_from == "resume" else {}
    dataset.verify(settings.verify_data, is_known=bool(saved))
    hardware.keep_freed_memory()
    with checkpoint.fitting(Path(settings.out_dir)) if saved else contextlib.nullcontext():
        model = build_model(settings, dataset, saved)
        settings = resolve_auto(settings, ranks, model, saved)
        forward = parallelize(model, settings, ranks)  # before the optimizers: may replace weights
        run = Run(settings, ranks, dataset, model, forward, make_optimizers(model, settings))
        if saved:
            restore(run, saved)
        elif not settings.fine_tunes:
            model.init_weights(settings.seed, parallel.shard_like, settings.embedding_std)
    parallel.start_deepspeed(run)
    ranks.keep(run)
    return run


def load_saved(settings: TrainConfig, ranks: Ranks, dataset: Dataset) -> dict:
    """The newest checkpoint of the run to continue; rank 0 first puts a damaged one aside."""
    saved, folder = {}, Path(settings.out_dir)
    ranks.on_rank_0(lambda: saved.update(checkpoint.load_newest(folder)))
    saved = saved or checkpoint.load_newest(folder)
    saved["settings"] = asdict(TrainConfig()) | saved["settings"]  # it can lack new ones
    with checkpoint.fitting(folder):
        checkpoint.check_same_run(saved, asdict(settings), dataset)
    return saved


def restore(run: Run, saved: dict):
    """Bring a run to where its checkpoint left it, used in `checkpoint.fitting`."""
    saved = parallel.shard_state(saved, run.model)
    run.model.load_state_dict(saved["model"])
    checkpoint.restore_optimizers(run.optimizers, saved)
    if saved.get("scaler") and run.scaler.is_enabled():
        run.scaler.load_state_dict(saved["scaler"])
    run.step, run.best_val_loss = saved["step"], saved["best_val_loss"]
    run.val_loss, run.val_step = saved["val_loss"], saved["val_step"]
    if saved["settings"]["eval_tokens"] != run.settings.eval_tokens:
        run.best_val_loss, run.val_step = math.inf, -1  # of another validation text


def resolve_auto(settings: TrainConfig, ranks: Ranks, model: GPT, saved: dict) -> TrainConfig:
    """Replace `auto` and 0 by the checkpoint's values on such a device, or by this machine's."""
    if settings.parallel == "fsdp" and ranks.world_size == 1:  # there is nothing to split
        settings = replace(settings, parallel="ddp")
    device, dtype, mode = ranks.device.type, settings.dtype, settings.compile
    before = saved["settings"] if saved and saved["settings"]["device"] == device else {}
    if dtype == "auto":
        dtype = before.get("dtype") or hardware.best_training_dtype(ranks.device)
    hardware.check_dtype(dtype, ranks.device, settings.block_size)  # it can be a checkpoint's
    hardware.set_dtype(model, dtype, ranks.device)
    if mode == "auto":
        tokens = settings.max_steps * settings.batch_tokens / ranks.world_size
        flops = model.flops_per_token(settings.block_size) * tokens
        mode = before.get("compile", "on")
        if mode == "on":  # no checkpoint, or 0.1's, which knew on and off
            mode = hardware.choose_compile(ranks.device, dtype, flops)
        mode = "blocks" if mode == "model" and settings.parallel != "ddp" else mode
    now = [dtype, settings.activation_checkpointing, ranks.world_size]
    was = [before.get("dtype"), before.get("activation_checkpointing"), saved.get("world_size")]
    size = settings.micro_batch_size or (before["micro_batch_size"] if now == was else 0)
    if not size:
        share = settings.step_sequences // ranks.world_size
        model.to(ranks.device)  # all of it: where it is split, micro_batch_size is given
        size = ranks.min(hardware.fitting_micro_batch_size(model, share, settings.block_size))
    if not size:
        raise Failure(f"not one sequence fits; {hardware.less_memory(asdict(settings))}")
    settings = replace(settings, device=device, dtype=dtype, compile=mode, micro_batch_size=size)
    settings.check()  # whatever was found, and whatever a checkpoint says
    return settings


def build_model(settings: TrainConfig, dataset: Dataset, saved: dict) -> GPT:
    """The checkpoint's model or a new one, both without weights, or another's. Raises Failure."""
    if saved:
        model = checkpoint.new_model(saved)
    elif settings.fine_tunes:
        model = pretrained_model(settings, dataset)
    else:
        shape = {field.name: getattr(settings, field.name) for field in fields(ModelShape)}
        model = GPT(GPTConfig(vocab_size=dataset.tokenizer.vocab_size, **shape))
    model.activation_checkpointing = settings.activation_checkpointing
    return model


def parallelize(model: GPT, settings: TrainConfig, ranks: Ranks) -> torch.nn.Module:
    """The model as the loop calls it: compiled, then data-parallel, with all weights or a share."""
    if settings.compile == "model":
        model.compile()
    if settings.compile == "blocks":  # all have the same code, which is compiled once
        for block in model.h:
            block.compile()
        model.cross_entropy = torch.compile(model.cross_entropy)
    if settings.parallel == "fsdp":
        parallel.shard_model(model, ranks.device, settings.reshard_after_forward)
    if settings.parallel == "ddp":  # DeepSpeed takes the model from the CPU, see start_deepspeed
        model.to(ranks.device)
    if settings.parallel != "ddp" or ranks.world_size == 1:
        return model
    forward = DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True)
    forward.broadcast_buffers = False  # an option, but under another name from torch 2.13 on
    return forward


def pretrained_model(settings: TrainConfig, dataset: Dataset) -> GPT:
    """The model to fine-tune. Raises Failure where it does not fit the dataset or the settings."""
    name, tokens, block_size = settings.init_from, dataset.tokenizer, settings.block_size
    model, tokenizer = checkpoint.open_model(name, "", settings.dropout)
    if not tokenizer.same_ids(tokens):
        is_run = checkpoint.find_model(name).is_file()
        source = "data/ITS_DATASET/tokenizer.tiktoken" if is_run else shlex.quote(name)
        hint = f"make it again: python prepare_data.py NAME --source=PATH --tokenizer={source}"
        raise Failure(f"dataset {settings.dataset} has the tokenizer {tokens.name}; {hint}")
    if block_size > model.config.block_size:
        raise Failure(f"block_size {block_size} exceeds the {model.config.block_size} of {name}")
    return model


# The loop


def train(run: Run) -> bool:
    """Train to max_steps, or return False at a request to stop. Either way latest.pt is saved."""
    settings, ranks, forward, first_step = run.settings, run.ranks, run.forward, run.step
    peak = hardware.peak_flops(ranks.device, settings.dtype) * ranks.world_size
    flops = run.model.flops_per_token(settings.block_size)
    meter = log.Meter(settings.max_steps, settings.batch_tokens, flops, peak)
    batch = micro_batch(run, first_step, 0)
    if run.writer and ranks.device.type == "cuda":
        run.writer.reserve(4 * list(run.model.parameters()))  # latest.pt: weights, moments; best.pt
    with catch_stop_requests(run):
        for step in range(first_step, settings.max_steps + 1):  # the last pass validates and saves
            is_last = step == settings.max_steps
            # a resumed run does not repeat the validation that its checkpoint has
            if step > run.val_step and (step % settings.eval_interval == 0 or is_last):
                with meter.paused():
                    validate_and_log(run)
            stop = ranks.any(run.must_stop())
            is_due = step > first_step and step % settings.checkpoint_interval == 0
            with meter.paused():
                if is_due or stop or is_last:
                    save_latest(run)
                if run.is_best:
                    parallel.save(forward, run.writer, "best.pt", run_state(run), time.monotonic())
            run.is_best = False
            if stop or is_last:
                finish_saving(run)
                return run.val_step == settings.max_steps

            set_learning_rates(run, step)
            if settings.dropout:
                torch.manual_seed(hash_numbers(settings.seed, step, ranks.rank))
            step_loss = torch.zeros((), device=ranks.device)
            for micro_step in range(run.micro_steps):
                parallel.announce(forward, is_last=micro_step == run.micro_steps - 1)
                loss = forward(*batch).mean() / run.micro_steps
                # While the device works; after the last micro-step, the next step's first batch
                batch = micro_batch(run, step, micro_step + 1)
                run.scaler.scale(loss).backward()
                step_loss += loss.detach()
            grad_norm = update_weights(run, step_loss)
            run.step = step + 1
            if run.step % settings.log_interval == 0 or step == first_step:
                log_step(run, meter, ranks.sum(step_loss) / ranks.world_size, grad_norm)


def micro_batch(run: Run, step: int, micro_step: int):
    """This rank's tokens and targets, each (micro_batch_size, block_size), on its device."""
    settings = run.settings
    turn = micro_step * run.ranks.world_size + run.ranks.rank  # the ranks take turns
    first = step * settings.step_sequences + turn * settings.micro_batch_size
    windows = run.dataset.batch(settings.seed, first, settings.micro_batch_size)
    return to_device(windows, run.ranks.device)


def to_device(windows: np.ndarray, device: torch.device):
    """Windows (B, T + 1) as tokens and targets (B, T) on the device."""
    batch = torch.from_numpy(windows)
    if device.type == "cuda":  # from pinned memory the copy does not wait for the GPU
        batch = batch.pin_memory().to(device, non_blocking=True)
    batch = batch.to(device)
    return batch[:, :-1].contiguous(), batch[:, 1:].clone()  # share no memory: validate changes one


def update_weights(run: Run, loss: torch.Tensor) -> torch.Tensor:
    """Clip the gradients, move the weights by them, and return the gradients' norm before."""
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    grad_norm = parallel.clip_grad_norm(run.forward, run.settings.grad_clip or math.inf)
    skip_if_not_finite(run, loss, grad_norm)
    for optimizer in run.optimizers:  # not scaler.step, which looks at each optimizer by itself
        optimizer.step()
    run.scaler.update()
    run.model.zero_grad(set_to_none=run.forward is run.model)  # else they are DDP's buckets
    return grad_norm


def skip_if_not_finite(run: Run, loss: torch.Tensor, grad_norm: torch.Tensor):
    """Have optimizers skip this update, and all later ones, if one of these is not finite.

    The device decides, alike on all ranks, and nothing waits for it until `stop_if_not_finite`.
    """
    is_inf, scale = ~grad_norm.isfinite(), run.scaler.scale(torch.ones_like(loss))
    # In float16 a too large gradient only skips an update and halves the scale, down to 1
    is_bad = ~loss.isfinite() | (is_inf & (scale <= 1))
    found_inf = run.ranks.sum(is_bad.float()).clamp(max=1.0)
    is_first = found_inf > run.found_inf
    run.bad_step = torch.where(is_first, run.step, run.bad_step)
    run.is_bad_here = torch.where(is_first, ~loss.isfinite(), run.is_bad_here)
    run.found_inf = torch.maximum(run.found_inf, found_inf)
    for optimizer in run.optimizers:
        optimizer.found_inf = torch.maximum(run.found_inf, is_inf.float())


def stop_if_not_finite(run: Run):
    """After a step that was not finite, save the state before it and raise Failure."""
    if not run.found_inf:  # waits for the device
        return
    run.step, run.found_inf = int(run.bad_step), 0.0  # 0: saving must not come back here
    save_latest(run)
    finish_saving(run)
    ranks, count = run.ranks, run.settings.step_sequences
    bad_rank = ranks.min(ranks.rank if run.is_bad_here else ranks.world_size)
    what = f"the loss of rank {bad_rank}" if bad_rank < ranks.world_size else "the gradient"
    windows = f"windows at positions {run.step * count} to {(run.step + 1) * count - 1}"
    hint = "latest.pt is from before it. Try a lower --learning_rate or more --warmup_steps"
    raise Failure(f"step {run.step + 1}: {what} is not finite ({windows}).\n{hint}", NOT_FINITE)


def log_step(run: Run, meter: log.Meter, loss: torch.Tensor, grad_norm: torch.Tensor):
    """Print a line about the step just done and add it to metrics.jsonl. Waits for the device."""
    stop_if_not_finite(run)
    speed, words = meter.measure(run.step)
    memory = hardware.memory_gib(run.ranks.device)
    rate = run.settings.learning_rate * schedule(run.step - 1, run.settings)
    values = {"loss": loss.item(), "grad_norm": grad_norm.item(), "learning_rate": rate}
    if run.step == 1 or run.step % run.settings.log_interval == 0:  # not where a run continues
        run.record(step=run.step, **values, **speed, memory_gib=memory)
    done = f"step {run.step:>6,} of {run.settings.max_steps:,} | loss {loss:.4f}"
    run.print(" | ".join([done, *words, f"{memory:.1f} GiB"]))


def make_optimizers(model: GPT, settings: TrainConfig) -> list:
    """AdamW (Loshchilov & Hutter 2019), and Muon for the blocks' matrices if asked for."""
    matrices = model.matrices() if settings.optimizer == "muon" else []
    for_muon, kinds = {id(weight) for weight, _ in matrices}, defaultdict(list)
    for name, parameter in model.named_parameters():
        if id(parameter) not in for_muon:
            kinds[name.split(".")[0] if parameter.dim() >= 2 else "vectors"].append(parameter)
    kinds["vectors"] = kinds.pop("vectors")  # last: a checkpoint has moments in this order
    peaks = dict(wte=settings.embedding_learning_rate, lm_head=settings.head_learning_rate)
    groups = []
    for kind, parameters in kinds.items():  # wte, wpe, h, lm_head, vectors
        decay = 0.0 if kind == "vectors" else settings.weight_decay
        peak = peaks.get(kind) or settings.learning_rate
        groups.append(dict(params=parameters, peak=peak, weight_decay=decay))
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), fused=True)
    if not matrices:
        return [adamw]
    muon = parallel.make_muon(matrices, settings.muon_momentum, settings.weight_decay)
    muon.param_groups[0]["peak"] = settings.muon_learning_rate or settings.learning_rate
    return [adamw, muon]


def set_learning_rates(run: Run, step: int):
    """Give each group of parameters its learning rate for a step."""
    share = schedule(step, run.settings)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]


def schedule(step: int, settings: TrainConfig) -> float:
    """The learning rate's share of its peak: linear warm-up, a plateau, and the decay to min_lr."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    decay_steps = settings.decay_steps or settings.max_steps - settings.warmup_steps
    progress = max(0.0, 1 - (settings.max_steps - step) / max(1, decay_steps))  # 0 to 1
    height = 1 - progress  # linear, after a plateau: Hägele et al. 2024
    if settings.decay == "cosine":  # Loshchilov & Hutter 2017
        height = (1 + math.cos(math.pi * progress)) / 2
    lowest = settings.min_lr / (settings.learning_rate or 1.0)  # both can be 0
    return lowest + (1 - lowest) * height


# Validation and checkpoints


def validate_and_log(run: Run):
    """Validate, unless a stop is requested meanwhile: the resumed run makes up for it."""
    stop_if_not_finite(run)
    losses = {part.folder.name: validate(run, part.val) for part in run.dataset.parts}
    if None in losses.values():
        return
    loss = sum(share * part for share, part in zip(run.dataset.shares, losses.values()))
    each = {f"val_loss_{name}": part for name, part in losses.items() if len(losses) > 1}
    if not math.isfinite(loss):
        raise Failure(f"step {run.step}: the validation loss is {loss}", NOT_FINITE)
    run.val_loss, run.val_step = loss, run.step
    run.record(step=run.step, val_loss=loss, bits_per_byte=run.dataset.bits_per_byte(loss), **each)
    perplexity = f"perplexity {log.perplexity(loss):.2f}"
    names = "".join(f" | {name} {part:.4f}" for name, part in each.items())
    run.print(f"step {run.step:>6,} | validation loss {loss:.4f}, {perplexity}{names}")
    if loss < run.best_val_loss:
        run.best_val_loss, run.is_best = loss, True


def validate(run: Run, windows: Windows) -> float | None:
    """The mean loss, in nats per token, of fixed windows spread evenly over a validation text."""
    settings, ranks, size = run.settings, run.ranks, run.settings.micro_batch_size
    count = min(len(windows), max(1, settings.eval_tokens // settings.block_size))
    chosen = np.linspace(0, len(windows) - 1, count).round().astype(np.int64)
    total, is_compiled = 0.0, settings.compile != "off"
    run.model.train(is_compiled and not settings.dropout)  # without dropout both modes are the same
    for first in range(0, count, size * ranks.world_size):  # as often on each rank
        if ranks.any(run.must_stop()):
            return None  # not the loss of all windows
        indices = chosen[first + ranks.rank * size :][:size]
        rows = np.resize(indices, size)  # the last batch is filled up: no shape to compile anew
        tokens, targets = to_device(windows[rows], ranks.device)
        targets[len(indices) :] = -1
        with torch.set_grad_enabled(is_compiled):  # as in training: no graph to compile anew
            total += run.model(tokens, targets).sum().item()
    run.model.train()
    total = ranks.sum(torch.tensor(total, dtype=torch.float64)).item()
    return total / (count * settings.block_size)


def save_latest(run: Run):
    """Start to write latest.pt in the background. Raises Failure after a step not finite."""
    stop_if_not_finite(run)
    started = time.monotonic()
    finish_saving(run)  # one at a time
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    state = run_state(run) | {"optimizers": optimizers, "scaler": run.scaler.state_dict()}
    parallel.save(run.forward, run.writer, "latest.pt", state, started)


def finish_saving(run: Run):
    """Wait until latest.pt is written. Raises OSError if it could not be, and ends all ranks."""
    while run.ranks.any(run.writer and not run.writer.is_done()):
        time.sleep(0.05)
    run.ranks.on_rank_0(lambda: run.writer.finish())


def run_state(run: Run) -> dict:
    """What a checkpoint holds, but the optimizers' state."""
    return checkpoint.model_state(run.model, run.dataset.tokenizer) | {
        "step": run.step,
        "val_loss": run.val_loss,
        "val_step": run.val_step,
        "best_val_loss": run.best_val_loss,
        "settings": asdict(run.settings),
        "dataset": run.dataset.fingerprint,
        "world_size": run.ranks.world_size,
    }


def report(run: Run):
    """Print what the run reached, and let the model continue a prompt."""
    if run.ranks.rank == 0:
        log.print_report(run.folder, run.val_loss, run.dataset)
        if prompt := run.settings.sample_prompt:
            options = dict(checkpoint=str(run.folder / "latest.pt"), device=run.settings.device)
            sample.main(sample.SampleConfig(prompt=prompt, max_new_tokens=120, **options))


if __name__ == "__main__":
    config.run(main, TrainConfig, LESS_MEMORY)
