"""The ranks of a running group: losses, replacements, hangs, and the epochs that follow."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

from ..protocol.bulk import RankHello, StepProgress
from ..protocol.frontends import RankLost
from ..protocol.results import Abandoned, StepResult
from ..protocol.specs import ControllerSpec
from .hang_detector import STALLED_SECONDS, HangDetector
from .pilot import Pilot
from .status import ClusterStatus
from .survivors import Survivors

log = logging.getLogger(__name__)

RETURN_SECONDS = 0.25
"""Seconds in which nothing is sent to ranks after one has come back: a connection that is away
seldom is the only one, and each that comes back later would need an epoch of its own."""


class Membership:
    """Decides when an epoch begins and who takes part, and sets the status's phase while ranks are
    missing.

    ``lost`` ranks are not yet replaced. Nothing is sent to ranks until they are back, or until the
    survivors can go on without them. ``watch`` returns why the group cannot go on, empty while it
    can. Times are monotonic seconds.
    """

    def __init__(
        self, spec: ControllerSpec, hellos: Mapping[int, RankHello], pilot: Pilot, status: ClusterStatus
    ) -> None:
        self.lost_ranks: set[int] = set()
        self.survivors = Survivors(spec, hellos, status.experts, pilot)
        self._waits = False
        self._hung: set[int] = set()
        self._hellos = dict(sorted(hellos.items()))
        self._pilot, self._status = pilot, status
        self._detector = HangDetector(spec.collective_deadline, spec.rank_deadline)
        self._detector.cold.update(hellos)
        self._stalled = False
        self._rank_deadline = spec.rank_deadline
        self._back_by = math.inf
        self._resume_at = -math.inf

    def pause(self, now: float) -> float:
        """For how long from now nothing may be sent to ranks; infinity while some are missing."""
        return math.inf if self._waits else max(0.0, self._resume_at - now)

    def stood_still(self, seconds: float, now: float) -> None:
        """The controller stood still for so long: deadlines move on, silence counts from now."""
        self._back_by += seconds
        self._detector.stood_still(seconds)
        self._pilot.resume(now)

    @property
    def cold(self) -> set[int]:
        """Ranks that have answered no step since they joined."""
        return self._detector.cold

    def answered(self, results: Iterable[StepResult]) -> None:
        """Ranks have answered a step, so that they have compiled what it takes."""
        self._detector.cold.difference_update(result.rank for result in results)

    def progressed(self, message: StepProgress, now: float) -> None:
        """A rank is in a step that takes long."""
        self._detector.progressed(message.rank, (message.epoch, message.step, message.phases), now)

    def conditions(self) -> Iterable[tuple[RankHello, str]]:
        """Each rank's hello, and its condition: serving | lost | hung."""
        for rank, hello in self._hellos.items():
            yield hello, "lost" if rank in self.lost_ranks else "hung" if rank in self._hung else "serving"

    def lost(self, message: RankLost, now: float) -> None:
        """A rank is gone. Its requests keep their tokens and wait, for the survivors or for the
        replacement. The launcher may tell it twice, and of a process whose successor is here.
        """
        told = message.rank in self.lost_ranks
        if told or (message.pid and message.pid != self._hellos[message.rank].pid):
            return
        status, data = self._status, self._pilot.group.mesh.data_of_rank(message.rank)
        self.lost_ranks.add(message.rank)
        self._hung.discard(message.rank)
        reason = f"rank {message.rank} is lost: {message.reason}"
        if not self._waits and data in self.survivors.absent:
            log.error("%s; the others go on", reason)
            self._tell_absent()
            return
        status.reason = reason
        if status.phase not in ("serving", "recovering", "draining"):
            return
        log.error("%s; waiting for its replacement", status.reason)
        self._waits = True
        self._begin_epoch([data])
        if status.phase == "serving":
            status.phase = "recovering"
        self._back_by = now + self._rank_deadline
        self._settle(now)

    def replaced(self, hello: RankHello, now: float) -> None:
        """A replacement has said hello for a lost rank. The group goes on after the last one that
        it waits for; one that it went on without joins in the next epoch. The pool of its data
        index has no more pages than it.
        """
        group = self._pilot.group
        data = group.mesh.data_of_rank(hello.rank)
        pages = int(group.kv.num_pages[data])
        if hello.num_pages < pages:
            log.warning("rank %d came back with %d pages, it had %d", hello.rank, hello.num_pages, pages)
            self._pilot.shrink(data, hello.num_pages)
        self._hellos[hello.rank] = hello
        self._detector.cold.add(hello.rank)
        self.lost_ranks.discard(hello.rank)
        self._settle(now)

    def _settle(self, now: float) -> None:
        """Goes on with the ranks that are here, if they have every expert or can load it."""
        if self.survivors.prepare(self.lost_ranks) and not self.survivors.loading:
            self._go_on(now)

    def _go_on(self, now: float) -> None:
        status, group = self._status, self._pilot.group
        if self.survivors.go_on(self.lost_ranks):
            self._begin_epoch([])
        self._waits = False
        who = f"all ranks but {sorted(self.lost_ranks)}" if self.lost_ranks else "all ranks"
        log.info("%s are here; epoch %d goes on", who, group.steps.epoch)
        if status.phase == "recovering":
            status.phase = "serving"
        status.reason = ""
        self._tell_absent()
        self._back_by = math.inf
        self._pilot.resume(now)

    def _tell_absent(self) -> None:
        """Health names the ranks without which the others serve."""
        names = ", ".join(f"rank {rank} on {self._hellos[rank].host}" for rank in sorted(self.lost_ranks))
        serving = self._pilot.group.mesh.data - len(self.survivors.absent)
        of = f"{serving} of {self._pilot.group.mesh.data} data indices serve"
        self._status.without = f"{names} lost; {of} until it is replaced" if names else ""

    def returned(self, hello: RankHello, now: float) -> None:
        """A rank that is not lost says hello. It has loaded experts of a lost one; or its
        connection was away, so that messages may be lost: a new epoch begins. Another process is a
        replacement whose loss was not reported: it is lost until ``replaced``.
        """
        known = self._hellos[hello.rank]
        if (hello.host, hello.pid, hello.life) != (known.host, known.pid, known.life):
            self.lost(RankLost(hello.rank, "another process has taken its place"), now)
            return
        if hello.rank in self.survivors.loading:
            self.survivors.loaded(hello)
            if self._waits:
                self._settle(now)
        elif self._status.phase in ("serving", "recovering", "draining"):
            if self.pause(now) == 0.0:
                epoch = self._pilot.group.steps.epoch + 1
                log.warning("rank %d was away, messages may be lost: epoch %d begins", hello.rank, epoch)
                self._begin_epoch([])
            self._resume_at = now + RETURN_SECONDS

    def abandoned(self, message: Abandoned, now: float) -> None:
        """A rank is alive but could not finish its step, because a peer did not answer."""
        if message.epoch == self._pilot.group.steps.epoch:
            log.warning("rank %d abandoned step %d: %s", message.rank, message.step, message.reason)
            self._detector.abandoned(message.rank, now)

    def watch(self, now: float) -> str:
        """Finds hung ranks; the launcher reads of them in the state and kills them."""
        if self._waits:
            if now <= self._back_by:
                return ""
            lost, loading, seconds = sorted(self.lost_ranks), self.survivors.loading, self._rank_deadline
            wait = f"ranks {sorted(loading)} have not loaded their experts" if loading else "no replacement"
            return f"{self._status.reason}; {wait} for ranks {lost} within {seconds:.0f} s"
        group = self._pilot.group
        behind = group.steps.behind()
        if not behind:
            self._pilot.all_answered(now)
        if not self._hung:
            self._judge(now, behind)
            return ""
        if self._pilot.silent_for(now) <= self._rank_deadline:
            return ""
        return f"ranks {sorted(self._hung)} hang and have not been replaced"

    def _judge(self, now: float, behind: list[int]) -> None:
        group = self._pilot.group
        silent_for = self._pilot.silent_for(now)
        judgement = self._detector.judge(now, behind, silent_for, group.predicted_seconds())
        self._tell_stalled(judgement.stalled)
        if judgement.regroup:
            log.error("every rank has abandoned its step")
            self._begin_epoch([])
        for rank in judgement.hung:
            step, host = int(group.steps.acknowledged[rank]) + 1, self._hellos[rank].host
            log.error("rank %d on %s hangs in step %d: it has to be replaced", rank, host, step)
            self._hung.add(rank)
            self._status.reason = f"rank {rank} hangs in step {step}"

    def _tell_stalled(self, ranks: tuple[int, ...]) -> None:
        """Health tells of ranks that stand still, and when they move again."""
        status = self._status
        if ranks and status.phase == "serving":
            names = ", ".join(f"rank {rank} on {self._hellos[rank].host}" for rank in ranks)
            self._stalled, status.phase = True, "recovering"
            status.reason = f"{names} stood still for {STALLED_SECONDS:g} s in the middle of a step"
            log.warning("%s", status.reason)
        elif self._stalled and not ranks:
            self._stalled = False
            if status.phase == "recovering" and not self._waits:
                status.phase, status.reason = "serving", ""

    def _begin_epoch(self, emptied: list[int]) -> None:
        self._pilot.begin_epoch(self.survivors.absent, emptied)
        log.info("epoch %d begins", self._pilot.group.steps.epoch)
        self._detector.reset()
