"""The gate: chooses each token's experts and their weights.

Suffixes: T tokens, D hidden, E experts, G groups of experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routing import Routing as Routing  # re-exported for callers of a gate


@dataclass(frozen=True)
class GateCounts:
    """Extra inputs of a gate in a captured step. ``num_tokens`` int32 [1]: rows of x from there on
    are padding, with ids of -1 and weights of 0. ``counts_E`` int64 is increased by the tokens of
    each expert, without padding.
    """

    num_tokens: Tensor
    counts_E: Tensor


def gate(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, routing: Routing, counts: GateCounts | None = None
) -> tuple[Tensor, Tensor]:
    """Returns ids_TK int64, best first, and weights_TK float32.

    ``weight_ED`` is float32, or in the dtype of x: scores are sums in float32 either way, so they
    do not depend on the model's dtype. ``bias_E`` float32 affects only the selection; the weights
    come from the scores without it, unless it is the bias of the logits (``routing.logit_bias``).
    """
    ids_TK, weights_TK = choose(F.linear(x_TD.float(), weight_ED.float()), bias_E, routing)
    return (ids_TK, weights_TK) if counts is None else leave_out_padding(ids_TK, weights_TK, counts)


def leave_out_padding(ids_TK: Tensor, weights_TK: Tensor, counts: GateCounts) -> tuple[Tensor, Tensor]:
    """Applies ``counts`` to a choice of experts."""
    padding_T1 = torch.arange(len(ids_TK), device=ids_TK.device)[:, None] >= counts.num_tokens
    ids_TK = ids_TK.masked_fill(padding_T1, -1)
    weights_TK = weights_TK.masked_fill(padding_T1, 0.0)
    counts.counts_E.add_(expert_counts(ids_TK, len(counts.counts_E)))
    return ids_TK, weights_TK


def choose(logits_TE: Tensor, bias_E: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """The selection rule: ids_TK and weights_TK as in ``gate``, from logits_TE float32."""
    if routing.logit_bias and bias_E is not None:
        logits_TE, bias_E = logits_TE + bias_E, None
    scores_TE = logits_TE.softmax(-1) if routing.scoring == "softmax" else logits_TE.sigmoid()
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if routing.top_groups < routing.num_groups:
        choice_TE = _mask_groups(choice_TE, routing)
    weights_TK, ids_TK = choice_TE.topk(routing.top_k, dim=-1)
    if choice_TE is not scores_TE:
        weights_TK = scores_TE.gather(-1, ids_TK)
    if routing.normalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)  # all sigmoids may be zero
    return ids_TK, weights_TK if routing.scale == 1.0 else weights_TK * routing.scale


def expert_counts(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Tokens per expert, int64 [num_experts]; ids of -1 (padding) are not counted."""
    return torch.bincount(ids_TK.flatten() + 1, minlength=num_experts + 1)[1:]


def _mask_groups(choice_TE: Tensor, routing: Routing) -> Tensor:
    """Sets the scores of experts outside the best groups to -inf."""
    choice_TGE = choice_TE.view(len(choice_TE), routing.num_groups, choice_TE.shape[1] // routing.num_groups)
    counted = 1 if routing.group_quality == "best" else min(2, choice_TGE.shape[-1])
    groups_TG = choice_TGE.topk(counted, dim=-1).values.sum(-1)
    best_TG = groups_TG.topk(routing.top_groups, dim=-1).indices
    closed_TG = torch.ones_like(groups_TG, dtype=torch.bool).scatter_(-1, best_TG, False)
    return choice_TGE.masked_fill(closed_TG.unsqueeze(-1), float("-inf")).flatten(-2)
