"""Helper threads of kernels: loops are whole with several callers, after sleep and in forks;
failures are told; processes end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np
import pytest

import lockstep
from lockstep.kernels.cpu.codegen import crew
from lockstep.kernels.cpu.codegen.arrays import inner
from lockstep.kernels.cpu.codegen.atomics import now
from lockstep.kernels.cpu.codegen.threads import share_out


@inner()
def count(begin, end, seen_N, nanoseconds):  # type: ignore[no-untyped-def]
    """Counts every number, after a while for each."""
    for n in range(begin, end):
        until = now() + nanoseconds
        while now() < until:
            pass
        seen_N[n] += 1


@numba.njit(nogil=True)
def run(seen_N, nanoseconds, times):  # type: ignore[no-untyped-def]
    for _ in range(times):
        share_out(count, len(seen_N), (seen_N, nanoseconds), False)


@inner()
def refuse(begin, end, refused):  # type: ignore[no-untyped-def]
    if begin <= refused < end:
        raise ValueError("refused")


@numba.njit
def run_refusing(total, refused):  # type: ignore[no-untyped-def]
    share_out(refuse, total, (refused,), False)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = crew.num_threads()
    crew.set_num_threads(request.param)
    yield request.param
    crew.set_num_threads(before)


def _names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kernels")]


def test_there_are_as_many_threads_as_wanted(threads: int) -> None:
    assert crew.num_threads() == threads and len(_names()) == threads - 1
    crew.set_num_threads(1)
    assert crew.num_threads() == 1 and not _names()


@pytest.mark.parametrize("total", [1, 2, 17, 300])
def test_many_loops_in_turn_are_whole(total: int, threads: int) -> None:
    seen_N = np.zeros(total, np.int64)
    run(seen_N, 0, 2000)
    assert (seen_N == 2000).all(), f"{threads} threads"


@pytest.mark.parametrize("pause", [0.0, 0.003])
def test_helpers_take_parts(pause: float, threads: int) -> None:
    """The first part waits for the last, which another thread has to run, but not for ever. Helpers
    sleep after half a millisecond, and must wake up.
    """

    @inner()
    def wait_for_the_last(begin, end, done_N):  # type: ignore[no-untyped-def]
        until = now() + 20_000_000_000
        if begin == 0:
            while not done_N[-1] and now() < until:
                pass
        done_N[begin] = 1 if begin or done_N[-1] else 2

    @numba.njit
    def run_waiting(done_N):  # type: ignore[no-untyped-def]
        share_out(wait_for_the_last, len(done_N), (done_N,), False)

    if threads == 1:
        pytest.skip("there is no helper")
    for _ in range(20):
        done_N = np.zeros(threads * 4, np.int64)
        time.sleep(pause)
        run_waiting(done_N)
        assert (done_N == 1).all()


def test_several_callers_at_once(threads: int) -> None:
    """One shares its loop, the others run theirs alone meanwhile."""
    seen_CN = np.zeros((4, 50), np.int64)
    callers = [threading.Thread(target=run, args=(seen_N, 100, 500)) for seen_N in seen_CN]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert (seen_CN == 500).all(), f"{threads} threads"


def test_threads_come_and_go_beside_a_loop() -> None:
    before, seen_N = crew.num_threads(), np.zeros(50, np.int64)
    caller = threading.Thread(target=run, args=(seen_N, 100, 2000))
    caller.start()
    try:
        for number in (3, 1, 2, 5, 1, 4) * 5:
            crew.set_num_threads(number)
    finally:
        crew.set_num_threads(before)
    caller.join()
    assert (seen_N == 2000).all()


def test_a_failure_is_told_and_the_crew_goes_on(threads: int) -> None:
    for refused in (0, 99):
        with pytest.raises((ValueError, RuntimeError), match=r"refused|part of a kernel's loop failed"):
            run_refusing(100, refused)
    run_refusing(100, 100)
    seen_N = np.zeros(100, np.int64)
    run(seen_N, 0, 10)
    assert (seen_N == 10).all(), f"{threads} threads"


_FORK = """
import os, torch
from lockstep.kernels.cpu.codegen import crew
from lockstep.kernels.cpu.norm import rms_norm
x, weight = torch.randn(400, 256), torch.ones(256)
alone = rms_norm(x, weight, 1e-6)
crew.set_num_threads(3)
assert torch.equal(rms_norm(x, weight, 1e-6), alone)
child = os.fork()
if child == 0:
    assert crew.num_threads() == 1 and torch.equal(rms_norm(x, weight, 1e-6), alone)
    crew.set_num_threads(2)
    assert crew.num_threads() == 2 and torch.equal(rms_norm(x, weight, 1e-6), alone)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(rms_norm(x, weight, 1e-6), alone)
print("ends")
"""


def test_a_fork_has_a_crew_of_its_own_and_processes_end() -> None:
    """The process leaves while its helpers sleep, poll, or are about to."""
    done = subprocess.run(
        [sys.executable, "-c", _FORK],
        env=os.environ | {"PYTHONPATH": str(Path(lockstep.__path__[0]).parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr
