"""The (epoch, step) sequence of a group: plans sent, and the last one each rank acknowledged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...parallel.mesh import Mesh
from ..protocol.arrays import Int64
from ..protocol.results import StepResult
from .flight import Flight


class StepSequence:
    """Positions in the sequence of plans.

    ``acknowledged`` [rank] is the last step whose result is in; ``newest_result`` is the largest.
    ``alive`` [D] are the data indices that take part; ``vacant`` as in ``Header``. ``rebasing`` [D]
    are those whose next section clears them: until it is sent, their results do not count.
    """

    def __init__(self, mesh: Mesh, epoch: int) -> None:
        self._mesh = mesh
        self.epoch = epoch
        self.next_step = 0
        self.newest_result = -1
        self.acknowledged = [-1] * mesh.world
        self.flights: dict[int, Flight] = {}
        self.alive = np.ones(mesh.data, np.bool_)
        self.rebasing = np.ones(mesh.data, np.bool_)
        self._heard = [False] * mesh.world  # ranks of data indices that live and are not set back
        self.vacant: tuple[int, ...] = ()
        self._restarting = True

    # ----------------------------------------------------------------- questions

    @property
    def last_step(self) -> int:
        """The last step sent."""
        return self.next_step - 1

    @property
    def in_flight(self) -> int:
        """Plans without any result."""
        return self.last_step - self.newest_result

    @property
    def predecessor(self) -> int:
        """The step that the next plan follows: -1 for the first one of an epoch."""
        return -1 if self._restarting else self.last_step

    def living(self) -> list[int]:
        """The data indices that take part."""
        living: list[int] = self.alive.nonzero()[0].tolist()
        return living

    def absent(self) -> list[int]:
        """The data indices that take no part in this epoch."""
        absent: list[int] = np.flatnonzero(~self.alive).tolist()
        return absent

    def behind(self) -> list[int]:
        """The ranks that owe a result."""
        return [
            rank
            for rank, step in enumerate(self.acknowledged)
            if step < self.last_step and self.alive[self._mesh.data_of_rank(rank)]
        ]

    def executed(self, data: int) -> int:
        """The last step that all members of ``data`` have acknowledged."""
        return min(self.acknowledged[rank] for rank in self._mesh.members(data))

    def reported(self, data: int) -> int:
        """The last step whose tokens of ``data`` are in."""
        return self.acknowledged[self._mesh.reporter(data)]

    def planned_after(self, step: int, num_rows: int) -> Int64:
        """The number of plans in flight after ``step`` that let each row decode [rows]."""
        later = [flight.rows[flight.decode] for flight in self.flights.values() if flight.step > step]
        if not later:
            return np.zeros(num_rows, np.int64)
        return np.bincount(np.concatenate(later), minlength=num_rows)

    # ----------------------------------------------------------------- plans and results

    def sent(self, flight: Flight) -> None:
        """Appends the plan that was just sent."""
        self.flights[flight.step] = flight
        self.next_step += 1
        self._restarting = False

    def counts(self, result: StepResult) -> bool:
        """Whether a result is new and belongs to a plan in flight; a data index that is set back or
        has left gives none.
        """
        rank, step = result.rank, result.step
        return (
            result.epoch == self.epoch
            and self._heard[rank]
            and step > self.acknowledged[rank]
            and step in self.flights
        )

    def follows(self, result: StepResult) -> bool:
        """Whether this result is the next one of its rank."""
        return result.step == self.acknowledged[result.rank] + 1

    def acknowledge(self, result: StepResult) -> None:
        self.acknowledged[result.rank] = result.step

    def first_result(self, step: int) -> None:
        """Notes the newest step with a result."""
        self.newest_result = max(self.newest_result, step)

    def land(self) -> None:
        """Drops the flights that every living data index has acknowledged."""
        if self.alive.all():
            oldest = min(self.acknowledged)
        else:
            oldest = min(map(self.executed, self.living()), default=self.next_step)
        for step in [step for step in self.flights if step <= oldest]:
            del self.flights[step]

    # ----------------------------------------------------------------- setting back

    def begin_epoch(self) -> None:
        """Starts a new epoch: earlier plans have no successor."""
        self.epoch += 1
        self._restarting = True

    def attend(self, absent: Sequence[int]) -> None:
        """Lets all data indices except ``absent`` take part from the next plan on, which clears
        those that come back.
        """
        self.alive[:] = True
        self.alive[list(absent)] = False
        self.rebasing[list(absent)] = True
        self._listen()
        self.vacant = self._mesh.positions(absent)

    def set_back(self, data: int) -> None:
        """Marks ``data`` for clearing by its next section; results of earlier plans no longer
        count.
        """
        self.rebasing[data] = True
        self._listen()
        self._assume_executed(data)
        if self.rebasing[self.alive].all():
            self.flights.clear()
            self.newest_result = self.last_step

    def rebased(self) -> None:
        """Books that a plan has cleared every data index that was set back."""
        if not self.rebasing.any():
            return
        for data in np.flatnonzero(self.rebasing & self.alive).tolist():
            self._assume_executed(data)
        self.rebasing[self.alive] = False
        self._listen()

    def _listen(self) -> None:
        """Notes whose results count."""
        heard = (self.alive & ~self.rebasing).tolist()
        self._heard = [heard[self._mesh.data_of_rank(rank)] for rank in range(self._mesh.world)]

    def _assume_executed(self, data: int) -> None:
        for rank in self._mesh.members(data):
            self.acknowledged[rank] = self.last_step
