"""Sampler cases at a vocabulary of 152k. A captured step has settings, counters and edits on the
device, so the Triton column is timed with them there. The other columns take them from the host, as
their signatures say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..reference.column import Reference
from ..reference.sampling import LogitEdits, Purpose, SamplingParams, uniform
from .call import Call, Case

BATCHES, VOCABULARY = (1, 16, 64, 256), 152064
SETTINGS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "plain": (1.0, 0, 1.0, 0.0),
    "top-k 50, top-p 0.9": (0.8, 50, 0.9, 0.0),
}
_BIASED, _LIKELIEST = 20, 20

Make = Callable[[torch.device], Call]


def sampler_cases() -> Iterator[Case]:
    for batch in BATCHES:
        for name, row in SETTINGS.items():
            yield Case("sample", f"{batch} x {VOCABULARY}, {name}", _sample(batch, row), small=batch == 16)
        yield Case(
            "logprobs", f"{batch} x {VOCABULARY}, {_LIKELIEST} likeliest", _logprobs(batch), small=batch == 16
        )
        yield Case(
            "edit_logits",
            f"{batch} x {VOCABULARY}, {_BIASED} biased",
            _edit_logits(batch),
            small=batch == 16,
        )
        yield Case("penalise", f"{batch} x {VOCABULARY}", _penalise(batch), small=batch == 16)
        yield Case("allow_only", f"{batch} x {VOCABULARY}", _allow_only(batch), small=batch == 16)


def _logits(device: torch.device, rows: int) -> Tensor:
    return torch.empty(rows, VOCABULARY, device=device).normal_(0, 3)


def _sample(rows: int, row: tuple[float, int, float, float]) -> Make:
    def make(device: torch.device) -> Call:
        logits = _logits(device, rows)
        seeds = np.arange(rows)
        positions = np.arange(rows) * 17
        dtypes = (np.float32, np.int64, np.float32, np.float32)
        params = SamplingParams(
            *(np.full(rows, value, dtype) for value, dtype in zip(row, dtypes, strict=True))
        )
        uniform_R = uniform(seeds, positions, Purpose.SAMPLE)

        def bind(ops: Reference) -> Callable[[], object]:
            if ops.column != "triton":
                return lambda: ops.sample(logits, params, uniform_R)
            from ..reference.sampling import SlotSampling
            from ..triton.draw import sample_slots

            settings = (
                params.temperature_R,
                params.top_k_R,
                params.top_p_R,
                params.min_p_R,
                seeds,
                positions,
            )
            slots = SlotSampling(*(torch.from_numpy(setting).to(device) for setting in settings))
            return lambda: sample_slots(logits, slots, Purpose.SAMPLE)

        return Call(bind, rows * VOCABULARY * 4.0)

    return make


def _logprobs(rows: int) -> Make:
    def make(device: torch.device) -> Call:
        logits = _logits(device, rows)
        tokens = torch.arange(rows, device=device)
        return Call(lambda ops: lambda: ops.logprobs(logits, tokens, _LIKELIEST), rows * VOCABULARY * 4.0)

    return make


def _edit_logits(rows: int) -> Make:
    """Edits so small that logits stay the same however often they are applied."""

    def make(device: torch.device) -> Call:
        logits = _logits(device, rows)
        biased = np.repeat(np.arange(rows), _BIASED)
        none = np.zeros(0, np.int64)
        edits = LogitEdits(
            counted_rows_N=none,
            counted_tokens_N=none,
            output_counts_N=none,
            repetition_R=np.ones(rows, np.float32),
            presence_R=np.zeros(rows, np.float32),
            frequency_R=np.zeros(rows, np.float32),
            bias_rows_N=biased,
            bias_tokens_N=np.tile(np.arange(_BIASED) * 999, rows),
            bias_values_N=np.full(len(biased), 0.0001, np.float32),
            masked_rows_N=none,
            masked_tokens_N=none,
        )

        def bind(ops: Reference) -> Callable[[], object]:
            if ops.column != "triton":
                return lambda: ops.edit_logits(logits, edits)
            from ..triton.sampling import edit_bias

            bias = [
                torch.from_numpy(part).to(device)
                for part in (edits.bias_rows_N, edits.bias_tokens_N, edits.bias_values_N)
            ]
            return lambda: edit_bias(logits, *bias)

        return Call(bind, len(biased) * 28.0)

    return make


def _penalise(rows: int) -> Make:
    """Penalties so small that logits stay the same however often they are applied. Every token's
    count is read, and every 32nd was seen.
    """

    def make(device: torch.device) -> Call:
        logits = _logits(device, rows)
        slots = torch.arange(rows, device=device)
        counts = torch.zeros(rows, VOCABULARY, dtype=torch.int16, device=device)
        counts[:, ::32] = 2
        penalties = torch.tensor([[1.0001, 0.0001, 0.0001]], device=device).repeat(rows, 1)
        num_bytes = rows * VOCABULARY * (counts.itemsize + 2 * logits.itemsize)  # lines of 32 bytes
        return Call(lambda ops: lambda: ops.penalise(logits, slots, counts, penalties), float(num_bytes))

    return make


def _allow_only(rows: int) -> Make:
    def make(device: torch.device) -> Call:
        logits = _logits(device, rows)
        owners = np.arange(rows)
        dice = np.random.default_rng(0)
        bits = dice.integers(-(2**31), 2**31, (rows, VOCABULARY // 32), np.int64).astype(np.int32)

        def bind(ops: Reference) -> Callable[[], object]:
            if ops.column != "triton":
                return lambda: ops.allow_only(logits, owners, bits)
            from ..triton.sampling import edit_allowed

            on_device = torch.from_numpy(owners).to(device), torch.from_numpy(bits).to(device)
            return lambda: edit_allowed(logits, *on_device)

        # Half of the tokens are refused, and only those are written.
        return Call(bind, rows * VOCABULARY * (0.125 + 2.0))

    return make
