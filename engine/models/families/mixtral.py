"""Mixtral (arXiv 2401.04088): grouped-query attention, experts in every layer, softmax over the
chosen experts.
"""

from __future__ import annotations

from ....moe.config import MoEConfig
from ..config import Blocks, CheckpointNames, Family
from ..config_blocks import check_choice, read_gqa, read_rope
from ..config_fields import Fields

_NAMES = CheckpointNames(renamed=(("mlp.", "block_sparse_moe."),), projections=("w1", "w3", "w2"))


def _read(fields: Fields) -> Blocks:
    if fields.has("sliding_window"):
        raise fields.refuse("sliding_window", "supported: null")
    attention = read_gqa(fields)
    moe = MoEConfig(
        hidden=fields.integer("hidden_size"),
        expert_width=fields.integer("intermediate_size"),
        num_experts=fields.integer("num_local_experts"),
        top_k=fields.integer("num_experts_per_tok", 2),
    )
    rope = read_rope(fields, attention.head_dim, interleaved=False, theta=1e6)
    layers = tuple(range(fields.integer("num_hidden_layers")))
    return Blocks(attention, rope, check_choice(fields, moe), layers, _NAMES)


FAMILY = Family("mixtral", ("MixtralForCausalLM",), ("mixtral",), _read, norm_eps=1e-5)
