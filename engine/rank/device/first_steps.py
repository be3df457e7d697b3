"""The first steps of a rank on a GPU: prompts of all sizes, so that no later step has to compile a
kernel: of the model, of sampling, or for what only some requests ask (penalties, grammars,
log-probabilities). A rank computes them in its rehearsal. They take as much memory as any step:
the largest prompt comes once more, after others, and all slots draw.

A kernel is compiled for each tile, and tiles go by the number of rows or pairs. Prompts are
computed in powers of two up to the most that a step may have, with and without cached tokens.
Compiled kernels are kept on disk: later starts, and ranks that join later, load them.

T tokens  C rows that sample
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import numpy as np
import torch
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

_CACHED = (0, 64)  # tokens before the prompt
_STRIDE, _RANK_STRIDE = 7919, 104729  # primes: tokens that differ, so that routing spreads them
_MOST_DRAWN = 64
_UPLOADED = 1 << 12  # bytes
_LONG = 3  # times the largest prompt, before it


def compute_first_steps(parts: Parts, slots: DeviceSlots, forward: Forward, most: int, max_len: int) -> None:
    """Computes prompts of up to ``most`` tokens in a slot that nothing reads."""
    begin, dispatcher = time.monotonic(), parts.dispatcher
    most = min(most, max_len - max(_CACHED))
    sizes = list(_sizes(most))
    clock, dispatcher.clock = dispatcher.clock, NoClock()  # times of compiling say nothing of steps
    try:
        for number, size in enumerate(sizes, start=1):
            for cached in _CACHED:
                hidden_TD = _prompt(parts, slots, forward, size, cached)
                if parts.links.stage.last and size <= _MOST_DRAWN:
                    _draw(parts, hidden_TD, max_len)
            facts = number, len(sizes), size, time.monotonic() - begin
            _LOG.info("computed %d of %d first steps: %d tokens, after %.1f s", *facts)
        hidden_TD = _prompt(parts, slots, forward, most, min(_LONG * most, max_len - most))
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


def _prompt(parts: Parts, slots: DeviceSlots, forward: Forward, size: int, cached: int) -> Tensor:
    device, config = parts.device, parts.model.config
    tokens = (np.arange(size) * _STRIDE + parts.rank * _RANK_STRIDE) % config.vocab_size

    def sent(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    lane = Lane(
        num_decode=0,
        slots_R=sent(slots.scratch),
        starts_R=sent(cached),
        lengths_R=sent(cached + size, dtype=torch.int32),
        query_start_R1=sent(0, size, dtype=torch.int32),
        owners_T=torch.zeros(size, dtype=torch.int64, device=device),
        given_T=torch.from_numpy(tokens).to(device),
        query_starts=(0, size),
        lengths=(cached + size,),
    )
    tokens_T, positions_T, batch = slots.inputs(lane, -(-(cached + size) // parts.pool.page_size))
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
