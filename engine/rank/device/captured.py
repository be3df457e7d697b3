"""Steps of a rank, captured by capacity and repeated.

A captured step has a row for each token: one that decodes, or one of a prompt, whose keys and
values are written before any row attends. A row reads the keys up to its own position by itself, so
prompts that would read many are not computed so.

Suffixes: B rows of a captured step, padding included; C rows that sample; E entries of page tables;
D hidden, T tokens of a step.
"""

from __future__ import annotations

import functools
import logging
import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....moe.clock import NoClock
from ...protocol.buckets import BUCKETS, MOST_CAPTURED, bucket_over, largest_captured
from ...protocol.plan import Header
from ...protocol.slot_table import Rows
from ..forward import Forward
from ..halves import whole
from ..parts import Parts
from .draw import Draw
from .graphs import GraphRecorder, Graphs
from .slots import DeviceSlots, Lane
from .step_arrays import NUM_SAMPLE_ARRAYS, Arrays, LaneArrays, sampling_of, scattered
from .transfers import Upload

_LOG = logging.getLogger(__name__)

_LAYERS, _SAMPLE = "layers", "sample"
_NUM_INPUTS = 7  # arrays that the layers read; then come those of sampling

_MOST_READ = MOST_CAPTURED * MOST_CAPTURED // 2
"""Keys that the rows of prompts in a captured step read, together. Not timed on a card yet."""


class CapturedSteps:
    """Captures steps of a model that is whole: decode steps of up to ``num_slots`` rows, and steps
    with prompts of up to ``most_tokens``. Layers and sampling are two recordings: between them a
    host may change logits instead. Sampling of more than ``num_slots`` rows is not recorded.
    """

    def __init__(
        self,
        parts: Parts,
        slots: DeviceSlots,
        upload: Upload,
        forward: Forward,
        draw: Draw,
        most_tokens: int,
        recorder: GraphRecorder | None,
    ) -> None:
        self._parts, self._slots, self._upload, self._forward = parts, slots, upload, forward
        self._draw = draw
        self._graphs = Graphs(recorder)
        is_whole = parts.links.stage.first and parts.links.stage.last and recorder is not None
        self._most_drawn = bucket_over(len(forward.history_i32))
        most = largest_captured(len(forward.history_i32), most_tokens) if is_whole else 0
        self._sizes = tuple(size for size in BUCKETS if 0 < size <= most)

    def repeats(self, header: Header, rows: Rows) -> bool:
        """Whether the layers of a step are a recording. Ranks need not find the same: what travels
        is the same.
        """
        if header.microbatches > 1 or header.trace or header.capacity not in self._sizes:
            return False
        starts, ends = rows.starts[rows.num_decode :], rows.ends[rows.num_decode :]
        return int((ends * (ends + 1) - starts * (starts + 1)).sum()) // 2 <= _MOST_READ

    def samples(self, size: int) -> bool:
        """Whether rows that need no host are sampled by a recording."""
        return size <= self._most_drawn

    def begin_epoch(self) -> None:
        """Captures all steps, the largest first, unless recordings of an earlier epoch hold: those
        without a group.
        """
        if not self._sizes or (self._graphs.num_recorded and self._parts.groups.alone):
            return
        self.forget()
        begin, dispatcher = time.monotonic(), self._parts.dispatcher
        clock, dispatcher.clock = dispatcher.clock, NoClock()
        try:
            for number, size in enumerate(reversed(self._sizes), start=1):
                self._parts.tell(f"capturing {number} of {len(self._sizes)} sizes of steps")
                self._capture(size)
                facts = number, len(self._sizes), size, time.monotonic() - begin
                _LOG.info("captured %d of %d steps: up to %d rows, after %.1f s", *facts)
        finally:
            dispatcher.clock = clock

    def forget(self) -> None:
        """Drops all recordings, and the memory that they hold."""
        self._graphs.forget()

    def _capture(self, size: int) -> None:
        """Records a step whose rows are all padding: it changes nothing."""
        idle = Rows(*(np.zeros(0, np.int64),) * 3, np.zeros(0, np.bool_), 0)
        entries: Arrays = [np.zeros(0, np.int64), np.zeros(0, np.int32)]
        sent = self.send(size, idle, idle.samples, entries, [], alone=True)
        self.layers(size, sent)
        if self.samples(size):
            self.sample(size, sent)

    def send(
        self, size: int, rows: Rows, draws: NDArray[np.bool_], entries: Arrays, samples: Arrays, alone: bool
    ) -> list[Tensor]:
        """Hands over a step of ``size`` rows, with ``samples`` of those that draw: for ``drawn`` if
        those are ``alone`` and are sampled by a recording, else for ``drawing``. Returns the arrays
        on the device, for the other methods.
        """
        scratch = self._slots.scratch
        nowhere, scratch_page = self._slots.nowhere
        ahead = max(0, len(entries[0]) - size)
        if ahead:
            self._slots.write_pages(*self._upload.send([entries[0][:ahead], entries[1][:ahead]]))
        places = np.full(size, nowhere)
        pages = np.full(size, scratch_page, np.int32)
        places[: len(entries[0]) - ahead] = entries[0][ahead:]
        pages[: len(entries[1]) - ahead] = entries[1][ahead:]
        tokens = LaneArrays(rows, draws, whole(rows), self._forward.history_i32, scratch).by_token(
            size, scratch
        )
        chosen = rows.counts.cumsum()[draws] - 1
        if not samples:
            samples = _no_samples()
        real = np.array([int(rows.counts.sum())])
        arrays = [places, pages, *tokens, real]
        if alone and self.samples(size):
            return self._upload.send([*arrays, *scattered(samples, chosen, size, scratch), chosen])
        return self._upload.send([*arrays, chosen, *samples])

    def layers(self, size: int, sent: list[Tensor]) -> Tensor:
        """hidden_BD of the step that was sent."""
        return self._graphs.run((_LAYERS, size), functools.partial(self._layers, size, *sent[:_NUM_INPUTS]))

    def sample(self, size: int, sent: list[Tensor]) -> Tensor:
        """tokens_B int64 by the model's own logits."""
        hidden_BD = self._graphs.result((_LAYERS, size))
        part = functools.partial(self._sample, hidden_BD, sent[_NUM_INPUTS : _NUM_INPUTS + NUM_SAMPLE_ARRAYS])
        return self._graphs.run((_SAMPLE, size), part)

    def drawn(self, size: int, sent: list[Tensor]) -> Tensor:
        """tokens_C int64 of the rows that draw, by the model's own logits."""
        return self.sample(size, sent).index_select(0, sent[-1])

    def drawing(self, sent: list[Tensor]) -> list[Tensor]:
        """The indices and the samples of the rows that draw, out of all that was sent."""
        return sent[_NUM_INPUTS:]

    def _layers(self, size: int, *sent: Tensor) -> Tensor:
        places_E, pages_E, slots_B, starts_B, lengths_B, given_B, real_1 = sent
        parts, device = self._parts, slots_B.device
        self._slots.write_pages(places_E, pages_E)
        lane = Lane(
            num_decode=size,
            slots_R=slots_B,
            starts_R=starts_B,
            lengths_R=lengths_B,
            query_start_R1=torch.arange(size + 1, dtype=torch.int32, device=device),
            owners_T=torch.arange(size, device=device),
            given_T=given_B,
        )
        tokens_B, positions_B, batch = self._slots.inputs(lane)
        self._forward.announce(size, size, real_1)
        hidden_BD: Tensor = parts.model(tokens_B, positions_B, batch, parts.pool.cache)
        return hidden_BD

    def _sample(self, hidden_BD: Tensor, sent: list[Tensor]) -> Tensor:
        targets_B, settings = sampling_of(sent)
        tokens_B = self._draw.free(hidden_BD, settings)
        self._slots.last_S1.index_copy_(0, targets_B, tokens_B)
        return tokens_B


def _no_samples() -> Arrays:
    ints = np.zeros(0, np.int64)
    floats = np.zeros(0, np.float32)
    return [ints, floats, ints, floats, floats, ints, ints]
