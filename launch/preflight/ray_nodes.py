"""A check on the nodes of a Ray cluster that a recipe would use: an actor on each, which is asked
in its place.
"""

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
_MAX_ROUNDS = 16  # of sending, each node to one other: beyond that, some pairs are only called


class Prober:
    """The actor. ``address`` is what other nodes reach its node by."""

    def __init__(self, address: str, token: bytes) -> None:
        self._address = address
        self._token = token
        self._listener: Listener | None = None

    def look(self, questions: Questions) -> NodeFacts:
        return look_around(questions, self._address)

    def time(self) -> float:
        return time.time()

    def listen(self) -> int:
        self._listener = Listener(self._address, self._token)
        return self._listener.port

    def call(self, source: str, peers: list[Peer], measure: bool) -> list[Link]:
        return call(source, peers, self._token, measure=measure)


class RayNodes:
    """Asks the ``nodes``. What does not answer within its deadline is left out, and is a finding in
    ``silent``.
    """

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
        """The reading with the shortest way to the node and back counts: the node's clock was read
        somewhere in between.
        """
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
        """Every direction between two nodes is called; then each node sends to the next but k, for
        k = 1, 2, ...
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
        """What each node says of calling its targets."""

        def ask(node: Node, prober: Any) -> Any:
            return prober.call.remote(str(node), targets.get(node, []), measure)

        answers = self._each("its calls to others", ask, ANSWER_SECONDS + 2 * CONNECT_SECONDS + SEND_SECONDS)
        return {(link.source, link.target): link for links in answers.values() for link in links}

    def _each(
        self, what: str, ask: Callable[[Node, Any], Any], seconds: float, only: dict[Node, Any] | None = None
    ) -> dict[Node, Any]:
        """The answers of all nodes, asked at once; one that fails is not asked again."""
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
        todo = "see that Lockstep is installed there as it is here, and that the node is well"
        self.silent.append(Finding("error", "node", why, str(node), todo))


_UNKNOWN = Link("", "", "not called")


def _prober(node: Node, token: bytes) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
    return (
        ray.remote(Prober)
        .options(num_cpus=0, max_restarts=0, scheduling_strategy=strategy)
        .remote(node.address, token)
    )
