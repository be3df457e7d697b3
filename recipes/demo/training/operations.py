"""Training operations that would be slow in autograd, in plain torch: norms, attention inside
documents, and the routed experts.

Products are bf16, which matrix units of CPUs and GPUs are built for; sums over rows are float32.
``compiled.py`` has the same operations for one CPU core.

T tokens  H heads  N head dim  E rotated dims or experts  D hidden  F expert width
K experts per token  R = T x K rows and padding
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Angles = tuple[Tensor, Tensor]  # cosines and sines, float32 [T, rotated dims / 2]

EPSILON = 1e-6
_ROWS = 64
_FILL = 32
_BLOCK = 256  # rows of a block of scores, which stays in a CPU core's cache


class Operations:
    """The network's operations apart from linear layers."""

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root mean square norm of x (float32 or bf16), times ``weight`` (float32), to bf16."""
        out: Tensor = _Norm.apply(x, weight)  # type: ignore[no-untyped-call]
        return out

    def attend(
        self, q_THN: Tensor, kv_THN: Tensor, rope_TE: Tensor, angles: Angles, lengths: list[int], scale: float
    ) -> Tensor:
        """Causal attention inside each document of ``lengths``, [T, H, values]. kv_THN holds the
        first dims of the keys, and the values. The last dims of the queries, and the keys' last
        dims rope_TE, which all heads share, are still to be rotated.
        """
        nope = q_THN.shape[2] - rope_TE.shape[1]
        q_nope, q_rope = q_THN.split([nope, rope_TE.shape[1]], -1)
        k_nope, v_THN = kv_THN.split([nope, kv_THN.shape[2] - nope], -1)
        k_rope = rotate(rope_TE[:, None], angles).expand(-1, q_THN.shape[1], -1)
        q_THN = torch.cat([q_nope, rotate(q_rope, angles)], -1)
        k_THN = torch.cat([k_nope, k_rope], -1)
        operands = q_THN, k_THN, v_THN, lengths, scale
        out: Tensor = _DocumentAttention.apply(*operands)  # type: ignore[no-untyped-call]
        return out

    def swiglu(self, both: Tensor) -> Tensor:
        """SwiGLU of gates and values side by side."""
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up

    def run_experts(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13_EFD: Tensor, w2_EDF: Tensor
    ) -> Tensor:
        """Applies experts ids_TK to x_TD (bf16) and sums with weights_TK (float32). w13 holds the
        gate and up projections, w2 the down projection.
        """
        operands = x_TD, ids_TK, weights_TK, w13_EFD, w2_EDF
        out: Tensor = _RoutedExperts.apply(*operands)  # type: ignore[no-untyped-call]
        return out


def rotate(x_THE: Tensor, angles: Angles) -> Tensor:
    """Rotates the pairs (2i, 2i + 1); the result has the first members first."""
    cos, sin = (part[:, None] for part in angles)
    even, odd = x_THE[..., ::2], x_THE[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1).to(x_THE.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        plain = x.float()
        scale = plain.square().mean(-1, keepdim=True).add_(EPSILON).rsqrt_()
        unit = plain * scale
        ctx.save_for_backward(unit, scale, weight)
        ctx.dtype = x.dtype
        return (unit * weight).bfloat16()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        unit, scale, weight = ctx.saved_tensors
        grad = grads[0].float()
        dweight = (grad * unit).flatten(0, -2).sum(0)
        grad = grad.mul_(weight)
        mean = (grad * unit).mean(-1, keepdim=True)
        return grad.addcmul_(unit, mean, value=-1).mul_(scale).to(ctx.dtype), dweight


class _DocumentAttention(torch.autograd.Function):
    """Causal attention of q_THN, k_THN and v_THN (bf16) inside each document of ``lengths``.

    Documents are padded to a multiple of ``_FILL`` tokens with zeros at the end, where causality
    hides them.
    """

    @staticmethod
    def forward(
        ctx: Any, q_THN: Tensor, k_THN: Tensor, v_THN: Tensor, lengths: list[int], scale: float
    ) -> Tensor:
        filled = [-(-length // _FILL) * _FILL for length in lengths]
        places_T = _filled_places(lengths, filled).to(q_THN.device)
        q, k, v = (_fill(x, places_T, sum(filled)) for x in (q_THN, k_THN, v_THN))
        out = torch.empty_like(q)
        saved = []
        q *= scale
        future = torch.full((_BLOCK, _BLOCK), float("-inf"), device=q.device).triu_(1)
        for first, row, last in _blocks(filled):
            scores = torch.bmm(q[:, row:last].float(), k[:, first:last].float().transpose(1, 2))
            scores[:, :, row - first :] += future[: last - row, : last - row]
            chances = scores.softmax(-1).to(q.dtype)
            torch.bmm(chances, v[:, first:last], out=out[:, row:last])
            saved.append(chances)
        ctx.save_for_backward(q, k, v, out, places_T, *saved)
        ctx.filled, ctx.scale = filled, scale
        return out.index_select(1, places_T).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, places_T, *saved = ctx.saved_tensors
        grad = _fill(grads[0], places_T, q.shape[1])
        inner = (grad.float() * out.float()).sum(-1, keepdim=True)
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        for (first, row, last), chances in zip(_blocks(ctx.filled), saved, strict=True):
            part = grad[:, row:last]
            dv[:, first:last] += torch.bmm(chances.transpose(1, 2), part)
            dscores = (
                torch.bmm(part, v[:, first:last].transpose(1, 2))
                .float()
                .sub_(inner[:, row:last])
                .mul_(chances.float())
                .to(q.dtype)
            )
            torch.bmm(dscores, k[:, first:last], out=dq[:, row:last])
            dk[:, first:last] += torch.bmm(dscores.transpose(1, 2), q[:, row:last])
        dq *= ctx.scale
        return *(x.index_select(1, places_T).transpose(0, 1) for x in (dq, dk, dv)), None, None


def _filled_places(lengths: list[int], filled: list[int]) -> Tensor:
    """Place of each token in the padded documents."""
    offsets = torch.tensor([0, *filled]).cumsum(0)[:-1] - torch.tensor([0, *lengths]).cumsum(0)[:-1]
    return torch.arange(sum(lengths)) + offsets.repeat_interleave(torch.tensor(lengths))


def _fill(x_THN: Tensor, places_T: Tensor, size: int) -> Tensor:
    """Puts heads first and tokens at their places, with zeros between."""
    return x_THN.new_zeros(x_THN.shape[1], size, x_THN.shape[2]).index_copy_(
        1, places_T, x_THN.transpose(0, 1)
    )


def _blocks(lengths: list[int]) -> list[tuple[int, int, int]]:
    """First token of the document, first and last row, for each block."""
    found, start = [], 0
    for length in lengths:
        found += [
            (start, row, min(row + _BLOCK, start + length)) for row in range(start, start + length, _BLOCK)
        ]
        start += length
    return found


class _RoutedExperts(torch.autograd.Function):
    """Rows are sorted by expert, and each expert's rows are padded to a multiple of ``_ROWS`` with
    zeros, because oneDNN compiles a kernel for every new number of rows.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor
    ) -> Tensor:
        num, top_k = ids_TK.shape
        place_R, ends = _places(ids_TK, len(w13))
        token_R = torch.arange(num, device=x_TD.device).repeat_interleave(top_k)
        x_RD = x_TD.new_zeros(ends[-1], x_TD.shape[1]).index_copy_(0, place_R, x_TD.index_select(0, token_R))
        up_RF = x_RD.new_empty(len(x_RD), w13.shape[1])
        multiply_experts(x_RD, w13, ends, up_RF)
        gate, up = up_RF.chunk(2, -1)
        act_RF = F.silu(gate) * up
        y_RD = torch.empty_like(x_RD)
        multiply_experts(act_RF, w2, ends, y_RD)
        ctx.save_for_backward(x_RD, up_RF, act_RF, y_RD, place_R, weights_TK, w13, w2)
        ctx.ends = ends
        y_TKD = y_RD.index_select(0, place_R).view(num, top_k, -1)
        return torch.bmm(weights_TK[:, None].to(y_TKD.dtype), y_TKD).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, up_RF, act_RF, y_RD, place_R, weights_TK, w13, w2 = ctx.saved_tensors
        num, top_k = weights_TK.shape
        y_TKD = y_RD.index_select(0, place_R).view(num, top_k, -1)
        dweights_TK = torch.bmm(y_TKD, grads[0][:, :, None]).squeeze(2)
        dy_TKD = grads[0][:, None] * weights_TK[:, :, None].to(y_RD.dtype)
        dy_RD = torch.zeros_like(y_RD).index_copy_(0, place_R, dy_TKD.view(num * top_k, -1))
        dact_RF = torch.empty_like(act_RF)
        dup_RF = torch.empty_like(up_RF)
        dx_RD = torch.empty_like(x_RD)
        dw2 = multiply_experts_back(dy_RD, act_RF, w2, ctx.ends, dact_RF)
        gate, up = up_RF.chunk(2, -1)
        width = act_RF.shape[1]
        dup_RF[:, :width] = torch.ops.aten.silu_backward(dact_RF * up, gate.contiguous())
        torch.mul(dact_RF, F.silu(gate), out=dup_RF[:, width:])
        dw13 = multiply_experts_back(dup_RF, x_RD, w13, ctx.ends, dx_RD)
        dx_TD = dx_RD.index_select(0, place_R).view(num, top_k, -1).sum(1)
        return dx_TD, None, dweights_TK.float(), dw13, dw2


def _places(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """The row of each (token, choice), and the end of each expert's rows."""
    ids_R = ids_TK.flatten()
    counts_E = torch.bincount(ids_R, minlength=num_experts)
    padded_E = (counts_E + _ROWS - 1) // _ROWS * _ROWS
    ends_E = padded_E.cumsum(0)
    order_R = ids_R.argsort(stable=True)
    first_E = counts_E.cumsum(0) - counts_E
    sorted_R = ids_R[order_R]
    row_R = torch.arange(len(ids_R), device=ids_R.device) - first_E[sorted_R] + (ends_E - padded_E)[sorted_R]
    return torch.empty_like(order_R).scatter_(0, order_R, row_R), ends_E.tolist()


def _spans(ends: list[int]) -> list[tuple[int, slice]]:
    """Experts that have rows, and their rows."""
    return [
        (expert, slice(start, end))
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        if end > start
    ]


def multiply_experts(x_RI: Tensor, weights: Tensor, ends: list[int], out: Tensor) -> None:
    """Multiplies each expert's rows by its weights [E, outputs, inputs], into ``out``."""
    for expert, rows in _spans(ends):
        torch.mm(x_RI[rows], weights[expert].T, out=out[rows])


def multiply_experts_back(
    grad: Tensor, x_RI: Tensor, weights: Tensor, ends: list[int], dx_RI: Tensor
) -> Tensor:
    """Gradients of ``multiply_experts``: with respect to its rows, into ``dx_RI``; with respect to
    the weights, returned.
    """
    dweights = torch.zeros_like(weights)
    for expert, rows in _spans(ends):
        torch.mm(grad[rows], weights[expert], out=dx_RI[rows])
        torch.mm(grad[rows].T, x_RI[rows], out=dweights[expert])
    return dweights
