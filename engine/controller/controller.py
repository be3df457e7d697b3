"""The controller process: it gathers its ranks, then serves."""

from __future__ import annotations

import itertools
import time

from ..protocol.bulk import RankHello
from ..protocol.frontends import RankLost
from ..protocol.lobby import Lobby
from ..protocol.message import Stop
from ..protocol.specs import ControllerSpec
from .balancer import Balancer
from .frontends import Frontends
from .gathering import Gathering, planner_settings, unheard
from .kv_events import KVEventPublisher, KVEventSockets
from .membership import Membership
from .pilot import Pilot
from .serving import Serving
from .status import ClusterStatus
from .transport import BIND_SECONDS, Transport


class Controller:
    """Serves one group from its ranks' hellos until it is stopped."""

    def __init__(self, spec: ControllerSpec) -> None:
        self._spec = spec
        life = 0 if spec.succession is None else spec.succession.life
        self._event_sockets = None
        if spec.kv_events is not None:
            self._event_sockets = KVEventSockets(spec.kv_events, BIND_SECONDS if life else 0.0)
        self._transport = Transport(spec)
        self._lobby = Lobby(spec.lobby, "controller")
        self._frontends = Frontends(self._transport)
        self._first_number = life << 32  # states and events show who is the later controller
        self._numbers = itertools.count(self._first_number + 1)

    @property
    def addresses(self) -> tuple[str, ...]:
        """(step, bulk, frontend) addresses."""
        return self._transport.addresses

    def stop(self) -> None:
        """Asks the loop to end; safe in a signal handler."""
        self._frontends.stop_requested = True

    def run(self) -> ClusterStatus | None:
        """Serves until ``Stop``. Returns the status at the end, None when it never served.

        Raises TimeoutError when ranks stay away, ValueError when the configured context does not
        fit.
        """
        self._lobby.report("starting", "waiting for ranks", address=self.addresses)
        try:
            gathering = Gathering(self._spec, self._transport, self._frontends, self._lobby, self._numbers)
            hellos = gathering.run()
            status = None if self._frontends.stop_requested else self._serve(gathering, hellos)
            self._lobby.report("stopped")
            return status
        finally:
            self._dismiss()

    def _serve(self, gathering: Gathering, hellos: dict[int, RankHello]) -> ClusterStatus:
        inheritance = gathering.inheritance
        lost = sorted(set(range(self._spec.mesh.world)) - set(hellos))
        hellos = hellos | {rank: unheard(rank, hellos) for rank in lost}
        settings = planner_settings(self._spec, hellos, inheritance)
        publisher = self._publisher(settings.page_size)
        pilot = Pilot(settings, self._spec.recording, None if publisher is None else publisher.publish)
        try:
            kept = inheritance.hand_over(self._spec.mesh, settings.num_pages, pilot)
            placement_i32 = inheritance.placement_i32 or self._spec.placement_i32
            status = ClusterStatus(self._spec.mesh, hellos, pilot.group, self._numbers, placement_i32)
            membership = Membership(self._spec, hellos, pilot, status)
            for rank in lost:
                membership.lost(RankLost(rank, "before this controller"), time.monotonic())
            balancer = Balancer(self._spec.mesh, hellos, status.experts, pilot, enabled=self._spec.balance)
            serving = Serving(
                self._transport, self._frontends, self._lobby, pilot, membership, status, balancer
            )
            gathering.hand_over(serving, time.monotonic())
            pages = f"{sum(settings.num_pages)} pages of {settings.page_size} tokens"
            found = f" ({kept} hold blocks)" if kept else ""
            detail = f"{len(hellos)} ranks, {pages}{found}, context {settings.max_len}"
            self._lobby.report("ready", detail)
            try:
                serving.run()
            finally:
                balancer.close()
            return status
        finally:
            pilot.close()
            if publisher is not None:
                publisher.close()

    def _publisher(self, page_size: int) -> KVEventPublisher | None:
        sockets, self._event_sockets = self._event_sockets, None
        return None if sockets is None else KVEventPublisher(sockets, page_size, self._first_number)

    def _dismiss(self) -> None:
        """Tells all peers to stop, if this was asked for: after an error, another may follow."""
        farewell = Stop("the controller has stopped")
        if self._frontends.stop_requested:
            for rank in range(self._spec.mesh.world):
                self._transport.send_bulk(rank, farewell)
                self._transport.send_pulse(rank, farewell)
            self._frontends.dismiss(farewell)
        if self._event_sockets is not None:
            self._event_sockets.close()
        self._transport.close()
        self._lobby.close()
