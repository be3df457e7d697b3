"""Duration of a simulated step: the floors of ``launch plan`` for the work of each rank.

Floors are linear in a section's work, except for reading expert weights: a step reads those that
some token needs; and for layers that bound the positions of each token. So the linear factors
are taken from ``capacity.floors`` once. Suffixes: D data indices, S stages.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ...engine.simulation.simulated_group import StepWork
from ...parallel.stages import PipelineStage
from ..capacity.floors import (
    Floor,
    Work,
    attention_seconds,
    bounds_of,
    index_read_seconds,
    index_seconds,
    read_seconds,
    stage_floor,
)
from ..capacity.setup import Setup

PARTS = ("compute", "memory", "network")


class FloorTimes:
    """Seconds of a step at ``efficiency`` times the speed of its floor.

    The slowest part (``PARTS``) counts, as if the others overlapped with it. Computing routed
    experts takes ``expert_imbalance`` (maximum / mean load) times as long as with even loads, on
    all ranks, since they wait for the fullest; an exchange ends when the rank that sends most has
    sent. ``bound``: seconds of all steps by their slowest part.
    """

    def __init__(self, setup: Setup, efficiency: float, expert_imbalance: float = 1.0) -> None:
        self.bound = dict.fromkeys(PARTS, 0.0)
        self._efficiency = efficiency
        self._stages = [_StageTimes(setup, stage, expert_imbalance) for stage in setup.stages()]

    def __call__(self, work: StepWork) -> NDArray[np.float64]:
        own_SD, largest = [], np.zeros(len(PARTS))
        for stage in self._stages:
            compute_D, memory_D, network = stage.parts(work)
            own_SD.append(np.maximum(np.maximum(compute_D, memory_D), network))
            largest += (float(compute_D.max()), float(memory_D.max()), network)
        seconds: NDArray[np.float64] = np.stack(own_SD) / self._efficiency
        self.bound[PARTS[int(largest.argmax())]] += float(seconds.max(axis=1).sum())
        return seconds


class _StageTimes:
    """The floor of one stage as linear factors.

    ``_compute`` [2]: seconds per token and per sampled row. ``_decode``, ``_prompt``, ``_read``:
    seconds of a layer per position attended to in decode and in prefill, and per position read.
    ``_index``, ``_index_read``: of all indexers per position that one scores, and reads.
    """

    def __init__(self, setup: Setup, stage: PipelineStage, expert_imbalance: float) -> None:
        self._setup, self._stage = setup, stage
        self._data = setup.mesh.data
        units = _work(tokens=1), _work(sampled=1)
        self._compute = np.array([stage_floor(setup, stage, unit).compute for unit in units])
        self._routed = stage_floor(setup, stage, _work(routed=1)).compute * expert_imbalance
        self._decode, self._prompt = (setup.sharing * attention_seconds(setup, way) for way in (True, False))
        self._read = setup.sharing * read_seconds(setup)
        indexers = setup.shape.num_indexers(stage.layers)
        self._index = setup.sharing * indexers * index_seconds(setup)
        self._index_read = setup.sharing * indexers * index_read_seconds(setup)
        bounds = bounds_of(setup, stage)
        self._whole = stage.num_layers - len(bounds)
        self._bounds = Counter(bounds)
        self._floor = lru_cache(1 << 16)(self._even_floor)

    def parts(self, work: StepWork) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """Compute [D], memory [D] and network seconds."""
        total = int(work.tokens_D.sum())
        most = int(work.tokens_D.max())
        features = np.stack([work.tokens_D, work.sampled_D]).astype(np.float64)
        prompts_D = work.tokens_D - work.decodes_D
        decoded_D = self._seen(work.decode_context_D, work.decodes_D)
        compute_D = self._compute @ features + self._routed * total / self._data
        compute_D += self._decode * decoded_D + self._prompt * self._seen(work.prompt_context_D, prompts_D)
        compute_D += self._index * (work.decode_context_D + work.prompt_context_D)
        read_D = decoded_D + self._seen(work.kv_reads_D - work.decode_context_D, prompts_D)
        memory_D = self._floor(total).memory + self._read * read_D + self._index_read * work.kv_reads_D
        return compute_D, memory_D, self._floor(most * self._data).network

    def _seen(self, positions_D: NDArray[np.int64], tokens_D: NDArray[np.int64]) -> NDArray[np.float64]:
        """``positions_D`` over the layers, some of which bound those of each of ``tokens_D``."""
        seen_D = self._whole * positions_D.astype(np.float64)
        for bound, num_layers in self._bounds.items():
            seen_D += num_layers * np.minimum(positions_D, tokens_D * bound)
        return seen_D

    def _even_floor(self, total: int) -> Floor:
        """The floor of ``total`` tokens spread evenly over all ranks."""
        each = total / self._data
        return stage_floor(self._setup, self._stage, _work(tokens=each, routed=each))


def _work(
    *,
    tokens: float = 0,
    sampled: float = 0,
    routed: float = 0,
) -> Work:
    return Work(tokens, sampled, 0, 0, routed, True)
