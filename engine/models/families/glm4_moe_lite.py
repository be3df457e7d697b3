"""GLM-4.7-Flash: DeepSeek-V3's latent attention, gate and shared experts, the first layer dense.

Layers after the last predict further tokens in training (``num_nextn_predict_layers``) and are not
loaded.
"""

from __future__ import annotations

from ..config import Blocks, Family
from ..config_blocks import layers_beyond, read_corrected_moe, read_mla, read_rope
from ..config_fields import Fields

_KINDS = {"dense", "sparse"}


def _read(fields: Fields) -> Blocks:
    rope = read_rope(fields, fields.integer("qk_rope_head_dim"), fields.flag("rope_interleave", True))
    moe = read_corrected_moe(fields, num_shared=1)
    return Blocks(
        read_mla(fields), rope, moe, _sparse_layers(fields), num_predict_layers=layers_beyond(fields)
    )


def _sparse_layers(fields: Fields) -> tuple[int, ...]:
    """The layers with experts, which one of two fields names."""
    num_layers, kinds = fields.integer("num_hidden_layers"), fields.raw("mlp_layer_types")
    if kinds is None:
        return tuple(range(fields.integer("first_k_dense_replace", 1, minimum=0), num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in _KINDS for kind in kinds):
        raise fields.refuse(
            "mlp_layer_types", f'expected "dense" or "sparse" for each of {num_layers} layers'
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "sparse")


FAMILY = Family("glm4_moe_lite", ("Glm4MoeLiteForCausalLM",), ("glm4_moe_lite",), _read, norm_eps=1e-5)
