"""What a model is: its Hugging Face ``config.json`` as a checked, frozen description. No torch here.

Both generations of the file are read: ``rope_theta`` and ``rope_scaling`` (transformers 4) or ``rope_parameters`` (5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...moe.config import MoEConfig
from .config_fields import Fields

Family = Literal["qwen3_moe", "deepseek_v3"]

_ARCHITECTURES: dict[str, Family] = {"Qwen3MoeForCausalLM": "qwen3_moe", "DeepseekV3ForCausalLM": "deepseek_v3"}
_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (arXiv 2309.00071): ``factor`` stretches ``original_length``; cos and sin are multiplied by ``magnitude``."""

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    magnitude: float


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding over ``dim`` values: pairs are (i, i + dim/2), or (2i, 2i + 1) when ``interleaved``."""

    dim: int
    theta: float
    interleaved: bool
    yarn: YarnConfig | None


@dataclass(frozen=True)
class GqaConfig:
    """Grouped-query attention; ``bias`` on all four projections."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (arXiv 2405.04434 section 2.1). ``q_latent`` None: queries are projected directly.

    ``scale`` multiplies the scores and holds YaRN's correction. ``bias`` on the projections from and to the hidden state.
    """

    num_heads: int
    q_latent: int | None
    kv_latent: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    bias: bool


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of ``num_layers`` layers, of which ``moe_layers`` (ascending) hold experts and the others a dense MLP.

    ``dtype`` is the checkpoint's own. ``max_position`` bounds the length of a sequence. ``eos_ids`` end a sequence.
    """

    family: Family
    vocab_size: int
    hidden: int
    num_layers: int
    max_position: int
    norm_eps: float
    tie_embeddings: bool
    dense_width: int
    eos_ids: tuple[int, ...]
    dtype: str
    moe_layers: tuple[int, ...]
    moe: MoEConfig
    attention: GqaConfig | MlaConfig
    rope: RopeConfig

    @property
    def kv_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The cache tensors of one layer: the shape of one token's entry in each.

        GQA: keys and values, each (kv_heads, head_dim). MLA: the latent beside the rotated key, (kv_latent + rope_dim,).
        """
        if isinstance(self.attention, MlaConfig):
            return ((self.attention.kv_latent + self.attention.rope_dim,),)
        entry = (self.attention.num_kv_heads, self.attention.head_dim)
        return (entry, entry)

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of cache one token takes over all layers."""
        return self.num_layers * dtype_bytes * sum(math.prod(shape) for shape in self.kv_shapes)


def load_config(path: Path) -> ModelConfig:
    """The description of the model in directory ``path``. Raises ValueError naming the file and field at fault."""
    if not path.is_dir():
        raise ValueError(f"{path}: not a directory; a model directory holds config.json and *.safetensors")
    fields = Fields.read(path / "config.json")
    family = _family(fields)
    if fields.has("quantization_config"):
        raise fields.refuse("quantization_config", "quantised checkpoints are not supported yet; use a bf16, fp16 or fp32 one")
    fields.expect("hidden_act", "silu")
    return _PARSERS[family](fields, _eos_ids(fields, path / "generation_config.json"))


def _family(fields: Fields) -> Family:
    names = fields.raw("architectures") or []
    if isinstance(names, list) and len(names) == 1 and names[0] in _ARCHITECTURES:
        return _ARCHITECTURES[names[0]]
    if not names and fields.raw("model_type") in _ARCHITECTURES.values():
        family: Family = fields.raw("model_type")
        return family
    field = "architectures" if names else "model_type"
    raise fields.refuse(field, "supported architectures: " + ", ".join(_ARCHITECTURES))


def _eos_ids(fields: Fields, generation: Path) -> tuple[int, ...]:
    """Ids that end a sequence: those of config.json, then further ones of generation_config.json."""
    ids = fields.integers("eos_token_id")
    if generation.is_file():
        ids += Fields.read(generation).integers("eos_token_id")
    return tuple(dict.fromkeys(ids))


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.has("dtype") else "torch_dtype"
    fields.expect(name, *_DTYPES)
    return str(fields.raw(name) or "bfloat16")


# --------------------------------------------------------------------------- rotary embedding


def _rope(fields: Fields, dim: int, interleaved: bool) -> RopeConfig:
    scaling = fields.nested("rope_parameters") or fields.nested("rope_scaling")
    owner = scaling if scaling is not None and scaling.has("rope_theta") else fields
    theta = owner.number("rope_theta", 10000.0)
    for holder in (fields, scaling):
        if holder is not None:
            holder.expect("partial_rotary_factor", 1, 1.0)
    kind_field = "rope_type" if scaling is not None and scaling.has("rope_type") else "type"
    if scaling is not None:
        scaling.expect(kind_field, "default", "yarn")
    if dim % 2:
        raise ValueError(f"{fields.source}: the rotary dimension is {dim}; expected an even number")
    yarn = _yarn(fields, scaling) if scaling is not None and scaling.raw(kind_field) == "yarn" else None
    return RopeConfig(dim=dim, theta=theta, interleaved=interleaved, yarn=yarn)


def _yarn(fields: Fields, scaling: Fields) -> YarnConfig:
    length = fields.integer("max_position_embeddings")
    original = scaling.integer("original_max_position_embeddings", length)
    factor = scaling.number("factor", length / original)
    mscale, mscale_all = scaling.raw("mscale"), scaling.raw("mscale_all_dim")
    if scaling.has("attention_factor"):
        magnitude = scaling.number("attention_factor")
    elif mscale and mscale_all:
        magnitude = yarn_magnitude(factor, scaling.number("mscale")) / yarn_magnitude(factor, scaling.number("mscale_all_dim"))
    else:
        magnitude = yarn_magnitude(factor, 1.0)
    return YarnConfig(
        factor=factor,
        original_length=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        magnitude=magnitude,
    )


def yarn_magnitude(factor: float, weight: float) -> float:
    """The factor by which YaRN scales attention for a context stretched ``factor`` times (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def _max_position(fields: Fields, rope: RopeConfig) -> int:
    """The length the position encoding is meant for: with YaRN the stretched one, which config.json may not show."""
    length = fields.integer("max_position_embeddings")
    return max(length, int(rope.yarn.factor * rope.yarn.original_length)) if rope.yarn else length


# --------------------------------------------------------------------------- families


def _qwen3_moe(fields: Fields, eos_ids: tuple[int, ...]) -> ModelConfig:
    fields.expect("use_sliding_window", False)
    layer_types = fields.raw("layer_types") or ["full_attention"]
    if set(layer_types) != {"full_attention"}:
        raise fields.refuse("layer_types", 'supported: "full_attention" in every layer')
    num_layers = fields.integer("num_hidden_layers")
    period, dense = fields.integer("decoder_sparse_step", 1), set(fields.integers("mlp_only_layers"))
    attention = _gqa(fields)
    rope = _rope(fields, attention.head_dim, interleaved=False)
    experts_field = "num_experts" if fields.has("num_experts") else "num_local_experts"
    moe = MoEConfig(
        hidden=fields.integer("hidden_size"),
        expert_width=fields.integer("moe_intermediate_size"),
        num_experts=fields.integer(experts_field),
        top_k=fields.integer("num_experts_per_tok"),
        normalise=fields.flag("norm_topk_prob", False),
    )
    _check_top_k(fields, moe)
    return _assemble(
        fields,
        family="qwen3_moe",
        eos_ids=eos_ids,
        moe_layers=tuple(i for i in range(num_layers) if i not in dense and (i + 1) % period == 0),
        moe=moe,
        attention=attention,
        rope=rope,
    )


def _gqa(fields: Fields) -> GqaConfig:
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.refuse("num_key_value_heads", f"expected a divisor of num_attention_heads ({num_heads})")
    return GqaConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.integer("head_dim", fields.integer("hidden_size") // num_heads),
        bias=fields.flag("attention_bias", False),
    )


def _deepseek_v3(fields: Fields, eos_ids: tuple[int, ...]) -> ModelConfig:
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    fields.expect("moe_layer_freq", 1)
    rope = _rope(fields, fields.integer("qk_rope_head_dim"), fields.flag("rope_interleave", True))
    experts_field = "n_routed_experts" if fields.has("n_routed_experts") else "num_local_experts"
    width = fields.integer("moe_intermediate_size")
    moe = MoEConfig(
        hidden=fields.integer("hidden_size"),
        expert_width=width,
        num_experts=fields.integer(experts_field),
        top_k=fields.integer("num_experts_per_tok"),
        scoring="sigmoid",
        normalise=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 1.0),
        num_groups=fields.integer("n_group", 1),
        top_groups=fields.integer("topk_group", 1),
        selection_bias=True,
        shared_width=width * fields.integer("n_shared_experts", 0, minimum=0),
    )
    _check_groups(fields, moe)
    num_layers = fields.integer("num_hidden_layers")
    first = fields.integer("first_k_dense_replace", 0, minimum=0)
    return _assemble(
        fields,
        family="deepseek_v3",
        eos_ids=eos_ids,
        moe_layers=tuple(range(first, num_layers)),
        moe=moe,
        attention=_mla(fields),
        rope=rope,
    )


def _mla(fields: Fields) -> MlaConfig:
    nope_dim, rope_dim = fields.integer("qk_nope_head_dim"), fields.integer("qk_rope_head_dim")
    scale = (nope_dim + rope_dim) ** -0.5
    scaling = fields.nested("rope_parameters") or fields.nested("rope_scaling")
    if scaling is not None and scaling.raw("mscale_all_dim") and "yarn" in (scaling.raw("rope_type"), scaling.raw("type")):
        scale *= yarn_magnitude(_yarn(fields, scaling).factor, scaling.number("mscale_all_dim")) ** 2
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


def _assemble(
    fields: Fields,
    *,
    family: Family,
    eos_ids: tuple[int, ...],
    moe_layers: tuple[int, ...],
    moe: MoEConfig,
    attention: GqaConfig | MlaConfig,
    rope: RopeConfig,
) -> ModelConfig:
    if not moe_layers:
        raise ValueError(f"{fields.source}: no layer holds experts; a Mixture-of-Experts model is required")
    vocab_size = fields.integer("vocab_size")
    if any(token >= vocab_size for token in eos_ids):
        raise ValueError(f"{fields.source}: eos_token_id is {list(eos_ids)}; expected ids below vocab_size ({vocab_size})")
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden=moe.hidden,
        num_layers=fields.integer("num_hidden_layers"),
        max_position=_max_position(fields, rope),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        dense_width=fields.integer("intermediate_size", moe.expert_width),
        eos_ids=eos_ids,
        dtype=_dtype(fields),
        moe_layers=moe_layers,
        moe=moe,
        attention=attention,
        rope=rope,
    )


def _check_top_k(fields: Fields, moe: MoEConfig) -> None:
    if moe.top_k > moe.num_experts:
        raise fields.refuse("num_experts_per_tok", f"expected at most the number of experts ({moe.num_experts})")


def _check_groups(fields: Fields, moe: MoEConfig) -> None:
    _check_top_k(fields, moe)
    if moe.num_groups > 1 and (moe.num_experts % moe.num_groups or moe.num_experts < 2 * moe.num_groups):
        raise fields.refuse("n_group", f"expected groups of equal size, two or more of the {moe.num_experts} experts each")
    if moe.top_groups > moe.num_groups:
        raise fields.refuse("topk_group", f"expected at most n_group ({moe.num_groups})")
    if moe.top_k > moe.num_experts // moe.num_groups * moe.top_groups:
        raise fields.refuse("num_experts_per_tok", f"expected at most the experts of topk_group ({moe.top_groups}) groups")


_PARSERS: dict[Family, Callable[[Fields, tuple[int, ...]], ModelConfig]] = {
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
}
