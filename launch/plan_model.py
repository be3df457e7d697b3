"""The dimensions of a model, read from its ``config.json``: all that a plan needs, also of models the engine cannot run yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..engine.models.config import GqaConfig, MlaConfig
from ..engine.models.config_fields import Fields
from ..moe.config import MoEConfig

_FAMILIES = {
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "MixtralForCausalLM": "mixtral",
}
SWIGLU = 3  # matrices of a feed-forward block


@dataclass(frozen=True)
class Shape:
    """A decoder's dimensions. ``dtype`` is the checkpoint's; ``stored`` that of its matrices: fp8 where it is quantised."""

    family: str
    dtype: str
    stored: str
    vocab_size: int
    hidden: int
    num_layers: int
    max_position: int
    tie_embeddings: bool
    dense_width: int
    moe_layers: tuple[int, ...]
    moe: MoEConfig
    attention: GqaConfig | MlaConfig

    @property
    def attention_params(self) -> int:
        """Values in the matrices and biases of one layer's attention."""
        shape, hidden = self.attention, self.hidden
        if isinstance(shape, GqaConfig):
            queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
            return hidden * (2 * queries + 2 * keys) + shape.bias * (queries + 2 * keys + hidden)
        queries = shape.num_heads * (shape.nope_dim + shape.rope_dim)
        down = (shape.q_latent or queries) + shape.kv_latent + shape.rope_dim
        up = shape.kv_latent * shape.num_heads * (shape.nope_dim + shape.value_dim) + (shape.q_latent or 0) * queries
        return hidden * (down + shape.num_heads * shape.value_dim) + up + shape.bias * (down + hidden)

    @property
    def norm_params(self) -> int:
        """Values in the norms of one layer."""
        shape = self.attention
        if isinstance(shape, MlaConfig):
            return 2 * self.hidden + (shape.q_latent or 0) + shape.kv_latent
        return 2 * self.hidden + (2 * shape.head_dim if self.family == "qwen3_moe" else 0)

    @property
    def dense_params(self) -> int:
        """Values in the feed-forward block of a layer without experts."""
        return SWIGLU * self.hidden * self.dense_width

    @property
    def shared_params(self) -> int:
        """Values in the shared experts of one MoE layer."""
        return SWIGLU * self.hidden * self.moe.shared_width

    @property
    def gate_params(self) -> int:
        """Values in the gate of one MoE layer."""
        return self.moe.num_experts * (self.hidden + self.moe.selection_bias)

    @property
    def expert_params(self) -> int:
        """Values in one expert."""
        return SWIGLU * self.hidden * self.moe.expert_width

    @property
    def total_params(self) -> int:
        """Values of the whole model."""
        num_moe = len(self.moe_layers)
        per_moe = self.shared_params + self.gate_params + self.moe.num_experts * self.expert_params
        head = self.vocab_size * self.hidden * (1 if self.tie_embeddings else 2) + self.hidden
        layers = self.num_layers * (self.attention_params + self.norm_params)
        return head + layers + num_moe * per_moe + (self.num_layers - num_moe) * self.dense_params

    def kv_bytes(self, dtype: str, tensor: int = 1) -> int:
        """Bytes of cache one token takes in one layer on one of ``tensor`` ranks. In fp8 there is a float32 scale per head,
        or per 128 values of a latent, whose rotary part stays in bf16."""
        size = {"fp32": 4, "bf16": 2, "fp8": 1}[dtype]
        shape = self.attention
        if isinstance(shape, GqaConfig):
            heads = -(-shape.num_kv_heads // tensor)
            return 2 * heads * (shape.head_dim * size + (4 if dtype == "fp8" else 0))
        if dtype == "fp8":
            return shape.kv_latent + 4 * -(-shape.kv_latent // 128) + 2 * shape.rope_dim
        return (shape.kv_latent + shape.rope_dim) * size

    def attention_operations(self, decode: bool) -> int:
        """Operations of one layer for one token and one position of its context. In decode latent attention works on the latent."""
        shape = self.attention
        if isinstance(shape, GqaConfig):
            return 4 * shape.num_heads * shape.head_dim
        if decode:
            return 2 * shape.num_heads * (2 * shape.kv_latent + shape.rope_dim)
        return 2 * shape.num_heads * (shape.nope_dim + shape.rope_dim + shape.value_dim)


def read_shape(folder: Path) -> Shape:
    """The dimensions of the model in ``folder``. Raises ValueError naming the file and field at fault."""
    fields = Fields.read(folder / "config.json")
    names = fields.raw("architectures") or []
    family = _FAMILIES.get(names[0]) if isinstance(names, list) and len(names) == 1 else None
    if family is None:
        raise fields.refuse("architectures", "a plan can be made for " + ", ".join(_FAMILIES))
    fields.expect("moe_layer_freq", 1)
    num_layers = fields.integer("num_hidden_layers")
    first, period = fields.integer("first_k_dense_replace", 0, minimum=0), fields.integer("decoder_sparse_step", 1)
    dense = fields.integers("mlp_only_layers")
    moe = _moe(fields, family)
    return Shape(
        family=family,
        dtype=_dtype(fields),
        stored=_stored(fields),
        vocab_size=fields.integer("vocab_size"),
        hidden=moe.hidden,
        num_layers=num_layers,
        max_position=_max_position(fields),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        dense_width=fields.integer("intermediate_size", moe.expert_width),
        moe_layers=tuple(layer for layer in range(first, num_layers) if layer not in dense and (layer + 1) % period == 0),
        moe=moe,
        attention=_mla(fields) if fields.has("kv_lora_rank") else _gqa(fields),
    )


def _moe(fields: Fields, family: str) -> MoEConfig:
    present = [name for name in ("n_routed_experts", "num_experts", "num_local_experts") if fields.has(name)]
    width = fields.integer("moe_intermediate_size" if fields.has("moe_intermediate_size") else "intermediate_size")
    return MoEConfig(
        hidden=fields.integer("hidden_size"),
        expert_width=width,
        num_experts=fields.integer(present[0] if present else "num_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        num_groups=fields.integer("n_group", 1),
        top_groups=fields.integer("topk_group", 1),
        selection_bias=family == "deepseek_v3",
        shared_width=width * fields.integer("n_shared_experts", 0, minimum=0),
    )


def _gqa(fields: Fields) -> GqaConfig:
    heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", fields.integer("hidden_size") // heads)
    return GqaConfig(heads, fields.integer("num_key_value_heads", heads), head_dim, fields.flag("attention_bias", False))


def _mla(fields: Fields) -> MlaConfig:
    return MlaConfig(
        num_heads=fields.integer("num_attention_heads"),
        q_latent=fields.optional_integer("q_lora_rank"),
        kv_latent=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rope_dim=fields.integer("qk_rope_head_dim"),
        value_dim=fields.integer("v_head_dim"),
        scale=1.0,  # no dimension; a plan does not need it
        bias=fields.flag("attention_bias", False),
    )


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.has("dtype") else "torch_dtype"
    fields.expect(name, "bfloat16", "float32", "float16")
    return str(fields.raw(name) or "bfloat16")


def _stored(fields: Fields) -> str:
    quantisation = fields.nested("quantization_config")
    if quantisation is None:
        return "fp32" if _dtype(fields) == "float32" else "bf16"
    quantisation.expect("quant_method", "fp8")
    return "fp8"


def _max_position(fields: Fields) -> int:
    """With YaRN the stretched length, which max_position_embeddings may not show."""
    length = fields.integer("max_position_embeddings")
    scaling = fields.nested("rope_parameters") or fields.nested("rope_scaling")
    if scaling is None or "yarn" not in (scaling.raw("rope_type"), scaling.raw("type")):
        return length
    original = scaling.integer("original_max_position_embeddings", length)
    return max(length, int(scaling.number("factor", length / original) * original))
