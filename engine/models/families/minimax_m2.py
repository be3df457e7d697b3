"""MiniMax-M2 to M2.7: grouped-query attention that rotates a part of each head and normalises
queries and keys over all heads at once, a sigmoid gate with a selection bias, Mixtral's names.
"""

from __future__ import annotations

from ....moe.config import MoEConfig
from ..config import Blocks, CheckpointNames, Family
from ..config_blocks import check_choice, read_gqa, read_rope, rotated_part
from ..config_fields import Fields

_NAMES = CheckpointNames(
    renamed=(("mlp.gate.e_score", "block_sparse_moe.e_score"), ("mlp.", "block_sparse_moe.")),
    projections=("w1", "w3", "w2"),
)
_FULL_ATTENTION = 1  # in attn_type_list


def _read(fields: Fields) -> Blocks:
    fields.expect("scoring_func", "sigmoid")
    fields.expect("use_routing_bias", True)
    fields.expect("use_qk_norm", True)
    fields.expect("qk_norm_type", "per_layer")
    fields.expect("shared_intermediate_size", 0)
    if set(fields.integers("attn_type_list")) - {_FULL_ATTENTION}:
        raise fields.refuse("attn_type_list", f"supported: {_FULL_ATTENTION} in every layer")
    attention = read_gqa(fields, qk_norm=True, wide_norm=True)
    moe = MoEConfig(
        hidden=fields.integer("hidden_size"),
        expert_width=fields.integer("intermediate_size"),
        num_experts=fields.integer("num_local_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        scoring="sigmoid",
        selection_bias=True,
    )
    part = rotated_part(fields, fields.integer("rotary_dim", attention.head_dim) / attention.head_dim)
    rope = read_rope(fields, attention.head_dim, interleaved=False, theta=5e6, part=part)
    return Blocks(
        attention,
        rope,
        check_choice(fields, moe),
        tuple(range(fields.integer("num_hidden_layers"))),
        _NAMES,
        num_predict_layers=fields.integer("num_mtp_modules", 0, minimum=0),
    )


FAMILY = Family("minimax_m2", ("MiniMaxM2ForCausalLM",), ("minimax_m2",), _read)
