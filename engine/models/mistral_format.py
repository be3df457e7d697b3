"""Checkpoints in Mistral's own format, ``params.json`` and ``consolidated*.safetensors``, converted
to the config keys of transformers' model ``mistral4``. No torch here.

Engines read Mistral-Large-3 from this format, Mistral-Small-4 from either
(https://huggingface.co/mistralai/Mistral-Large-3-675B-Instruct-2512).
"""

from __future__ import annotations

import re
from typing import Any

from .config_fields import Fields

PARAMS_FILE = "params.json"
EMBEDDING = "tok_embeddings.weight"  # stands in every checkpoint of this format, and in no other
_END = 2  # </s> in every vocabulary of Mistral's; params.json does not say it

_NUMBERS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
_MOE = {
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "expert_hidden_dim": "moe_intermediate_size",
    "first_k_dense_replace": "first_k_dense_replace",
    "num_expert_groups": "n_group",
    "num_expert_groups_per_tok": "topk_group",
    "routed_scale": "routed_scaling_factor",
}
_OUTER = {"tok_embeddings.": "model.embed_tokens.", "norm.": "model.norm.", "output.": "lm_head."}
_INNER = (
    ("attention_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("attention.wq.", "self_attn.q_proj."),
    ("attention.wq_a.", "self_attn.q_a_proj."),
    ("attention.q_a_norm.", "self_attn.q_a_layernorm."),
    ("attention.wq_b.", "self_attn.q_b_proj."),
    ("attention.wkv_a_with_mqa.", "self_attn.kv_a_proj_with_mqa."),
    ("attention.kv_a_norm.", "self_attn.kv_a_layernorm."),
    ("attention.wkv_b.", "self_attn.kv_b_proj."),
    ("attention.wo.", "self_attn.o_proj."),
    ("feed_forward.", "mlp."),
    ("shared_experts.", "mlp.shared_experts."),
    ("experts.", "mlp.experts."),
    ("gate.", "mlp.gate."),
)
_PROJECTIONS = {".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
_SCALES = {".qscale_weight": ".weight_scale", ".qscale_act": ".activation_scale"}
_LAYER = re.compile(r"(layers\.\d+\.)(.+)")


def described(params: Fields) -> Fields:
    """The fields of a config.json for those of a params.json. Raises ValueError for a model without
    latent attention, and for fields that would change its result.
    """
    for name in ("qk_nope_head_dim", "moe"):
        if not params.has(name):
            wanted = "supported in this format: latent attention and experts, as Mistral-Large-3 has them"
            raise params.refuse(name, f"{wanted}; any other model from a folder in transformers' format")
    params.expect("sliding_window", None)
    rope = _rope(params)
    length = int(rope["factor"] * rope["original_max_position_embeddings"])
    return Fields(
        {
            **{ours: params.integer(theirs) for theirs, ours in _NUMBERS.items()},
            "model_type": "mistral4",
            "max_position_embeddings": params.integer("max_position_embeddings", length),
            "q_lora_rank": params.optional_integer("q_lora_rank"),
            "rms_norm_eps": params.number("norm_eps"),
            "hidden_act": params.raw("activation"),
            "tie_word_embeddings": params.flag("tied_embeddings", False),
            "eos_token_id": _END,
            "dtype": params.raw("dtype"),
            "rope_parameters": rope,
            "quantization_config": _quantisation(params),
            **_experts(params),
        },
        f"{params.source} in the words of transformers",
    )


def our_name(name: str) -> str | None:
    """The name of a text model's tensor in transformers' format; None for any other tensor."""
    for theirs, ours in _OUTER.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return None
    inner = layer[2]
    for theirs, ours in _INNER:
        if inner.startswith(theirs):
            inner = ours + inner.removeprefix(theirs)
            break
    for table in (_PROJECTIONS, _SCALES):
        for theirs, ours in table.items():
            inner = inner.replace(theirs, ours)
    return f"model.{layer[1]}{inner}"


def _experts(params: Fields) -> dict[str, Any]:
    moe = params.nested("moe")
    assert moe is not None
    moe.expect("route_every_n", 1)
    moe.expect("renorm_strategy", "WEIGHTS")
    moe.expect("use_load_balancing_bias", False)
    num_shared = moe.integer("num_shared_experts", 0, minimum=0)
    return {"n_shared_experts": num_shared} | {ours: moe.raw(theirs) for theirs, ours in _MOE.items()}


def _rope(params: Fields) -> dict[str, Any]:
    """YaRN of the frequencies alone: neither scores nor rotated values are scaled, which
    ``apply_scale`` says.
    """
    yarn = params.nested("yarn")
    growth = params.nested("llama_4_scaling")
    if yarn is None:
        raise params.refuse("yarn", "expected an object")
    if yarn.flag("apply_scale", True):
        raise yarn.refuse("apply_scale", "supported: false")
    length, beta = yarn.integer("original_max_position_embeddings"), 0.0
    if growth is not None:
        growth.expect("original_max_position_embeddings", length)
        beta = growth.number("beta")
    return {
        "rope_type": "yarn",
        "rope_theta": params.number("rope_theta", 10000.0),
        "factor": yarn.number("factor"),
        "original_max_position_embeddings": length,
        "beta_fast": yarn.number("beta"),
        "beta_slow": yarn.number("alpha"),
        "attention_factor": 1.0,
        "llama_4_scaling_beta": beta,
    }


def _quantisation(params: Fields) -> dict[str, Any] | None:
    """The ``quantization_config``, which params.json may hold itself (Mistral-Large-3), or say in
    words of its own: FP8 with a scale per matrix (Mistral-Small-4).
    """
    own = params.nested("quantization")
    if own is None:
        stored: dict[str, Any] | None = params.raw("quantization_config")
        return stored
    if own.raw("qformat_weight") != "fp8_e4m3":
        raise own.refuse("qformat_weight", 'supported: "fp8_e4m3"')
    own.expect("qscheme_act", "TENSOR", "NO_SCALES")
    return {"quant_method": "fp8", "weight_block_size": None}
