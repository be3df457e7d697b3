"""A controller that dies under load: another one takes its place, and nothing is lost."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import httpx

from support.launch.clusters import until
from support.launch.launcher import Launcher
from support.serving.reader import Reader

TOKENS = 240
STREAMS = 4


def _have_served_again(launcher: Launcher, times: int) -> bool:
    return launcher.err.count("all ranks serve again") == times


def test_streams_go_on_after_controllers_that_were_killed(tmp_path: Path) -> None:
    """Twice: the second one is killed soon after the first."""
    recording = tmp_path / "run.recording"
    arguments = ("--recipe", "demo", "cluster.backend=local", "frontend.port=0", "kv_cache.memory=16MiB")
    with Launcher(tmp_path, *arguments, f"recording={recording}") as launcher:
        url = launcher.url()
        base = url.removesuffix("/v1")
        undisturbed = Reader(url, TOKENS)
        undisturbed.run()
        readers = [Reader(url, TOKENS).flowing() for _ in range(STREAMS)]
        ranks = {launcher.pid_of(f"rank {rank}") for rank in range(2)}
        for times in range(1, 3):
            os.kill(launcher.pid_of("controller 0"), signal.SIGKILL)
            until(partial(_have_served_again, launcher, times), "the ranks to serve again")
        for reader in readers:
            reader.join(60)
        assert [(reader.error, reader.finish) for reader in readers] == [(None, "length")] * STREAMS
        assert {reader.text for reader in readers} == {undisturbed.text}
        until(lambda: httpx.get(f"{base}/health", timeout=10.0).status_code == 200, "/health")
        assert {launcher.pid_of(f"rank {rank}") for rank in range(2)} == ranks, "ranks keep their weights"
        again = Reader(url, 8)
        again.run()
        assert again.error is None and undisturbed.text.startswith(again.text)
        launcher.signal()
        assert launcher.wait() == 0, launcher.err
        launcher.assert_nothing_left()
        print(launcher.err, [reader.gap for reader in readers])
        names = sorted(path.name for path in tmp_path.glob("run.recording*"))
        assert names == ["run.recording", "run.recording.2", "run.recording.3"]
