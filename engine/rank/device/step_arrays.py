"""The arrays that a device needs for a step, as the host makes them from its tables.

Suffixes: R rows, T tokens, C rows that sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ....kernels.reference.sampling import SlotSampling
from ...protocol.arrays import Int32, Int64
from ...protocol.slot_table import Rows
from ..halves import Part
from ..slot_sampling import RowSettings
from .slots import Lane

Arrays = list[NDArray[Any]]

NUM_LANE_ARRAYS = 6
NUM_SAMPLE_ARRAYS = 7


class LaneArrays:
    """Host arrays of a step, or of one microbatch. Idle rows decode and draw nothing: they read
    nothing, and their writes go to the slot ``scratch``.
    """

    def __init__(
        self, rows: Rows, draws: NDArray[np.bool_], part: Part, history_i32: Int32, scratch: int
    ) -> None:
        slots, starts, counts = rows.slots[part.rows], part.starts.copy(), part.counts
        self.num_decode = part.num_decode
        query_start = np.zeros(len(counts) + 1, np.int32)
        counts.cumsum(out=query_start[1:])
        owners = np.repeat(np.arange(len(counts)), counts)
        given = np.full(len(owners), -1, np.int64)
        prompt = owners[part.num_decode :]
        positions = np.arange(part.num_decode, len(owners)) - query_start[prompt] + starts[prompt]
        given[part.num_decode :] = history_i32[slots[prompt], positions]
        lengths = starts + counts
        idle = np.flatnonzero(~draws[part.rows[: part.num_decode]])
        slots = slots.copy()
        slots[idle], starts[idle], lengths[idle] = scratch, 0, 0
        self.lengths = tuple(lengths.tolist())
        self.query_starts = tuple(query_start.tolist())
        self.arrays: Arrays = [slots, starts, lengths.astype(np.int32), query_start, owners, given]

    def by_token(self, size: int, scratch: int) -> Arrays:
        """A row for each token, padded to ``size`` rows: the slot, the length before it and with
        it, 0 for padding and idle rows, and the token as of ``Lane``.
        """
        slots, starts, lengths, query_start, owners, given = self.arrays
        num_tokens = len(owners)
        positions = np.arange(num_tokens) - query_start[owners] + starts[owners]
        found = [np.full(size, scratch), *(np.zeros(size, kind) for kind in (np.int64, np.int32))]
        found.append(np.full(size, -1))
        values = slots[owners], positions, np.where(lengths[owners] > 0, positions + 1, 0), given
        for array, value in zip(found, values, strict=True):
            array[:num_tokens] = value
        return found

    def on_device(self, sent: Sequence[Tensor]) -> Lane:
        """The rows, from their arrays on the device."""
        slots_R, starts_R, lengths_R, query_start_R1, owners_T, given_T = sent
        return Lane(
            num_decode=self.num_decode,
            slots_R=slots_R,
            starts_R=starts_R,
            lengths_R=lengths_R,
            query_start_R1=query_start_R1,
            owners_T=owners_T,
            given_T=given_T,
            query_starts=self.query_starts,
            lengths=self.lengths,
        )


def sample_arrays(slots: Int64, settings: RowSettings, positions: Int64) -> Arrays:
    """The slots [C] that take the tokens of ``positions``, and the settings that draw them."""
    params = settings.params
    return [
        slots,
        params.temperature_R,
        params.top_k_R,
        params.top_p_R,
        params.min_p_R,
        settings.seed,
        positions,
    ]


def scattered(arrays: Arrays, chosen: Int64, width: int, scratch: int) -> Arrays:
    """``sample_arrays`` for all of ``width`` rows, of which ``chosen`` [C] sample: the others are
    greedy, and ``scratch`` takes their tokens.
    """
    found: Arrays = []
    for number, array in enumerate(arrays):
        whole = np.full(width, 0 if number else scratch, array.dtype)
        whole[chosen] = array
        found.append(whole)
    return found


def sampling_of(sent: Sequence[Tensor]) -> tuple[Tensor, SlotSampling]:
    """targets_C and the settings, from ``sample_arrays`` on the device."""
    targets, temperature, top_k, top_p, min_p, seed, position = sent[:NUM_SAMPLE_ARRAYS]
    return targets, SlotSampling(temperature, top_k, top_p, min_p, seed, position)
