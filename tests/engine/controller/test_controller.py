"""The controller over real sockets, with simulated ranks and a frontend without HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

import msgspec
import numpy as np
import pytest
import zmq

from lockstep.engine.controller.controller import Controller
from lockstep.engine.controller.serving import Serving
from lockstep.engine.controller.transport import Transport
from lockstep.engine.kv.hashing import chain_hashes
from lockstep.engine.planner.cost_model import Cost
from lockstep.engine.planner.settings import Settings
from lockstep.engine.protocol.cluster_state import ClusterState
from lockstep.engine.protocol.frontends import (
    Abort,
    Drain,
    FrontendHello,
    Heartbeat,
    RankLost,
    Rejected,
    Started,
    Submit,
    ToFrontend,
    TokenBatch,
)
from lockstep.engine.protocol.message import Finish, Sampling, encode
from lockstep.engine.protocol.sockets import client_socket, new_keypair
from lockstep.engine.protocol.specs import ControllerSpec, Keys, SchedulerSpec
from lockstep.engine.protocol.turns import LONGEST_TURN
from lockstep.engine.simulation.served_ranks import SimulatedRanks, SimulatedSpec
from lockstep.engine.simulation.simulation import Simulation
from lockstep.launch.run.launcher_link import LauncherLink
from lockstep.launch.simulation.record import Record
from lockstep.parallel.mesh import Mesh
from support.engine.planner.planner_world import ROOT

PAGE = 4
SLOW = 0.1
"""Seconds of a slow step: a request of 240 tokens runs for 24 s, in which a test can act."""


def submit_of(handle: int, length: int, max_tokens: int) -> Submit:
    tokens = np.arange(handle, handle + length, dtype=np.int32).tobytes()
    return Submit(
        handle,
        str(handle),
        tokens,
        chain_hashes(ROOT, tokens, PAGE),
        length + max_tokens,
        Sampling(seed=handle),
    )


class Frontend:
    """A raw peer of the frontend socket."""

    def __init__(
        self, keys: Keys, address: str, name: bytes = b"f0", lease: float = 30.0, life: int = 0
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = client_socket(self._context, zmq.DEALER, keys, name)
        self._socket.connect(address)
        self._decoder = msgspec.msgpack.Decoder(ToFrontend)
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, Finish] = {}
        self.rejected: dict[int, Rejected] = {}
        self.cached: dict[int, int] = {}
        self.state: ClusterState | None = None
        with suppress(zmq.Again):  # its key has been refused already
            self.send(FrontendHello("test", lease, life))

    def send(self, message: msgspec.Struct) -> None:
        self._socket.send(encode(message), zmq.DONTWAIT)

    def submit(self, handle: int, length: int, max_tokens: int) -> None:
        self.send(submit_of(handle, length, max_tokens))

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
        """Receives until ``condition`` holds. A failure names ``what`` it waited for."""
        end = time.monotonic() + seconds
        while not condition():
            if self._socket.poll(50):
                self._take(self._decoder.decode(self._socket.recv()))
            else:
                assert time.monotonic() < end, f"waited {seconds} s for {what}; state {self.state}"

    def until_phase(self, phase: str) -> None:
        self.until(lambda: self.state is not None and self.state.phase == phase, f"phase {phase}")

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()

    def _take(self, message: object) -> None:
        if isinstance(message, TokenBatch):
            start = 0
            columns = (
                np.frombuffer(message.handles_i64, np.int64),
                np.frombuffer(message.counts_i32, np.int32),
                np.frombuffer(message.finish_u8, np.uint8),
            )
            for handle, count, finish in zip(*(column.tolist() for column in columns), strict=True):
                self.tokens.setdefault(handle, []).extend(
                    np.frombuffer(message.tokens_i32, np.int32)[start : start + count].tolist()
                )
                start += count
                if finish:
                    self.finish[handle] = Finish(finish)
        elif isinstance(message, Rejected):
            self.rejected[message.handle] = message
        elif isinstance(message, ClusterState):
            self.state = message
        elif isinstance(message, Started):
            handles, cached = (
                np.frombuffer(message.handles_i64, np.int64),
                np.frombuffer(message.cached_i32, np.int32),
            )
            self.cached |= dict(zip(handles.tolist(), cached.tolist(), strict=True))


@dataclass
class Running:
    """A controller in a thread, its keys, and the ranks and frontends that have joined it."""

    controller: Controller
    keys: Keys
    ranks: SimulatedRanks | None = None
    threads: list[threading.Thread] = field(default_factory=list)
    peers: list[Frontend] = field(default_factory=list)

    def join_ranks(self, ranks: tuple[int, ...], mesh: Mesh, step_seconds: float = 0.002) -> None:
        step, bulk, _ = self.controller.addresses
        spec = SimulatedSpec(
            ranks=ranks,
            mesh=mesh,
            keys=self.keys,
            step_address=step,
            bulk_address=bulk,
            num_slots=16,
            max_len=256,
            num_pages=200,
            page_size=PAGE,
            step_seconds=step_seconds,
        )
        self.ranks = SimulatedRanks(spec)
        self._start(self.ranks.run)

    def frontend(self, name: bytes = b"f0", lease: float = 30.0, life: int = 0) -> Frontend:
        self.peers.append(Frontend(self.keys, self.controller.addresses[2], name, lease, life))
        return self.peers[-1]

    def _start(self, run: Callable[[], None]) -> None:
        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def pace(self, step_seconds: float) -> None:
        """Sets the seconds of a step, from the next plan on."""
        assert self.ranks is not None
        for rank in self.ranks._ranks.values():
            rank.cost = Cost(step_seconds, 0.0, 0.0, 0.0)

    def end_ranks(self) -> None:
        """Ends the ranks that joined last, and waits for their end."""
        assert self.ranks is not None
        self.ranks.stop()
        self.threads[-1].join(timeout=30)

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.controller.stop()
        for peer in self.peers:
            with suppress(zmq.Again):
                peer.send(Heartbeat())  # wakes the controller
        if self.ranks is not None:
            self.ranks.stop()
        for thread in self.threads:
            thread.join(timeout=30)
        for peer in self.peers:
            peer.close()
        assert not any(thread.is_alive() for thread in self.threads)


def forward(clock: pytest.MonkeyPatch, seconds: float) -> None:
    """Puts the clock of this process forward."""
    now = time.monotonic
    clock.setattr(time, "monotonic", lambda: now() + seconds)


def forward_in_a_turn(clock: pytest.MonkeyPatch, seconds: float) -> None:
    """Puts the clock forward once, after the controller has begun a turn."""
    begin, stops = Serving._listen_to_ranks, [seconds]

    def stand_still(serving: Serving) -> None:
        if stops:
            forward(clock, stops.pop())
        begin(serving)

    clock.setattr(Serving, "_listen_to_ranks", stand_still)


def let_time_pass(
    clock: pytest.MonkeyPatch, watcher: Frontend, condition: Callable[[], bool], what: str
) -> None:
    """Puts the clock forward until ``condition`` holds, each time that ``watcher`` has got a state,
    and by less than a standstill.
    """
    now, passed, begun = time.monotonic, 0.0, time.perf_counter()
    clock.setattr(time, "monotonic", lambda: now() + passed)
    while not condition():
        assert time.perf_counter() - begun < 60, f"waited 60 s for {what}; state {watcher.state}"
        last, passed = watcher.state, passed + LONGEST_TURN / 2
        watcher.send(Heartbeat())  # wakes the controller
        watcher.until(lambda last=last: watcher.state is not last, "a state")  # type: ignore[misc]


def scheduler(max_queue: int = 100) -> SchedulerSpec:
    return SchedulerSpec(max_running=16, max_batch_tokens=64, max_queue=max_queue, checksum_every=1)


def start(
    mesh: Mesh,
    *,
    max_queue: int = 100,
    rank_deadline: float = 20.0,
    max_len: int | None = None,
    recording: str | None = None,
) -> Running:
    server, client = new_keypair(), new_keypair()
    spec = ControllerSpec(
        host="127.0.0.1",
        survivors=False,
        secret=server[1],
        public=server[0],
        allowed=(client[0],),
        mesh=mesh,
        scheduler=scheduler(max_queue),
        model_max_len=256,
        max_len=max_len,
        rank_deadline=rank_deadline,
        recording=recording,
    )
    return Running(Controller(spec), Keys(server_public=server[0], public=client[0], secret=client[1]))


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A controller with two ranks. It ends before ``monkeypatch`` puts its clock back."""
    with start(Mesh(data=2)) as cluster:
        cluster._start(cluster.controller.run)
        cluster.join_ranks((0, 1), Mesh(data=2))
        yield cluster


def serving(frontend: Frontend) -> bool:
    return frontend.state is not None and frontend.state.phase == "serving"


def draining(running: Running, max_tokens: int) -> Frontend:
    """Request 1 generates slowly, and the cluster drains for as long as it needs."""
    frontend = running.frontend()
    frontend.until_phase("serving")
    running.pace(SLOW)
    frontend.submit(1, 10, max_tokens)
    frontend.until(lambda: 1 in frontend.tokens, "a token")
    frontend.send(Drain(600.0))
    frontend.until_phase("draining")
    return frontend


def idle_after(frontend: Frontend, tokens: int) -> bool:
    """Whether the last state counts so many tokens and nothing runs. An older state may have come
    before it.
    """
    return (
        frontend.state is not None
        and frontend.state.generation_tokens == tokens
        and frontend.state.num_running == 0
    )


def test_serves_tokens(running: Running) -> None:
    frontend = running.frontend()
    frontend.until_phase("serving")
    for handle in range(40):
        frontend.submit(handle, 10 + handle, 20)
    frontend.until(lambda: len(frontend.finish) == 40, "40 ends")
    assert all(len(tokens) == 20 for tokens in frontend.tokens.values())
    assert set(frontend.finish.values()) == {Finish.LENGTH}
    frontend.cached.clear()
    frontend.submit(39, 49, 20)
    frontend.until(lambda: 39 in frontend.cached, "a start")
    frontend.until(lambda: idle_after(frontend, 41 * 20), "rows to be given back")
    frontend.until(
        lambda: frontend.state is not None and frontend.state.kv_usage == 0.0, "pages to be given back"
    )


def test_a_burst_takes_the_steps_and_the_time_of_its_simulation() -> None:
    """Virtual time predicts the controller: same order within a turn, same pacing."""
    asks = [(handle, 10 + handle, 20) for handle in range(40)]
    arrivals: list[float] = []
    with start(Mesh()) as cluster:
        cluster._start(cluster.controller.run)
        cluster.join_ranks((0,), Mesh(), step_seconds=0.02)
        frontend = cluster.frontend()
        frontend.until_phase("serving")
        began = time.monotonic()
        for ask in asks:
            arrivals.append(time.monotonic() - began)
            frontend.submit(*ask)
        frontend.until(lambda: len(frontend.finish) == len(asks), "all ends")
        took = time.monotonic() - began
        frontend.until(
            lambda: frontend.state is not None and frontend.state.generation_tokens == 800,
            "the state after them",
        )
        state = frontend.state
    assert state is not None
    record = Record(np.array(arrivals))
    simulated = Simulation(
        Settings(Mesh(), scheduler(), [200], PAGE, 256), lambda work: np.full((1, 1), 0.02), record
    )
    assert simulated.run((arrival, submit_of(*ask)) for arrival, ask in zip(arrivals, asks, strict=True))
    expected = simulated.planner.group.counters
    assert abs(state.steps - expected.steps) <= 3, "what is on its way takes part one step later"
    assert 0.85 * simulated.now < took < 2 * simulated.now + 30, (
        "no quicker than its steps, and no slower but where the machine stands still"
    )
    assert record.finished == len(asks) and expected.prefix_hits == state.prefix_hits


def test_a_full_disk_ends_the_recording_and_not_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[str] = []

    def report(phase: str, detail: str = "", fraction: float = 0.0, address: tuple[str, ...] = ()) -> None:
        reports.append(detail)

    with start(Mesh(), recording="/dev/full") as cluster:
        monkeypatch.setattr(cluster.controller._lobby, "report", report)
        cluster._start(cluster.controller.run)
        cluster.join_ranks((0,), Mesh())
        frontend = cluster.frontend()
        frontend.until_phase("serving")
        frontend.submit(1, 10, 240)
        frontend.until(lambda: 1 in frontend.finish, "the end")
        assert frontend.finish[1] == Finish.LENGTH
        frontend.until(
            lambda: reports[-1].startswith("the recording to /dev/full has ended: "), "the recording to end"
        )
        frontend.submit(2, 10, 20)
        frontend.until(lambda: 2 in frontend.finish, "the end of a request after it")


def test_an_abort_is_acknowledged_and_frees(running: Running) -> None:
    frontend = running.frontend()
    frontend.until_phase("serving")
    running.pace(SLOW)
    frontend.submit(1, 10, 240)
    frontend.until(lambda: 1 in frontend.tokens, "a token")
    frontend.until(lambda: frontend.state is not None and frontend.state.kv_usage > 0.0, "pages to be taken")
    frontend.send(Abort(1))
    frontend.until(lambda: frontend.finish.get(1) == Finish.ABORT, "the acknowledgement")
    frontend.until(
        lambda: frontend.state is not None and frontend.state.kv_usage == 0.0, "pages to be given back"
    )
    assert frontend.state is not None and frontend.state.generation_tokens < 240, "it ran to its end"


def test_a_silent_frontend_loses_its_lease(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    silent, watcher = running.frontend(b"silent", lease=10.0), running.frontend(b"watcher", lease=3600.0)
    silent.until_phase("serving")
    running.pace(SLOW)
    for handle in range(8):
        silent.submit(handle, 10, 240)
    watcher.until(
        lambda: watcher.state is not None and watcher.state.prompt_tokens == 80, "the requests to arrive"
    )
    let_time_pass(
        monkeypatch,
        watcher,
        lambda: watcher.state is not None and watcher.state.num_running + watcher.state.num_waiting == 0,
        "the lease to run out",
    )
    assert watcher.state is not None and watcher.state.generation_tokens < 8 * 240, "they ran to their end"
    silent.until(silence(silent, 1.0), "its messages to stop")
    assert not silent.finish, "it learns of the end, and takes it for that of its requests"


@pytest.mark.parametrize("when", ["between turns", "in a turn"])
def test_a_standstill_of_the_controller_ends_no_lease(
    running: Running, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    frontend = running.frontend(lease=20.0)
    frontend.until_phase("serving")
    running.pace(SLOW / 4)
    frontend.submit(1, 10, 200)
    frontend.until(lambda: 1 in frontend.tokens, "a token")
    if when == "between turns":
        forward(monkeypatch, 100.0)
    else:
        forward_in_a_turn(monkeypatch, 100.0)
    for _ in range(3):  # leases are judged before each state
        last = frontend.state
        frontend.until(lambda last=last: frontend.state is not last, "a state")  # type: ignore[misc]
    running.pace(0.002)
    frontend.until(lambda: 1 in frontend.finish, "the end of the request")
    assert (frontend.finish[1], len(frontend.tokens[1])) == (Finish.LENGTH, 200)


def test_a_hello_of_a_known_rank_begins_an_epoch_and_loses_nothing(running: Running) -> None:
    """Its connection was away, and a plan is lost."""
    frontend = running.frontend()
    frontend.until_phase("serving")
    running.pace(SLOW / 4)
    for handle in range(1, 5):
        frontend.submit(handle, 10, 100)
    frontend.until(lambda: len(frontend.tokens) == 4, "tokens")
    assert running.ranks is not None
    running.ranks.come_back(1)
    frontend.until(lambda: frontend.state is not None and frontend.state.epoch == 1, "the epoch")
    running.pace(0.002)
    frontend.until(lambda: len(frontend.finish) == 4, "all ends")
    assert set(frontend.finish.values()) == {Finish.LENGTH}
    assert all(len(tokens) == 100 for tokens in frontend.tokens.values())
    assert frontend.state is not None and frontend.state.epoch == 1


def test_an_open_request_is_taken_again_while_the_cluster_drains(running: Running) -> None:
    frontend = draining(running, 60)
    frontend.submit(1, 10, 60)  # open: ignored
    begun = np.array([5, 6], np.int32).tobytes()
    frontend.send(msgspec.structs.replace(submit_of(2, 10, 60), emitted_i32=begun))
    running.pace(0.002)
    frontend.until_phase("drained")
    assert frontend.finish == {1: Finish.LENGTH, 2: Finish.LENGTH} and not frontend.rejected
    assert [len(frontend.tokens[handle]) for handle in (1, 2)] == [60, 58]


def silence(frontend: Frontend, seconds: float) -> Callable[[], bool]:
    """A condition: no state has come for so long. One may be on its way when it is made."""
    last, since = frontend.state, time.monotonic()

    def silent() -> bool:
        nonlocal last, since
        if frontend.state is not last:
            last, since = frontend.state, time.monotonic()
        return time.monotonic() - since > seconds

    return silent


def test_a_launcher_may_be_silent_for_as_long_as_ranks_take_to_load(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, frontend = (
        LauncherLink(running.controller.addresses[2], running.keys),
        running.frontend(lease=10.0),
    )
    watcher = running.frontend(b"watcher", lease=3600.0)
    try:
        frontend.until_phase("serving")
        over = time.monotonic() + 11.0
        let_time_pass(monkeypatch, watcher, lambda: time.monotonic() > over, "the lease to run out")
        frontend.until(silence(frontend, 1.0), "states to stop coming, since its lease is over")
        launcher.drain(5.0)
        end = time.monotonic() + 30
        while (state := launcher.read(0.1)) is None or state.phase != "drained":
            assert time.monotonic() < end, f"the launcher was left with {state}"
    finally:
        launcher.close()


def test_another_process_under_the_same_name_aborts_the_requests_of_the_one_before(running: Running) -> None:
    first, watcher = running.frontend(b"f", life=1), running.frontend(b"watcher")
    first.until_phase("serving")
    running.pace(SLOW / 2)
    first.submit(1, 10, 240)
    first.until(lambda: 1 in first.tokens, "a token")
    first.send(FrontendHello("test", 30.0, 1))  # the same process, after a broken connection
    first.until(lambda: len(first.tokens[1]) > 20, "tokens go on")
    assert 1 not in first.finish
    running.peers.remove(first)
    first.close()
    second = running.frontend(b"f", life=2)
    second.until(
        lambda: second.finish.get(1) == Finish.ABORT, "the end of the request, which the new process drops"
    )
    watcher.until(
        lambda: watcher.state is not None and watcher.state.step > 0 and watcher.state.kv_usage == 0.0,
        "its pages to be free",
    )
    assert watcher.state is not None and watcher.state.generation_tokens < 240, "it ran to its end"


def test_states_are_numbered_and_carry_what_steps_add_up_to(running: Running) -> None:
    frontend = running.frontend()
    frontend.until_phase("serving")
    assert frontend.state is not None
    number, begun = frontend.state.number, time.perf_counter()
    frontend.submit(1, 10, 20)
    frontend.submit(2, 30, 20)
    frontend.until(lambda: {1, 2} <= set(frontend.finish), "both ends")
    frontend.until(lambda: idle_after(frontend, 2 * 20), "a state after them")
    state, seconds = frontend.state, time.perf_counter() - begun
    assert state is not None and state.number > number and state.steps > 0
    tokens = np.frombuffer(state.totals.tokens_i64, np.int64)
    computed = 10 + 30 + 2 * 19  # the last token of each is never an input
    assert len(tokens) == 2 and computed <= tokens.sum() <= computed + 2 * 3, (
        "plans sent ahead may hold a row too many"
    )
    steps = np.frombuffer(state.totals.step_i64, np.int64).sum()
    assert steps == np.frombuffer(state.totals.plan_i64, np.int64).sum() == state.steps
    assert state.totals.rows >= tokens.sum() and state.totals.dispatch_rows >= state.totals.rows
    assert (
        0 < state.totals.plan_seconds < seconds and not state.totals.overlap and state.totals.moved_bytes == 0
    )
    assert (np.frombuffer(state.totals.busy_f64) > 0).all()


def test_draining_finishes_what_runs_and_refuses_the_rest(running: Running) -> None:
    frontend = draining(running, 200)
    frontend.submit(2, 10, 5)
    frontend.until(lambda: 2 in frontend.rejected, "a refusal")
    assert frontend.rejected[2].status == 503 and frontend.rejected[2].retry_after > 0
    assert frontend.rejected[2].reason == "the cluster is draining"
    running.pace(0.002)
    frontend.until_phase("drained")
    assert frontend.finish[1] == Finish.LENGTH and len(frontend.tokens[1]) == 200
    assert frontend.state is not None and frontend.state.reason == "", "a reason that contradicts the phase"
    frontend.submit(3, 10, 5)
    frontend.until(lambda: 3 in frontend.rejected, "a refusal")
    assert frontend.rejected[3].reason == "the cluster is drained"


def test_a_second_drain_shortens_the_first(running: Running) -> None:
    frontend = running.frontend()
    frontend.until_phase("serving")
    running.pace(SLOW)
    frontend.submit(1, 10, 240)
    frontend.submit(2, 20, 230)
    frontend.until(lambda: {1, 2} <= set(frontend.tokens), "tokens")
    frontend.send(Drain(600.0))
    frontend.send(Drain(0.0))
    frontend.until_phase("drained")
    assert frontend.finish == {1: Finish.ERROR, 2: Finish.ERROR}
    frontend.until(
        lambda: frontend.state is not None and frontend.state.kv_usage == 0.0, "pages to be given back"
    )


def test_only_the_launcher_may_declare_a_rank_lost(running: Running) -> None:
    frontend = running.frontend()
    frontend.until_phase("serving")
    frontend.send(RankLost(1, "said by the wrong one"))
    frontend.submit(1, 10, 5)
    frontend.until(lambda: 1 in frontend.finish, "an end")
    assert serving(frontend)


def test_a_lost_rank_is_a_pause_until_it_is_replaced(running: Running) -> None:
    frontend, launcher = running.frontend(), running.frontend(b"launcher")
    frontend.until_phase("serving")
    running.pace(SLOW)
    frontend.submit(1, 10, 240)
    frontend.submit(2, 20, 230)
    frontend.until(lambda: {1, 2} <= set(frontend.tokens), "tokens")
    running.end_ranks()
    assert not frontend.finish
    launcher.send(RankLost(1, "it was killed"))
    frontend.until_phase("recovering")
    assert (
        frontend.state is not None
        and "rank 1" in frontend.state.reason
        and "it was killed" in frontend.state.reason
    )
    assert [rank.state for rank in frontend.state.ranks] == ["serving", "lost"]
    frontend.submit(3, 10, 20)
    launcher.send(RankLost(0, "it was killed too"))
    frontend.until(
        lambda: frontend.state is not None and {rank.state for rank in frontend.state.ranks} == {"lost"},
        "both to be missed",
    )
    running.join_ranks((0, 1), Mesh(data=2))
    frontend.until(lambda: {1, 2, 3} <= set(frontend.finish), "all ends")
    assert set(frontend.finish.values()) == {Finish.LENGTH}
    assert [len(frontend.tokens[handle]) for handle in (1, 2, 3)] == [240, 230, 20]
    frontend.until(
        lambda: serving(frontend) and frontend.state is not None and frontend.state.epoch == 2,
        "phase serving in epoch 2",
    )


def test_a_loss_and_the_replacement_may_be_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that stood still reads the ranks' messages first, and among them the new rank's
    hello.
    """
    go, standing, wait = threading.Event(), threading.Event(), Transport.wait
    go.set()

    def held(transport: Transport, seconds: float) -> None:
        if not go.is_set():
            standing.set()
            assert go.wait(60)
        wait(transport, seconds)

    monkeypatch.setattr(Transport, "wait", held)
    with start(Mesh(data=2)) as running:
        running._start(running.controller.run)
        for rank in range(2):
            running.join_ranks((rank,), Mesh(data=2))
        frontend, launcher = running.frontend(), running.frontend(b"launcher")
        frontend.until_phase("serving")
        launcher.until_phase("serving")
        go.clear()
        try:
            assert standing.wait(30)
            running.end_ranks()
            launcher.send(RankLost(1, "it was killed"))
            running.join_ranks((1,), Mesh(data=2))
            transport, end = running.controller._transport, time.monotonic() + 30
            while not all(
                int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN
                for socket in (transport._bulk, transport._frontend)
            ):
                assert time.monotonic() < end, "waited 30 s for the loss and the hello to arrive"
                time.sleep(0.01)
        finally:
            go.set()
        frontend.until(
            lambda: serving(frontend) and frontend.state is not None and frontend.state.epoch == 1,
            "phase serving in epoch 1",
        )
        frontend.submit(1, 10, 20)
        frontend.until(lambda: 1 in frontend.finish, "an end")


def test_a_rank_that_is_not_replaced_ends_the_cluster(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    frontend, launcher = running.frontend(lease=3600.0), running.frontend(b"launcher", lease=3600.0)
    frontend.until_phase("serving")
    running.pace(SLOW)
    frontend.submit(1, 10, 240)
    frontend.until(lambda: 1 in frontend.tokens, "a token")
    launcher.send(RankLost(1, "it was killed"))
    frontend.until_phase("recovering")
    assert 1 not in frontend.finish
    let_time_pass(
        monkeypatch,
        launcher,
        lambda: launcher.state is not None and launcher.state.phase == "failed",
        "the cluster to give the rank up",
    )
    frontend.until(lambda: frontend.finish.get(1) == Finish.ERROR, "the end of the request")
    frontend.until_phase("failed")
    assert frontend.state is not None and "no replacement for ranks [1] within 20 s" in frontend.state.reason


def test_a_stranger_cannot_join(running: Running) -> None:
    own = new_keypair()
    keys = Keys(server_public=running.keys.server_public, public=own[0], secret=own[1])
    stranger = Frontend(keys, running.controller.addresses[2], b"stranger")
    running.peers.append(stranger)
    with pytest.raises(AssertionError, match="phase serving"):
        stranger.until(lambda: stranger.state is not None, "phase serving", 1.0)


def test_a_rank_that_stays_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes quickly once two of three are there. A standstill before does not count."""
    reported: list[str] = []

    def report(phase: str, detail: str = "", fraction: float = 0.0, address: tuple[str, ...] = ()) -> None:
        if detail.startswith("2 of 3 ranks"):
            forward(monkeypatch, 100.0)
            reported.append(detail)

    turns, wait = 0, Transport.wait

    def wait_quickly(transport: Transport, timeout: float) -> None:
        nonlocal turns
        if reported:
            turns += 1
            forward(monkeypatch, LONGEST_TURN / 2)
        wait(transport, timeout / 100)

    with start(Mesh(data=3)) as cluster:
        monkeypatch.setattr(cluster.controller._lobby, "report", report)
        monkeypatch.setattr(Transport, "wait", wait_quickly)
        cluster.join_ranks((0, 2), Mesh(data=3))
        with pytest.raises(TimeoutError, match=r"ranks \[1\] have not reported within 20 s"):
            cluster.controller.run()
    assert turns > 10, "the standstill counted"


def test_a_context_that_does_not_fit_is_refused() -> None:
    with start(Mesh(data=1), max_len=10_000) as cluster:
        cluster.join_ranks((0,), Mesh(data=1))
        with pytest.raises(ValueError, match=r"model.max_len is 10000.*800 tokens"):
            cluster.controller.run()
