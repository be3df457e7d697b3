"""Messages for frontends: tokens gathered per frontend, and single messages."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..protocol.arrays import Int32, Int64
from ..protocol.frontends import HandleLogprobs, Rejected, Started, TokenBatch
from ..protocol.message import Finish, Message
from ..protocol.results import PromptLogprobs


@dataclass(frozen=True)
class Entries:
    """Token entries of one batch of results: vectors [n], tokens ragged over counts."""

    frontend: NDArray[np.integer[Any]]
    handle: Int64
    position: Int64
    count: Int64
    finish: Int64
    tokens: Int32


class Start(NamedTuple):
    """A request runs, for the first time or again; see ``Started``."""

    handle: int
    num_cached: int
    data: int
    preemptions: int
    epoch: int


@dataclass
class Outbox:
    """Collects entries until ``take`` packs them: one ``TokenBatch`` per frontend."""

    entries: list[Entries] = field(default_factory=list)
    logprobs: dict[int, list[HandleLogprobs]] = field(default_factory=dict)
    started: dict[int, list[Start]] = field(default_factory=dict)
    single: list[tuple[int, Message]] = field(default_factory=list)

    def start(self, frontend: int, start: Start) -> None:
        """Reports that a plan has admitted a request."""
        self.started.setdefault(frontend, []).append(start)

    def end(self, frontend: int, handle: int, position: int, finish: Finish) -> None:
        """Reports the end of a request without a further token."""
        one = [np.array([value], np.int64) for value in (frontend, handle, position, 0, int(finish))]
        self.entries.append(Entries(one[0], one[1], one[2], one[3], one[4], np.zeros(0, np.int32)))

    def prompt_logprobs(self, frontend: int, logprobs: PromptLogprobs) -> None:
        """Log-probabilities of a prompt, sent before the tokens of the same step."""
        self.single.append((frontend, logprobs))

    def reject(self, frontend: int, rejected: Rejected) -> None:
        self.single.append((frontend, rejected))

    def take(self, step: int) -> list[tuple[int, Message]]:
        """Everything since the last call as (frontend, message), starts before tokens."""
        messages = self.single
        for frontend, starts in self.started.items():
            handles, *columns = zip(*starts, strict=True)
            packed = [np.array(column, np.int32).tobytes() for column in columns]
            messages.append((frontend, Started(np.array(handles, np.int64).tobytes(), *packed)))
        messages.extend(self._batches(step))
        self.entries, self.logprobs, self.started, self.single = [], {}, {}, []
        return messages

    def _batches(self, step: int) -> list[tuple[int, Message]]:
        """One ``TokenBatch`` per frontend that has entries."""
        if not self.entries:
            return []
        entries = self.entries[0] if len(self.entries) == 1 else _joined(self.entries)
        names = np.bincount(entries.frontend).nonzero()[0].tolist()
        if len(names) == 1:
            return [(names[0], self._batch(step, names[0], entries))]
        return [(name, self._batch(step, name, _entries_for(entries, name))) for name in names]

    def _batch(self, step: int, frontend: int, entries: Entries) -> TokenBatch:
        return TokenBatch(
            step=step,
            handles_i64=entries.handle.tobytes(),
            positions_i32=entries.position.astype(np.int32).tobytes(),
            counts_i32=entries.count.astype(np.int32).tobytes(),
            tokens_i32=entries.tokens.tobytes(),
            finish_u8=entries.finish.astype(np.uint8).tobytes(),
            logprobs=tuple(self.logprobs.get(frontend, ())),
        )


def _joined(entries: list[Entries]) -> Entries:
    return Entries(
        *(np.concatenate([getattr(part, field.name) for part in entries]) for field in fields(Entries))
    )


def _entries_for(entries: Entries, frontend: int) -> Entries:
    mine = np.flatnonzero(entries.frontend == frontend)
    counts = entries.count[mine]
    if (entries.count == 1).all():
        tokens = entries.tokens[mine]
    else:
        starts = np.repeat(np.cumsum(entries.count)[mine] - counts, counts)
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        tokens = entries.tokens[starts + within]
    return Entries(
        entries.frontend[mine],
        entries.handle[mine],
        entries.position[mine],
        counts,
        entries.finish[mine],
        tokens,
    )
