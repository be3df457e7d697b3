"""Rows on their way out: retired by a plan, reused when no result can name them any more."""

from __future__ import annotations

from collections.abc import Collection

from .rows import RowTable
from .step_sequence import StepSequence


class Draining:
    """Retired rows. The next plan frees a row's slot; the row has *drained* once the last result
    that counts for it is in.
    """

    def __init__(self, rows: RowTable, steps: StepSequence) -> None:
        self._rows, self._steps = rows, steps
        self._freeing: list[int] = []
        self._draining: list[tuple[int, int]] = []  # (row, the last step whose result counts)
        self._drained: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._draining or self._drained)

    def retire(self, row: int, last_step: int) -> None:
        """Takes a row out of all plans after ``last_step``; results up to that still count."""
        self._rows.retire(row)
        self._freeing.append(row)
        self._draining.append((row, last_step))

    def drain(self, data: Collection[int]) -> None:
        """Finds the rows of ``data`` that have drained."""
        left: list[tuple[int, int]] = []
        for row, last in self._draining:
            index = self._rows.data(row)
            if index in data and self._steps.reported(index) >= last:
                self._drained.append(row)
            else:
                left.append((row, last))
        self._draining = left

    def set_back(self, data: int) -> None:
        """Every row that plans have named on ``data`` has drained: none of its results counts, and
        its slot is cleared rather than freed.
        """
        mine = self._rows.of_data(data)
        self._freeing = [row for row in self._freeing if row not in mine]
        self._draining = [(row, last) for row, last in self._draining if row not in mine]
        self._drained = [row for row in self._drained if row not in mine]
        self._drained += self._rows.named_on(data)

    def take_freeing(self) -> list[int]:
        """Rows whose slots the next plan frees."""
        freeing, self._freeing = self._freeing, []
        return freeing

    def take_drained(self) -> list[int]:
        """Rows that have drained since the last call."""
        drained, self._drained = self._drained, []
        return drained
