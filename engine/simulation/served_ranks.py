"""Many simulated ranks in one process, on real sockets. The controller cannot tell them from real
ones.

Each rank executes its plans in order; a step takes the cost model's seconds of wall time. The
control-path benchmark uses them, and tests of the serving path that need no model.
"""

from __future__ import annotations

import heapq
import os
import socket as network
import time

import msgspec
import zmq

from ...parallel.mesh import Mesh
from ..planner.cost_model import Cost
from ..protocol.bulk import Preload, Preloaded, RankHello, ToRankBulk
from ..protocol.message import Stop, encode
from ..protocol.plan import StepPlan, decode_plan
from ..protocol.sockets import client_socket, rank_identity
from ..protocol.specs import Keys
from ..protocol.timeline import StepSpans, clock_name
from .simulated_rank import SimulatedRank


class SimulatedSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Ranks to simulate. A step takes ``step_seconds``, and more for its tokens and KV reads."""

    ranks: tuple[int, ...]
    mesh: Mesh
    keys: Keys
    step_address: str
    bulk_address: str
    num_slots: int
    max_len: int
    num_pages: int
    page_size: int
    step_seconds: float = 0.02
    token_seconds: float = 0.0
    kv_seconds: float = 0.0
    vocabulary: int = 1000


class Timeline:
    """Times of each step in monotonic seconds: its first result left this process, its plan has
    reached all ranks here.
    """

    def __init__(self) -> None:
        self.first_result: dict[int, float] = {}
        self.plan_complete: dict[int, float] = {}


class SimulatedRanks:
    """Serves its ranks until the controller says Stop."""

    def __init__(self, spec: SimulatedSpec) -> None:
        self._spec = spec
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.setsockopt(zmq.MAX_SOCKETS, 4096)
        self._poller = zmq.Poller()
        self._step: dict[zmq.Socket[bytes], int] = {}
        self._bulk: dict[zmq.Socket[bytes], int] = {}
        self._ranks: dict[int, SimulatedRank] = {}
        self._free_at: dict[int, float] = dict.fromkeys(spec.ranks, 0.0)
        self._due: list[tuple[float, int, bytes, int]] = []
        self._traced: dict[tuple[int, int], StepSpans] = {}  # by rank and step
        self._by_rank: dict[int, zmq.Socket[bytes]] = {}
        self.timeline = Timeline()
        self._decoder = msgspec.msgpack.Decoder(ToRankBulk)
        self._stopping = False
        self._returning: int | None = None
        self._hellos: dict[int, tuple[zmq.Socket[bytes], bytes]] = {}
        for rank in spec.ranks:
            self._open(rank)

    def stop(self) -> None:
        self._stopping = True

    def come_back(self, rank: int) -> None:
        """The connection of ``rank`` was away: it misses its next plan and says hello again."""
        self._returning = rank

    def run(self) -> None:
        while not self._stopping:
            timeout = max(0.0, self._due[0][0] - time.monotonic()) if self._due else 0.2
            ready = [socket for socket, _ in self._poller.poll(int(1000 * timeout))]
            plans = [
                (self._step[socket], plan)
                for socket in ready
                if socket in self._step
                for plan in self._take_plans(socket)
            ]
            for socket in ready:
                if socket in self._bulk:
                    self._take_bulk(socket)
            for rank, plan in plans:
                self._execute(rank, plan)
            self._send_due()
        for socket in (*self._step, *self._bulk):
            socket.close(linger=0)
        self._context.term()

    def _open(self, rank: int) -> None:
        spec = self._spec
        simulated = SimulatedRank(
            rank,
            spec.num_slots,
            -(-spec.max_len // spec.page_size),
            num_cohorts=spec.mesh.num_cohorts,
            samples=spec.mesh.samples(rank),
        )
        simulated.vocabulary = spec.vocabulary
        simulated.cost = Cost(spec.step_seconds, spec.token_seconds, spec.kv_seconds, 0.0)
        self._ranks[rank] = simulated
        step = client_socket(self._context, zmq.DEALER, spec.keys, rank_identity(rank))
        step.connect(spec.step_address)
        bulk = client_socket(self._context, zmq.DEALER, spec.keys, rank_identity(rank))
        bulk.connect(spec.bulk_address)
        self._step[step], self._bulk[bulk], self._by_rank[rank] = rank, rank, step
        self._poller.register(step, zmq.POLLIN)
        self._poller.register(bulk, zmq.POLLIN)
        hello = RankHello(
            rank, network.gethostname(), os.getpid(), spec.num_pages, spec.page_size, 0, 0, 0, "simulated"
        )
        self._hellos[rank] = bulk, encode(hello)
        bulk.send(encode(hello))

    def _take_bulk(self, socket: zmq.Socket[bytes]) -> None:
        while socket.poll(0):
            message = self._decoder.decode(socket.recv())
            if isinstance(message, Stop):
                self._stopping = True
                return
            self._ranks[self._bulk[socket]].stage(message)
            if isinstance(message, Preload):
                socket.send(encode(Preloaded(self._bulk[socket], message.staged)))

    def _take_plans(self, socket: zmq.Socket[bytes]) -> list[StepPlan]:
        plans: list[StepPlan] = []
        while socket.poll(0):
            plans.append(decode_plan(*socket.recv_multipart()))
            self.timeline.plan_complete[plans[-1].header.step] = time.monotonic()
        return plans

    def _execute(self, rank: int, plan: StepPlan) -> None:
        """Starts a rank's step when it has the plan and has finished the step before."""
        if rank == self._returning:
            self._returning = None
            bulk, hello = self._hellos[rank]
            bulk.send(hello)
            return
        received = self.timeline.plan_complete[plan.header.step]
        result = self._ranks[rank].execute(plan)
        if result is not None:
            begun = max(received, self._free_at[rank])
            self._free_at[rank] = begun + getattr(result, "seconds", 0.0)
            if plan.header.trace:
                where = rank, plan.header.epoch, plan.header.step
                self._traced[rank, plan.header.step] = StepSpans(
                    *where, begun=begun, ended=self._free_at[rank], clock=clock_name()
                )
            heapq.heappush(self._due, (self._free_at[rank], rank, encode(result), plan.header.step))

    def _send_due(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic():
            _, rank, payload, step = heapq.heappop(self._due)
            self.timeline.first_result.setdefault(step, time.monotonic())
            self._by_rank[rank].send(payload)
            if (spans := self._traced.pop((rank, step), None)) is not None:
                self._hellos[rank][0].send(encode(spans))
