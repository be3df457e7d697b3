"""Survivors go on without a rank until its replacement joins them: all texts are the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest

from support.launch.clusters import until
from support.launch.launcher import Launcher
from support.serving.reader import Reader, cluster_of

TOKENS, STREAMS = 240, 5
ADMIN = "an-admin-key"
LAYOUTS = {
    # The others keep 36 of 48 slots for 32 experts: some are loaded again.
    "data 4": ("experts.redundant=16", "experts.dispatch=all_to_all"),
    # Both ranks of a data index are away when one is lost: the others have exactly 32 slots.
    "data 2 x tensor 2": (
        "experts.redundant=32",
        "experts.dispatch=all_gather",
        "experts.balance=off",
        "parallel.tensor=2",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_survivors_go_on_and_the_replacement_joins_later(layout: str, tmp_path: Path) -> None:
    overrides = ("cluster.backend=local", "frontend.port=0", f"frontend.admin_key={ADMIN}")
    sizes = ("cluster.ranks_per_node=4", "cluster.threads=1", "kv_cache.memory=16MiB")
    hold = tmp_path / "hold"
    with Launcher(
        tmp_path / "run",
        *("--recipe", "demo", *overrides, *sizes, *LAYOUTS[layout]),
        module="support.launch.launch_held",
        environment={"HOLD": str(hold)},
    ) as launcher:
        url = launcher.url()
        base = url.removesuffix("/v1")

        def rank_states() -> list[str]:
            return [rank["state"] for rank in cluster_of(url, ADMIN)["ranks"]]

        undisturbed = Reader(url, TOKENS)
        undisturbed.run()
        readers = [Reader(url, TOKENS).flowing() for _ in range(STREAMS)]
        hold.touch()
        os.kill(launcher.pid_of("rank 3"), signal.SIGKILL)
        until(lambda: "the others serve after" in launcher.err, "the survivors to go on")
        for reader in readers:
            reader.join(120)
        alone = [Reader(url, TOKENS).flowing() for _ in range(STREAMS)]
        os.kill(launcher.pid_of("controller 0"), signal.SIGKILL)
        until(lambda: launcher.err.count("the others serve after") == 2, "the survivors to go on again")
        alone += [Reader(url, TOKENS).flowing()]
        for reader in alone:
            reader.join(120)
        until(lambda: rank_states() == ["serving", "serving", "serving", "lost"], "the state of ranks")
        health = httpx.get(f"{base}/health")
        assert health.status_code == 200 and "rank 3" in health.json()["degraded"], health.text
        hold.unlink()
        joining = [Reader(url, TOKENS).flowing() for _ in range(STREAMS)]
        until(lambda: "all ranks serve again" in launcher.err, "the replacement to join")
        after = [Reader(url, TOKENS).flowing() for _ in range(STREAMS)]
        for reader in (*joining, *after):
            reader.join(120)
        every = (*readers, *alone, *joining, *after)
        assert {(reader.error, reader.finish) for reader in every} == {(None, "length")}
        assert {reader.text for reader in every} == {undisturbed.text}
        until(lambda: rank_states() == ["serving"] * 4, "the state of ranks")
        assert "degraded" not in httpx.get(f"{base}/health").json()
        launcher.signal()
        assert launcher.wait() == 0, launcher.err
        launcher.assert_nothing_left()
