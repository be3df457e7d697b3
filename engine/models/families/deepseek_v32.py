"""DeepSeek-V3.2 (arXiv 2512.02556): DeepSeek-V3 whose latent attention sees the positions that an
indexer chooses.
"""

from __future__ import annotations

from dataclasses import replace

from ..config import Blocks, Family, IndexerConfig
from ..config_blocks import layers_beyond, named_layers, read_corrected_moe, read_mla, read_rope
from ..config_fields import Fields

_INDEXED = "indexed_attention"


def _read(fields: Fields) -> Blocks:
    fields.expect("rope_interleave", True)
    fields.expect("moe_layer_freq", 1)
    if set(fields.raw("layer_types") or [_INDEXED]) != {_INDEXED}:
        raise fields.refuse("layer_types", f'supported: "{_INDEXED}" in every layer')
    rope = read_rope(fields, fields.integer("qk_rope_head_dim"), interleaved=True)
    fields.integer("q_lora_rank")  # the indexer reads the latent of the queries
    indexer = IndexerConfig(
        num_heads=fields.integer("index_n_heads", 64),
        head_dim=fields.integer("index_head_dim", 128),
        top_k=fields.integer("index_topk", 2048),
    )
    if indexer.head_dim < rope.dim:
        raise fields.refuse("index_head_dim", f"expected at least qk_rope_head_dim ({rope.dim})")
    attention = replace(read_mla(fields), indexer=indexer)
    moe = read_corrected_moe(fields, num_shared=1)
    layers = named_layers(fields, num_dense=3)
    return Blocks(attention, rope, moe, layers, num_predict_layers=layers_beyond(fields))


FAMILY = Family("deepseek_v32", ("DeepseekV32ForCausalLM",), ("deepseek_v32",), _read)
