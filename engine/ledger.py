"""The ledger of results: tokens into the log, ends recognised, rows and pages given back.

Only here do sampled tokens become facts. A result is read against the frozen row list of its plan; results that are late, repeated or
of an older epoch change nothing, and a gap sets the data index back to what is acknowledged.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .group import Flight, Group
from .kv.block_index import UInt64, as_keys
from .kv.hashing import chain_hashes
from .outbox import Entries, Outbox
from .requests import Request, State
from .slots import Int32, Int64, add64, length_terms
from .types import HASH_BYTES, Finish, HandleLogprobs, StepResult

_NONE, _STOP, _LENGTH = int(Finish.NONE), int(Finish.STOP), int(Finish.LENGTH)  # members of an enumeration are slow to find

_T = TypeVar("_T", bound=np.generic)


class StateMismatch(AssertionError):
    """A rank's checksum differs from the planner's: one of the two has a bug."""


class Ledger:
    """Books results into a group."""

    def __init__(self, group: Group, outbox: Outbox) -> None:
        self._group = group
        self._outbox = outbox

    def book(self, results: list[StepResult]) -> set[int]:
        """Books results in the order they arrived; returns the data indices whose chain of results has a gap."""
        gaps: set[int] = set()
        batch: list[StepResult] = []
        for result in results:
            if batch and batch[0].step != result.step:
                self._book_step(batch)
                batch = []
            verdict = self._expected(result)
            if verdict is None:
                gaps.add(self._group.data_of_rank(result.rank))
            elif verdict:
                batch.append(result)
                self._group.acknowledged[result.rank] = result.step
        if batch:
            self._book_step(batch)
        return gaps

    def settle(self) -> None:
        """Gives back rows that have drained: ends requests, or puts them back into the queue with what they have emitted."""
        group, rows = self._group, self._group.rows
        if not group.drained:
            return
        drained, group.drained = group.drained, []
        tokens = [group.log.read(row) for row in drained]
        self._keep_outputs(drained, tokens)
        group.kv.release_many([rows.data(row) for row in drained], [rows.take_pages(row) for row in drained])
        for row, emitted in zip(drained, tokens, strict=True):
            self._vacate(row, emitted)

    def cancel(self, request: Request, finish: Finish = Finish.ABORT) -> None:
        """Ends an open request wherever it stands; its frontend hears of it when its row has drained."""
        group, row = self._group, request.row
        if row < 0:
            group.queue.drop(request)
            self.end(request, finish)
        elif group.rows.state[row] in (State.STAGING, State.READY):
            group.unreserve(row)
            self.end(request, finish)
        elif group.rows.state[row] == State.DRAINING:
            group.rows.finish[row] = finish
        else:
            self._leave(row, finish)

    def end(self, request: Request, finish: Finish) -> None:
        """Tells the frontend, once, that a request has ended without a further token."""
        if self._group.open.pop((request.frontend, request.handle), None) is not None:
            self._outbox.end(request.frontend, request.handle, request.num_emitted, finish)

    # ----------------------------------------------------------------- one step's results

    def _expected(self, result: StepResult) -> bool | None:
        """True for the next result of its rank's chain, False for one to ignore, None for a gap."""
        group = self._group
        data = group.data_of_rank(result.rank)
        if result.epoch != group.epoch or not group.alive[data] or group.rebasing[data]:
            return False
        last = int(group.acknowledged[result.rank])
        if result.step <= last or result.step not in group.flights:
            return False
        return True if result.step == last + 1 else None

    def _book_step(self, results: list[StepResult]) -> None:
        group = self._group
        flight = group.flights[results[0].step]
        group.newest_result = max(group.newest_result, flight.step)
        sampling = [result for result in results if group.samples(result.rank)]
        if sampling:
            self._book_tokens(flight, sampling)
        self._observe(flight, results)
        if flight.check is not None:
            self._compare(flight, results)
        self._drain([group.data_of_rank(result.rank) for result in sampling])
        acknowledged = group.acknowledged
        if not group.alive.all():
            acknowledged = acknowledged[np.tile(np.repeat(group.alive, group.layout.tensor), group.layout.pipeline)]
        oldest = int(acknowledged.min(initial=group.next_step))
        for step in [step for step in group.flights if step <= oldest]:
            del group.flights[step]

    def _book_tokens(self, flight: Flight, results: list[StepResult]) -> None:
        group, rows = self._group, self._group.rows
        spans = [flight.span(group.data_of_rank(result.rank)) for result in results]
        row = _joined([flight.rows[span] for span in spans])
        decode = _joined([flight.decode[span] for span in spans])
        tokens = _joined([np.frombuffer(result.tokens_i32, np.int32) for result in results])
        if any(result.counts_u8 for result in results):
            counts = _joined([_counts(result, span.stop - span.start) for result, span in zip(results, spans, strict=True)])
        else:
            counts = np.ones(len(row), np.int64)
        assert len(counts) == len(row), f"step {flight.step}: {len(counts)} rows reported, {len(row)} planned"
        assert int(counts.sum()) == len(tokens), f"step {flight.step}: {len(tokens)} tokens for {int(counts.sum())} counted"
        ended = self._ended(results, spans, len(row))
        decoding, grown = (row, counts) if decode.all() else (row[decode], counts[decode])
        rows.low[decoding] += grown
        rows.flying[decoding] -= 1

        live = rows.finish[row] == _NONE
        if not live.all():
            tokens = tokens[np.repeat(live, counts)]
            row, counts, ended = row[live], counts[live], ended[live]
        before = group.log.count[row]
        if len(tokens) == len(row) and (counts == 1).all():
            group.log.append(row, tokens)
        else:
            group.log.append_ragged(row, counts, tokens)
        group.counters.generation_tokens += len(tokens)
        finish = _LENGTH * (rows.prompt[row] + group.log.count[row] >= rows.limit[row])
        finish[ended] = _STOP
        self._outbox.entries.append(Entries(rows.frontend[row], rows.handle[row], rows.base[row] + before, counts, finish, tokens))
        self._logprobs(flight, results)
        for index in finish.nonzero()[0].tolist():
            self._finish(int(row[index]), Finish(int(finish[index])))

    def _ended(self, results: list[StepResult], spans: list[slice], num_rows: int) -> NDArray[np.bool_]:
        ended = np.zeros(num_rows, np.bool_)
        start = 0
        for result, span in zip(results, spans, strict=True):
            if result.ended_i32:
                ended[start + np.frombuffer(result.ended_i32, np.int32)] = True
            start += span.stop - span.start
        return ended

    def _logprobs(self, flight: Flight, results: list[StepResult]) -> None:
        """Log-probabilities of rows that asked for them; the row's request was live when its tokens were booked."""
        group, rows = self._group, self._group.rows
        for result in results:
            if not result.logprobs:
                continue
            span = flight.span(group.data_of_rank(result.rank))
            counts = _counts(result, span.stop - span.start)
            for item in result.logprobs:
                row = int(flight.rows[span.start + item.row])
                if rows.finish[row] == Finish.NONE:
                    position = int(rows.base[row] + group.log.count[row]) - int(counts[item.row]) + item.index
                    line = HandleLogprobs(int(rows.handle[row]), position, item.chosen, item.top_ids_i32, item.top_f32)
                    self._outbox.logprobs.setdefault(int(rows.frontend[row]), []).append(line)

    def _finish(self, row: int, finish: Finish) -> None:
        """The last token of a request is in: its client is told now, its row drains."""
        group = self._group
        request = group.rows.request(row)
        group.open.pop((request.frontend, request.handle))
        group.rows.finish[row] = finish
        if group.rows.state[row] != State.DRAINING:
            self._leave(row, finish)

    def _leave(self, row: int, finish: Finish) -> None:
        group = self._group
        group.rows.finish[row] = finish
        prefilling = group.prefilling[group.rows.data(row)]
        if row in prefilling:
            prefilling.remove(row)
        group.retire(row, group.next_step - 1)
        self._drain([group.rows.data(row)])

    # ----------------------------------------------------------------- draining

    def _drain(self, data: list[int]) -> None:
        """Moves rows whose last result is in to ``group.drained``."""
        group, rows = self._group, self._group.rows
        if not group.draining:
            return
        reporters = {index: int(group.acknowledged[group.members(index)[-group.layout.tensor]]) for index in set(data)}
        left: list[int] = []
        for row in group.draining:
            last = reporters.get(rows.data(row))
            (group.drained if last is not None and last >= rows.drain_step[row] else left).append(row)
        group.draining = left

    def _vacate(self, row: int, emitted: Int32) -> None:
        group, rows = self._group, self._group.rows
        request, finish = rows.request(row), rows.finish[row]
        group.log.clear(row)
        rows.vacate(row)
        request.emitted_i32 += emitted.tobytes()
        if finish in (Finish.ABORT, Finish.ERROR):
            self.end(request, Finish(int(finish)))
        elif finish == Finish.NONE:
            group.queue.put_back(request)

    def _keep_outputs(self, drained: list[int], tokens: list[Int32]) -> None:
        """Hashes the blocks that sampled tokens have completed, so that they stay in the cache."""
        group, rows = self._group, self._group.rows
        found: list[tuple[int, UInt64, Int64]] = []
        for row, emitted in zip(drained, tokens, strict=True):
            request = rows.request(row)
            if not group.kv.caching or not request.root:
                continue
            known = len(request.hashes)
            self._extend_hashes(request, emitted)
            # The last sampled token has no KV yet, and a preempted row has no pages left.
            written = min(int(rows.low[row]) // group.page_size, int(rows.num_pages[row]), len(request.hashes))
            if rows.sent[row] >= rows.prompt[row] and written > known:
                pages = rows.pages[row, known:written].copy()
                group.kv.written[pages] = group.acknowledged[group.members(rows.data(row))].min()
                found.append((rows.data(row), request.hashes[known:written], pages))
        if found:
            data = np.repeat([data for data, _, _ in found], [len(pages) for _, _, pages in found])
            keys, pages = np.concatenate([keys for _, keys, _ in found]), np.concatenate([pages for _, _, pages in found])
            taken = group.kv.announce(data, keys, pages)
            group.publishing.append((data[taken], keys[taken], pages[taken]))

    def _extend_hashes(self, request: Request, emitted: Int32) -> None:
        """Hashes of the full blocks of prompt and output so far."""
        known, page_bytes = len(request.hashes), 4 * self._group.page_size
        total = (request.num_staged + len(emitted)) * 4
        if total >= (known + 1) * page_bytes:
            tail = (request.prompt_i32 + request.emitted_i32 + emitted.tobytes())[known * page_bytes :]
            parent = request.hashes[known - 1].tobytes() if known else request.root
            request.hashes = np.concatenate([request.hashes, as_keys(chain_hashes(parent, tail, self._group.page_size)[HASH_BYTES:])])

    # ----------------------------------------------------------------- what ranks say beside tokens

    def _observe(self, flight: Flight, results: list[StepResult]) -> None:
        """Fits the cost model to the slowest section among these results."""
        group = self._group
        slowest = max(results, key=lambda result: result.seconds - result.waited)
        seconds = slowest.seconds - slowest.waited
        if seconds > 0:
            data = group.data_of_rank(slowest.rank)
            group.cost.observe(float(flight.tokens[data]), float(flight.kv[data]), float(flight.context[data]), seconds)

    def _compare(self, flight: Flight, results: list[StepResult]) -> None:
        """Raises StateMismatch where a rank's checksum is not the planner's."""
        group, rows, check = self._group, self._group.rows, flight.check
        assert check is not None
        for result in results:
            check.reported[result.rank] = result.checksum
            data = group.data_of_rank(result.rank)
            if group.samples(result.rank):
                mine = (check.rows // rows.num_slots) == data
                active, lengths = check.rows[mine], check.lengths[mine]
                lengths = np.where(lengths < 0, rows.low[active], lengths)
                total = length_terms(active % rows.num_slots, lengths).sum(dtype=np.uint64)
                check.expected[data] = add64(int(total), int(check.pages[data]))
        for rank, reported in list(check.reported.items()):
            expected = check.expected.get(group.data_of_rank(rank))
            if expected is not None and expected != reported:
                raise StateMismatch(f"rank {rank}, step {flight.step}: checksum {reported:#x}, the planner expects {expected:#x}")


def _joined(parts: list[NDArray[_T]]) -> NDArray[_T]:
    """One array of several; of one, itself."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _counts(result: StepResult, num_rows: int) -> Int64:
    """Tokens per sampling row of a result [num_rows]."""
    if not result.counts_u8:
        return np.ones(num_rows, np.int64)
    return np.frombuffer(result.counts_u8, np.uint8).astype(np.int64)
