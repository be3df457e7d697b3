"""Ranks that choose tokens by their parts of given logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.engine.protocol.message import Sampling
from lockstep.engine.protocol.results import RowLogprobs
from lockstep.engine.rank.device.split_draw import SplitDraw
from lockstep.engine.rank.device.under_way import Drawing
from lockstep.engine.rank.slot_sampling import SlotSettings
from lockstep.engine.rank.token_choice import TokenChoice
from lockstep.engine.rank.token_logprobs import logprob_lines
from lockstep.kernels.reference.sampling import SamplingParams
from lockstep.kernels.table import ops_of
from lockstep.parallel.collectives import Collectives, Pending
from lockstep.parallel.dense import split_as_attention
from lockstep.parallel.logits import SplitLogits
from lockstep.parallel.tensor import UNSPLIT, TensorGroup, TensorSplit
from lockstep.parallel.vocabulary import vocabulary_shard

Chooser = Callable[[TensorSplit, str, bool, Sequence[int]], list[Any]]
CPU = torch.device("cpu")
SIZE = 1003  # tokens: three parts of 335, the last of which has two of padding
ROWS = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.8, top_k=1),
    Sampling(temperature=0.8, top_k=5),
    Sampling(temperature=1.3, top_k=50),
    Sampling(temperature=1.0, top_k=256),
    Sampling(temperature=1.0, top_k=257),
    Sampling(temperature=1.5, top_k=40, top_p=0.9),
    Sampling(temperature=1.5, top_k=40, top_p=0.9, min_p=0.05),
    Sampling(temperature=1.0),
    Sampling(temperature=0.4),
    Sampling(temperature=3.0, num_logprobs=5),
    Sampling(temperature=1.0, top_p=0.8),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=0.0, num_logprobs=3),
    Sampling(temperature=0.7, top_k=8, num_logprobs=0),
    Sampling(temperature=0.9, top_k=8, repetition_penalty=1.4, num_logprobs=2),
]


class Model:
    """Logits that are given, of which ``split`` has a part; hidden states are rows of them."""

    ops, dtype = ops_of("cpu"), torch.float32

    def __init__(self, logits_RV: Tensor, split: TensorSplit) -> None:
        self._logits_RV, self._split = logits_RV, split

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self._logits_RV.clone()

    def own_logits(self, hidden_RD: Tensor) -> SplitLogits:
        rows, shard = vocabulary_shard(self._split, SIZE)
        start, end = shard.bounds(rows)
        own_RP = torch.full((len(self._logits_RV), rows), -torch.inf)
        own_RP[:, : end - start] = self._logits_RV[:, start:end]
        return SplitLogits(own_RP, start, SIZE, self._split)

    def most_likely(self, logits: SplitLogits) -> Tensor:
        num = len(logits.own_RP)
        ids_R = self.ops.sample(logits.own_RP, SamplingParams.greedy(num), np.zeros(num))
        return self._split.most(logits.own_RP.gather(1, ids_R[:, None])[:, 0], ids_R + logits.first)


class Widest(Collectives):
    """Collectives that note the most columns that were gathered."""

    most = 0

    def all_gather(self, rows: Tensor, what: str, fill: int = 0) -> Pending:
        self.most = max(self.most, rows.shape[1])
        return super().all_gather(rows, what, fill)


def logits_of(kind: str, step: int) -> Tensor:
    draw = torch.Generator().manual_seed(step)
    logits_RV = 3 * torch.randn(len(ROWS), SIZE, generator=draw)
    if kind == "ties":  # more of the best are equal than any part sends
        logits_RV = logits_RV.round().clamp_max(2.0)
    if kind == "far apart":  # one part has all
        logits_RV[:, : SIZE // 2] -= 200.0
    if kind == "forbidden":
        logits_RV[:, 10:] = -torch.inf
    return logits_RV


def choose(split: TensorSplit, kind: str, samples: bool, rows: Sequence[int]) -> list[Any]:
    """Tokens and log-probabilities of some of ``ROWS`` in a few steps."""
    settings = SlotSettings(len(rows), SIZE)
    for slot, row in enumerate(rows):
        settings.admit(slot, ROWS[row], np.arange(3, 9, dtype=np.int32), 0)
    slots, found = np.arange(len(rows)), []
    for step in range(12):
        parts: Any = SimpleNamespace(
            model=Model(logits_of(kind, step)[list(rows)], split),
            splits=split_as_attention(split),
            samples=samples,
            device=CPU,
        )
        tokens, lines = TokenChoice(parts, settings).choose(
            torch.zeros(len(rows), 1), slots, slots + 10 * step, slots, None
        )
        found.append((tokens.tolist(), _told(lines)))
    return found


def _told(lines: Sequence[RowLogprobs]) -> list[Any]:
    return [
        (
            line.row,
            round(line.chosen, 4),
            np.frombuffer(line.top_ids_i32, np.int32).tolist(),
            np.round(np.frombuffer(line.top_f32, np.float32), 4).tolist(),
        )
        for line in lines
    ]


def draw_on_device(split: TensorSplit, kind: str, samples: bool, rows: Sequence[int]) -> list[Any]:
    """As ``choose``, by the executor of a device."""
    settings, slots, found = SlotSettings(len(rows), SIZE), np.arange(len(rows)), []
    for slot, row in enumerate(rows):
        settings.admit(slot, ROWS[row], np.arange(3, 9, dtype=np.int32), 0)
    own = settings.rows(slots)
    for step in range(12):
        model: Any = Model(logits_of(kind, step)[list(rows)], split)
        parts: Any = SimpleNamespace(
            model=model, splits=split_as_attention(split), samples=samples, device=CPU
        )
        drawing = Drawing(slots, slots, slots + 10 * step, slots, slots, own, False, None)
        sent = [torch.from_numpy(array) for array in drawing.arrays()]
        tokens, more = SplitDraw(parts, settings, None).draw(torch.zeros(len(rows), 1), sent, drawing)
        lines = logprob_lines((more[0], more[1], more[2]), slots[own.asked], own.num_logprobs[own.asked])
        found.append((tokens.tolist(), _told(lines)))
    return found


def choose_in_parts(
    collectives: Collectives,
    kind: str,
    rows: Sequence[int],
    by: Chooser = choose,
) -> tuple[list[Any], list[Any], int]:
    """Choices of a group, those of one rank, and the most columns that were gathered."""
    watched = Widest("layers", collectives.index, collectives.size, collectives.store, 60.0, CPU)
    watched.build(0)
    watched.most = 0
    there = by(TensorGroup(watched), kind, collectives.index == 0, rows)
    return there, choose(UNSPLIT, kind, True, rows), watched.most


def draw_in_parts(
    collectives: Collectives, kind: str, rows: Sequence[int]
) -> tuple[list[Any], list[Any], int]:
    """As ``choose_in_parts``, by the executor of a device."""
    return choose_in_parts(collectives, kind, rows, by=draw_on_device)


def facts_of_parts(collectives: Collectives) -> tuple[list[Any], list[Any]]:
    """Ranks of tokens among all, by parts and by the whole."""
    whole_RV = logits_of("ties", 3)
    logits = Model(whole_RV, TensorGroup(collectives)).own_logits(whole_RV)
    tokens_R = torch.arange(len(whole_RV)) * 61
    above_R = (whole_RV > whole_RV.gather(1, tokens_R[:, None])).sum(1)
    return logits.num_above(tokens_R).tolist(), above_R.tolist()
