"""A router outside follows the block index of a served cluster: hits, evictions, a gap, a killed
rank and a killed controller.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from lockstep.engine.planner.planner import Planner
from lockstep.engine.recording.recorder import replay
from support.engine.kv_router import KVRouter, free_address, name_of
from support.launch.launcher import Launcher
from support.serving.served import PAGE_SIZE, Ask, Served, serve


def told(recording: Path) -> set[int]:
    """The blocks that the controller of a recording had told of at its end."""
    planner: Planner | None = None
    for planner, _ in replay(recording):  # noqa: B007
        pass
    assert planner is not None
    planner.check()
    return {name_of(key.tobytes()) for key in planner.group.kv.told()}


def asks(first: int, count: int, length: int = 6 * PAGE_SIZE) -> list[Ask]:
    """Requests whose prompts differ from their first token on."""
    return [
        Ask(
            {
                "prompt": [5 + (number * 7 + position) % 1000 for position in range(length)],
                "max_tokens": 4,
                "ignore_eos": True,
            }
        )
        for number in range(first, first + count)
    ]


def serve_again(launcher: Launcher, served: Served, process: str) -> None:
    """Kills a process and waits until all ranks serve again."""
    before = launcher.err.count("all ranks serve again")
    os.kill(launcher.pid_of(process), signal.SIGKILL)
    served.wait_until(
        lambda: launcher.err.count("all ranks serve again") > before, f"{process} to be replaced", 120.0
    )


def walk(router: KVRouter, name: bytes | int) -> list[int]:
    """The tokens of the block ``name`` and of those after it."""
    tokens: list[int] = []
    while True:
        tokens += router.mirror[name][1]
        children = [child for child, (parent, _) in router.mirror.items() if parent == name]
        if not children:
            return tokens
        [name] = children


def test_a_mirror_equals_the_index_whatever_happens(tmp_path: Path) -> None:
    events, replays = free_address(), free_address()
    recording = tmp_path / "recording"
    overrides = (
        f"kv_cache.events={events}",
        f"kv_cache.events_replay={replays}",
        "kv_cache.events_topic=kv@pod@demo",
        "kv_cache.memory=1MiB",
        "model.max_len=512",
        f"recording={recording}",
    )
    with KVRouter(events, replays, "kv@pod@demo") as router:
        with serve(tmp_path / "run", *overrides) as served:
            launcher = served.launcher
            router.catch_up()  # a subscription may be later than the first batch
            assert router.cleared == 1

            [ask] = asks(0, 1)
            served.ok([ask])
            assert served.ok([ask])[0].cached >= 5 * PAGE_SIZE
            router.drain()
            prompt = ask.body["prompt"]
            [start] = [entry for entry in router.mirror.items() if entry[1][1] == prompt[:PAGE_SIZE]]
            assert start[1][0] is None and walk(router, start[0])[: len(prompt)] == prompt

            stored = len(router.mirror)
            served.ok(asks(1, 60))
            router.drain()
            pages = sum(rank["pages_total"] for rank in served.cluster()["ranks"])
            assert stored < len(router.mirror) <= pages < 60 * 6, "the pools are full: blocks have left"

            served.ok(asks(100, 20))
            assert router.lose(5.0) > 0 and router.lose(5.0) > 0
            served.ok(asks(200, 3))
            router.drain()
            assert router.gaps >= 1

            serve_again(launcher, served, "rank 1")
            served.ok(asks(300, 10))
            router.drain()
            assert router.cleared == 1, "one rank's death clears nobody else's blocks"

            served.assert_clean()
            router.drain()
            before = set(router.mirror)
            serve_again(launcher, served, "controller 0")
            again = served.ok(asks(300, 10))
            assert any(answer.cached for answer in again), "ranks keep their blocks"
            served.assert_clean()
            router.drain(1.0)
            assert router.cleared > 1, "the later controller has cleared the mirror"
        assert before == told(recording)
        assert set(router.mirror) == told(tmp_path / "recording.2")
        assert len(before & set(router.mirror)) > 10, "adopted blocks are told as requests find them"
