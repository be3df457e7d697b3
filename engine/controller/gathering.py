"""The controller before it serves: it waits for every rank, and derives the planner's settings."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping

from msgspec import structs

from ..planner.settings import Settings
from ..protocol.bulk import Published, RankHello, SetPlacement
from ..protocol.cluster_state import ClusterState
from ..protocol.frontends import Abort, RankLost, Submit
from ..protocol.lobby import Lobby
from ..protocol.specs import ControllerSpec
from ..protocol.timeline import AskTimeline, TimelineEnd
from ..protocol.turns import Turns
from .frontends import Frontends, Reactions
from .inheritance import Inheritance
from .status import gathering_state
from .transport import Transport

log = logging.getLogger(__name__)

_WAIT = 0.5


class Gathering:
    """Collects the ranks' hellos. The first controller of a run rejects requests meanwhile; one
    that follows another keeps them for ``hand_over``. ``numbers`` number the states.
    """

    def __init__(
        self,
        spec: ControllerSpec,
        transport: Transport,
        frontends: Frontends,
        lobby: Lobby,
        numbers: Iterator[int],
    ) -> None:
        self._spec, self._succession = spec, spec.succession
        self._transport, self._frontends, self._lobby = transport, frontends, lobby
        self._numbers = numbers
        self._lost = set() if self._succession is None else set(self._succession.lost)
        self._reason = "ranks are loading"
        if self._succession is not None:
            self._reason = "the controller was lost, another one waits for the ranks"
        self.inheritance = Inheritance(-1 if self._succession is None else self._succession.epoch)
        self._kept: list[tuple[int, Submit | Abort]] = []
        self._handles: set[tuple[int, int]] = set()  # handles of submits among them
        draining = self._succession is not None and self._succession.draining
        self._drain_by = math.inf if draining else None

    def run(self) -> dict[int, RankHello]:
        """Returns the hellos of all ranks but those that were lost before, or those so far when a
        stop was requested. Raises TimeoutError.
        """
        seconds = self._spec.rank_deadline
        hellos = self.inheritance.hellos
        deadline = time.monotonic() + seconds
        next_state, turns = 0.0, Turns(time.monotonic())
        while self._missing() and not self._frontends.stop_requested:
            self._transport.wait(min(_WAIT, max(0.0, deadline - time.monotonic())))
            now = time.monotonic()
            deadline += turns.take(now)
            self._frontends.listen(now, self)
            if now >= next_state:  # else frontends would take the silence for a loss
                next_state = now + _WAIT
                self._frontends.tell(self.state())
            self._listen_to_ranks()
            self._place_ranks()
            if now > deadline:
                raise TimeoutError(f"ranks {self._missing()} have not reported within {seconds:.0f} s")
        return hellos

    def _missing(self) -> list[int]:
        """The ranks that nothing can begin without."""
        return sorted(set(range(self._spec.mesh.world)) - set(self.inheritance.hellos) - self._lost)

    def _listen_to_ranks(self) -> None:
        world = self._spec.mesh.world
        for message in self._transport.bulk_messages():
            if isinstance(message, Published):
                self.inheritance.published(message)
            elif isinstance(message, RankHello):
                self.inheritance.hello(message)
                here = len(self.inheritance.hellos)
                log.info("rank %d on %s is here with %d pages", message.rank, message.host, message.num_pages)
                self._lobby.report("starting", f"{here} of {world} ranks are here", here / world)

    def _place_ranks(self) -> None:
        """Once all ranks are here, those without the newest placement load its experts, and say
        hello again.
        """
        if not self._missing():
            place = SetPlacement(self.inheritance.placement_version, self.inheritance.placement_i32)
            for rank in self.inheritance.take_behind():
                log.info("rank %d loads the experts of placement %d", rank, place.version)
                self._transport.send_bulk(rank, place)

    def hand_over(self, serving: Reactions, now: float) -> None:
        """Gives ``serving`` everything that has been asked of this controller so far."""
        for frontend, message in self._kept:
            if isinstance(message, Submit):
                serving.submit(frontend, message)
            else:
                serving.abort(frontend, message)
        if self._drain_by is not None:
            serving.drain(now, self._drain_by)

    # ----------------------------------------------------------------- Reactions

    def state(self) -> ClusterState:
        return gathering_state(self._reason, next(self._numbers), self._succession)

    def submit(self, frontend: int, message: Submit) -> str:
        if self._succession is None:
            return self._reason
        if (frontend, message.handle) not in self._handles:
            self._handles.add((frontend, message.handle))
            self._kept.append((frontend, message))
        return ""

    def abort(self, frontend: int, message: Abort) -> None:
        if self._succession is not None:
            self._kept.append((frontend, message))

    def abort_frontend(self, frontend: int) -> None:
        self._kept = [(owner, message) for owner, message in self._kept if owner != frontend]
        self._handles = {key for key in self._handles if key[0] != frontend}

    def drain(self, now: float, deadline: float) -> None:
        """The first controller of a run has nothing to finish."""
        if self._succession is not None:
            self._drain_by = deadline if self._drain_by is None else min(deadline, self._drain_by)

    def timeline(self, name: bytes, message: AskTimeline) -> None:
        """No step is planned yet."""
        self._transport.send_frontend(name, TimelineEnd(message.id, self._reason, 503))

    def degraded(self, reason: str) -> None:
        """The launcher says it again until the state shows it."""

    def rank_lost(self, message: RankLost) -> None:
        """Its replacement has to say hello, unless it has done so before the loss was reported."""
        hello = self.inheritance.hellos.get(message.rank)
        if hello is not None and message.pid in (0, hello.pid):
            self.inheritance.lost(message.rank)
        if hello is None or message.pid in (0, hello.pid):
            self._reason = f"rank {message.rank} is lost: {message.reason}"


def unheard(rank: int, hellos: Mapping[int, RankHello]) -> RankHello:
    """The facts of a rank that was lost before this controller came: those of any other."""
    other = next(iter(hellos.values()))
    return structs.replace(other, rank=rank, host="an unknown host", pid=0, life=0, epoch=-1)


def planner_settings(
    spec: ControllerSpec, hellos: Mapping[int, RankHello], inheritance: Inheritance
) -> Settings:
    """Pool sizes and the longest context. Raises ValueError when the configured context does not
    fit, unless the run has begun before.
    """
    mesh = spec.mesh
    num_pages = [min(hellos[rank].num_pages for rank in mesh.members(data)) for data in range(mesh.data)]
    page_size = hellos[0].page_size
    fits = min(num_pages) * page_size
    if spec.max_len is not None and spec.max_len > fits and spec.succession is None:
        raise ValueError(
            f"model.max_len is {spec.max_len}, but the KV cache of a rank holds {fits} tokens: "
            f"lower model.max_len to {fits} or raise kv_cache.memory"
        )
    max_len = min(spec.max_len or spec.model_max_len, fits)
    if max_len < spec.model_max_len:
        limited = "the context is limited to %d of the model's %d tokens; the KV cache holds %d a rank"
        log.info(limited, max_len, spec.model_max_len, fits)
    return Settings(
        mesh,
        spec.scheduler,
        num_pages,
        page_size,
        max_len,
        epoch=inheritance.first_epoch,
        placement_version=inheritance.placement_version,
        tell_changes=spec.kv_events is not None,
    )
