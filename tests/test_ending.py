"""A process that ran foreign code ends when its work is done, whatever threads that code has left behind."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

LEFT_BEHIND = """
import atexit, sys, time
from concurrent.futures import ThreadPoolExecutor
import tools.ending as ending

ending.PATIENCE_S = 0.5
atexit.register(print, "cleared up")
with ending.ending_in_time():
    ThreadPoolExecutor(1).submit(time.sleep, {seconds})
    print("done", end=" ")
    {last}
"""


@pytest.mark.parametrize(
    ("last", "code"), [("pass", 0), ("sys.exit(3)", 3), ("sys.exit('no')", 1), ("sys.exit()", 0), ("1 / 0", 1)]
)
def test_a_hanging_thread_of_a_pool_does_not_hold_up_the_end(last: str, code: int) -> None:
    """A world bounded its calls by a pool: the server said that it had stopped, and stayed."""
    began = time.perf_counter()
    ended = ended_of(LEFT_BEHIND.format(seconds=60, last=last))
    assert ended.returncode == code
    assert ended.stdout == "done cleared up\n"
    assert time.perf_counter() - began < 20


def test_a_thread_that_ends_soon_is_waited_for() -> None:
    finished = "ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.2), print('and more', end=' ')))"
    ended = ended_of(LEFT_BEHIND.format(seconds=0, last=finished))
    assert (ended.returncode, ended.stdout) == (0, "done and more cleared up\n")


def test_what_clears_up_may_take_longer() -> None:
    code = LEFT_BEHIND.format(seconds=0, last="atexit.register(time.sleep, 1)")
    assert ended_of(code).stdout == "done cleared up\n"


def test_what_hangs_while_clearing_up_does_not_hold_up_the_end_either() -> None:
    for seconds in (0, 60):
        last = "atexit.register(time.sleep, 60); ending.CLEARING_S = 1"
        began = time.perf_counter()
        assert ended_of(LEFT_BEHIND.format(seconds=seconds, last=last)).returncode == 0
        assert time.perf_counter() - began < 20


def test_what_clears_up_is_called_once_where_the_thread_ends_meanwhile() -> None:
    last = "atexit.register(lambda: (print('once', end=' '), time.sleep(1.5)))"
    assert ended_of(LEFT_BEHIND.format(seconds=1, last=last)).stdout == "done once cleared up\n"


def ended_of(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
