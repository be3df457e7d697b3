"""Hy3: grouped-query attention with norms of queries and keys, a sigmoid gate with a selection bias
and a scale, and a shared expert.
"""

from __future__ import annotations

from ....moe.config import MoEConfig
from ..config import Blocks, CheckpointNames, Family
from ..config_blocks import check_choice, layers_beyond, named_layers, read_gqa, read_rope
from ..config_fields import Fields

_NAMES = CheckpointNames(
    renamed=(
        ("mlp.gate.e_score_correction_bias", "mlp.expert_bias"),
        ("mlp.gate.", "mlp.router.gate."),
        ("mlp.shared_experts.", "mlp.shared_mlp."),
    ),
)
_ALWAYS = ("qk_norm", "route_norm", "moe_router_use_sigmoid", "moe_router_enable_expert_bias")


def _read(fields: Fields) -> Blocks:
    fields.expect("mlp_bias", False)
    for always in _ALWAYS:
        fields.expect(always, True)
    bias = fields.flag("attention_bias", False)
    attention = read_gqa(fields, qkv_bias=bias, out_bias=bias, qk_norm=True)
    width = fields.integer("moe_intermediate_size")
    moe = MoEConfig(
        hidden=fields.integer("hidden_size"),
        expert_width=width,
        num_experts=fields.integer("num_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        scoring="sigmoid",
        scale=fields.number("router_scaling_factor", 2.826),
        selection_bias=True,
        shared_width=width * fields.integer("num_shared_experts", 1),
    )
    rope = read_rope(fields, attention.head_dim, interleaved=False, theta=11158840.0)
    return Blocks(
        attention,
        rope,
        check_choice(fields, moe),
        named_layers(fields),
        _NAMES,
        num_predict_layers=layers_beyond(fields),
    )


FAMILY = Family("hy_v3", ("HYV3ForCausalLM",), ("hy_v3",), _read, norm_eps=1e-5)
