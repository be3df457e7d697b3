"""The controller's side of the frontend socket: who is there, and what each may ask.

The launcher is on that socket too, as a frontend called ``launcher`` with commands of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ..protocol.cluster_state import ClusterState
from ..protocol.frontends import (
    Abort,
    Degraded,
    Drain,
    FromFrontend,
    FrontendHello,
    Heartbeat,
    RankLost,
    Rejected,
    Submit,
)
from ..protocol.message import Message, Stop
from ..protocol.timeline import AskTimeline
from .transport import Transport

log = logging.getLogger(__name__)

LAUNCHER = b"launcher"
_RETRY_AFTER = 5.0


@dataclass
class Frontend:
    """A frontend that has said hello at least once.

    ``index`` is the planner's number for it and never changes. ``life`` tells processes of the same
    name apart. Its lease lasts until ``expiry``; each message extends it by ``lease`` seconds.
    """

    name: bytes
    index: int
    life: int
    lease: float
    expiry: float
    leased: bool = True


class Reactions(Protocol):
    """Acts on messages of frontends and of the launcher; each phase of the controller has one."""

    def state(self) -> ClusterState:
        """The state to greet a frontend with."""

    def submit(self, frontend: int, message: Submit) -> str:
        """Takes a request. Returns why it does not; empty when it does."""

    def abort(self, frontend: int, message: Abort) -> None:
        """Aborts one request."""

    def abort_frontend(self, frontend: int) -> None:
        """Aborts all requests of a frontend whose process has gone."""

    def drain(self, now: float, deadline: float) -> None:
        """Takes no more requests and ends those that run by ``deadline``."""

    def timeline(self, name: bytes, message: AskTimeline) -> None:
        """The frontend ``name`` asks for the timeline of some steps."""

    def rank_lost(self, message: RankLost) -> None:
        """The launcher reports that a rank is gone."""

    def degraded(self, reason: str) -> None:
        """The launcher names what is missing; empty: nothing."""


class Frontends:
    """All frontends by name, and by the planner's index. Times are monotonic seconds."""

    def __init__(self, transport: Transport) -> None:
        self.stop_requested = False
        self._transport = transport
        self._by_name: dict[bytes, Frontend] = {}
        self._by_index: list[Frontend] = []

    def listen(self, now: float, reactions: Reactions) -> None:
        """Takes in all messages that have arrived."""
        for name, message in self._transport.frontend_messages():
            frontend = self._by_name.get(name)
            leased = frontend is not None and frontend.leased
            if frontend is not None and leased:
                frontend.expiry = now + frontend.lease
            if isinstance(message, FrontendHello):
                self._welcome(name, message, now, reactions)
            elif isinstance(message, Submit | Abort):
                if frontend is not None and leased:
                    self._request(frontend, message, reactions)
            elif not isinstance(message, Heartbeat):
                self._command(name, message, now, reactions)

    def end_leases(self, now: float, reactions: Reactions) -> None:
        """Aborts the requests of frontends that have been silent for too long."""
        for frontend in self._by_index:
            if frontend.leased and frontend.expiry < now:
                name = frontend.name.decode()
                log.warning(
                    "frontend %s was silent for longer than its lease: its requests are aborted", name
                )
                frontend.leased = False
                reactions.abort_frontend(frontend.index)

    def extend_leases(self, now: float) -> None:
        """The controller stood still: frontends have as long as ever to be heard."""
        for frontend in self._by_index:
            if frontend.leased:
                frontend.expiry = now + frontend.lease

    def send(self, output: Iterable[tuple[int, Message]]) -> None:
        """Sends the planner's messages, given as (frontend, message). A frontend without a lease
        gets none: it submits its requests again when it is back.
        """
        for index, message in output:
            if self._by_index[index].leased:
                self._transport.send_frontend(self._by_index[index].name, message)

    def tell(self, state: ClusterState) -> None:
        """Sends the state to every frontend that holds a lease."""
        for frontend in self._by_index:
            if frontend.leased:
                self._transport.send_frontend(frontend.name, state)

    def dismiss(self, message: Stop) -> None:
        """Tells every frontend that ever was here to stop."""
        for frontend in self._by_index:
            self._transport.send_frontend(frontend.name, message)

    def _welcome(self, name: bytes, hello: FrontendHello, now: float, reactions: Reactions) -> None:
        frontend = self._by_name.get(name)
        if frontend is None:
            frontend = Frontend(name, len(self._by_index), hello.life, hello.lease, now + hello.lease)
            self._by_name[name] = frontend
            self._by_index.append(frontend)
        elif frontend.life != hello.life:
            log.warning(
                "frontend %s is a new process: the requests of the old one are aborted", name.decode()
            )
            reactions.abort_frontend(frontend.index)
        frontend.life = hello.life
        frontend.lease = hello.lease
        frontend.expiry = now + hello.lease
        frontend.leased = True
        self._transport.send_frontend(name, reactions.state())

    def _request(self, frontend: Frontend, message: Submit | Abort, reactions: Reactions) -> None:
        if isinstance(message, Abort):
            reactions.abort(frontend.index, message)
        elif reason := reactions.submit(frontend.index, message):
            rejected = Rejected(message.handle, 503, reason, retry_after=_RETRY_AFTER)
            self._transport.send_frontend(frontend.name, rejected)

    def _command(self, name: bytes, message: FromFrontend, now: float, reactions: Reactions) -> None:
        """Any peer may ask to drain or for a timeline, since frontends check the admin key. The
        rest is the launcher's.
        """
        if isinstance(message, Drain):
            reactions.drain(now, now + message.deadline)
        elif isinstance(message, AskTimeline):
            reactions.timeline(name, message)
        elif name != LAUNCHER:
            log.warning("%s sent %s, which only the launcher may", name.decode(), type(message).__name__)
        elif isinstance(message, Stop):
            self.stop_requested = True
        elif isinstance(message, RankLost):
            reactions.rank_lost(message)
        elif isinstance(message, Degraded):
            reactions.degraded(message.reason)
