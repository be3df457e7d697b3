"""DeepSeek-V3 (arXiv 2412.19437) and Kimi-K2 (arXiv 2507.20534), which has its architecture: latent
attention, a sigmoid gate with a selection bias, shared experts. Layers after the last predict
further tokens in training and are not loaded.
"""

from __future__ import annotations

from ..config import Blocks, Family
from ..config_blocks import layers_after_dense, layers_beyond, read_corrected_moe, read_mla, read_rope
from ..config_fields import Fields


def _read(fields: Fields) -> Blocks:
    moe = read_corrected_moe(fields, num_shared=0)
    rope = read_rope(fields, fields.integer("qk_rope_head_dim"), fields.flag("rope_interleave", True))
    return Blocks(
        read_mla(fields), rope, moe, layers_after_dense(fields), num_predict_layers=layers_beyond(fields)
    )


FAMILY = Family("deepseek_v3", ("DeepseekV3ForCausalLM",), ("deepseek_v3", "kimi_k2"), _read)
