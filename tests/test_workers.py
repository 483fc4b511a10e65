"""Worker processes: results in order, and how all of them end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from workers import Workers

SCRIPT = """
import config
from workers import Workers
part = "[__import__('time').sleep(0.02), __import__('os').getpid()][1]"
with config.exit_on_failure(), Workers(2) as workers:
    for pid in workers.map(eval, [part] * 10_000):
        print(pid, flush=True)
"""


def test_results_come_in_order_and_few_parts_are_in_flight():
    taken = []

    def parts():
        for number in range(40):
            taken.append(number)
            yield f"[__import__('time').sleep({number % 3} / 100), {number}][1]"

    with Workers(2) as workers:
        for number, result in enumerate(workers.map(eval, parts())):
            assert result == number and len(taken) <= number + 4
        assert number == 39 and len(multiprocessing.active_children()) == 2
        with pytest.raises(ZeroDivisionError):
            list(workers.map(eval, ["1", "1 / 0", "2"]))
    assert multiprocessing.active_children() == []


def test_a_single_part_or_worker_starts_no_process():
    for count, parts in ((0, 1), (2, 0), (2, 1), (1, 3)):
        results = Workers(count).map(lambda _: os.getpid(), range(parts))
        assert list(results) == [os.getpid()] * parts


def start() -> tuple[subprocess.Popen, set[int]]:
    """A process with two workers at work, in a process group of its own, and their ids."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, text=True, **options)
    pids = set()
    while len(pids) < 2:
        pids.add(int(process.stdout.readline()))
    return process, pids


def finish(process: subprocess.Popen) -> tuple[str, int]:
    """The errors and the exit code, once all that hold its pipes have ended."""
    try:
        return process.communicate(timeout=30)[1], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def test_a_killed_worker_ends_the_run_with_one_line():
    process, pids = start()
    os.kill(min(pids), signal.SIGKILL)
    message = "-c: a worker process was killed; is the memory full? try fewer --processes\n"
    assert finish(process) == (message, 6)


def test_workers_end_when_their_parent_is_killed():
    process, _ = start()
    process.kill()
    assert finish(process)[1] == -signal.SIGKILL


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_ends_all_quietly(presses):
    process, pids = start()
    for pid in pids:
        os.kill(pid, signal.SIGINT)  # a worker leaves it to its parent
    assert all(process.stdout.readline() for _ in range(20))
    for _ in range(presses):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        time.sleep(0.01)
    assert finish(process) == ("-c: interrupted\n", 130)
