"""The rows that wait to compute their prompts."""

from __future__ import annotations

from collections.abc import Iterator

from .rows import RowTable


class PrefillQueues:
    """Rows in prefill per data index, in the order in which their prompts arrived."""

    def __init__(self, rows: RowTable) -> None:
        self._rows = rows
        self._queues: list[list[int]] = [[] for _ in range(rows.num_data)]

    def __bool__(self) -> bool:
        return any(self._queues)

    def add(self, row: int) -> None:
        self._queues[self._rows.data(row)].append(row)

    def discard(self, row: int) -> None:
        queue = self._queues[self._rows.data(row)]
        if row in queue:
            queue.remove(row)

    def clear(self, data: int) -> None:
        self._queues[data].clear()

    def has_work(self, cohort: int) -> bool:
        """Whether some row of ``cohort`` waits and is not held."""
        return next(self.waiting(cohort), None) is not None

    def waiting(self, cohort: int) -> Iterator[tuple[int, list[int]]]:
        """Data indices with rows of ``cohort`` that wait and are not held, and those rows."""
        cohorts, held = self._rows.cohort, self._rows.held
        for data, queue in enumerate(self._queues):
            rows = queue and [row for row in queue if cohorts[row] == cohort and not held[row]]
            if rows:
                yield data, rows
