"""Readers of ``config.json`` that several families share: rotary embedding, attention, groups of
experts. No torch here.

Both generations of the file are read: ``rope_theta`` and ``rope_scaling`` (transformers 4) or
``rope_parameters`` (5).
"""

from __future__ import annotations

import math

from ...moe.config import MoEConfig
from .config import GqaConfig, IndexerConfig, MlaConfig, QueryGrowth, RopeConfig, YarnConfig
from .config_fields import Fields

_SLIDING = "sliding_attention"
_INDEXED = "indexed_attention"
_GROWTH = "llama_4_scaling_beta"
_MLP_KINDS = {"dense", "sparse"}


def read_rope(
    fields: Fields,
    dim: int,
    interleaved: bool,
    theta: float = 10000.0,
    part: float = 1.0,
    grows: bool = False,
) -> RopeConfig:
    """The rotary embedding of heads of ``dim`` values. ``theta`` is the family's default. ``part``:
    the fraction of a head that the family rotates; a file with another value is refused, and one
    whose queries grow with their position unless the family ``grows``.
    """
    scaling = _scaling(fields)
    owner = scaling if scaling is not None and scaling.has("rope_theta") else fields
    for holder in (fields, scaling):
        if holder is not None:
            holder.expect("partial_rotary_factor", part)
    rotated = int(dim * part)
    if rotated % 2:
        raise ValueError(f"{fields.source}: the rotary dimension is {rotated}; expected an even number")
    if scaling is not None and not grows:
        scaling.expect(_GROWTH, 0)
    return RopeConfig(
        rotated,
        owner.number("rope_theta", theta),
        interleaved,
        _yarn(fields, scaling),
        _growth(fields, scaling) if grows else None,
    )


def read_gqa(
    fields: Fields,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: bool = False,
    wide_norm: bool = False,
    sinks: bool = False,
) -> GqaConfig:
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.refuse("num_key_value_heads", f"expected a divisor of num_attention_heads ({num_heads})")
    head_dim = fields.integer("head_dim", fields.integer("hidden_size") // num_heads)
    return GqaConfig(num_heads, num_kv_heads, head_dim, qkv_bias, out_bias, qk_norm, wide_norm, sinks)


def read_mla(fields: Fields) -> MlaConfig:
    nope_dim = fields.integer("qk_nope_head_dim")
    rope_dim = fields.integer("qk_rope_head_dim")
    scale = (nope_dim + rope_dim) ** -0.5
    scaling = _scaling(fields)
    yarn = _yarn(fields, scaling)
    if scaling is not None and yarn is not None and scaling.raw("mscale_all_dim"):
        scale *= _yarn_magnitude(yarn.factor, scaling.number("mscale_all_dim")) ** 2
    return MlaConfig(
        num_heads=fields.integer("num_attention_heads"),
        q_latent=fields.optional_integer("q_lora_rank"),
        kv_latent=fields.integer("kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=fields.integer("v_head_dim"),
        scale=scale,
        bias=fields.flag("attention_bias", False),
    )


def read_indexer(fields: Fields, num_heads: int) -> IndexerConfig:
    """An indexer of every layer's latent attention, by default of ``num_heads``."""
    if set(fields.raw("layer_types") or [_INDEXED]) != {_INDEXED}:
        raise fields.refuse("layer_types", f'supported: "{_INDEXED}" in every layer')
    fields.integer("q_lora_rank")  # the indexer reads the latent of the queries
    indexer = IndexerConfig(
        num_heads=fields.integer("index_n_heads", num_heads),
        head_dim=fields.integer("index_head_dim", 128),
        top_k=fields.integer("index_topk", 2048),
    )
    rotated = fields.integer("qk_rope_head_dim")
    if indexer.head_dim < rotated:
        raise fields.refuse("index_head_dim", f"expected at least qk_rope_head_dim ({rotated})")
    return indexer


def layers_after_dense(fields: Fields) -> tuple[int, ...]:
    """The layers with experts if the first ones are dense (DeepSeek, GLM)."""
    fields.expect("moe_layer_freq", 1)
    return tuple(
        range(fields.integer("first_k_dense_replace", 0, minimum=0), fields.integer("num_hidden_layers"))
    )


def sparse_layers(fields: Fields) -> tuple[int, ...]:
    """The layers with experts if every n-th one has them, with exceptions (Qwen)."""
    period = fields.integer("decoder_sparse_step", 1)
    dense = fields.integers("mlp_only_layers")
    return tuple(
        i for i in range(fields.integer("num_hidden_layers")) if i not in dense and (i + 1) % period == 0
    )


def named_layers(fields: Fields, num_dense: int = 1) -> tuple[int, ...]:
    """The layers with experts, which one of two fields names; by default all but the first
    ``num_dense``.
    """
    num_layers = fields.integer("num_hidden_layers")
    kinds = fields.raw("mlp_layer_types")
    if kinds is None:
        return tuple(range(fields.integer("first_k_dense_replace", num_dense, minimum=0), num_layers))
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or not all(kind in _MLP_KINDS for kind in kinds)
    ):
        raise fields.refuse(
            "mlp_layer_types", f'expected "dense" or "sparse" for each of {num_layers} layers'
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "sparse")


def expect_full_attention(fields: Fields) -> None:
    """Refuses layers that attend to a window only."""
    fields.expect("use_sliding_window", False)
    if set(fields.raw("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise fields.refuse("layer_types", 'supported: "full_attention" in every layer')


def read_windows(fields: Fields) -> tuple[int, ...]:
    """The windows of layers that take turns with layers that see all positions (gpt-oss); none
    where no layer has one.
    """
    kinds = fields.raw("layer_types")
    num_layers = fields.integer("num_hidden_layers")
    if kinds is None:
        kinds = ["full_attention" if layer % 2 else _SLIDING for layer in range(num_layers)]
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or not set(kinds) <= {_SLIDING, "full_attention"}
    ):
        allowed = f'expected "{_SLIDING}" or "full_attention" for each of {num_layers} layers'
        raise fields.refuse("layer_types", allowed)
    if _SLIDING not in kinds:
        return ()
    window = fields.integer("sliding_window", 128)
    return tuple(window if kind == _SLIDING else 0 for kind in kinds)


def read_corrected_moe(fields: Fields, num_shared: int) -> MoEConfig:
    """DeepSeek-V3's experts (arXiv 2412.19437, section 2.1.2), which other families use too: a
    sigmoid gate with a selection bias, and by default ``num_shared`` shared experts.
    """
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    width = fields.integer("moe_intermediate_size")
    moe = MoEConfig(
        hidden=fields.integer("hidden_size"),
        expert_width=width,
        num_experts=fields.integer(first_present(fields, "n_routed_experts", "num_local_experts")),
        top_k=fields.integer("num_experts_per_tok"),
        scoring="sigmoid",
        normalise=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 1.0),
        num_groups=fields.integer("n_group", 1),
        top_groups=fields.integer("topk_group", 1),
        selection_bias=True,
        shared_width=width * fields.integer("n_shared_experts", num_shared, minimum=0),
    )
    return check_choice(fields, moe)


def layers_beyond(fields: Fields) -> int:
    """The number of layers after the last one that predict further tokens."""
    return fields.integer(first_present(fields, "num_nextn_predict_layers", "num_mtp_layers"), 0, minimum=0)


def check_choice(fields: Fields, moe: MoEConfig) -> MoEConfig:
    """Returns ``moe``. Raises ValueError if fewer experts are eligible than a token chooses."""
    if moe.top_k > moe.num_experts:
        raise fields.refuse(
            "num_experts_per_tok", f"expected at most the number of experts ({moe.num_experts})"
        )
    least = 2 if moe.group_quality == "best_two" else 1
    if moe.num_groups > 1 and (moe.num_experts % moe.num_groups or moe.num_experts < least * moe.num_groups):
        raise fields.refuse(
            "n_group", f"expected groups of equal size, {least} or more of the {moe.num_experts} experts each"
        )
    if moe.top_groups > moe.num_groups:
        raise fields.refuse("topk_group", f"expected at most n_group ({moe.num_groups})")
    if moe.top_k > moe.num_experts // moe.num_groups * moe.top_groups:
        raise fields.refuse(
            "num_experts_per_tok", f"expected at most the experts of topk_group ({moe.top_groups}) groups"
        )
    return moe


def rotated_part(fields: Fields, default: float) -> float:
    """The fraction of a head that is rotated."""
    scaling = _scaling(fields)
    owner = scaling if scaling is not None and scaling.has("partial_rotary_factor") else fields
    part = owner.number("partial_rotary_factor", default)
    if part > 1.0:
        raise owner.refuse("partial_rotary_factor", "expected at most 1")
    return part


def first_present(fields: Fields, *names: str) -> str:
    """The first of ``names`` that the file has, or else the first one: generations of a file give
    one field different names.
    """
    return next((name for name in names if fields.has(name)), names[0])


def _scaling(fields: Fields) -> Fields | None:
    return fields.nested("rope_parameters") or fields.nested("rope_scaling")


def _yarn(fields: Fields, scaling: Fields | None) -> YarnConfig | None:
    if scaling is None:
        return None
    kind = first_present(scaling, "rope_type", "type")
    scaling.expect(kind, "default", "yarn")
    if scaling.raw(kind) != "yarn":
        return None
    length = fields.integer("max_position_embeddings")
    original = scaling.integer("original_max_position_embeddings", length)
    factor = scaling.number("factor", length / original)
    mscale = scaling.raw("mscale")
    mscale_all = scaling.raw("mscale_all_dim")
    if scaling.has("attention_factor"):
        magnitude = scaling.number("attention_factor")
    elif mscale and mscale_all:
        magnitude = _yarn_magnitude(factor, scaling.number("mscale")) / _yarn_magnitude(
            factor, scaling.number("mscale_all_dim")
        )
    else:
        magnitude = _yarn_magnitude(factor, 1.0)
    return YarnConfig(
        factor=factor,
        original_length=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        magnitude=magnitude,
    )


def _growth(fields: Fields, scaling: Fields | None) -> QueryGrowth | None:
    if scaling is None or not scaling.raw(_GROWTH):
        return None
    length = scaling.integer("original_max_position_embeddings", fields.integer("max_position_embeddings"))
    return QueryGrowth(scaling.number(_GROWTH), length)


def _yarn_magnitude(factor: float, weight: float) -> float:
    """The factor by which YaRN scales attention for a context stretched ``factor`` times (arXiv
    2309.00071, equation 22).
    """
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0
