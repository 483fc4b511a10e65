"""Processes that compute the parts of a long task; the results come in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice

from config import INPUT_OUTPUT, Failure


class Workers:
    """Up to `count` processes (0: one per core), for a `with`; a task's second part starts them."""

    def __init__(self, count: int):
        has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
        self.count = count or (len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count())
        self.pool = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pool:
            with no_interrupt():  # the processes wait for a signal to end
                self.pool.shutdown(cancel_futures=True)

    def map(self, function: Callable, parts: Iterable) -> Iterator:
        """Yield function(part) for each part, in order, with few parts in memory at once."""
        parts = iter(parts)
        first_two = list(islice(parts, 2))
        parts = chain(first_two, parts)
        if self.count == 1 or len(first_two) < 2:
            yield from map(function, parts)
            return
        if not self.pool:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.count, context, end_with_parent)
        results = deque()
        try:
            for part in parts:
                with no_interrupt():  # inherited by a process that starts here
                    results.append(self.pool.submit(function, part))
                if len(results) == 2 * self.count:
                    yield results.popleft().result()
            while results:
                yield results.popleft().result()
        except BrokenProcessPool:
            hint = "is the memory full? try fewer --processes"
            raise Failure(f"a worker process was killed; {hint}", INPUT_OUTPUT) from None


@contextmanager
def no_interrupt() -> Iterator:
    """Ctrl-C waits until the end of this block."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def end_with_parent():
    """Have this process end as soon as its parent is gone, even if that was killed."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
