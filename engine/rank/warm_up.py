"""Compiles a model's kernels before its rank meets the others: no step with a deadline should wait
for a compiler.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...kernels.cpu.codegen.compiling import alone_in_compiling, compile_shared
from ...kernels.cpu.codegen.wanted import Wanted, only_noted
from ...kernels.formats.kv_format import KvFormat
from ...kernels.reference.column import Reference
from ...kernels.reference.paged import build_batch
from ...kernels.reference.sampling import SamplingParams
from ...kernels.table import ops_of
from ...moe.balance.placement import Placement, contiguous
from ...moe.dispatch.dispatcher import Dispatcher
from ..models.config import MlaConfig, ModelConfig
from ..models.registry import build_model
from .page_pool import KVPool, entries_of

_LOG = logging.getLogger(__name__)

_WIDEST = 512
_VOCABULARY = 64
_PROMPT, _SHORT = 33, 3
"""Numbers of tokens: enough to be split over threads, and too few."""

_FEW = 8
"""Positions that attention looks at where an indexer chooses them."""

_LIKELIEST, _CHOICES = 2, 1024
"""Top-k and vocabulary of the sampler's run: a small top-k of many tokens has its own kernel."""


@dataclass(frozen=True)
class Pages:
    """KV cache: the format of its entries, and the tokens in a page."""

    format: KvFormat
    size: int


def warm_up(
    config: ModelConfig,
    dtype: torch.dtype,
    pages: Pages,
    alone: Callable[[Placement], Dispatcher],
    report: Callable[[str], None],
) -> None:
    """Computes a few steps on this CPU with a small model that has one layer of each kind.

    A first run calls no kernel, only notes them. The processes of a machine that start at once
    share their compiling, with as many further processes as this one has threads beside its own.
    ``alone`` makes a dispatcher of the rank's kind for a group of one. ``report`` is called with
    the number of kernels that are compiled.
    """
    small = _miniature(config)
    compile_shared(_wanted(small, dtype, pages, alone), report, torch.get_num_threads() - 1)
    with alone_in_compiling(report):
        _compute(small, dtype, pages, alone)


def _wanted(
    config: ModelConfig, dtype: torch.dtype, pages: Pages, alone: Callable[[Placement], Dispatcher]
) -> list[Wanted]:
    """The kernels that ``_compute`` calls; those found so far if results that are zeros stop it."""
    ops_of("cpu")  # all kernels are imported before their calls are noted
    with only_noted() as found:
        try:
            _compute(config, dtype, pages, alone)
        except Exception as error:
            _LOG.warning("kernels after the first %d are compiled one by one: %r", len(found), error)
    return found


@torch.inference_mode()
def _compute(
    config: ModelConfig, dtype: torch.dtype, pages: Pages, alone: Callable[[Placement], Dispatcher]
) -> None:
    cpu = torch.device("cpu")
    dispatcher = alone(contiguous(len(config.moe_layers), config.moe.num_experts, 1))
    model = build_model(config, dispatcher, dtype, cpu)
    for parameter in model.parameters():
        parameter.zero_()
    model.pack()
    entries = entries_of(config, range(config.num_layers), 1, pages.format)
    pool = KVPool(entries, -(-(_PROMPT + 2) // pages.size), pages.size, pages.format, cpu)
    pages_1P = np.arange(pool.num_pages, dtype=np.int32)[None]
    for start, count in ((0, _PROMPT), (_PROMPT, 1), (0, _SHORT)):
        batch, positions_T = build_batch(
            np.array([start]), np.array([count]), int(count == 1), pages_1P, pages.size, cpu
        )
        dispatcher.begin_step(count, count)
        hidden_TD = model(torch.zeros(count, dtype=torch.int64), positions_T, batch, pool.cache)
        model.logits(hidden_TD[-1:])
    _sample(model.ops, torch.zeros(1, _CHOICES))


def _sample(ops: Reference, logits_RV: Tensor) -> None:
    """Samples greedily, from all tokens, by top-k and by top-p; then computes log-probabilities."""
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, _LIKELIEST, 1.0), (1.0, 0, 0.5)):
        params = SamplingParams(
            np.full(1, temperature, np.float32),
            np.full(1, top_k),
            np.full(1, top_p, np.float32),
            np.zeros(1, np.float32),
        )
        tokens_R = ops.sample(logits_RV, params, np.full(1, 0.5))
    ops.logprobs(logits_RV, tokens_R, _LIKELIEST)


def _miniature(config: ModelConfig) -> ModelConfig:
    """A small configuration that compiles the same kernels. They depend on types, on kinds of
    layers, and on which small powers of two divide the widths; not on sizes.
    """
    moe = config.moe
    per_group = max(2, -(-moe.top_k // moe.top_groups))
    hidden = _narrow(moe.hidden)
    width = _narrow(moe.expert_width)
    small = replace(
        moe,
        hidden=hidden,
        expert_width=width,
        shared_width=width if moe.shared_width else 0,
        num_experts=min(moe.num_experts, moe.num_groups * per_group),
    )
    num_dense = int(len(config.moe_layers) < config.num_layers)
    attention = config.attention
    if isinstance(attention, MlaConfig) and attention.indexer is not None:
        chosen = min(attention.indexer.top_k, _FEW)  # the prompt is longer
        attention = replace(attention, indexer=replace(attention.indexer, top_k=chosen, followers=()))
    return replace(
        config,
        attention=attention,
        vocab_size=_VOCABULARY,
        hidden=hidden,
        num_layers=num_dense + 1,
        moe_layers=(num_dense,),
        dense_width=_narrow(config.dense_width),
        eos_ids=(),
        moe=small,
    )


def _narrow(width: int) -> int:
    """A width of at most about 512 that the same powers of two divide, up to 128."""
    return width if width <= _WIDEST else _WIDEST + math.gcd(width, 128) % 128
