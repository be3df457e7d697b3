"""The gate on a CPU in one compiled call: product, scores, choice and weights, token by token.

The same code sums each product for every caller, so a token's result depends neither on its
neighbours nor on the number of threads. The gate's weights [E, D] stay in a core's cache from one
token to the next.

T tokens  D hidden  E experts  G groups of experts  K experts per token
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..reference import gate as reference
from ..reference.gate import Routing
from .codegen.arrays import FAST, array, computes, exp, inner, widen
from .codegen.threads import share_out

# With fewer multiplications than this the calling thread does all of them: 10 us, and no waiting
# for a thread that another process may hold up.
_ALONE = 1 << 18
_BLOCK = 16

_NO_BIAS = np.zeros(0, np.float32)


def gate(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """Same as ``gate.gate``. Ties go to the lower expert."""
    if not computes(x_TD.dtype):
        return reference.gate(x_TD, weight_ED, bias_E, routing)
    x = array(x_TD)
    weight = array(weight_ED)
    bias = _NO_BIAS if bias_E is None else array(bias_E)
    ids = np.empty((len(x), routing.top_k), np.int64)
    weights = np.empty((len(x), routing.top_k), np.float32)
    route(x, weight, bias, *rule_of(routing), ids, weights)
    return torch.from_numpy(ids), torch.from_numpy(weights)


def rule_of(routing: Routing) -> tuple[tuple[int, int, bool], tuple[bool, bool, float, bool]]:
    """Group settings and scoring rule in the form that compiled code takes."""
    groups = (
        routing.num_groups,
        min(routing.top_groups, routing.num_groups),
        routing.group_quality == "best_two",
    )
    return groups, (routing.scoring == "sigmoid", routing.normalise, routing.scale, routing.logit_bias)


@njit(cache=True, forceinline=True)
def route(x_TD, weight_ED, bias_E, groups, rule, ids_TK, weights_TK):
    blocks = (len(x_TD) + _BLOCK - 1) // _BLOCK
    alone = len(x_TD) * weight_ED.size < _ALONE
    share_out(_route_blocks, blocks, (x_TD, weight_ED, bias_E, groups, rule, ids_TK, weights_TK), alone)


@inner()
def _route_blocks(begin, end, x_TD, weight_ED, bias_E, groups, rule, ids_TK, weights_TK):
    for block in range(begin, end):
        own = slice(block * _BLOCK, min((block + 1) * _BLOCK, len(x_TD)))
        _route(x_TD[own], weight_ED, bias_E, groups, rule, ids_TK[own], weights_TK[own])


@njit(cache=True, inline="always")
def _route(x_TD, weight_ED, bias_E, groups, rule, ids_TK, weights_TK):
    sigmoid, normalise, scale, logit_bias = rule
    scores_TE = _logits(x_TD, weight_ED)
    for t in range(len(x_TD)):
        scores_E = scores_TE[t]
        if logit_bias:
            for e in range(len(bias_E)):
                scores_E[e] += bias_E[e]
        if sigmoid:
            _sigmoid(scores_E)
        else:
            _softmax(scores_E)
        choice_E = scores_E.copy()
        if not logit_bias:
            for e in range(len(bias_E)):
                choice_E[e] += bias_E[e]
        if groups[1] < groups[0]:
            _close_groups(choice_E, groups)
        total = np.float32(0)
        for k in range(ids_TK.shape[1]):
            best = _best(choice_E)
            choice_E[best] = -np.inf
            ids_TK[t, k], weights_TK[t, k] = best, scores_E[best]
            total += scores_E[best]
        factor = np.float32(scale)
        if normalise:
            factor /= total + np.float32(1e-20)  # all sigmoids may be zero
        for k in range(ids_TK.shape[1]):
            weights_TK[t, k] *= factor


@inner()
def _logits(x_TD, weight_ED):
    """Four experts at a time: their weights stay in the nearest cache for all tokens."""
    wide_TD = np.empty(x_TD.shape, np.float32)
    for t in range(x_TD.shape[0]):
        for d in range(x_TD.shape[1]):
            wide_TD[t, d] = widen(x_TD[t, d])
    num = len(weight_ED)
    out_TE = np.empty((len(x_TD), num), np.float32)
    for e in range(0, num - num % 4, 4):
        for t in range(len(x_TD)):
            out_TE[t, e], out_TE[t, e + 1], out_TE[t, e + 2], out_TE[t, e + 3] = _four_dots(
                wide_TD[t], weight_ED[e : e + 4]
            )
    for e in range(num - num % 4, num):
        for t in range(len(x_TD)):
            out_TE[t, e] = _dot(wide_TD[t], weight_ED[e])
    return out_TE


@inner(fastmath=FAST)
def _four_dots(x_D, weight_4D):
    a = b = c = d = np.float32(0)
    for i in range(len(x_D)):
        x = x_D[i]
        a += x * weight_4D[0, i]
        b += x * weight_4D[1, i]
        c += x * weight_4D[2, i]
        d += x * weight_4D[3, i]
    return a, b, c, d


@inner(fastmath=FAST)
def _dot(x_D, weight_D):
    total = np.float32(0)
    for i in range(len(x_D)):
        total += x_D[i] * weight_D[i]
    return total


@inner(fastmath=FAST)
def _softmax(scores_E):
    largest, total = scores_E[0], np.float32(0)
    for e in range(1, len(scores_E)):
        largest = max(largest, scores_E[e])
    for e in range(len(scores_E)):
        scores_E[e] = exp(scores_E[e] - largest)
        total += scores_E[e]
    for e in range(len(scores_E)):
        scores_E[e] /= total


@inner()
def _sigmoid(scores_E):
    for e in range(len(scores_E)):
        scores_E[e] = np.float32(1) / (np.float32(1) + exp(-scores_E[e]))


@inner()
def _best(values):
    best = 0
    for i in range(1, len(values)):
        if values[i] > values[best]:
            best = i
    return best


@inner()
def _close_groups(choice_E, groups):
    """Sets experts outside the best groups to -inf."""
    num_groups, top_groups, two = groups
    size = len(choice_E) // num_groups
    quality_G = np.empty(num_groups, np.float32)
    for g in range(num_groups):
        members = choice_E[g * size : (g + 1) * size]
        first = _best(members)
        quality_G[g] = members[first]
        second = np.float32(-np.inf)
        for i in range(size):
            if i != first:
                second = max(second, members[i])
        if two and size > 1:
            quality_G[g] += second
    open_G = np.zeros(num_groups, np.bool_)
    for _ in range(top_groups):
        best = _best(quality_G)
        open_G[best] = True
        quality_G[best] = -np.inf
    for e in range(len(choice_E)):
        if not open_G[e // size]:
            choice_E[e] = -np.inf
