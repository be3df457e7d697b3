"""Mistral-Small-4 and Mistral-Large-3: DeepSeek-V3's latent attention with queries that grow with
their position, a softmax gate, shared experts.

Scores are scaled as the checkpoint says: in transformers' format by YaRN's ``mscale_all_dim``, as
transformers does since 5.17; not at all in Mistral's own, which has ``apply_scale: false``.
"""

from __future__ import annotations

from dataclasses import replace

from ....moe.config import MoEConfig
from ..config import Blocks, Family
from ..config_blocks import check_choice, layers_after_dense, read_mla, read_rope
from ..config_fields import Fields


def _read(fields: Fields) -> Blocks:
    if not (fields.has("rope_parameters") or fields.has("rope_scaling")):
        raise fields.refuse("rope_parameters", "expected those of YaRN")
    attention = read_mla(fields)
    width = fields.integer("moe_intermediate_size")
    moe = MoEConfig(
        hidden=fields.integer("hidden_size"),
        expert_width=width,
        num_experts=fields.integer("n_routed_experts"),
        top_k=fields.integer("num_experts_per_tok", 4),
        normalise=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 1.0),
        num_groups=fields.integer("n_group", 1),
        top_groups=fields.integer("topk_group", 1),
        shared_width=width * fields.integer("n_shared_experts", 1, minimum=0),
    )
    head = attention.nope_dim + attention.rope_dim
    interleaved = fields.flag("rope_interleave", True)
    rope = read_rope(fields, head, interleaved, part=attention.rope_dim / head, grows=True)
    rope = replace(rope, dim=attention.rope_dim)
    return Blocks(attention, rope, check_choice(fields, moe), layers_after_dense(fields))


FAMILY = Family("mistral4", ("Mistral4ForCausalLM",), ("mistral4",), _read)
