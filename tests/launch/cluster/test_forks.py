"""Processes that a fork server starts: they are as others, cost no imports, and end with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lockstep.engine.rank.process import main as rank_main
from lockstep.launch.cluster.cluster import Imports
from lockstep.launch.cluster.local import LocalCluster
from support.launch.clusters import dummy, next_deaths, until
from support.launch.launcher import command_of

PATH = dict(dummy(0, "sleep").environment)
IMPORTS = Imports("support.launch.dummy_role", PATH)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    made = LocalCluster(tmp_path)
    yield made
    made.close()


def started(cluster: LocalCluster, count: int) -> dict[int, psutil.Process]:
    until(lambda: len(cluster.running()) == count, f"{count} processes")
    return {task.index: psutil.Process(place.pid) for task, place in cluster.running()}


def test_a_fork_is_as_a_process_of_its_own(cluster: LocalCluster, tmp_path: Path) -> None:
    cluster.prepare(IMPORTS)
    task = dummy(3, "sleep", imports=IMPORTS, say="here")
    cluster.start([replace(task, environment={**task.environment, "OWN": "value"})])
    process = started(cluster, 1)[3]
    own = ["-m", "support.launch.dummy_role", "rank", "3"]
    until(lambda: command_of(process)[-5:-1] == own, "its own command line")
    assert os.getsid(process.pid) == process.pid
    server = process.parent()
    assert server is not None and server.parent() == psutil.Process()
    assert "fork_server" in " ".join(command_of(server))
    log = tmp_path / "rank-3.log"
    until(lambda: log.exists() and log.read_text() == "here value\n", "its words in its log")
    assert log.stat().st_mode & 0o777 == 0o600
    targets = {os.readlink(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir()}
    assert targets == {"/dev/null", str(log)}, "open files of the fork server are left open"


def test_a_fork_has_its_own_title_whatever_its_environment(cluster: LocalCluster) -> None:
    """A title's place is found by the first variable; Ray's processes have theirs in any order."""
    task = dummy(3, "sleep", imports=IMPORTS)
    cluster.start([replace(task, environment={**os.environ, **PATH})])
    process = started(cluster, 1)[3]
    until(lambda: command_of(process)[-3:-1] == ["rank", "3"], "its own command line")


def test_ends_are_told_as_those_of_others(cluster: LocalCluster) -> None:
    tasks = [dummy(0, "exit", code=3, say="out of cheese"), dummy(1, "fail", say="the reason")]
    cluster.start(
        [replace(task, imports=IMPORTS) for task in (*tasks, dummy(2, "sleep"), dummy(3, "ignore"))]
    )
    deaths = {death.task.index: death for death in next_deaths(cluster, 2)}
    assert (deaths[0].code, deaths[0].last_line.split()[:3]) == (3, ["out", "of", "cheese"])
    assert (deaths[1].code, deaths[1].last_line) == (1, "RuntimeError: the reason")
    started(cluster, 2)[2].kill()
    [death] = next_deaths(cluster, 1)
    assert (death.task.index, death.code) == (2, -signal.SIGKILL)
    [(task, place)] = cluster.running()
    cluster.signal(task, signal.SIGKILL)
    assert next_deaths(cluster, 1)[0].code == -signal.SIGKILL
    assert not psutil.pid_exists(place.pid), "it is not released"


def test_forks_end_with_their_server_and_the_next_has_another(cluster: LocalCluster) -> None:
    both = [dummy(0, "sleep", imports=IMPORTS), dummy(1, "sleep", imports=IMPORTS)]
    cluster.start([*both, dummy(2, "sleep")])
    before = started(cluster, 3)
    server = before[0].parent()
    assert server is not None and server == before[1].parent() != before[2].parent()
    server.kill()
    deaths = next_deaths(cluster, 2)
    assert {(death.task.index, death.code) for death in deaths} == {(0, -9), (1, -9)}
    [lost_with] = {death.lost_with for death in deaths}
    assert lost_with == f"the fork server on {socket.gethostname()} (pid {server.pid})"
    until(lambda: not psutil.pid_exists(before[0].pid), "the forks to go with their server")
    cluster.start([both[0]])
    after = started(cluster, 2)
    assert after[0].parent() not in (server, None) and after[2] == before[2]


def test_a_module_that_cannot_be_imported_is_one_death_with_the_reason(cluster: LocalCluster) -> None:
    cluster.start([dummy(0, "sleep", imports=Imports("no.such_module"))])
    [death] = next_deaths(cluster, 1)
    assert death.code is None
    assert "the fork server has ended; its last line: " in death.cause
    assert "ModuleNotFoundError: No module named 'no'" in death.cause


def test_a_close_while_it_still_imports_leaves_nothing(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    cluster = LocalCluster(tmp_path)
    cluster.start([dummy(0, "sleep", imports=IMPORTS), dummy(1, "sleep")])
    cluster.close()
    until(lambda: set(psutil.Process().children(recursive=True)) <= before, "all processes to end")


@pytest.mark.parametrize("module", ["process", "imports_on_cpu"])
def test_what_ranks_import_touches_no_device_and_starts_no_thread(module: str) -> None:
    """A fork after the first call to a driver could not use the device; it has one thread only."""
    assert rank_main.__module__ == "lockstep.engine.rank.process"
    code = (
        "import torch\n"
        "def touched(*args): raise AssertionError('the driver was called')\n"
        "for name in ('_cuda_init', '_cuda_getDeviceCount'):\n"
        "    setattr(torch._C, name, touched)\n"
        "torch.cuda._device_count_nvml = touched\n"
        f"import os, lockstep.engine.rank.{module}\n"
        "print(torch.cuda.is_initialized(), len(os.listdir('/proc/self/task')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "False 1\n", done.stderr
