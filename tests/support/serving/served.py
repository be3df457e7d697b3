"""The served product as a client meets it: a launched cluster, many requests at once, and what the
server says of itself.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ..launch.launcher import Launcher
from .random_checkpoint import random_checkpoint

ADMIN_KEY = "admin-key-of-the-tests"
PAGE_SIZE = 16
MAX_LEN = 4096
VOCAB_SIZE = 1024
EOS = 1

Body = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """A request to be sent. ``cut_after``: the client goes away after that many chunks of the
    stream.
    """

    body: Body
    path: str = "/v1/completions"
    cut_after: int | None = None

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass
class Answer:
    """An answer: a ``document`` or the ``chunks`` of a stream. ``tokens``, ``text`` and
    ``finish`` are those of the first choice.
    """

    status: int
    headers: httpx.Headers
    document: Body = field(default_factory=dict)
    chunks: list[Body] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    usage: Body = field(default_factory=dict)
    cut: bool = False
    done: bool = False

    @property
    def cached(self) -> int:
        return int(self.usage["prompt_tokens_details"]["cached_tokens"])


class Served:
    """A launched cluster. ``http`` is a plain client of it; ``together`` sends many requests at
    once.
    """

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.base = launcher.url().removesuffix("/v1")
        self.http = httpx.Client(base_url=self.base, timeout=60.0)

    def ask(self, path: str = "/v1/completions", **body: Any) -> Answer:
        """One request, answered with 200."""
        return self.ok([Ask(body, path)])[0]

    def together(self, asks: Sequence[Ask], seconds: float = 240.0) -> list[Answer]:
        """All of them at once, each on a connection of its own. Fails when not all have been
        answered in time.
        """
        return asyncio.run(self._gather(asks, seconds))

    def ok(self, asks: Sequence[Ask], seconds: float = 240.0) -> list[Answer]:
        """``together``, all of them answered with 200."""
        answers = self.together(asks, seconds)
        for answer in answers:
            assert answer.status == 200, answer.document
        return answers

    async def _gather(self, asks: Sequence[Ask], seconds: float) -> list[Answer]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with (
            httpx.AsyncClient(base_url=self.base, timeout=seconds, limits=limits) as http,
            asyncio.timeout(seconds),
        ):
            return await asyncio.gather(*(send(http, ask) for ask in asks))

    # -------------------------------------------------------------- what the server says of itself

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics of the family prefix ``lockstep:`` that carry no labels but the
        model's, by name.
        """
        values: dict[str, float] = {}
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith("lockstep:"):
                name, _, value = line.rpartition(" ")
                values[name.removeprefix("lockstep:").removesuffix('{engine="0",model_name="demo"}')] = float(
                    value
                )
        return values

    def cluster(self) -> Body:
        """/admin/cluster: the controller's last state, of every half second."""
        answer = self.http.get("/admin/cluster", headers={"Authorization": f"Bearer {ADMIN_KEY}"})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def counted(self, *names: str) -> list[float]:
        """Counters of /metrics, when the controller has spoken again."""
        self.wait_for_state()
        metrics = self.metrics()
        return [metrics[f"{name}_total"] for name in names]

    def wait_for_state(self) -> None:
        """Until the server knows a state of the cluster that was made after this call: not the next
        one, which may be on its way.
        """
        number = self.cluster()["number"]
        self.wait_until(lambda: self.cluster()["number"] >= number + 2, "two more states of the cluster")

    def busy(self) -> str:
        """Names everything that still runs, waits or holds pages; empty if nothing does.
        Cached pages are not held.
        """
        cluster, load = self.cluster(), self.http.get("/load").json()
        pages = [rank["pages_used"] for rank in cluster["ranks"]]
        facts = {
            "requests in the frontend": load["server_load"],
            "running": cluster["num_running"],
            "waiting": cluster["num_waiting"],
            "pages in use": sum(pages),
            "rows of ranks": sum(rank["num_running"] for rank in cluster["ranks"]),
        }
        return ", ".join(f"{value} {name}" for name, value in facts.items() if value)

    def assert_clean(self, seconds: float = 30.0) -> None:
        """Within ``seconds`` nothing runs, waits or holds pages, and the server serves."""
        self.wait_for_state()
        deadline = time.monotonic() + seconds
        while busy := self.busy():
            assert time.monotonic() < deadline, f"after {seconds:g} s: {busy}"
            time.sleep(0.05)
        assert self.http.get("/health").status_code == 200
        assert self.ask(prompt=[5, 6, 7], max_tokens=2, ignore_eos=True).usage["completion_tokens"] == 2

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"within {seconds:g} s not: {what}"
            time.sleep(0.02)


@contextmanager
def serve(
    folder: Path, *overrides: str, data_limit: int | None = None, module: str = "lockstep.launch.cli"
) -> Iterator[Served]:
    """The demo recipe with random weights on two local ranks; drained and left without a process
    behind. ``data_limit`` and ``module`` as of ``Launcher``.
    """
    model = f"model.path={random_checkpoint()}"
    arguments = (
        "--recipe",
        "demo",
        model,
        "cluster.backend=local",
        "frontend.port=0",
        f"frontend.admin_key={ADMIN_KEY}",
        *overrides,
    )
    with Launcher(folder, *arguments, module=module, data_limit=data_limit) as launcher:
        served = Served(launcher)
        try:
            yield served
        finally:
            served.http.close()
        launcher.look()
        launcher.signal(signal.SIGTERM)
        assert launcher.wait(90.0) == 0, launcher.err
        launcher.assert_nothing_left()


async def send(http: httpx.AsyncClient, ask: Ask) -> Answer:
    """One request and its answer, of whatever status."""
    async with http.stream("POST", ask.path, json=ask.body) as response:
        answer = Answer(response.status_code, response.headers)
        if not (ask.stream and response.status_code == 200):
            _read_document(answer, json.loads(await response.aread()))
            return answer
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                answer.done = True
            elif line:
                assert line.startswith("data: "), line
                _read_chunk(answer, json.loads(line[6:]))
            if ask.cut_after is not None and len(answer.chunks) >= ask.cut_after:
                answer.cut = True
                break
    return answer


def _read_document(answer: Answer, document: Body) -> None:
    answer.document = document
    answer.done = True
    if answer.status == 200:
        [choice, *_] = document["choices"]
        answer.tokens = choice.get("token_ids", [])
        answer.text = choice["text"] if "text" in choice else choice["message"]["content"]
        answer.finish, answer.usage = choice["finish_reason"], document["usage"]


def _read_chunk(answer: Answer, chunk: Body) -> None:
    assert "error" not in chunk, chunk
    answer.chunks.append(chunk)
    answer.usage = chunk.get("usage") or answer.usage
    for choice in chunk["choices"]:
        if choice["index"] == 0:
            answer.text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            answer.tokens += choice.get("token_ids", [])
            answer.finish = choice["finish_reason"] or answer.finish
