"""The first steps of a rank on a GPU: of all sizes, so that no later step has to compile a kernel:
of the model, of sampling, or for what only some requests ask (penalties, grammars,
log-probabilities). A rank computes them in its rehearsal. They take as much memory as any step: the
largest prompt comes once more, after others, and all slots draw.

A kernel is compiled for each tile, and tiles go by the number of rows or pairs. Steps have powers
of two of tokens, up to the most that a step may have, with and without tokens in the cache. A row
that decodes splits its keys in more parts the longer it is. Nothing is left to captures: stages of
pipelines have none, nor have steps of two microbatches. Compiled kernels are kept on disk: later
starts, and ranks that join later, load them.

R rows  T tokens  C rows that sample
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....moe.clock import NoClock
from ...protocol.buckets import bucket_over
from ...protocol.message import Sampling
from ..forward import Forward
from ..parts import Parts
from ..prompt_logprobs import score_slice
from ..slot_sampling import SlotSettings
from .slots import DeviceSlots, Lane
from .split_draw import draw_of
from .token_counts import TokenCounts
from .transfers import Upload
from .under_way import Drawing

_LOG = logging.getLogger(__name__)

_CACHED = 64  # tokens before a prompt
_STRIDE, _RANK_STRIDE = 7919, 104729  # primes: tokens that differ, so that routing spreads them
_MOST_DRAWN = 64
_UPLOADED = 1 << 12  # bytes
_LONG = 3  # times the largest prompt, before it
_UNSPLIT = 256  # keys of a row that decodes, which one program reads
_FEW = 64  # rows for which attention has lanes in any step

_Prompt = tuple[int, int]  # tokens before it, and its own


def compute_first_steps(parts: Parts, slots: DeviceSlots, forward: Forward, most: int, max_len: int) -> None:
    """Computes steps of up to ``most`` tokens, with rows of up to ``max_len``, in a slot that
    nothing reads.
    """
    begin, dispatcher = time.monotonic(), parts.dispatcher
    run = functools.partial(_run, parts, slots, forward)
    sizes = list(_sizes(most))
    few = min(_CACHED, max_len // 2)
    clock, dispatcher.clock = dispatcher.clock, NoClock()  # times of compiling say nothing of steps
    try:
        for number, size in enumerate(sizes, start=1):
            parts.tell(f"computing {number} of {len(sizes)} sizes of steps")
            for cached in (0, few):
                hidden_TD = run([], _prompts(size, cached, max_len))
                if parts.links.stage.last and size <= _MOST_DRAWN:
                    _draw(parts, hidden_TD, max_len)
            facts = number, len(sizes), size, time.monotonic() - begin
            _LOG.info("computed %d of %d first steps: %d tokens, after %.1f s", *facts)
        for length in _lengths(max_len):
            run([length], [])
        run([max_len, *[1] * (min(most, slots.scratch) - 1)], [])
        for prompts in _many_prompts(min(most, slots.scratch), most, max_len):
            run([], prompts)
        longest = min(most, max_len - few)
        hidden_TD = run([], _prompts(most, min(_LONG * longest, max_len - longest), max_len))
        if parts.links.stage.last:
            _draw(parts, hidden_TD[: slots.scratch], max_len)
    finally:
        dispatcher.clock = clock
    dispatcher.counts_LS.zero_()


def _sizes(most: int) -> Iterator[int]:
    """Powers of two and their successors, which may need the next tile."""
    size = 1
    while size <= most:
        yield size
        if 1 < size < most:
            yield size + 1
        size *= 2


def _lengths(max_len: int) -> Iterator[int]:
    """Lengths whose keys are split in one part, and in more and more."""
    yield 1
    length = _UNSPLIT
    while length < max_len:
        yield length
        length *= 2
    yield max_len


def _prompts(size: int, cached: int, max_len: int) -> list[_Prompt]:
    """Prompts of ``size`` tokens together, as long as ``max_len`` allows behind ``cached``."""
    longest = max_len - cached
    return [(cached, min(longest, size - begin)) for begin in range(0, size, longest)]


def _many_prompts(most_rows: int, most: int, max_len: int) -> Iterator[list[_Prompt]]:
    """Short prompts in more and more rows with a long one, without and with tokens before it."""
    num_rows = _FEW
    while num_rows < most_rows:
        num_rows = min(2 * num_rows, most_rows)
        own = min(most - num_rows + 1, max_len // 2)
        for cached in (0, min(_LONG * own, max_len - own)):
            yield [*[(0, 1)] * (num_rows - 1), (cached, own)]


def _run(
    parts: Parts, slots: DeviceSlots, forward: Forward, decode: Sequence[int], prompts: Sequence[_Prompt]
) -> Tensor:
    """Hidden states [T, D] of a step: rows that decode, by their lengths after it, and prompts."""
    device, config = parts.device, parts.model.config
    starts = np.array([length - 1 for length in decode] + [cached for cached, _ in prompts])
    counts = np.array([1] * len(decode) + [own for _, own in prompts])
    size = int(counts.sum())
    lengths = (starts + counts).astype(np.int32)
    query_start = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    tokens = (np.arange(size) * _STRIDE + parts.rank * _RANK_STRIDE) % config.vocab_size

    def sent(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    lane = Lane(
        num_decode=len(decode),
        slots_R=sent(np.full(len(counts), slots.scratch)),
        starts_R=sent(starts),
        lengths_R=sent(lengths),
        query_start_R1=sent(query_start),
        owners_T=sent(np.repeat(np.arange(len(counts)), counts)),
        given_T=sent(tokens),
        query_starts=tuple(query_start.tolist()),
        lengths=tuple(lengths.tolist()),
    )
    tokens_T, positions_T, batch = slots.inputs(lane, -(-int(lengths.max()) // parts.pool.page_size))
    forward.announce(size, bucket_over(size))
    inputs = tokens_T
    if not parts.links.stage.first:
        inputs = torch.randn(size, config.hidden, device=device).to(parts.model.dtype)
    hidden_TD: Tensor = parts.model(inputs, positions_T, batch, parts.pool.cache)
    return hidden_TD


def _draw(parts: Parts, hidden_CD: Tensor, max_len: int) -> None:
    """Draws a token for each row, as a step does whose rows need the host; a row alone asks for
    everything that a request can ask for.
    """
    num_rows, num_top = len(hidden_CD), 1
    if num_rows == 1:
        next_C = torch.zeros(num_rows, dtype=torch.int64, device=hidden_CD.device)
        score_slice(parts, hidden_CD, next_C, num_top, ranks=True)
    vocab_size, device, counts = parts.model.config.vocab_size, hidden_CD.device, None
    settings = SlotSettings(num_rows, vocab_size, counts_tokens=False)
    for slot in range(num_rows):
        settings.admit(slot, _EVERYTHING if num_rows == 1 else _PLAIN, _HISTORY, 0)
    if num_rows == 1 and parts.samples:
        counts = TokenCounts(num_rows, max_len, vocab_size, device)
        counts.admit(0, _EVERYTHING, _HISTORY, 0)
        counts.send(Upload(_UPLOADED, device))
    slots = np.arange(num_rows)
    drawing = Drawing(
        chosen=slots,
        slots=slots,
        positions=slots + 1,
        numbers=slots,
        lives=slots,
        settings=settings.rows(slots),
        alone=False,
        masks=None,
    )
    sent = [torch.from_numpy(array).to(hidden_CD.device) for array in drawing.arrays()]
    draw_of(parts, settings, counts).draw(hidden_CD, sent, drawing)


def _ids(*values: int) -> bytes:
    return np.array(values, np.int32).tobytes()


_HISTORY = np.zeros(1, np.int32)
_PLAIN = Sampling(temperature=0.7, seed=1)
_EVERYTHING = Sampling(
    temperature=0.7,
    seed=1,
    presence_penalty=0.5,
    num_logprobs=1,
    stop_i32=_ids(2),
    min_tokens=2,
    bias_ids_i32=_ids(3),
    bias_values_f32=np.ones(1, np.float32).tobytes(),
    allowed_i32=_ids(0, 8),
)
