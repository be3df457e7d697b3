"""Splits the rows of a step in two microbatches that take equally long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..protocol.arrays import Int64
from ..protocol.slot_table import Rows


@dataclass(frozen=True)
class Part:
    """A part of a step's rows, decoding ones first. ``rows`` [n] are their indices in the step,
    starts and counts [n] those of the part, ``tokens`` [t] the indices of its tokens in the step.
    """

    rows: Int64
    starts: Int64
    counts: Int64
    num_decode: int
    tokens: Int64


def whole(rows: Rows) -> Part:
    """All rows of a step as one part."""
    num_rows = len(rows.slots)
    num_tokens = int(rows.counts.sum())
    return Part(np.arange(num_rows), rows.starts, rows.counts, rows.num_decode, np.arange(num_tokens))


def halves(rows: Rows, most: int, kv_share: float) -> tuple[Part, Part]:
    """Two parts of at most ``most`` tokens each. A token takes one unit of time and ``kv_share``
    for every position that it attends to.

    Decoding rows are dealt by length. Prompts are cut at one place, perhaps inside of one: its
    later tokens are then in the second part, which gets to every layer after the first.
    """
    num_decode, num_tokens = rows.num_decode, int(rows.counts.sum())
    assert num_tokens <= 2 * most, f"{num_tokens} tokens for two microbatches of {most}"
    longest_first = np.argsort(-rows.starts[:num_decode], kind="stable")
    places = np.arange(num_decode) % 4
    outer = (places == 0) | (places == 3)  # dealt back and forth: 0 1 1 0 0 1 1 0 ...
    dealt = np.sort(longest_first[outer]), np.sort(longest_first[~outer])
    seconds = [len(each) + kv_share * float(rows.starts[each].sum()) for each in dealt]

    counts = rows.counts[num_decode:]
    ends = counts.cumsum()
    num_prompt = num_tokens - num_decode
    owners = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(num_prompt) + (rows.starts[num_decode:] + counts - ends)[owners]
    costs = np.cumsum(1 + kv_share * positions)
    total = float(costs[-1]) if num_prompt else 0.0
    cut = int(np.searchsorted(costs, (total + seconds[1] - seconds[0]) / 2, side="right"))
    cut = min(max(cut, len(dealt[1]) + num_prompt - most), most - len(dealt[0]), num_prompt)
    cut = max(cut, 0)

    begins = ends - counts
    parts = []
    for decode, first, last in ((dealt[0], 0, cut), (dealt[1], cut, num_prompt)):
        taken_from = np.clip(begins, first, last)
        taken_to = np.clip(ends, first, last)
        chosen = np.flatnonzero(taken_to > taken_from)
        starts = rows.starts[num_decode + chosen] + (taken_from - begins)[chosen]
        part = Part(
            rows=np.concatenate([decode, num_decode + chosen]),
            starts=np.concatenate([rows.starts[decode], starts]),
            counts=np.concatenate([np.ones(len(decode), np.int64), (taken_to - taken_from)[chosen]]),
            num_decode=len(decode),
            tokens=np.concatenate([decode, num_decode + np.arange(first, last)]),
        )
        parts.append(part)
    return parts[0], parts[1]
