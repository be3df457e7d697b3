"""The demo model for training: DeepSeek-V3 (arXiv 2412.19437) with one multi-token-prediction
layer, over packed documents.

Weights are float32 and rounded to bf16 when used, so that the exported checkpoint is the trained
function.

T tokens  D hidden  H heads  N unrotated dims  E rotated dims  K experts per token
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels.reference.gate import Routing, choose, expert_counts
from .operations import Angles, Operations

Shape = dict[str, Any]


@dataclass(frozen=True)
class Packed:
    """Concatenated documents: tokens_T int64, weights_T float32 (how much predicting a token
    counts), ``lengths``.
    """

    tokens_T: Tensor
    weights_T: Tensor
    lengths: list[int]

    @property
    def positions_T(self) -> Tensor:
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.tokens_T.device)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs).normal_(std=inputs**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.bfloat16())


class Norm(nn.Module):
    """Root mean square norm, from float32 or bf16 to bf16."""

    def __init__(self, size: int, operations: Operations) -> None:
        super().__init__()
        self.weight, self._operations = nn.Parameter(torch.ones(size)), operations

    def forward(self, x: Tensor) -> Tensor:
        return self._operations.normalise(x, self.weight)


class Attention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1)."""

    def __init__(self, c: Shape, operations: Operations) -> None:
        super().__init__()
        self._operations = operations
        self.heads, self.latent = c["num_attention_heads"], c["kv_lora_rank"]
        self.nope, self.rope, self.value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        self.q_a_proj = Linear(c["hidden_size"], c["q_lora_rank"])
        self.q_a_layernorm = Norm(c["q_lora_rank"], operations)
        self.q_b_proj = Linear(c["q_lora_rank"], self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = Linear(c["hidden_size"], self.latent + self.rope)
        self.kv_a_layernorm = Norm(self.latent, operations)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.value))
        self.o_proj = Linear(self.heads * self.value, c["hidden_size"])

    def forward(self, x_TD: Tensor, angles: Angles, lengths: list[int]) -> Tensor:
        q_THN = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD))).unflatten(-1, (self.heads, -1))
        latent, rope_TE = self.kv_a_proj_with_mqa(x_TD).split([self.latent, self.rope], -1)
        kv_THN = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1))
        out = self._operations.attend(
            q_THN, kv_THN, rope_TE, angles, lengths, (self.nope + self.rope) ** -0.5
        )
        y: Tensor = self.o_proj(out.flatten(1))
        return y


class Mlp(nn.Module):
    def __init__(self, hidden: int, width: int, operations: Operations) -> None:
        super().__init__()
        self._operations = operations
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        both = F.linear(x, torch.cat([self.gate_proj.weight, self.up_proj.weight]).bfloat16())
        y: Tensor = self.down_proj(self._operations.swiglu(both))
        return y


class Gate(nn.Module):
    """The router. ``balance`` moves ``e_score_correction_bias``; the gradient does not."""

    e_score_correction_bias: Tensor
    counts_E: Tensor

    def __init__(self, c: Shape) -> None:
        super().__init__()
        experts = c["n_routed_experts"]
        self.weight = nn.Parameter(
            torch.empty(experts, c["hidden_size"]).normal_(std=c["hidden_size"] ** -0.5)
        )
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.register_buffer("counts_E", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.routing = Routing(
            top_k=c["num_experts_per_tok"],
            scoring="sigmoid",
            normalise=c["norm_topk_prob"],
            scale=c["routed_scaling_factor"],
            num_groups=c["n_group"],
            top_groups=c["topk_group"],
        )
        self.last_ids_TK: Tensor | None = None

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        logits_TE = F.linear(x_TD.float(), self.weight.bfloat16().float())
        ids_TK, weights_TK = choose(logits_TE, self.e_score_correction_bias, self.routing)
        self.last_ids_TK = ids_TK
        if self.training:
            self.counts_E += expert_counts(ids_TK, len(self.counts_E))
        return ids_TK, weights_TK

    def balance(self, counts_E: Tensor, rate: float) -> None:
        """Auxiliary-loss-free balancing (arXiv 2408.15664): lowers the bias of experts above the
        mean load and raises it below.
        """
        self.e_score_correction_bias -= rate * (counts_E - counts_E.mean()).sign()


class Moe(nn.Module):
    def __init__(self, c: Shape, operations: Operations) -> None:
        super().__init__()
        self._operations = operations
        hidden, width, experts = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
        self.gate = Gate(c)
        self.w13 = nn.Parameter(torch.empty(experts, 2 * width, hidden).normal_(std=hidden**-0.5))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, width).normal_(std=width**-0.5))
        self.shared_experts = Mlp(hidden, width * c["n_shared_experts"], operations)

    def forward(self, x_TD: Tensor) -> Tensor:
        ids_TK, weights_TK = self.gate(x_TD)
        shared: Tensor = self.shared_experts(x_TD)
        return shared + self._operations.run_experts(
            x_TD, ids_TK, weights_TK, self.w13.bfloat16(), self.w2.bfloat16()
        )


class Layer(nn.Module):
    def __init__(self, c: Shape, dense: bool, operations: Operations) -> None:
        super().__init__()
        hidden = c["hidden_size"]
        self.input_layernorm = Norm(hidden, operations)
        self.post_attention_layernorm = Norm(hidden, operations)
        self.self_attn = Attention(c, operations)
        self.mlp = Mlp(hidden, c["intermediate_size"], operations) if dense else Moe(c, operations)

    def forward(self, x_TD: Tensor, angles: Angles, lengths: list[int]) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), angles, lengths)
        y_TD: Tensor = x_TD + self.mlp(self.post_attention_layernorm(x_TD))
        return y_TD


class Predictor(nn.Module):
    """The multi-token-prediction layer (section 2.2): from the final state at a token and the
    embedding of the next token to the state for the token after that.
    """

    def __init__(self, c: Shape, operations: Operations) -> None:
        super().__init__()
        hidden = c["hidden_size"]
        self.enorm = Norm(hidden, operations)
        self.hnorm = Norm(hidden, operations)
        self.eh_proj = Linear(2 * hidden, hidden)
        self.layer = Layer(c, False, operations)
        self.norm = Norm(hidden, operations)

    def forward(self, state_TD: Tensor, next_TD: Tensor, angles: Angles, lengths: list[int]) -> Tensor:
        x_TD = self.eh_proj(torch.cat([self.enorm(next_TD), self.hnorm(state_TD)], -1)).float()
        out: Tensor = self.norm(self.layer(x_TD, angles, lengths))
        return out


class Network(nn.Module):
    """The whole model. ``shape``: the fields of its ``config.json``; ``operations``: plain torch by
    default.
    """

    def __init__(self, shape: Shape, operations: Operations | None = None) -> None:
        super().__init__()
        operations = operations or Operations()
        c = self.shape = shape
        self.embed = nn.Parameter(torch.empty(c["vocab_size"], c["hidden_size"]).normal_(std=0.5))
        self.layers = nn.ModuleList(
            Layer(c, index < c["first_k_dense_replace"], operations)
            for index in range(c["num_hidden_layers"])
        )
        self.norm = Norm(c["hidden_size"], operations)
        self.head = Linear(c["hidden_size"], c["vocab_size"])
        self.predictor = Predictor(c, operations)
        nn.init.normal_(self.head.weight, std=0.02)

    def gates(self) -> list[Gate]:
        """Gates of all MoE layers, the predictor's last."""
        return [module for module in self.modules() if isinstance(module, Gate)]

    def states(self, batch: Packed) -> tuple[Tensor, Angles]:
        """The normalised final states [T, D], and the rotations used."""
        size = self.shape["qk_rope_head_dim"]
        turns = self.shape["rope_theta"] ** -(torch.arange(0, size, 2, device=batch.tokens_T.device) / size)
        radians = batch.positions_T[:, None].float() * turns
        angles = radians.cos(), radians.sin()
        x_TD = F.embedding(batch.tokens_T, self.embed).bfloat16().float()
        for layer in self.layers:
            x_TD = layer(x_TD, angles, batch.lengths)
        return self.norm(x_TD), angles

    def losses(self, batch: Packed, predict: bool) -> tuple[Tensor, Tensor]:
        """Weighted sums of the losses on the next token and, if ``predict``, on the token after
        it.
        """
        states_TD, angles = self.states(batch)
        loss = self._loss(states_TD, batch, 1)
        if not predict:
            return loss, torch.zeros(())
        next_TD = F.embedding(batch.tokens_T.roll(-1), self.embed)
        return loss, self._loss(self.predictor(states_TD, next_TD, angles, batch.lengths), batch, 2)

    def _loss(self, states_TD: Tensor, batch: Packed, ahead: int) -> Tensor:
        """Cross-entropy of the tokens ``ahead``. The first ``ahead`` tokens of a document are not
        predicted.
        """
        weights_T = batch.weights_T.masked_fill(batch.positions_T < ahead, 0.0)
        chosen = weights_T.nonzero().squeeze(1)
        logits = self.head(states_TD.index_select(0, chosen - ahead)).float()
        losses: Tensor = F.cross_entropy(logits, batch.tokens_T[chosen], reduction="none")
        total: Tensor = (losses * weights_T[chosen]).sum()
        return total
