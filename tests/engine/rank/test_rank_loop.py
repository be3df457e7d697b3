"""The rank's side of the protocol over real CURVE sockets, with an executor that only takes
notes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator

import pytest
from msgspec import structs

from lockstep.engine.protocol.bulk import Disband, Preload, Preloaded, Published, RankHello, Unload
from lockstep.engine.protocol.message import Stop
from lockstep.engine.protocol.plan import Header, Section, StepPlan
from lockstep.engine.protocol.results import Refused, StepResult
from lockstep.engine.protocol.sockets import ABSENCE_SECONDS
from lockstep.engine.protocol.timeline import StepSpans
from lockstep.engine.rank.contract import ControllerLost, StepFailed
from lockstep.engine.rank.loop import RankLoop
from lockstep.engine.rank.sockets import RankSockets
from lockstep.parallel.recovery import ProcessSpent
from support.engine.rank.mock_controller import MockController
from support.launch.clusters import until


class NotingExecutor:
    """Notes what it is asked; fails in step ``fails_at``."""

    def __init__(self, fails_at: int = -1) -> None:
        self.notes: list[tuple[str, object]] = []
        self._fails_at = fails_at
        self.to_compile: dict[int, str] = {}
        self.may_compile = threading.Event()
        self.holds = threading.Event()  # steps stay under way
        self._done: deque[StepResult] = deque()

    def hello(self) -> RankHello:
        return RankHello(0, "here", 1, 16, 8, 1024, 2, 4, "cpu")

    def published(self) -> tuple[bytes, bytes]:
        return b"\1\0\0\0", bytes(16)

    def begin_epoch(self, epoch: int, vacant: tuple[int, ...]) -> None:
        self._done.clear()
        self.notes.append(("epoch", epoch))

    def end_epoch(self) -> None:
        self.notes.append(("end", None))

    def stage(self, staged: int, tokens_i32: bytes, grammar: str, num_emitted: int) -> bool:
        self.notes.append(("stage", staged))
        if grammar:
            self.to_compile[staged] = grammar
        return not grammar

    phases_entered = 0

    @property
    def compiling(self) -> bool:
        return bool(self.to_compile)

    def take_compiled(self) -> list[tuple[int, str]]:
        """Grammars are compiled once ``may_compile`` is set; one called "bad" cannot be."""
        if not self.may_compile.is_set():
            return []
        done = [(staged, "cannot" if grammar == "bad" else "") for staged, grammar in self.to_compile.items()]
        self.to_compile.clear()
        return done

    def unstage(self, staged: int) -> None:
        self.notes.append(("unstage", staged))

    def submit(self, plan: StepPlan) -> None:
        if plan.header.step == self._fails_at:
            raise RuntimeError("the pump is broken")
        self.notes.append(("step", plan.header.step))
        self._done.append(StepResult(0, plan.header.epoch, plan.header.step, 0))

    def take(self) -> StepResult | None:
        return self._done.popleft() if self._done and not self.holds.is_set() else None

    def take_spans(self) -> StepSpans | None:
        """Those of the last step that was noted."""
        return StepSpans(0, 0, self.notes[-1][1], 1.0, 2.0, "clock")  # type: ignore[arg-type]

    @property
    def steps(self) -> list[object]:
        return [value for name, value in self.notes if name == "step"]


class Running:
    """A RankLoop in a thread of its own, and how it ended."""

    def __init__(self, executor: NotingExecutor, sockets: RankSockets) -> None:
        self._sockets = sockets
        self._loop = RankLoop(0, executor, sockets)
        self._ended: list[object] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self, deadline: float = 30.0) -> object:
        """Waits for the end of ``run``. Gives its result or its exception."""
        self._thread.join(deadline)
        assert self._ended, f"the loop still runs after {deadline} s"
        return self._ended[0]

    @property
    def progress(self) -> tuple[int, int, int] | None:
        return self._loop.progress

    def _run(self) -> None:
        try:
            self._ended.append(self._loop.run())
        except Exception as error:
            self._ended.append(error)
        finally:
            self._sockets.close()


@pytest.fixture
def controller() -> Iterator[MockController]:
    controller = MockController()
    yield controller
    controller.close()


def _plan(step: int, predecessor: int | None = None, epoch: int = 0, rebase: bool = False) -> StepPlan:
    header = Header(0, epoch, step, step - 1 if predecessor is None else predecessor, 0, 4)
    return StepPlan(header, Section(rebase=rebase))


def test_the_chain_is_followed_and_its_breaks_are_not(controller: MockController) -> None:
    executor = NotingExecutor()
    running = Running(executor, RankSockets(controller.spec()))
    assert controller.receive("bulk") == executor.hello()

    controller.send(_plan(5, -1, rebase=True))
    controller.send(_plan(6))
    assert [controller.receive("step").step for _ in range(2)] == [5, 6]
    controller.send(_plan(6))
    controller.send(_plan(5, rebase=True))
    assert controller.silent("step"), "a duplicate was answered"
    controller.send(_plan(8))
    assert controller.receive("step") == Refused(0, 0, 0, 6, 8)
    controller.send(_plan(7))
    controller.send(_plan(8))
    assert [controller.receive("step").step for _ in range(2)] == [7, 8]

    controller.send(_plan(11, 10, rebase=True))  # a rebase needs no predecessor
    controller.send(_plan(12, epoch=1))  # another epoch without rebase
    assert controller.receive("step").step == 11
    assert controller.receive("step") == Refused(0, 1, 0, 11, 12)
    controller.send(_plan(13, -1, epoch=1, rebase=True))
    assert controller.receive("step").epoch == 1
    controller.send(_plan(14, epoch=0))
    assert controller.silent("step"), "a plan of a past epoch was answered"

    controller.send(Stop("enough"))
    assert running.end() == "enough"
    assert executor.steps == [5, 6, 7, 8, 11, 13]
    assert [value for name, value in executor.notes if name == "epoch"] == [0, 1]


def test_spans_follow_the_result_of_a_step_that_is_asked_about(controller: MockController) -> None:
    running = Running(NotingExecutor(), RankSockets(controller.spec()))
    controller.receive("bulk")
    asking = structs.replace(_plan(1).header, trace=True)
    for plan in (_plan(0, -1, rebase=True), StepPlan(asking, Section()), _plan(2)):
        controller.send(plan)
        assert controller.receive("step").step == plan.header.step
    assert controller.receive("bulk") == StepSpans(0, 0, 1, 1.0, 2.0, "clock")
    controller.send(Stop())
    running.end()
    assert controller.silent("bulk"), "no plan but the second asked"


def test_a_step_begins_while_others_are_under_way_and_results_keep_their_order(
    controller: MockController,
) -> None:
    executor = NotingExecutor()
    executor.holds.set()
    running = Running(executor, RankSockets(controller.spec()))
    controller.receive("bulk")
    for plan in (_plan(0, -1, rebase=True), _plan(1), _plan(2)):
        controller.send(plan)
    controller.send(Preload(5, b"\0" * 8))  # is taken meanwhile
    assert controller.receive("bulk") == Preloaded(0, 5)
    assert controller.silent("step"), "nothing is done"
    assert executor.steps == [0, 1, 2] and running.progress == (0, 0, 0)
    executor.holds.clear()
    assert [controller.receive("step").step for _ in range(3)] == [0, 1, 2]
    executor.holds.set()
    controller.send(_plan(3))
    controller.send(Disband(0))
    controller.send(_plan(4, -1, epoch=1, rebase=True))
    until(lambda: executor.steps[-1] == 4, "step 4 to begin")
    executor.holds.clear()
    assert controller.receive("step").step == 4, "nobody waits for step 3"
    controller.send(Stop())
    running.end()


def test_a_prompt_with_a_grammar_is_acknowledged_once_that_is_compiled(controller: MockController) -> None:
    executor = NotingExecutor()
    running = Running(executor, RankSockets(controller.spec()))
    controller.receive("bulk")
    controller.send(Preload(3, b"\0" * 8, "good", 1))
    controller.send(Preload(4, b"\0" * 8, "bad"))
    controller.send(Preload(5, b"\0" * 8))
    controller.send(_plan(0, -1, rebase=True))
    assert controller.receive("bulk") == Preloaded(0, 5), "a prompt without grammar waits for nobody's"
    assert controller.receive("step").step == 0, "nor does a step"
    executor.may_compile.set()
    answers = [controller.receive("bulk") for _ in range(2)]
    assert sorted(answers, key=lambda answer: answer.staged) == [Preloaded(0, 3), Preloaded(0, 4, "cannot")]
    controller.send(Stop(""))
    running.end()


def test_prompts_are_staged_before_plans_and_acknowledged(controller: MockController) -> None:
    executor = NotingExecutor()
    running = Running(executor, RankSockets(controller.spec()))
    controller.receive("bulk")
    controller.send(Preload(3, b"\0" * 4_000_000))
    controller.send(Unload(4))
    controller.send(Preload(5, b"\0" * 8))  # whose acknowledgement says that all before it was read
    assert [controller.receive("bulk") for _ in range(2)] == [Preloaded(0, 3), Preloaded(0, 5)]
    controller.send(_plan(0, -1, rebase=True))
    controller.receive("step")
    controller.send(Stop())
    assert running.end() == ""
    assert executor.notes == [("stage", 3), ("unstage", 4), ("stage", 5), ("epoch", 0), ("step", 0)]


def test_an_epoch_that_is_over_is_left_and_its_plans_are_ignored(controller: MockController) -> None:
    executor = NotingExecutor()
    running = Running(executor, RankSockets(controller.spec()))
    controller.receive("bulk")
    controller.send(_plan(0, -1, rebase=True))
    controller.receive("step")
    controller.send(Disband(0))
    controller.send(Preload(5, b"\0" * 8))  # whose acknowledgement says that all before it was read
    controller.receive("bulk")
    controller.send(_plan(1))
    controller.send(_plan(2, -1, epoch=1, rebase=True))
    assert controller.receive("step").step == 2
    controller.send(Disband(0))  # late
    controller.send(_plan(3, epoch=1))
    assert controller.receive("step").step == 3
    controller.send(Stop())
    running.end()
    names = [name for name, _ in executor.notes]
    assert names == ["epoch", "step", "end", "stage", "epoch", "step", "step"]


@pytest.mark.parametrize("told", [Disband(0), _plan(1, -1, epoch=1, rebase=True)])
def test_a_process_that_serves_one_epoch_ends_with_it(controller: MockController, told: object) -> None:
    """As itself, not as a step that failed: the launcher replaces it without a fault of its own."""
    executor = NotingExecutor()

    def end(*_: object) -> None:
        raise ProcessSpent("the epoch has ended")

    running = Running(executor, RankSockets(controller.spec()))
    controller.receive("bulk")
    controller.send(_plan(0, -1, rebase=True))
    controller.receive("step")
    executor.begin_epoch = executor.end_epoch = end  # type: ignore[method-assign]
    controller.send(told)
    assert isinstance(running.end(), ProcessSpent)


def test_a_failed_step_says_which_and_why(controller: MockController) -> None:
    running = Running(NotingExecutor(fails_at=1), RankSockets(controller.spec()))
    controller.receive("bulk")
    controller.send(_plan(0, -1, rebase=True))
    controller.receive("step")
    controller.send(_plan(1))
    error = running.end()
    assert isinstance(error, StepFailed) and str(error) == "epoch 0, step 1: RuntimeError: the pump is broken"


def test_a_controller_that_is_gone_is_missed(controller: MockController) -> None:
    running = Running(NotingExecutor(), RankSockets(controller.spec(), absence=1.0))
    controller.receive("bulk")
    start = time.monotonic()
    controller.unbind()
    error = running.end()
    assert isinstance(error, ControllerLost) and all(
        address in str(error) for address in controller.addresses.values()
    )
    assert 0.9 < time.monotonic() - start < 0.9 * ABSENCE_SECONDS, (
        "after its own time, however slow the machine, and not the usual one"
    )


def test_a_controller_that_never_answers_is_missed() -> None:
    nobody = MockController()
    spec = nobody.spec()
    nobody.close()
    assert isinstance(
        Running(NotingExecutor(), RankSockets(spec, absence=0.2, patience=1.0)).end(), ControllerLost
    )


def test_hello_is_said_when_plans_can_come(controller: MockController) -> None:
    """A plan for a rank that is known on bulk only would be thrown away."""
    address = controller.addresses["step"]
    controller.sockets["step"].unbind(address)
    executor = NotingExecutor()
    running = Running(executor, RankSockets(controller.spec()))
    assert controller.silent("bulk", 0.5)
    controller.sockets["step"].bind(address)
    assert controller.receive("bulk") == executor.hello()
    controller.send(_plan(0, -1, rebase=True))
    assert controller.receive("step").step == 0
    controller.send(Stop("enough"))
    assert running.end() == "enough"


@pytest.mark.parametrize("name", ["step", "bulk"])
def test_hello_is_said_again_when_one_of_the_connections_has_come_back(
    name: str, controller: MockController
) -> None:
    executor = NotingExecutor()
    running = Running(executor, RankSockets(controller.spec()))
    assert controller.receive("bulk") == executor.hello()
    controller.renew(name)
    assert controller.receive("bulk") == executor.hello(), "no epoch has begun, no page is written"
    controller.send(_plan(0, -1, rebase=True, epoch=3))
    assert controller.receive("step").step == 0
    controller.renew(name)
    assert controller.receive("bulk") == Published(0, *executor.published())
    assert controller.receive("bulk") == structs.replace(executor.hello(), epoch=3)
    assert executor.notes[-1] == ("end", None)
    controller.send(_plan(1, 0, epoch=3))  # it may overwrite pages that the rank has told of
    controller.send(_plan(0, -1, epoch=4, rebase=True))
    assert controller.receive("step").epoch == 4 and executor.steps == [0, 0]
    controller.send(Stop("enough"))
    assert running.end() == "enough"
