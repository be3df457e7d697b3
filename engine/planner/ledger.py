"""The ledger of results: logs tokens, recognises ends, gives rows and pages back.

Only here do sampled tokens become facts. A result is read against the frozen row list of its plan.
Results that are late, repeated or of an older epoch change nothing; a gap sets the data index back
to what is acknowledged.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TypeVar

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from ..protocol.arrays import Int64, add64, as_keys, ragged
from ..protocol.checksum import length_terms
from ..protocol.frontends import HandleLogprobs, Rejected
from ..protocol.message import HASH_BYTES, Finish
from ..protocol.results import StepResult
from .flight import Flight
from .group import Group
from .outbox import Entries, Outbox
from .request import Request, State

# Looking up enum members is slow.
_NONE = int(Finish.NONE)
_STOP = int(Finish.STOP)
_LENGTH = int(Finish.LENGTH)
_ABORT = int(Finish.ABORT)

_T = TypeVar("_T", bound=np.generic)


class StateMismatch(AssertionError):
    """A rank's checksum differs from the planner's: one of the two has a bug."""


class Ledger:
    """Books results into a group."""

    def __init__(self, group: Group, outbox: Outbox) -> None:
        self._group = group
        self._outbox = outbox

    def book(self, results: list[StepResult]) -> set[int]:
        """Books results in the order they arrived. Returns the data indices that miss a result."""
        steps = self._group.steps
        gaps: set[int] = set()
        batch: list[StepResult] = []
        for result in results:
            if batch and batch[0].step != result.step:
                self._book_step(batch)
                batch = []
            if not steps.counts(result):
                continue
            if steps.follows(result):
                batch.append(result)
                steps.acknowledge(result)
                if result.landed_i32:
                    self._group.moves.landed(result)
            else:
                gaps.add(self._group.mesh.data_of_rank(result.rank))
        if batch:
            self._book_step(batch)
        return gaps

    def settle(self) -> None:
        """Gives back rows that have drained: ends requests, or puts them back into the queue with
        what they have emitted.
        """
        group, rows = self._group, self._group.rows
        drained = group.draining.take_drained()
        if not drained:
            return
        row = np.array(drained)
        tokens = group.log.read(row)
        self._keep_outputs(row, tokens)
        group.give_back_pages(row)
        group.log.clear(row)
        requests = [rows.request(index) for index in drained]
        finishes = rows.finish[row].tolist()
        rows.vacate(drained)
        for request, finish, emitted in zip(requests, finishes, tokens, strict=True):
            request.emit(emitted)
            if finish >= _ABORT:
                self.end(request, Finish(finish))
            elif finish == _NONE:
                group.queue.put_back(request)

    def cancel(self, request: Request, finish: Finish = Finish.ABORT) -> None:
        """Ends an open request in any state. Its frontend is notified once its row has drained."""
        group, row = self._group, request.row
        if row < 0:
            group.queue.drop(request)
            self.end(request, finish)
        elif group.rows.state[row] in (State.PRELOADING, State.READY):
            group.unreserve(row)
            self.end(request, finish)
        elif group.rows.state[row] == State.DRAINING:
            group.rows.end(row, finish)
        else:
            self._leave(row, finish)

    def fail(self, request: Request, reason: str) -> None:
        """Ends an open request that cannot be completed. Its frontend gets the reason at once."""
        self._outbox.reject(request.frontend, Rejected(request.handle, 500, reason))
        self.cancel(request, Finish.ERROR)

    def end(self, request: Request, finish: Finish) -> None:
        """Tells the frontend, once, that a request has ended without a further token."""
        if self._group.close(request):
            self._outbox.end(request.frontend, request.handle, request.num_emitted, finish)

    # ----------------------------------------------------------------- one step's results

    def _book_step(self, results: list[StepResult]) -> None:
        """Books results of one step, from any of its ranks."""
        group = self._group
        flight = group.steps.flights[results[0].step]
        group.steps.first_result(flight.step)
        sampling = [result for result in results if group.mesh.samples(result.rank)]
        if sampling:
            self._book_tokens(flight, sampling)
        self._observe(flight, results)
        if flight.check is not None:
            self._compare(flight, results)
        group.draining.drain({group.mesh.data_of_rank(result.rank) for result in sampling})
        group.steps.land()

    def _book_tokens(self, flight: Flight, results: list[StepResult]) -> None:
        """Puts the tokens of sampling ranks into the log and the outbox, and ends the requests
        whose last token is among them.
        """
        group, rows = self._group, self._group.rows
        spans = [flight.span(group.mesh.data_of_rank(result.rank)) for result in results]
        row = _joined([flight.rows[span] for span in spans])
        tokens = np.frombuffer(b"".join([result.tokens_i32 for result in results]), np.int32)
        counts = np.ones(len(row), np.int64)
        counted = len(row)
        one_each = not any(result.counts_u8 for result in results)
        if not one_each:
            counts = _joined(
                [_counts(result, span.stop - span.start) for result, span in zip(results, spans, strict=True)]
            )
            counted = int(counts.sum())
        assert len(counts) == len(row), f"step {flight.step}: {len(counts)} rows reported, {len(row)} planned"
        assert counted == len(tokens), f"step {flight.step}: {len(tokens)} tokens for {counted} counted"
        starts = [0, *accumulate(span.stop - span.start for span in spans)]
        ended = self._ended(results, starts)
        if not one_each or group.spec.max_advance > 1:
            decode = _joined([flight.decode[span] for span in spans])
            rows.narrow(row[decode], counts[decode], group.spec.max_advance)

        for index, reason in self._errors(results, starts):
            if rows.finish[row[index]] == _NONE:
                self.fail(rows.request(int(row[index])), reason)
        live = rows.finish[row] == _NONE
        if not live.all():
            tokens = tokens[np.repeat(live, counts)]
            row, counts, ended = row[live], counts[live], ended[live]
        before = group.log.append(row, tokens) if one_each else group.log.append_ragged(row, counts, tokens)
        group.counters.generation_tokens += len(tokens)
        finish = _LENGTH * (before + counts >= rows.allowance[row])
        finish[ended] = _STOP
        self._outbox.entries.append(
            Entries(rows.frontend[row], rows.handle[row], rows.base[row] + before, counts, finish, tokens)
        )
        self._logprobs(flight, results)
        self._prompt_logprobs(flight, results)
        for index in finish.nonzero()[0].tolist():
            self._finish(int(row[index]), int(finish[index]))

    def _ended(self, results: list[StepResult], starts: list[int]) -> NDArray[np.bool_]:
        """Whether each row's last token is one of its stop ids [starts[-1]]. The rows of each
        result begin at ``starts``.
        """
        ended = np.zeros(starts[-1], np.bool_)
        for start, result in zip(starts, results, strict=False):
            if result.ended_i32:
                ended[start + np.frombuffer(result.ended_i32, np.int32)] = True
        return ended

    def _errors(self, results: list[StepResult], starts: list[int]) -> list[tuple[int, str]]:
        """Rows that cannot go on, by their index among all rows reported, and the reasons."""
        return [
            (start + error.row, error.reason)
            for start, result in zip(starts, results, strict=False)
            for error in result.errors
        ]

    def _logprobs(self, flight: Flight, results: list[StepResult]) -> None:
        """Sends log-probabilities of sampled tokens to frontends, for rows still live."""
        group, rows = self._group, self._group.rows
        for result in results:
            if not result.logprobs:
                continue
            span = flight.span(group.mesh.data_of_rank(result.rank))
            counts = _counts(result, span.stop - span.start)
            for item in result.logprobs:
                row = int(flight.rows[span.start + item.row])
                if rows.finish[row] == Finish.NONE:
                    position = int(rows.base[row] + group.log.count[row]) - int(counts[item.row]) + item.index
                    line = HandleLogprobs(
                        int(rows.handle[row]), position, item.chosen, item.top_ids_i32, item.top_f32
                    )
                    self._outbox.logprobs.setdefault(int(rows.frontend[row]), []).append(line)

    def _prompt_logprobs(self, flight: Flight, results: list[StepResult]) -> None:
        """Sends log-probabilities of prompts to frontends. A request that runs again may report
        some of them twice; its frontend drops those that it has.
        """
        group, rows = self._group, self._group.rows
        for result in results:
            if not result.prompt_logprobs:
                continue
            mine = flight.prompts[rows.data(flight.prompts) == group.mesh.data_of_rank(result.rank)]
            for item in result.prompt_logprobs:
                row = int(mine[item.of])
                if rows.finish[row] == Finish.NONE:
                    request = rows.request(row)
                    request.scored = max(request.scored, item.position + len(item.chosen_f32) // 4 - 1)
                    self._outbox.prompt_logprobs(request.frontend, structs.replace(item, of=request.handle))

    def _finish(self, row: int, finish: int) -> None:
        """Ends a request whose last token is in: notifies its client and lets its row drain."""
        group = self._group
        group.close(group.rows.request(row))
        group.rows.end(row, finish)
        if group.rows.state[row] != State.DRAINING:
            self._leave(row, finish)

    def _leave(self, row: int, finish: int) -> None:
        """Takes a row out of all further plans, with the reason why its request ended."""
        group = self._group
        group.rows.end(row, finish)
        group.leave(row)
        group.draining.drain([group.rows.data(row)])

    # ----------------------------------------------------------------- outputs that stay cached

    def _keep_outputs(self, row: Int64, tokens: list[bytes]) -> None:
        """Hashes the blocks that sampled tokens of rows [n] complete, so that they stay cached."""
        group, rows = self._group, self._group.rows
        if not group.kv.caching:
            return
        requests = [rows.request(index) for index in row.tolist()]
        known = [request.num_hashes for request in requests]
        for request, emitted in zip(requests, tokens, strict=True):
            if request.root:
                request.hash_outputs(emitted, group.page_size)
        # The last sampled token has no KV yet, and a preempted row has no pages left.
        written = np.maximum(rows.low[row] - rows.unwritten[row], 0) // group.page_size
        written = np.minimum(written, rows.num_pages[row])
        written[rows.sent[row] < rows.prompt[row]] = 0
        written = np.minimum(written, [request.num_hashes for request in requests])
        owners, index = ragged(np.maximum(written - known, 0))
        if not len(owners):
            return
        data = rows.data(row[owners])
        pages = rows.pages[row[owners], np.array(known)[owners] + index]
        spans = zip(requests, known, written.tolist(), strict=True)
        keys = as_keys(
            b"".join(
                [request.hashes_h128[HASH_BYTES * start : HASH_BYTES * end] for request, start, end in spans]
            )
        )
        # Other members of the data index may not have come so far yet.
        reported = np.array([group.steps.reported(index) for index in rows.data(row).tolist()])
        group.kv.mark_written(pages, reported[owners])
        taken = group.kv.announce(data, keys, pages)
        group.publishing.add(data[taken], keys[taken], pages[taken])
        if group.changes is not None:
            blocks = np.array(known)[owners] + index
            group.changes.stored(requests, owners[taken], blocks[taken], tokens)

    # ----------------------------------------------------------------- measurements and checksums

    def _observe(self, flight: Flight, results: list[StepResult]) -> None:
        """Gives the cost model the slowest section among these results."""
        group = self._group
        if group.overlap.mode == "auto":
            longest = float(flight.tokens.max()), float(flight.kv.max()), float(flight.context.max())
            group.overlap.observe(flight, results, group.cost.seconds(*longest))
        busy = [result.seconds - result.waited for result in results]
        seconds = max(busy)
        if seconds > 0:
            data = group.mesh.data_of_rank(results[busy.index(seconds)].rank)
            group.cost.observe(
                float(flight.tokens[data]), float(flight.kv[data]), float(flight.context[data]), seconds
            )

    def _compare(self, flight: Flight, results: list[StepResult]) -> None:
        """Raises StateMismatch when a rank's checksum differs from the planner's."""
        group, rows, check = self._group, self._group.rows, flight.check
        assert check is not None
        later = group.steps.planned_after(flight.step, len(rows.state))
        for result in results:
            check.reported[result.rank] = result.checksum
            data = group.mesh.data_of_rank(result.rank)
            if group.mesh.samples(result.rank):
                mine = rows.data(check.rows) == data
                active, sent = check.rows[mine], check.sent[mine]
                lengths = np.where(sent < 0, rows.low[active] - later[active], sent)
                total = length_terms(rows.slot(active), lengths).sum(dtype=np.uint64)
                check.expected[data] = add64(int(total), int(check.pages[data]))
        for rank, reported in list(check.reported.items()):
            expected = check.expected.get(group.mesh.data_of_rank(rank))
            if expected is not None and expected != reported:
                found = f"checksum {reported:#x}, the planner expects {expected:#x}"
                raise StateMismatch(f"rank {rank}, step {flight.step}: {found}")


def _joined(parts: list[NDArray[_T]]) -> NDArray[_T]:
    """The concatenation; a single array is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _counts(result: StepResult, num_rows: int) -> Int64:
    """Tokens per sampling row of a result [num_rows]."""
    if not result.counts_u8:
        return np.ones(num_rows, np.int64)
    return np.frombuffer(result.counts_u8, np.uint8).astype(np.int64)
