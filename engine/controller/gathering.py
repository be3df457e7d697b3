"""The controller before it serves: it waits for every rank, and derives the planner's settings."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping

from ..planner.settings import Settings
from ..protocol.bulk import RankHello
from ..protocol.cluster_state import ClusterState
from ..protocol.frontends import Abort, RankLost, Submit
from ..protocol.lobby import Lobby
from ..protocol.specs import ControllerSpec
from .frontends import Frontends
from .status import starting_state
from .transport import Transport

log = logging.getLogger(__name__)

_WAIT = 0.5


class Gathering:
    """Collects the ranks' hellos. Rejects requests meanwhile; ``numbers`` number the states."""

    def __init__(
        self,
        spec: ControllerSpec,
        transport: Transport,
        frontends: Frontends,
        lobby: Lobby,
        numbers: Iterator[int],
    ) -> None:
        self._spec = spec
        self._transport, self._frontends, self._lobby = transport, frontends, lobby
        self._numbers = numbers
        self._reason = "ranks are loading"
        self._hellos: dict[int, RankHello] = {}

    def run(self) -> dict[int, RankHello]:
        """Returns the hellos of all ranks, or those so far when a stop was requested. Raises
        TimeoutError.
        """
        world, seconds = self._spec.mesh.world, self._spec.rank_deadline
        deadline = time.monotonic() + seconds
        next_state = 0.0
        while len(self._hellos) < world and not self._frontends.stop_requested:
            self._transport.wait(min(_WAIT, max(0.0, deadline - time.monotonic())))
            now = time.monotonic()
            self._frontends.listen(now, self)
            if now >= next_state:  # else frontends would take the silence for a loss
                next_state = now + _WAIT
                self._frontends.tell(self.state())
            for message in self._transport.bulk_messages():
                if isinstance(message, RankHello):
                    self._hellos[message.rank] = message
                    here = len(self._hellos)
                    log.info(
                        "rank %d on %s is here with %d pages", message.rank, message.host, message.num_pages
                    )
                    self._lobby.report("starting", f"{here} of {world} ranks are here", here / world)
            if time.monotonic() > deadline:
                missing = [rank for rank in range(world) if rank not in self._hellos]
                raise TimeoutError(f"ranks {missing} have not reported within {seconds:.0f} s")
        return self._hellos

    # ----------------------------------------------------------------- Reactions

    def state(self) -> ClusterState:
        return starting_state(self._reason, next(self._numbers))

    def submit(self, frontend: int, message: Submit) -> str:
        return self._reason

    def abort(self, frontend: int, message: Abort) -> None:
        """No request is open."""

    def abort_frontend(self, frontend: int) -> None:
        """No request is open."""

    def drain(self, now: float, deadline: float) -> None:
        """No request is open."""

    def degraded(self, reason: str) -> None:
        """A frontend that is missing is replaced long before all ranks have loaded."""

    def rank_lost(self, message: RankLost) -> None:
        """Its replacement has to say hello."""
        self._hellos.pop(message.rank, None)
        self._reason = f"rank {message.rank} is lost: {message.reason}"


def planner_settings(spec: ControllerSpec, hellos: Mapping[int, RankHello]) -> Settings:
    """Pool sizes and the longest context. Raises ValueError when the configured context does not
    fit.
    """
    mesh = spec.mesh
    num_pages = [min(hellos[rank].num_pages for rank in mesh.members(data)) for data in range(mesh.data)]
    page_size = hellos[0].page_size
    fits = min(num_pages) * page_size
    if spec.max_len is not None and spec.max_len > fits:
        raise ValueError(
            f"model.max_len is {spec.max_len}, but the KV cache of a rank holds {fits} tokens: "
            f"lower model.max_len to {fits} or raise kv_cache.memory"
        )
    max_len = spec.max_len if spec.max_len is not None else min(spec.model_max_len, fits)
    if max_len < spec.model_max_len:
        limited = "the context is limited to %d of the model's %d tokens; the KV cache holds %d a rank"
        log.info(limited, max_len, spec.model_max_len, fits)
    return Settings(mesh, spec.scheduler, num_pages, page_size, max_len)
