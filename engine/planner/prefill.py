"""The prompt tokens that a step computes beside its decoding rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..protocol.arrays import Int64, as_keys, ragged
from ..protocol.message import HASH_BYTES
from ..protocol.plan import Admit
from .group import Group
from .request import State

_SCORE_BYTES = 12 << 10
"""Log-probabilities of prompts that one result may hold: the step socket carries at most 16 kB per
rank and step."""


@dataclass(frozen=True)
class DecodeLoad:
    """The decoding rows of each data index [D], and the KV tokens that they read [D]."""

    rows: Int64
    kv: Int64


@dataclass(frozen=True)
class PromptChunks:
    """The prompt chunks of one step, data-major and in the order of each queue.

    data, rows, starts, counts [n]: data index and row of each, its first position and its tokens.
    sampled [k], sampled_data [k]: rows whose prompt ends here, so that they sample. ``admits``: the
    rows of each data index that come with their first chunk.
    """

    data: Int64
    rows: Int64
    starts: Int64
    counts: Int64
    sampled: Int64
    sampled_data: Int64
    admits: dict[int, list[Admit]]


class Prefill:
    """Advances prompts."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def advance(self, cohort: int, load: DecodeLoad) -> PromptChunks | None:
        """Gives every data index its share of prompt tokens; rows that reach the end of their
        prompt start to decode.

        Returns None when no prompt waits. A prompt that waits while decoding rows use up the step
        has no chunk.
        """
        group = self._group
        chunks: list[tuple[int, int, int, int]] = []  # data, row, start, count
        seconds: float | None = None
        for data, waiting in group.prefilling.waiting(cohort):
            if seconds is None:
                seconds = self._seconds(load)
            budget = self._budget(data, load, waiting[0], seconds)
            chunks += [(data, *chunk) for chunk in self._share(waiting, budget)]
        return None if seconds is None else self._take(np.array(chunks, np.int64).reshape(-1, 4))

    def _seconds(self, load: DecodeLoad) -> float:
        """Bound on the seconds of this step, infinity without one.

        If rows decode, it is the inter-token target. Prompts still get their share of the time if
        decoding alone takes about as long or longer.
        """
        spec = self._group.spec
        seconds = spec.step_time_limit or math.inf
        if load.rows.any():
            seconds = min(seconds, spec.inter_token_target)
            if spec.prompt_share:
                slowest = self._group.cost.slowest(load.rows, load.kv)
                seconds = max(seconds, slowest / (1 - spec.prompt_share))
        return seconds

    def _budget(self, data: int, load: DecodeLoad, first: int, seconds: float) -> int:
        """Prompt tokens that ``data`` may compute in a step of ``seconds``; its ``first`` row waits
        longest. At least a page, so that every prompt ends.
        """
        group, rows = self._group, int(load.rows[data])
        budget = group.spec.max_batch_tokens - rows
        if group.cost.trusted is not None:
            budget = min(budget, max(group.cost.trusted - rows, group.page_size))
        if math.isinf(seconds):
            return budget
        fits = group.cost.prefill_tokens_within(
            seconds, rows, float(load.kv[data]), int(group.rows.sent[first])
        )
        return min(budget, max(fits, group.page_size))

    def _share(self, waiting: list[int], budget: int) -> Iterator[tuple[int, int, int]]:
        """Chunks (row, start, count) of the first prompts that wait, ``budget`` tokens together.
        Rows that report log-probabilities of their prompts advance only as far as one result can
        hold these.
        """
        rows, room = self._group.rows, _SCORE_BYTES
        for row in waiting:
            if budget <= 0:
                return
            start = int(rows.sent[row])
            each = int(rows.score_bytes[row])
            count = min(int(rows.prompt[row]) - start, budget, room // each if each else budget)
            if count:
                yield row, start, count
                budget -= count
                room -= count * each

    def _take(self, chunks: Int64) -> PromptChunks:
        """Moves rows past their chunks [n, (data, row, start, count)]."""
        group, rows = self._group, self._group.rows
        data, row, start, count = chunks.T
        end = start + count
        new = rows.state[row] == State.READY
        admits = self._admit(data[new], row[new])
        self._mark_written(data, row, start, end)
        last = rows.extend(row, end)
        for index in row[last].tolist():
            group.prefilling.discard(index)
        return PromptChunks(data, row, start, count, row[last], data[last], admits)

    def _admit(self, data: Int64, row: Int64) -> dict[int, list[Admit]]:
        """Admits rows [n] of data [n]."""
        group, rows = self._group, self._group.rows
        admits: dict[int, list[Admit]] = {}
        rows.admit(row)
        counts, pages = rows.read_pages(row)
        pages_i32 = group.kv.local(pages).astype(np.int32).tobytes()
        ends = (4 * counts.cumsum()).tolist()
        columns = data.tolist(), row.tolist(), rows.sent[row].tolist(), [0, *ends][:-1], ends
        for owner, index, cached, start, end in zip(*columns, strict=True):
            request = rows.request(index)
            group.preloads.admitted(request)
            admit = Admit(
                slot=rows.slot(index),
                staged=request.staged,
                num_cached=cached,
                num_emitted=request.num_emitted,
                limit=request.limit,
                pages_i32=pages_i32[start:end],
                sampling=request.sampling,
            )
            admits.setdefault(owner, []).append(admit)
        return admits

    def _mark_written(self, data: Int64, row: Int64, start: Int64, end: Int64) -> None:
        """Lets later plans of a rank read the blocks that its chunks [start, end) [n] complete."""
        group, rows = self._group, self._group.rows
        first, behind = start // group.page_size, end // group.page_size
        owners, index = ragged(behind - first)
        pages = rows.pages[row[owners], first[owners] + index]
        group.kv.mark_written(pages, group.steps.next_step)
        hashes = [rows.request(own).hashes_h128 for own in row.tolist()]
        spans = zip(hashes, first.tolist(), behind.tolist(), strict=True)
        keys = as_keys(b"".join([own[HASH_BYTES * begin : HASH_BYTES * stop] for own, begin, stop in spans]))
        num_hashes = np.array([len(own) // HASH_BYTES for own in hashes], np.int64)
        hashed = index + first[owners] < num_hashes[owners]
        owners, index, pages = owners[hashed], index[hashed], pages[hashed]
        group.publishing.add(data[owners], keys, pages)
        if group.changes is not None and len(owners):
            named = group.kv.index.names(data[owners], keys, pages).nonzero()[0]
            requests = [rows.request(own) for own in row.tolist()]
            group.changes.stored(requests, owners[named], (first[owners] + index)[named])
