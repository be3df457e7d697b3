"""GLM-5 to GLM-5.2 (arXiv 2602.15763): DeepSeek-V3.2's attention with indexers that rotate
neighbours, DeepSeek-V3's gate and shared experts, the first three layers dense. In GLM-5.2 most
layers look at what the indexer of a layer before them chose (arXiv 2603.12201).
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

_LETTERS = {"F": "full", "S": "shared"}


def _followers(fields: Fields) -> tuple[int, ...]:
    """The layers without an indexer, which one of three fields names."""
    num_layers = fields.integer("num_hidden_layers")
    name = "indexer_types" if fields.has("indexer_types") else "index_topk_pattern"
    kinds = fields.raw(name)
    if kinds is None:
        every = fields.integer("index_topk_freq", 1)
        first = fields.integer("index_skip_topk_offset", 2, minimum=0)
        return tuple(layer for layer in range(num_layers) if max(layer - first + 1, 0) % every)
    if isinstance(kinds, str):
        kinds = [_LETTERS.get(letter) for letter in kinds]
    known = isinstance(kinds, list) and all(kind in _LETTERS.values() for kind in kinds)
    if not known or len(kinds) != num_layers:
        raise fields.refuse(name, f'expected "full" or "shared" for each of {num_layers} layers')
    if kinds[0] == "shared":
        raise fields.refuse(name, 'expected "full" for the first layer')
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "shared")


def _read(fields: Fields) -> Blocks:
    fields.expect("rope_interleave", True)
    fields.expect("indexer_rope_interleave", True)
    rope = read_rope(fields, fields.integer("qk_rope_head_dim"), interleaved=True)
    indexer = read_indexer(fields, num_heads=32)
    indexer = replace(indexer, interleaved=True, followers=_followers(fields))
    moe = read_corrected_moe(fields, num_shared=1)
    layers = named_layers(fields, num_dense=3)
    attention = replace(read_mla(fields), indexer=indexer)
    return Blocks(attention, rope, moe, layers, num_predict_layers=layers_beyond(fields))


FAMILY = Family("glm_moe_dsa", ("GlmMoeDsaForCausalLM",), ("glm_moe_dsa",), _read, norm_eps=1e-5)
