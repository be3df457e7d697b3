"""GLM-4.5 (arXiv 2508.06471): grouped-query attention that rotates a part of each head, and
DeepSeek-V3's gate and shared experts.

Layers after the last predict further tokens in training (``num_nextn_predict_layers``) and are not
loaded.
"""

from __future__ import annotations

from ..config import Blocks, Family
from ..config_blocks import (
    layers_after_dense,
    layers_beyond,
    read_corrected_moe,
    read_gqa,
    read_rope,
    rotated_part,
)
from ..config_fields import Fields


def _read(fields: Fields) -> Blocks:
    attention = read_gqa(
        fields, qkv_bias=fields.flag("attention_bias", False), qk_norm=fields.flag("use_qk_norm", False)
    )
    moe = read_corrected_moe(fields, num_shared=1)
    rope = read_rope(fields, attention.head_dim, interleaved=False, part=rotated_part(fields, 0.5))
    return Blocks(attention, rope, moe, layers_after_dense(fields), num_predict_layers=layers_beyond(fields))


FAMILY = Family("glm4_moe", ("Glm4MoeForCausalLM",), ("glm4_moe",), _read, norm_eps=1e-5)
