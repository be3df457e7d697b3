"""The open requests of this frontend. Every message from the engine finds its generation here, and
aborted ones wait here until the engine has ended them.
"""

from __future__ import annotations

import logging
import secrets
import time
from array import array
from collections.abc import Callable

from msgspec import structs

from ..protocol.frontends import Abort, HandleLogprobs, Heartbeat, Rejected, Started, Submit, TokenBatch
from ..protocol.message import Finish
from ..protocol.results import PromptLogprobs
from .api.errors import ApiError
from .metrics.metrics import Metrics
from .requests.generation import REASONS, Generation, Stay

_log = logging.getLogger("lockstep.frontend")
Send = Callable[[Submit | Abort | Heartbeat], None]

_MAX_GAPS = 8


class OpenRequests:
    """Generations by handle, from submission until the engine reports their end.

    A handle is never used twice, not even by a restarted frontend of the same name: a late event
    for an earlier process finds nothing and is dropped.
    """

    def __init__(
        self,
        name: str,
        send: Send,
        metrics: Metrics,
        unfinished: Callable[[], ApiError],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``unfinished`` gives the error for a request that the engine ended without a result."""
        self._name = name
        self._send = send
        self._unfinished = unfinished
        self._metrics = metrics
        self._clock = clock
        self._open: dict[int, Generation] = {}
        self._next_handle = secrets.randbits(38) << 24

    def __len__(self) -> int:
        return len(self._open)

    def new_handle(self) -> int:
        self._next_handle += 1
        return self._next_handle

    def new_request_id(self) -> str:
        """An id for the engine that no other request of the cluster has."""
        return f"{self._name}-{secrets.token_hex(12)}"

    def submit(self, generation: Generation) -> None:
        generation.submitted = self._clock()
        self._open[generation.handle] = generation
        self._send(generation.submit)

    def abort(self, generation: Generation) -> None:
        """Asks the engine to abort ``generation``. The entry stays until the engine ends it."""
        if generation.finish is None:
            generation.finish = "abort"
            self._finished(generation, self._clock())
            self._send(Abort(generation.handle))

    def submit_again(self) -> None:
        """Submits every open request again, with the tokens that the client has, and repeats every
        abort, as messages of either side may be lost. The engine ignores those that it has.
        """
        for handle, generation in list(self._open.items()):
            if generation.finish is None:
                self._send(_resumed(generation, handle))
            else:
                del self._open[handle]
                self._send(Abort(handle))

    def fail_all(self, error: ApiError) -> None:
        """Fails and forgets all open requests, when the controller or this process goes."""
        for generation in list(self._open.values()):
            if generation.finish is None:
                self._fail(generation, error)
            self._send(Abort(generation.handle))
        self._open.clear()

    def on_tokens(self, batch: TokenBatch) -> None:
        """Hands the tokens of one step to their generations."""
        now = self._clock()
        handles: list[int] = array("q", batch.handles_i64).tolist()
        positions: list[int] = array("i", batch.positions_i32).tolist()
        counts: list[int] = array("i", batch.counts_i32).tolist()
        tokens: list[int] = array("i", batch.tokens_i32).tolist()
        logprobs = {(item.handle, item.position): item for item in batch.logprobs} if batch.logprobs else None
        start = 0
        for handle, position, count, finish in zip(handles, positions, counts, batch.finish_u8, strict=True):
            generation = self._open.get(handle)
            if generation is not None:
                if finish:
                    del self._open[handle]
                try:
                    self._on_entry(generation, position, tokens[start : start + count], finish, now, logprobs)
                except Exception:  # a bug in one reply must not affect the others
                    _log.exception("request %s failed", generation.submit.request_id)
                    self._break(generation)
            start += count

    def on_prompt(self, prompt: PromptLogprobs) -> None:
        """Takes log-probabilities of a prompt. A request that runs again sends known ones again."""
        generation = self._open.get(prompt.of)
        if generation is None or generation.finish is not None or generation.prompt_scores is None:
            return
        if prompt.position > generation.prompt_scores.known:
            self._on_gap(generation, "Log-probabilities of the prompt")
        else:
            generation.accept_prompt(prompt)

    def on_started(self, started: Started) -> None:
        now = self._clock()
        handles = array("q", started.handles_i64).tolist()
        columns = (started.data_i32, started.epochs_i32, started.cached_i32, started.preemptions_i32)
        packed = [array("i", column).tolist() for column in columns]
        for handle, data, epoch, cached, preemptions in zip(handles, *packed, strict=True):
            generation = self._open.get(handle)
            if generation is not None:
                num_tokens = len(generation.tokens)
                generation.run(Stay(now, data, epoch, cached, preemptions, num_tokens))

    def on_rejected(self, rejected: Rejected) -> None:
        generation = self._open.pop(rejected.handle, None)
        if generation is not None and generation.finish is None:
            retry = max(1.0, rejected.retry_after) if rejected.status == 503 else None
            self._fail(generation, ApiError(rejected.status, rejected.reason, retry_after=retry))

    def _on_entry(
        self,
        generation: Generation,
        position: int,
        tokens: list[int],
        finish: int,
        now: float,
        logprobs: dict[tuple[int, int], HandleLogprobs] | None,
    ) -> None:
        known = generation.num_received - position
        if known:
            if known < 0:
                self._on_gap(generation, f"Output tokens {generation.num_received} to {position - 1}")
                return
            tokens = tokens[known:]
        generation.num_received += len(tokens)
        if generation.finish is not None:  # the client has everything; only the engine's end was open
            return
        if generation.lacks_prompt and finish < Finish.ABORT:
            self._on_gap(generation, "Log-probabilities of the prompt")
            return
        if finish == Finish.ABORT:  # an abort not requested here: the engine took this process for gone
            self._on_gap(generation, f"Output tokens from {generation.num_received} on")
            return
        if tokens:
            self._metrics.tokens(generation, now)
            handle = generation.handle
            generation.accept(
                tokens, None if logprobs is None else lambda index: logprobs.get((handle, index))
            )
        elif not finish:
            return
        if finish and not generation.ended:
            if finish == Finish.ERROR:
                self._fail(generation, self._unfinished())
                return
            generation.close(REASONS[Finish(finish)])
        if generation.ended:
            self._finished(generation, now)
            if generation.stopped_early and not finish:
                self._send(Abort(generation.handle))
        generation.sink.advance(generation)

    def _break(self, generation: Generation) -> None:
        if generation.finish is None:
            self._send(Abort(generation.handle))
        self._fail(generation, ApiError(500, "Internal error while the answer was put together"))

    def _on_gap(self, generation: Generation, what: str) -> None:
        """Handles a lost part of a request. Everything after the gap would be wrong, so the request
        continues under another handle, after the tokens that the client has.
        """
        if generation.finish is not None:
            return
        self._open.pop(generation.handle, None)
        self._send(Abort(generation.handle))
        generation.num_gaps += 1
        if generation.num_gaps > _MAX_GAPS:
            self._fail(generation, ApiError(500, f"{what} were lost between the engine and this frontend"))
            return
        _log.warning("request %s: %s were lost, it goes on before them", generation.submit.request_id, what)
        generation.submit = _resumed(generation, self.new_handle())
        self._open[generation.handle] = generation
        self._send(generation.submit)

    def _fail(self, generation: Generation, error: ApiError) -> None:
        generation.finish = "error"
        self._finished(generation, self._clock())
        generation.sink.fail(generation, error)

    def _finished(self, generation: Generation, now: float) -> None:
        self._metrics.finished(generation, now)


def _resumed(generation: Generation, handle: int) -> Submit:
    """The request that continues after the tokens received so far."""
    tokens_i32 = array("i", generation.tokens).tobytes()
    return structs.replace(generation.submit, handle=handle, emitted_i32=tokens_i32)
