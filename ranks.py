"""The processes that train together, one per device: sums, requests to stop, failures, the end."""

import contextlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

import config
from config import INPUT_OUTPUT, Failure

PARENT = os.getppid()  # the process that started this one
KEPT = []  # what holds process groups, see Ranks.keep


@dataclass
class Ranks:
    """This process among those that train together: one per device."""

    rank: int
    world_size: int
    device: torch.device

    def keep(self, holder):
        """Keep what holds a process group until this process exits.

        To free a group Python waits, with its lock, for gloo's threads, which can need that lock.
        """
        if self.world_size > 1:
            KEPT.append(holder)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def min(self, value: int) -> int:
        """The smallest `value` of all ranks, agreed between CPUs without waiting for a GPU."""
        smallest = torch.tensor(int(value))
        if self.world_size > 1:
            dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return self.min(not flag) == 0

    def on_rank_0(self, task):
        """Run `task` on rank 0 while the others wait. If it fails, all end and rank 0 says why."""
        failure, code = None, 0
        if self.rank == 0:
            try:
                task()
            except (Failure, OSError) as error:
                failure, code = error, getattr(error, "code", INPUT_OUTPUT)
        code = -self.min(-code)  # the largest
        if code:
            raise failure or Failure("", code)  # without a text: rank 0 says why


@contextlib.contextmanager
def start_ranks(device: torch.device, timeout_minutes: int, less_memory: str):
    """Yield this process's Ranks; torchrun sets RANK, WORLD_SIZE and LOCAL_RANK. Raises Failure.

    timeout_minutes: how long a rank waits for others. less_memory: what to do if memory is full.
    """
    world_size, local_rank = (int(os.environ.get(name, 0)) for name in ("WORLD_SIZE", "LOCAL_RANK"))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
        threading.Thread(target=stop_without_launcher, daemon=True).start()
    if device.type == "cuda":
        device = take_gpu(local_rank)
    if world_size <= 1:
        yield Ranks(0, 1, device)
        return
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(attempt, store)  # torchrun keeps what a failed attempt left in it
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, None, timeout, world_size, rank, store)
    ranks = Ranks(rank, world_size, device)
    ranks.keep(dist.group.WORLD)
    with shared_failure(store, less_memory):
        yield ranks
    try:
        if device.type == "cpu":
            dist.barrier()  # a process that ends while gloo's threads still send can be aborted
        dist.destroy_process_group()
    except RuntimeError as error:  # a rank that has ended; the last checkpoint is written
        print(f"rank {rank}, after the training: {error!r:.200}", file=sys.stderr)


def take_gpu(local_rank: int) -> torch.device:
    """The GPU of this process among those of its host. Raises Failure."""
    needed, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if needed > count:
        raise Failure(f"{needed} processes for {count} GPUs: lower --nproc_per_node")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def launcher_is_gone() -> bool:
    """Whether torchrun, which started this process, has ended."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT


def stop_without_launcher():
    """Ask this process to stop once its launcher is gone: before the loop, that ends it at once."""
    while not launcher_is_gone():
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def catch_stop_requests(run):
    """Signals ask a run to stop. Only a Ctrl-C more than two seconds later ends it at once."""

    def request(number, frame):
        now = time.monotonic()
        run.stop_requested = run.stop_requested or now
        if number == signal.SIGINT and now > run.stop_requested + 2:
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
    numbers = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]  # as under nohup
    handlers = {number: signal.signal(number, request) for number in numbers}
    try:
        yield
    except Exception:  # a launcher's SIGTERM, which follows, must not end what is being written
        if run.writer:
            run.writer.pool.shutdown()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def shared_failure(store, less_memory: str):
    """Have all ranks end with the exit code of the first that fails, which alone says why.

    store: the one that the ranks of torch.distributed share.
    """
    threading.Thread(target=end_with_first, args=(store,), daemon=True).start()
    try:
        yield
    except Exception as error:
        message, code = config.explain(error, less_memory) or (None, 1)
        this = first = f"{code} {config.RANK}"
        if message != "":  # else another rank is the first
            with contextlib.suppress(RuntimeError):  # the launcher, which has the store, is gone
                first = store.compare_set("failure", "", this).decode()
        if message is None:  # not expected: a traceback
            raise
        if message and first == this:
            config.print_error(message)
        raise Failure("", int(first.split()[0])) from None


def end_with_first(store):
    """End this process if another rank has failed and this one waits for it on its GPU."""
    with contextlib.suppress(RuntimeError):  # the launcher is gone
        while not store.check(["failure"]):
            time.sleep(1)
        time.sleep(5)  # in which a rank that does not wait ends by itself
        config.end_process(int(store.get("failure").split()[0]))
