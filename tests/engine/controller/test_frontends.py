"""Frontends by lease and life, without sockets."""

from __future__ import annotations

import math
from typing import cast

import msgspec

from lockstep.engine.controller.frontends import LAUNCHER, Frontends
from lockstep.engine.controller.status import gathering_state
from lockstep.engine.controller.transport import Transport
from lockstep.engine.protocol.cluster_state import ClusterState
from lockstep.engine.protocol.frontends import (
    Abort,
    Drain,
    FromFrontend,
    FrontendHello,
    Heartbeat,
    RankLost,
    Rejected,
    Submit,
)
from lockstep.engine.protocol.message import Sampling, Stop

STATE = gathering_state("", 1)
SUBMIT = Submit(7, "r7", b"", b"", 1, Sampling())


class Line:
    """The frontend socket: a test fills ``incoming`` and reads ``sent``."""

    def __init__(self) -> None:
        self.incoming: list[tuple[bytes, FromFrontend]] = []
        self.sent: list[tuple[bytes, msgspec.Struct]] = []

    def frontend_messages(self) -> list[tuple[bytes, FromFrontend]]:
        messages, self.incoming = self.incoming, []
        return messages

    def send_frontend(self, name: bytes, message: msgspec.Struct) -> None:
        self.sent.append((name, message))


class Log:
    """Notes all reactions; ``refusal`` is the answer to requests."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.refusal = ""

    def state(self) -> ClusterState:
        return STATE

    def submit(self, frontend: int, message: Submit) -> str:
        self.calls.append(("submit", frontend, message))
        return self.refusal

    def abort(self, frontend: int, message: Abort) -> None:
        self.calls.append(("abort", frontend, message))

    def abort_frontend(self, frontend: int) -> None:
        self.calls.append(("abort_frontend", frontend))

    def drain(self, now: float, deadline: float) -> None:
        self.calls.append(("drain", now, deadline))

    def rank_lost(self, message: RankLost) -> None:
        self.calls.append(("rank_lost", message))


class Desk:
    """Frontends on a ``Line`` with a ``Log``."""

    def __init__(self) -> None:
        self.line, self.log = Line(), Log()
        self.frontends = Frontends(cast(Transport, self.line))

    def hear(self, now: float, *messages: tuple[bytes, FromFrontend]) -> list[tuple[object, ...]]:
        """Takes in messages. Returns the reactions since the last call."""
        self.line.incoming += messages
        self.frontends.listen(now, self.log)
        return self.reactions()

    def reactions(self) -> list[tuple[object, ...]]:
        calls, self.log.calls = self.log.calls, []
        return calls


def test_indices_follow_the_first_hello_and_stay() -> None:
    desk = Desk()
    names = (b"b", b"a", b"c")
    desk.hear(0.0, *((name, FrontendHello("", 30.0, 1)) for name in names))
    assert desk.line.sent == [(name, STATE) for name in names], "each is greeted with the state"
    desk.hear(1.0, (b"a", FrontendHello("", 30.0, 1)))
    assert [call[1] for call in desk.hear(2.0, *((name, SUBMIT) for name in names))] == [0, 1, 2]
    desk.line.sent.clear()
    desk.frontends.send([(2, Stop()), (0, Stop())])
    assert [name for name, _ in desk.line.sent] == [b"c", b"b"]


def test_requests_need_a_lease() -> None:
    desk = Desk()
    assert desk.hear(0.0, (b"a", SUBMIT), (b"a", Abort(7))) == [], "it has not said hello"
    desk.hear(0.0, (b"a", FrontendHello("", 10.0, 1)))
    assert desk.hear(9.0, (b"a", SUBMIT)) == [("submit", 0, SUBMIT)]
    desk.hear(18.0, (b"a", Heartbeat()))
    desk.frontends.end_leases(27.0, desk.log)
    assert desk.reactions() == [], "each message extends the lease"
    desk.frontends.end_leases(29.0, desk.log)
    assert desk.reactions() == [("abort_frontend", 0)]
    desk.frontends.end_leases(40.0, desk.log)
    assert desk.hear(41.0, (b"a", SUBMIT)) == [], "a message does not bring a lease back"
    assert desk.hear(42.0, (b"a", FrontendHello("", 10.0, 1)), (b"a", SUBMIT)) == [("submit", 0, SUBMIT)]


def test_states_go_to_lease_holders_and_the_farewell_to_all() -> None:
    desk = Desk()
    desk.hear(0.0, (b"a", FrontendHello("", 10.0, 1)), (LAUNCHER, FrontendHello("", math.inf)))
    desk.frontends.end_leases(20.0, desk.log)
    desk.line.sent.clear()
    desk.frontends.tell(STATE)
    assert desk.line.sent == [(LAUNCHER, STATE)]
    desk.frontends.dismiss(Stop())
    assert [name for name, _ in desk.line.sent[1:]] == [b"a", LAUNCHER]


def test_a_new_life_aborts_the_requests_of_the_old_one() -> None:
    desk = Desk()
    assert desk.hear(0.0, *((b"a", FrontendHello("", 10.0, life)) for life in (1, 1))) == []
    assert desk.hear(1.0, (b"a", FrontendHello("", 10.0, 2))) == [("abort_frontend", 0)]


def test_a_refused_request_is_answered_with_503() -> None:
    desk = Desk()
    desk.log.refusal = "the cluster is draining"
    desk.hear(0.0, (b"a", FrontendHello("", 10.0, 1)), (b"a", SUBMIT))
    assert desk.line.sent[-1] == (b"a", Rejected(7, 503, "the cluster is draining", retry_after=5.0))


def test_any_peer_may_drain_and_only_the_launcher_the_rest() -> None:
    desk = Desk()
    assert desk.hear(5.0, (b"a", Drain(3.0))) == [("drain", 5.0, 8.0)]
    lost = RankLost(1, "it was killed")
    assert desk.hear(5.0, (b"a", lost), (b"a", Stop())) == [] and not desk.frontends.stop_requested
    assert desk.hear(5.0, (LAUNCHER, lost), (LAUNCHER, Stop())) == [("rank_lost", lost)]
    assert desk.frontends.stop_requested
