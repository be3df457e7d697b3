"""What the frontends are told: tokens of a step gathered per frontend, and single messages."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .slots import Int32, Int64
from .types import Finish, HandleLogprobs, Message, Rejected, Started, TokenBatch


@dataclass(frozen=True)
class Entries:
    """Token entries of one ingestion: all vectors [n], tokens ragged over counts."""

    frontend: Int64
    handle: Int64
    position: Int64
    count: Int64
    finish: Int64
    tokens: Int32


@dataclass
class Outbox:
    """Collects entries until ``take`` packs them: one ``TokenBatch`` per frontend."""

    entries: list[Entries] = field(default_factory=list)
    logprobs: dict[int, list[HandleLogprobs]] = field(default_factory=dict)
    started: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)
    single: list[tuple[int, Message]] = field(default_factory=list)

    def end(self, frontend: int, handle: int, position: int, finish: Finish) -> None:
        """A request ends without a further token."""
        one = [np.array([value], np.int64) for value in (frontend, handle, position, 0, int(finish))]
        self.entries.append(Entries(one[0], one[1], one[2], one[3], one[4], np.zeros(0, np.int32)))

    def reject(self, frontend: int, rejected: Rejected) -> None:
        self.single.append((frontend, rejected))

    def take(self, step: int) -> list[tuple[int, Message]]:
        """Everything since the last call as (frontend, message), starts before tokens."""
        messages = self.single
        for frontend, starts in self.started.items():
            handles, cached, data = (np.array(column) for column in zip(*starts, strict=True))
            messages.append(
                (frontend, Started(handles.astype(np.int64).tobytes(), cached.astype(np.int32).tobytes(), data.astype(np.int32).tobytes()))
            )
        messages.extend(self._batches(step))
        self.entries, self.logprobs, self.started, self.single = [], {}, {}, []
        return messages

    def _batches(self, step: int) -> list[tuple[int, Message]]:
        if not self.entries:
            return []
        frontend = np.concatenate([entry.frontend for entry in self.entries])
        handle = np.concatenate([entry.handle for entry in self.entries])
        position = np.concatenate([entry.position for entry in self.entries])
        count = np.concatenate([entry.count for entry in self.entries])
        finish = np.concatenate([entry.finish for entry in self.entries])
        tokens = np.concatenate([entry.tokens for entry in self.entries])
        ends = np.cumsum(count)
        batches: list[tuple[int, Message]] = []
        for name in np.flatnonzero(np.bincount(frontend)).tolist():
            mine = np.flatnonzero(frontend == name)
            counts = count[mine]
            if len(mine) == len(frontend):
                own_tokens = tokens
            elif int(count.min()) == 1 and int(count.max()) == 1:
                own_tokens = tokens[mine]
            else:
                starts = np.repeat(ends[mine] - counts, counts)
                within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
                own_tokens = tokens[starts + within]
            batch = TokenBatch(
                step=step,
                handles_i64=handle[mine].tobytes(),
                positions_i32=position[mine].astype(np.int32).tobytes(),
                counts_i32=counts.astype(np.int32).tobytes(),
                tokens_i32=own_tokens.tobytes(),
                finish_u8=finish[mine].astype(np.uint8).tobytes(),
                logprobs=tuple(self.logprobs.get(name, ())),
            )
            batches.append((name, batch))
        return batches
