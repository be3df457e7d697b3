"""Two frontend processes behind one port, with real ranks: if one is killed, the other goes on."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.serving.served import ADMIN_KEY, Served, serve

STOPS = re.compile(r'^lockstep:request_success_total\{.*finished_reason="length".*\} (\S+)$', re.MULTILINE)


TWO = ("frontend.processes=2", "scheduler.max_running=64")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("two") / "run", *TWO) as served:
        yield served


class Stream:
    """A stream of ``num_tokens`` tokens in a thread; ``ended`` tells how it ended: complete, cut by
    ``cut``, or by an error.
    """

    def __init__(self, base: str, num_tokens: int) -> None:
        self.chunks = 0
        self.ended = ""
        self._cut = False
        self._base, self._num_tokens = base, num_tokens
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def cut(self) -> None:
        self._cut = True

    def _run(self) -> None:
        body = {"prompt": [5, 6, 7], "max_tokens": self._num_tokens, "ignore_eos": True, "stream": True}
        try:
            with httpx.stream("POST", f"{self._base}/v1/completions", json=body, timeout=60) as answer:
                assert answer.status_code == 200, answer.status_code
                for line in answer.iter_lines():
                    self.chunks += line.startswith("data: {")
                    self.ended = "complete" if line == "data: [DONE]" else self.ended
                    if self._cut:
                        self.ended = "cut"
                        return
        except httpx.HTTPError as error:
            self.ended = type(error).__name__


def finished(served: Served) -> float:
    """Number of requests that ended by length, as told by either frontend."""
    found = STOPS.search(httpx.get(f"{served.base}/metrics", timeout=20).text)
    assert found
    return float(found[1])


def test_the_death_of_a_frontend_ends_its_streams_alone(two: Served) -> None:
    two.wait_until(
        lambda: finished(two) == finished(two) >= 1,
        "both processes to say the same of the launcher's own request",
    )
    before, ready = finished(two), two.launcher.err.count("frontend 1: ready")
    for _ in range(6):
        assert two.ask(prompt=[5, 6, 7], max_tokens=4, ignore_eos=True).finish == "length"
    two.wait_until(lambda: finished(two) == finished(two) == before + 6, "both processes to say the same")
    streams = [Stream(two.base, 4000) for _ in range(8)]
    two.wait_until(lambda: all(stream.chunks > 5 for stream in streams), "all streams to flow")
    os.kill(two.launcher.pid_of("frontend 1"), signal.SIGKILL)
    statuses = []
    for _ in range(40):  # while the dead one is missed, found and replaced: nobody is refused
        statuses.append(httpx.get(f"{two.base}/v1/models", timeout=20).status_code)
        statuses.append(httpx.get(f"{two.base}/health", timeout=20).status_code)
        assert finished(two) >= before + 6
        time.sleep(0.05)
    assert set(statuses) == {200}
    two.wait_until(lambda: sum(bool(stream.ended) for stream in streams) == 4, "half of the streams to end")
    going = [stream for stream in streams if not stream.ended]
    counts = [stream.chunks for stream in going]
    two.wait_until(
        lambda: all(stream.chunks > count + 5 for stream, count in zip(going, counts, strict=True)),
        "the others to go on",
    )
    two.wait_until(
        lambda: two.launcher.err.count("frontend 1: ready") == ready + 1, "another in its place", 30
    )
    assert "was killed by SIGKILL" in two.launcher.err and "its streams have ended" in two.launcher.err
    two.wait_until(lambda: two.cluster()["num_running"] == 4, "the dead one's requests to be aborted", 15)
    for stream in going:
        stream.cut()
        stream.thread.join(60)
        assert stream.ended == "cut"
    for _ in range(2):
        assert two.ask(prompt=[5, 6, 7], max_tokens=4, ignore_eos=True).finish == "length"
    two.wait_until(
        lambda: finished(two) == finished(two) == before + 8, "counts go on from those of the dead process"
    )
    two.assert_clean()


def test_a_frontend_that_hangs_is_replaced_and_its_connections_are_answered(two: Served) -> None:
    ready = two.launcher.err.count("frontend 0: ready")
    os.kill(two.launcher.pid_of("frontend 0"), signal.SIGSTOP)
    answers: list[int] = []

    def ask() -> None:
        answers.append(httpx.get(f"{two.base}/health", timeout=60).status_code)

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [200] * 10
    assert "frontend 0 hangs and has taken no connection for 10 s; killing it" in two.launcher.err
    two.wait_until(
        lambda: two.launcher.err.count("frontend 0: ready") == ready + 1, "another in its place", 30
    )


def test_draining_through_one_drains_both_and_port_0_works(tmp_path: Path) -> None:
    with serve(tmp_path / "run", *TWO) as two:
        long = Stream(two.base, 200)
        two.wait_until(lambda: long.chunks > 2, "a stream to flow")
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        assert (
            httpx.post(
                f"{two.base}/admin/drain", headers={"Authorization": "Bearer no"}, timeout=20
            ).status_code
            == 401
        )
        assert httpx.post(f"{two.base}/admin/drain", headers=headers, timeout=20).status_code == 202
        for _ in range(4):  # connections are dealt in turn
            two.wait_until(lambda: httpx.get(f"{two.base}/ready", timeout=20).status_code == 503, "not ready")
            answer = httpx.post(
                f"{two.base}/v1/completions", json={"prompt": [5], "max_tokens": 2}, timeout=20
            )
            assert answer.status_code == 503
        long.thread.join(60)
        assert long.ended == "complete", "what ran was finished"
