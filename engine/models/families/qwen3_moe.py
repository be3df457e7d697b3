"""Qwen3-MoE (arXiv 2505.09388): grouped-query attention with normalised queries and keys, softmax
gate.
"""

from __future__ import annotations

from ....moe.config import MoEConfig
from ..config import Blocks, Family
from ..config_blocks import (
    check_choice,
    expect_full_attention,
    first_present,
    read_gqa,
    read_rope,
    sparse_layers,
)
from ..config_fields import Fields


def _read(fields: Fields) -> Blocks:
    expect_full_attention(fields)
    bias = fields.flag("attention_bias", False)
    attention = read_gqa(fields, qkv_bias=bias, out_bias=bias, qk_norm=True)
    moe = MoEConfig(
        hidden=fields.integer("hidden_size"),
        expert_width=fields.integer("moe_intermediate_size"),
        num_experts=fields.integer(first_present(fields, "num_experts", "num_local_experts")),
        top_k=fields.integer("num_experts_per_tok"),
        normalise=fields.flag("norm_topk_prob", False),
    )
    rope = read_rope(fields, attention.head_dim, interleaved=False)
    return Blocks(attention, rope, check_choice(fields, moe), sparse_layers(fields))


FAMILY = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), ("qwen3_moe",), _read)
