"""A model on one device with a paged cache, stepped by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lockstep.engine.models.checkpoint_reader import CheckpointReader
from lockstep.engine.models.config import load_config
from lockstep.engine.models.decoder import LayerCache, Model
from lockstep.engine.models.registry import build_model
from lockstep.engine.models.weights import load_weights
from lockstep.engine.rank.page_pool import KVPool, entries_of
from lockstep.kernels.formats.kv_format import KvFormat
from lockstep.kernels.reference.paged import build_batch
from lockstep.kernels.table import Column
from lockstep.moe.balance.placement import contiguous
from support.moe.dispatchers import dispatcher_of

MOST_TOKENS = 600


def load_local(
    path: Path, dtype: torch.dtype, column: Column | None = None, dispatch: str = "local"
) -> Model:
    """The model of directory ``path`` with all its experts here, whatever the ``dispatch``; a step
    of at most MOST_TOKENS.
    """
    config = load_config(path)
    device = torch.device("cpu")
    placement = contiguous(len(config.moe_layers), config.moe.num_experts, 1)
    dispatcher = dispatcher_of(dispatch, placement)
    dispatcher.begin_step(0, MOST_TOKENS)
    model = build_model(config, dispatcher, dtype, device, column)
    load_weights(
        model, CheckpointReader(path), lambda layer: placement.experts_of(0, layer), lambda fraction: None
    )
    return model


FORMATS: dict[torch.dtype, KvFormat] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "fp8"}


class Stepper:
    """Sequences over a paged cache of tensors of ``dtype`` with scattered pages. ``step`` computes
    some tokens of some sequences.
    """

    def __init__(
        self, model: Model, dtype: torch.dtype, num_pages: int = 128, page_size: int = 8, seed: int = 0
    ) -> None:
        self.model = model
        self.page_size = page_size
        self.lengths: dict[int, int] = {}
        self._pages: dict[int, list[int]] = {}
        self._free = np.random.default_rng(seed).permutation(num_pages).tolist()
        entries = entries_of(model.config, model.stage.layers, 1, FORMATS[dtype])
        self.cache: list[LayerCache] = KVPool(
            entries, num_pages - 1, page_size, FORMATS[dtype], torch.device("cpu")
        ).cache

    @torch.inference_mode()
    def step(self, rows: dict[int, list[int]], num_decode: int = 0) -> dict[int, Tensor]:
        """rows: sequence -> its next tokens; the first ``num_decode`` are decode rows of one token
        each.

        Returns float32 logits [tokens, V] of every computed token, by sequence.
        """
        for sequence, tokens in rows.items():
            table = self._pages.setdefault(sequence, [])
            while len(table) * self.page_size < self.lengths.get(sequence, 0) + len(tokens):
                table.append(self._free.pop())
        starts = np.array([self.lengths.get(sequence, 0) for sequence in rows], np.int64)
        counts = np.array([len(tokens) for tokens in rows.values()], np.int64)
        pages = np.zeros((len(rows), max((len(self._pages[s]) for s in rows), default=0)), np.int32)
        for i, sequence in enumerate(rows):
            pages[i, : len(self._pages[sequence])] = self._pages[sequence]
        batch, positions = build_batch(starts, counts, num_decode, pages, self.page_size)
        flat = torch.tensor([token for tokens in rows.values() for token in tokens], dtype=torch.int64)
        logits = self.model.logits(self.model(flat, positions, batch, self.cache))
        for sequence, tokens in rows.items():
            self.lengths[sequence] = self.lengths.get(sequence, 0) + len(tokens)
        return dict(zip(rows, logits.split(counts.tolist()), strict=True))
