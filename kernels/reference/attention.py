"""Grouped-query attention over a paged cache that already holds this step's tokens. The cache may
have another dtype, or hold FP8 entries (``kv_format``).

T tokens  R decode rows  H query heads  K key/value heads  G = H / K  D head dim
L positions of a row  Q queries
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_entries import gather_heads
from .paged import DecodeGroup, PagedBatch

# Queries of an extend over a cached prefix are masked block by block, so that the mask [block, L]
# stays small.
_QUERY_BLOCK = 512


@dataclass(frozen=True, eq=False)
class AttentionRule:
    """The positions that a query sees, and its softmax. ``window``: the last so many, its own
    included; 0: all. ``sinks_H`` float32: a logit per head that takes part in the softmax and has
    no value (arXiv 2309.17453, learned as in gpt-oss).
    """

    window: int = 0
    sinks_H: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether all positions are seen, and they alone."""
        return not self.window and self.sinks_H is None


PLAIN_RULE = AttentionRule()


def attend(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    rule: AttentionRule = PLAIN_RULE,
) -> Tensor:
    """Causal attention over caches that already hold this step's keys and values. Returns [T, H, D]
    in the dtype of q.

    Caches are [positions, K, D], or bytes.
    """
    out_THD = torch.empty_like(q_THD)
    for group in batch.decode_groups:
        rows = slice(0, batch.num_decode) if group.rows is None else group.rows
        out_THD[rows] = _decode(q_THD[rows], k_cache, v_cache, group, batch.page_size, scale, rule)
    for row in batch.extends():
        k_LKD, v_LKD = (
            gather_heads(cache, row.pages, batch.page_size, q_THD.shape[2], q_THD.dtype)[: row.length]
            for cache in (k_cache, v_cache)
        )
        out_THD[row.begin : row.end] = causal_attention(
            q_THD[row.begin : row.end], k_LKD, v_LKD, row.start, scale, rule
        )
    return out_THD


def causal_attention(
    q_THD: Tensor,
    k_LKD: Tensor,
    v_LKE: Tensor,
    start: int,
    scale: float,
    rule: AttentionRule = PLAIN_RULE,
) -> Tensor:
    """Attention of the T queries at positions [start, L) of one sequence over its L keys. Returns
    [T, H, E].
    """
    if not rule.plain:
        return _causal_by_rule(q_THD, k_LKD, v_LKE, start, scale, rule)
    q_1HTD, k_1KLD, v_1KLE = (x.transpose(0, 1).unsqueeze(0) for x in (q_THD, k_LKD, v_LKE))
    grouped = q_THD.shape[1] != k_LKD.shape[1]
    if start == 0:
        out_1HTE = F.scaled_dot_product_attention(
            q_1HTD, k_1KLD, v_1KLE, is_causal=True, scale=scale, enable_gqa=grouped
        )
        return out_1HTE[0].transpose(0, 1)
    blocks = []
    for begin in range(0, len(q_THD), _QUERY_BLOCK):
        end = min(begin + _QUERY_BLOCK, len(q_THD))
        seen = start + end
        mask = torch.ones(end - begin, seen, dtype=torch.bool, device=q_THD.device).tril(start + begin)
        out_1HTE = F.scaled_dot_product_attention(
            q_1HTD[:, :, begin:end],
            k_1KLD[:, :, :seen],
            v_1KLE[:, :, :seen],
            attn_mask=mask,
            scale=scale,
            enable_gqa=grouped,
        )
        blocks.append(out_1HTE[0].transpose(0, 1))
    return torch.cat(blocks)


def _causal_by_rule(
    q_THD: Tensor, k_LKD: Tensor, v_LKE: Tensor, start: int, scale: float, rule: AttentionRule
) -> Tensor:
    k_K1LD, v_K1LE = (x.transpose(0, 1).unsqueeze(1) for x in (k_LKD, v_LKE))
    blocks = []
    for begin in range(0, len(q_THD), _QUERY_BLOCK):
        q_KGQD = q_THD[begin : begin + _QUERY_BLOCK].transpose(0, 1).unflatten(0, (len(k_K1LD), -1))
        num_queries, seen = q_KGQD.shape[2], start + begin + q_KGQD.shape[2]
        mask_QL = torch.ones(num_queries, seen, dtype=torch.bool, device=q_THD.device).tril(start + begin)
        if rule.window:
            mask_QL = mask_QL.triu(start + begin + 1 - rule.window)
        out_KGQE = _softmax_of(q_KGQD, k_K1LD[:, :, :seen], v_K1LE[:, :, :seen], mask_QL, scale, rule)
        blocks.append(out_KGQE.flatten(0, 1).transpose(0, 1))
    return torch.cat(blocks)


def _softmax_of(
    q_KGQD: Tensor, k_K1LD: Tensor, v_K1LE: Tensor, mask_QL: Tensor, scale: float, rule: AttentionRule
) -> Tensor:
    """Attention in float32 of [..., K, G, Q, D] to the positions that ``mask_QL`` leaves."""
    scores = (q_KGQD.float() @ k_K1LD.float().mT * scale).masked_fill(~mask_QL, float("-inf"))
    if rule.sinks_H is not None:
        sinks_KG11 = rule.sinks_H.view(*scores.shape[-4:-2], 1, 1)
        scores = torch.cat([scores, sinks_KG11.expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : k_K1LD.shape[-2]]
    return (weights @ v_K1LE.float()).to(q_KGQD.dtype)


def _decode(
    q_RHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    group: DecodeGroup,
    page_size: int,
    scale: float,
    rule: AttentionRule,
) -> Tensor:
    """One query per row over its own pages, padded to the longest row of the group. Returns [R, H,
    D].

    The G query heads that share a key head take the place of a sequence of queries, so that keys
    are read once.
    """
    k_RKLD, v_RKLD = (
        gather_heads(cache, group.pages, page_size, q_RHD.shape[2], q_RHD.dtype)
        .unflatten(0, (group.num_rows, -1))
        .transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    q_RKGD = q_RHD.unflatten(1, (k_RKLD.shape[1], -1))
    if not rule.plain:
        mask = group.mask
        if rule.window:
            mask = mask & (mask.flip(-1).cumsum(-1).flip(-1) <= rule.window)
        q_RKG1D = q_RKGD.unsqueeze(3)
        k_RK1LD = k_RKLD.unsqueeze(2)
        v_RK1LD = v_RKLD.unsqueeze(2)
        return _softmax_of(q_RKG1D, k_RK1LD, v_RK1LD, mask.unsqueeze(3), scale, rule).squeeze(3).flatten(1, 2)
    return F.scaled_dot_product_attention(q_RKGD, k_RKLD, v_RKLD, attn_mask=group.mask, scale=scale).flatten(
        1, 2
    )
