"""Processes that stand still for a while: nothing is lost, and streams go on with the same text."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence

import httpx
import pytest

from support.launch.clusters import until
from support.launch.launcher import Launcher
from support.serving.reader import Reader

TOKENS = 240
STREAMS = 4


def stop_for(pids: Sequence[int], seconds: float) -> None:
    """Lets processes stand still, as a suspended machine does."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def pids_of(launcher: Launcher, who: str) -> list[int]:
    if who != "everything":
        return [launcher.pid_of(who)]
    launcher.look()
    return [launcher.process.pid, *(process.pid for process in launcher.seen if process.is_running())]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """One cluster for all pauses, since none of them may replace a process."""
    arguments = ("--recipe", "demo", "cluster.backend=local", "frontend.port=0", "kv_cache.memory=16MiB")
    with Launcher(tmp_path_factory.mktemp("run"), *arguments) as launcher:
        launcher.url()
        yield launcher
        launcher.look()
        launcher.signal()
        assert launcher.wait() == 0, launcher.err
        launcher.assert_nothing_left()


@pytest.mark.parametrize(
    ("who", "seconds"), [("controller 0", 13.0), ("rank 1", 20.0), ("frontend 0", 13.0), ("everything", 13.0)]
)
def test_streams_go_on_with_the_same_text(launcher: Launcher, who: str, seconds: float) -> None:
    url = launcher.url()
    undisturbed = Reader(url, TOKENS)
    undisturbed.run()
    readers = [Reader(url, TOKENS) for _ in range(STREAMS)]
    for reader in readers:
        reader.start()
    assert all(reader.started.wait(60) for reader in readers)
    victims = pids_of(launcher, who)
    stop_for(victims, seconds)
    resumed = time.monotonic()
    for reader in readers:
        reader.join(60)
    took = time.monotonic() - resumed
    assert [(reader.error, reader.finish) for reader in readers] == [(None, "length")] * STREAMS
    assert {reader.text for reader in readers} == {undisturbed.text}
    print(f"{who}: {took:.1f} s after the pause of {seconds:g} s; longest gaps {[r.gap for r in readers]}")
    base = url.removesuffix("/v1")
    until(lambda: httpx.get(f"{base}/ready", timeout=10.0).status_code == 200, "/ready shows serving")
    assert pids_of(launcher, who)[:1] == victims[:1], "it was replaced"
    assert "killing it" not in launcher.err and "in its place" not in launcher.err
