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
STREAMS = 24
PROMPTS = ("Hello", "What is 17 + 25?", "Sort pear, apple, fig and plum.", "The box is red. The lid")
"""One round is of one prompt, so that loads drift from round to round."""
ADMIN = "an-admin-key"


def test_experts_move_and_stay_where_they_are_through_deaths(tmp_path: Path) -> None:
    arguments = ("cluster.backend=local", "frontend.port=0", f"frontend.admin_key={ADMIN}")
    with Launcher(tmp_path, "--recipe", "demo", *arguments, "kv_cache.memory=16MiB") as launcher:
        url = launcher.url()
        base = url.removesuffix("/v1")

        undisturbed = _undisturbed(url)
        before = cluster_of(url, ADMIN)
        assert before["placement_version"] == before["moves_open"] == 0
        _read_until(url, undisturbed, lambda: cluster_of(url, ADMIN)["placement_version"] > 0)
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
        assert {reader.text for reader in readers} == {undisturbed["Hello"]}
        launcher.signal()
        assert launcher.wait() == 0, launcher.err
        launcher.assert_nothing_left()


def test_a_rank_killed_while_experts_move_changes_no_text(tmp_path: Path) -> None:
    """With two ranks it is a source and a target of the moves."""
    arguments = ("cluster.backend=local", "frontend.port=0", f"frontend.admin_key={ADMIN}")
    with Launcher(tmp_path, "--recipe", "demo", *arguments, "kv_cache.memory=16MiB") as launcher:
        url = launcher.url()
        undisturbed = _undisturbed(url)
        readers = _readers_while(url, lambda: cluster_of(url, ADMIN)["moves_open"] > 0)
        os.kill(launcher.pid_of("rank 1"), signal.SIGKILL)
        until(lambda: "all ranks serve again" in launcher.err, "the ranks to serve again")
        for reader in readers:
            reader.join(120)
        assert [(reader.error, reader.finish) for reader in readers] == [(None, "length")] * STREAMS
        assert {reader.text for reader in readers} == {undisturbed[readers[0].prompt]}
        _read_until(url, undisturbed, lambda: True)
        launcher.signal()
        assert launcher.wait() == 0, launcher.err
        launcher.assert_nothing_left()


def _undisturbed(url: str) -> dict[str, str]:
    """The text that follows each prompt."""
    readers = [Reader(url, TOKENS, prompt) for prompt in PROMPTS]
    for reader in readers:
        reader.run()
        assert reader.error is None, reader.error
    return {reader.prompt: reader.text for reader in readers}


def _readers_while(url: str, condition: Callable[[], bool]) -> list[Reader]:
    """Streams of the round in which the condition comes to hold. It is looked at from the first
    token on: moves take the time between two reports.
    """
    for prompt in PROMPTS * 5:
        readers = [Reader(url, TOKENS, prompt) for _ in range(STREAMS)]
        for reader in readers:
            reader.start()
        while any(reader.is_alive() for reader in readers):
            if condition():
                return readers
            time.sleep(0.02)
    raise AssertionError(f"experts have not moved: {cluster_of(url, ADMIN)}")


def _read_until(url: str, undisturbed: dict[str, str], condition: Callable[[], bool]) -> None:
    """Streams round after round until the condition holds; each has the text it would have had
    undisturbed.
    """
    for prompt in PROMPTS * 5:
        readers = [Reader(url, TOKENS, prompt) for _ in range(STREAMS)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(120)
        assert {reader.error for reader in readers} == {None}
        assert {reader.text for reader in readers} == {undisturbed[prompt]}
        if condition():
            return
    raise AssertionError(f"experts have not moved: {cluster_of(url, ADMIN)}")
