"""Checks the nodes of a Ray cluster that a recipe would use, by an actor on each."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..cluster.ray_session import Node
from .finding import Finding
from .links import Clock
from .probe import NodeFacts, Questions, look_around
from .reach import CONNECT_SECONDS, SEND_SECONDS, Link, Listener, Peer, call

START_SECONDS = 30.0
ANSWER_SECONDS = 10.0
_CLOCK_READINGS = 5
_MAX_ROUNDS = 16  # each node sends to one other per round; further pairs are only called


class Prober:
    """The actor. ``address``: address of its node for others."""

    def __init__(self, address: str, token: bytes) -> None:
        self._address = address
        self._token = token

    def look(self, questions: Questions) -> NodeFacts:
        return look_around(questions, self._address)

    def time(self) -> float:
        return time.time()

    def listen(self) -> int:
        """Listens until the actor ends; returns the port."""
        return Listener(self._address, self._token).port

    def call(self, source: str, peers: list[Peer], measure: bool) -> list[Link]:
        return call(source, peers, self._token, measure=measure)


class RayNodes:
    """Asks the ``nodes``. One that misses a deadline is dropped and is a finding in ``silent``."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.silent: list[Finding] = []
        token = secrets.token_bytes(16)
        self._probers = {node: _prober(node, token) for node in nodes}
        self._each("its probe to start", lambda node, prober: prober.time.remote(), START_SECONDS)

    def facts(self, questions: Questions) -> list[NodeFacts]:
        seconds = max(questions.seconds, questions.model_seconds) + ANSWER_SECONDS
        answers = self._each("its facts", lambda node, prober: prober.look.remote(questions), seconds)
        return list(answers.values())

    def clocks(self) -> list[Clock]:
        """The clock of every node, by the reading with the shortest round trip."""
        readings: dict[Node, list[tuple[float, float]]] = {}
        for _ in range(_CLOCK_READINGS):
            for node, prober in list(self._probers.items()):
                before = time.time()
                there = self._each(
                    "its clock", lambda _, prober: prober.time.remote(), ANSWER_SECONDS, only={node: prober}
                ).get(node)
                after = time.time()
                if there is not None:
                    readings.setdefault(node, []).append(((after - before) / 2, there - (before + after) / 2))
        best = {node: min(found) for node, found in readings.items()}
        return [Clock(str(node), ahead, doubt) for node, (doubt, ahead) in best.items()]

    def links(self) -> list[Link]:
        """Measures links: every node calls every other; then in round k each sends to the k-th node
        after it.
        """
        ports = self._each("a port to listen on", lambda node, prober: prober.listen.remote(), ANSWER_SECONDS)
        peers = [(node, Peer(str(node), node.address, port)) for node, port in ports.items()]

        found = self._call(
            {node: [peer for other, peer in peers if other != node] for node in ports}, measure=False
        )
        for shift in range(1, min(len(peers), _MAX_ROUNDS + 1)):
            target = {node: peers[(index + shift) % len(peers)][1] for index, (node, _) in enumerate(peers)}
            works = {
                node: [peer]
                for node, peer in target.items()
                if not found.get((str(node), peer.name), _UNKNOWN).problem
            }
            found |= self._call(works, measure=True)
        return list(found.values())

    def _call(self, targets: dict[Node, list[Peer]], *, measure: bool) -> dict[tuple[str, str], Link]:
        """The links found when each node calls its targets."""

        def ask(node: Node, prober: Any) -> Any:
            return prober.call.remote(str(node), targets.get(node, []), measure)

        answers = self._each("its calls to others", ask, ANSWER_SECONDS + 2 * CONNECT_SECONDS + SEND_SECONDS)
        return {(link.source, link.target): link for links in answers.values() for link in links}

    def _each(
        self, what: str, ask: Callable[[Node, Any], Any], seconds: float, only: dict[Node, Any] | None = None
    ) -> dict[Node, Any]:
        """Asks all nodes at once; returns the answers. A node that fails is not asked again."""
        refs = {node: ask(node, prober) for node, prober in (self._probers if only is None else only).items()}
        end = time.monotonic() + seconds
        answers = {}
        for node, ref in refs.items():
            try:
                answers[node] = ray.get(ref, timeout=max(0.0, end - time.monotonic()))
            except GetTimeoutError:
                self._drop(node, f"waited {seconds:g} s for {what}")
            except RayError as error:
                self._drop(node, f"{what}: {' '.join(str(error).split())[-300:]}")
        return answers

    def _drop(self, node: Node, why: str) -> None:
        self._probers.pop(node, None)
        todo = "check that the same Lockstep is installed there and that the node is healthy"
        self.silent.append(Finding("error", "node", why, str(node), todo))


_UNKNOWN = Link("", "", "not called")


def _prober(node: Node, token: bytes) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
    return (
        ray.remote(Prober)
        .options(num_cpus=0, max_restarts=0, scheduling_strategy=strategy)
        .remote(node.address, token)
    )
