"""Experts that move under load: texts stay the same, and so does the placement when a rank or the
controller is killed afterwards.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from support.launch.clusters import until
from support.launch.launcher import Launcher
from support.serving.reader import Reader, cluster_of

TOKENS = 160
STREAMS = 12
ADMIN = "an-admin-key"


def test_experts_move_and_stay_where_they_are_through_deaths(tmp_path: Path) -> None:
    arguments = ("cluster.backend=local", "frontend.port=0", f"frontend.admin_key={ADMIN}")
    with Launcher(tmp_path, "--recipe", "demo", *arguments, "kv_cache.memory=16MiB") as launcher:
        url = launcher.url()
        base = url.removesuffix("/v1")

        undisturbed = Reader(url, TOKENS)
        undisturbed.run()
        before = cluster_of(url, ADMIN)
        assert before["placement_version"] == before["moves_open"] == 0
        texts = _read_until(url, lambda: cluster_of(url, ADMIN)["placement_version"] > 0)
        moved = cluster_of(url, ADMIN)
        assert moved["placement"] != before["placement"]
        moved_bytes = httpx.get(f"{base}/metrics").text.split("lockstep:moved_bytes_total{")[1].split()[1]
        assert float(moved_bytes) > 0

        readers = [Reader(url, TOKENS).flowing() for _ in range(4)]
        os.kill(launcher.pid_of("rank 1"), signal.SIGKILL)
        until(lambda: "all ranks serve again" in launcher.err, "the ranks to serve again")
        assert cluster_of(url, ADMIN)["placement_version"] >= moved["placement_version"], (
            "the replacement loads what it lacks"
        )
        os.kill(launcher.pid_of("controller 0"), signal.SIGKILL)
        until(lambda: launcher.err.count("all ranks serve again") == 2, "the ranks to serve again")
        for reader in readers:
            reader.join(60)
        until(
            lambda: cluster_of(url, ADMIN)["placement_version"] >= moved["placement_version"],
            "the placement of before",
        )
        assert [(reader.error, reader.finish) for reader in readers] == [(None, "length")] * 4
        assert {*texts, *(reader.text for reader in readers)} == {undisturbed.text}
        launcher.signal()
        assert launcher.wait() == 0, launcher.err
        launcher.assert_nothing_left()


def test_a_rank_killed_while_experts_move_changes_no_text(tmp_path: Path) -> None:
    """With two ranks it is a source and a target of the moves."""
    arguments = ("cluster.backend=local", "frontend.port=0", f"frontend.admin_key={ADMIN}")
    with Launcher(tmp_path, "--recipe", "demo", *arguments, "kv_cache.memory=16MiB") as launcher:
        url = launcher.url()
        undisturbed = Reader(url, TOKENS)
        undisturbed.run()
        readers = _readers_while(url, lambda: cluster_of(url, ADMIN)["moves_open"] > 0)
        os.kill(launcher.pid_of("rank 1"), signal.SIGKILL)
        until(lambda: "all ranks serve again" in launcher.err, "the ranks to serve again")
        for reader in readers:
            reader.join(120)
        assert [(reader.error, reader.finish) for reader in readers] == [(None, "length")] * STREAMS
        texts = [reader.text for reader in readers] + _read_until(url, lambda: True)
        assert set(texts) == {undisturbed.text}
        launcher.signal()
        assert launcher.wait() == 0, launcher.err
        launcher.assert_nothing_left()


def _readers_while(url: str, condition: Callable[[], bool]) -> list[Reader]:
    """Streams of the round in which the condition comes to hold. It is looked at from the first
    token on: experts move once, and then they are balanced.
    """
    for _ in range(20):
        readers = [Reader(url, TOKENS) for _ in range(STREAMS)]
        for reader in readers:
            reader.start()
        while any(reader.is_alive() for reader in readers):
            if condition():
                return readers
            time.sleep(0.02)
    raise AssertionError("experts have not moved")


def _read_until(url: str, condition: Callable[[], bool]) -> list[str]:
    """The texts of streams, round after round until the condition holds."""
    texts: list[str] = []
    for _ in range(20):
        readers = [Reader(url, TOKENS).flowing() for _ in range(STREAMS)]
        for reader in readers:
            reader.join(120)
            assert reader.error is None, reader.error
        texts += [reader.text for reader in readers]
        if condition():
            return texts
    raise AssertionError("experts have not moved")
