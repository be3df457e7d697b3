"""One group's planner, its pacer and its recording. The controller and the simulation share it.

A turn books results, plans when a plan is due, takes in events, and follows up. Every call that
changes the planner is recorded here, so that no caller can forget to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ..planner.group import Group
from ..planner.group_plan import GroupPlan
from ..planner.index_changes import Change
from ..planner.planner import Planner
from ..planner.settings import Settings
from ..protocol.bulk import Preload, Preloaded, Unload
from ..protocol.frontends import Abort, Submit
from ..protocol.message import Message
from ..protocol.plan import Transfer
from ..protocol.results import Refused, StepResult
from ..recording.recorder import Recorder
from .pacer import Pacer


class Pilot:
    """Runs one group's planner; times are seconds of one monotonic clock.

    ``planner`` and ``group`` are there to be read: changes go through the pilot's methods.
    ``recording`` is the file to record to, None for no recording. ``tell`` hears the changes of
    the block index in each turn that has some, if ``settings.tell_changes``.
    """

    def __init__(
        self,
        settings: Settings,
        recording: str | None = None,
        tell: Callable[[list[Change]], None] | None = None,
    ) -> None:
        self.planner = Planner(settings)
        self.group: Group = self.planner.group
        self._pacer = Pacer(enabled=settings.spec.pacing)
        self._tell = tell
        self._recording = recording
        self._recorder = None if recording is None else Recorder(Path(recording), settings)

    # ----------------------------------------------------------------- steps

    def book(self, results: list[StepResult], now: float, step_seconds: float) -> None:
        """Takes in results of ranks; the steps in flight are paced as if each took
        ``step_seconds``. Raises StateMismatch when a rank's state differs from the planner's.
        """
        before = self.group.steps.newest_result
        self._record("results", results)
        self.planner.results(results)
        if self.group.steps.newest_result > before:
            self._pacer.first_result(now, self.group.steps.in_flight, step_seconds)

    def wait(self, now: float) -> float:
        """Seconds until a plan is due; infinity when only an event can bring one."""
        return self._pacer.wait(now) if self.planner.wants_plan else math.inf

    def due(self, now: float) -> bool:
        """Whether ``plan`` should be called now."""
        return self.planner.wants_plan and self._pacer.due(now)

    def plan(self, now: float) -> GroupPlan | None:
        """The next plan, to be sent at once; None when there is no work."""
        plan = self.planner.plan()
        if self._recorder is not None:
            self._recorder.plan(plan)
        if plan is None:
            self._pacer.nothing_to_do()
        else:
            self._pacer.sent(now)
        return plan

    def follow_up(self) -> tuple[list[tuple[int, Preload | Unload]], list[tuple[int, Message]]]:
        """Does what can wait until the plan is out: settling and admission.

        Returns messages for ranks and for frontends, as (rank, message) and (frontend, message).
        """
        self._record("tidy")
        self.planner.tidy()
        return self.planner.take_staging(), self.take_output()

    def take_output(self) -> list[tuple[int, Message]]:
        """Messages for frontends since the last call, as (frontend, message)."""
        if self._tell is not None and (changes := self.planner.take_changes()):
            self._tell(changes)
        return self.planner.take_output()

    # ----------------------------------------------------------------- events

    def submit(self, frontend: int, message: Submit) -> None:
        """Queues or rejects a request."""
        self._record("submit", frontend, message)
        self.planner.submit(frontend, message)
        self._pacer.work_arrived()

    def continues(self, frontend: int, message: Submit) -> bool:
        """Whether a request is open or had begun before its frontend submits it (again)."""
        return bool(message.emitted_i32) or (frontend, message.handle) in self.group.open

    def move_experts(self, moves: list[Transfer]) -> None:
        """Later plans start and commit these moves."""
        self._record("move_experts", moves)
        self.planner.move_experts(moves)

    def place_experts(self, version: int) -> None:
        """Ranks have loaded another placement, between two epochs."""
        self._record("place_experts", version)
        self.planner.place_experts(version)

    def shrink(self, data: int, num_pages: int) -> None:
        """A new rank of ``data`` has a smaller pool."""
        self._record("shrink", data, num_pages)
        self.planner.shrink(data, num_pages)

    def adopt(self, data: int, pages_i32: bytes, hashes_h128: bytes) -> None:
        """Ranks of ``data`` hold blocks since an earlier controller."""
        self._record("adopt", data, pages_i32, hashes_h128)
        self.planner.adopt(data, pages_i32, hashes_h128)

    def abort(self, frontend: int, message: Abort) -> None:
        """Aborts one request."""
        self._record("abort", frontend, message)
        self.planner.abort(frontend, message)

    def abort_frontend(self, frontend: int) -> None:
        """Aborts all requests of a frontend."""
        self._record("abort_frontend", frontend)
        self.planner.abort_frontend(frontend)

    def staged(self, message: Preloaded) -> None:
        """A rank holds a prompt."""
        self._record("staged", message)
        self.planner.staged(message)
        self._pacer.work_arrived()

    def refused(self, message: Refused) -> None:
        """Handles a rank's refusal of a plan that does not follow its predecessor."""
        self._record("refused", message)
        self.planner.refused(message)

    def begin_epoch(self, absent: Sequence[int], emptied: Sequence[int] = ()) -> None:
        """Starts a new epoch without the data indices ``absent``; those ``emptied`` have lost their
        pages.
        """
        self._record("begin_epoch", absent, emptied)
        self.planner.begin_epoch(absent=absent, emptied=emptied)
        self._pacer.work_arrived()

    def fail_all(self) -> None:
        """Ends every open request with an error."""
        self._record("fail_all")
        self.planner.fail_all()

    # ----------------------------------------------------------------- silence

    def all_answered(self, now: float) -> None:
        """No rank owes a result."""
        self._pacer.all_answered(now)

    def resume(self, now: float) -> None:
        """All ranks are back: silence counts from now, and a plan may leave at once."""
        self._pacer.all_answered(now)
        self._pacer.work_arrived()

    def silent_for(self, now: float) -> float:
        """Seconds without a first result while some were owed."""
        return self._pacer.silent_for(now)

    # ----------------------------------------------------------------- the recording

    def flush_recording(self) -> str:
        """Writes the recording to disk. Says once when the disk has ended it; otherwise empty."""
        if self._recorder is None:
            return ""
        self._recorder.flush()
        failure = self._recorder.failure
        if not failure:
            return ""
        self.close()
        return f"the recording to {self._recording} has ended: {failure}"

    def close(self) -> None:
        """Ends the recording."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def _record(self, name: str, *arguments: object) -> None:
        if self._recorder is not None:
            self._recorder.event(name, *arguments)
