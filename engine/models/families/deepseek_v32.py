"""DeepSeek-V3.2 (arXiv 2512.02556): DeepSeek-V3 whose latent attention sees the positions that an
indexer chooses.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import Blocks, Family
from ..config_blocks import (
    layers_beyond,
    named_layers,
    read_corrected_moe,
    read_indexer,
    read_mla,
    read_rope,
)
from ..config_fields import Fields


def _read(fields: Fields) -> Blocks:
    fields.expect("rope_interleave", True)
    fields.expect("moe_layer_freq", 1)
    rope = read_rope(fields, fields.integer("qk_rope_head_dim"), interleaved=True)
    attention = replace(read_mla(fields), indexer=read_indexer(fields, num_heads=64))
    moe = read_corrected_moe(fields, num_shared=1)
    layers = named_layers(fields, num_dense=3)
    return Blocks(attention, rope, moe, layers, num_predict_layers=layers_beyond(fields))


FAMILY = Family("deepseek_v32", ("DeepseekV32ForCausalLM",), ("deepseek_v32",), _read)
