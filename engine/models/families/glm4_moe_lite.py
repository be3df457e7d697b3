"""GLM-4.7-Flash: DeepSeek-V3's latent attention, gate and shared experts, the first layer dense.

Layers after the last predict further tokens in training (``num_nextn_predict_layers``) and are not
loaded.
"""

from __future__ import annotations

from ..config import Blocks, Family
from ..config_blocks import layers_beyond, named_layers, read_corrected_moe, read_mla, read_rope
from ..config_fields import Fields


def _read(fields: Fields) -> Blocks:
    rope = read_rope(fields, fields.integer("qk_rope_head_dim"), fields.flag("rope_interleave", True))
    moe = read_corrected_moe(fields, num_shared=1)
    return Blocks(read_mla(fields), rope, moe, named_layers(fields), num_predict_layers=layers_beyond(fields))


FAMILY = Family("glm4_moe_lite", ("Glm4MoeLiteForCausalLM",), ("glm4_moe_lite",), _read, norm_eps=1e-5)
