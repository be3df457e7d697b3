"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): grouped-query attention with biases, softmax gate,
and a shared expert with a gate of its own for its output.
"""

from __future__ import annotations

from ....moe.config import MoEConfig
from ..config import Blocks, CheckpointNames, Family
from ..config_blocks import (
    check_choice,
    expect_full_attention,
    first_present,
    read_gqa,
    read_rope,
    sparse_layers,
)
from ..config_fields import Fields

_NAMES = CheckpointNames(
    renamed=(
        ("mlp.shared_experts.gate.", "mlp.shared_expert_gate."),
        ("mlp.shared_experts.", "mlp.shared_expert."),
    ),
)


def _read(fields: Fields) -> Blocks:
    expect_full_attention(fields)
    attention = read_gqa(fields, qkv_bias=fields.flag("qkv_bias", True))
    moe = MoEConfig(
        hidden=fields.integer("hidden_size"),
        expert_width=fields.integer("moe_intermediate_size"),
        num_experts=fields.integer(first_present(fields, "num_experts", "num_local_experts")),
        top_k=fields.integer("num_experts_per_tok"),
        normalise=fields.flag("norm_topk_prob", False),
        shared_width=fields.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    rope = read_rope(fields, attention.head_dim, interleaved=False)
    return Blocks(attention, rope, check_choice(fields, moe), sparse_layers(fields), _NAMES)


FAMILY = Family("qwen2_moe", ("Qwen2MoeForCausalLM",), ("qwen2_moe",), _read)
