"""The rows that wait to compute their prompts."""

from __future__ import annotations

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
        return any(self._in_turn(row, cohort) for queue in self._queues for row in queue)

    def waiting(self, data: int, cohort: int) -> list[int]:
        """The rows of ``data`` and ``cohort`` that are not held."""
        return [row for row in self._queues[data] if self._in_turn(row, cohort)]

    def _in_turn(self, row: int, cohort: int) -> bool:
        return bool(self._rows.cohort[row] == cohort and not self._rows.held[row])
