"""config.json of small models of every family, each with three layers and eight experts.
``changes`` replace fields, None removes one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .checkpoints import YARN, deepseek_v3_config, qwen3_moe_config

# Kimi-K2's: frequencies are kept or slowed, with almost no ramp between.
KIMI_YARN = YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "factor": 32.0}
KIMI_YARN |= {"original_max_position_embeddings": 4096}
GPT_OSS_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
MISTRAL_ROPE = {
    "type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.5,
    "partial_rotary_factor": 0.5,
}
_ABSENT = {"rope_interleave": None, "topk_method": None, "scoring_func": None}
_NOT_QWEN3 = {
    "attention_bias": None,
    "use_sliding_window": None,
    "decoder_sparse_step": None,
    "mlp_only_layers": None,
}


def deepseek_v2_config(**changes: Any) -> dict[str, Any]:
    """A DeepSeek-V2 with a query latent; the groups take part with ``topk_method``
    group_limited_greedy.
    """
    own = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "norm_topk_prob": False,
        "routed_scaling_factor": 4.0,
    }
    return deepseek_v3_config(**(_ABSENT | own | {"topk_method": "greedy", "n_shared_experts": 2} | changes))


def kimi_k2_config(**changes: Any) -> dict[str, Any]:
    own = {
        "model_type": "kimi_k2",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "rope_theta": 50000.0,
    }
    rope = {"rope_scaling": KIMI_YARN, "max_position_embeddings": 131072, "qk_rope_head_dim": 16}
    return deepseek_v3_config(**(own | rope | changes))


def mixtral_config(**changes: Any) -> dict[str, Any]:
    own = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5,
    }
    moe = {
        "num_local_experts": 8,
        "num_experts": None,
        "moe_intermediate_size": None,
        "norm_topk_prob": None,
        "head_dim": None,
    }
    return qwen3_moe_config(**(_NOT_QWEN3 | own | moe | changes))


def qwen2_moe_config(**changes: Any) -> dict[str, Any]:
    own = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "head_dim": None,
    }
    attention = {"attention_bias": None, "qkv_bias": True, "sliding_window": 32768, "max_window_layers": 21}
    return qwen3_moe_config(**(own | attention | {"shared_expert_intermediate_size": 48} | changes))


def glm4_moe_config(**changes: Any) -> dict[str, Any]:
    """As GLM-4.5: biases, norms of queries and keys, half of a head rotated."""
    own = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    }
    attention = {
        "attention_bias": True,
        "use_qk_norm": True,
        "use_sliding_window": None,
        "decoder_sparse_step": None,
    }
    moe = {
        "num_experts": None,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "mlp_only_layers": None,
    }
    scale = {"routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}
    return qwen3_moe_config(**(own | attention | moe | scale | changes))


def minimax_m2_config(**changes: Any) -> dict[str, Any]:
    """As MiniMax-M2: half of a head rotated, norms over all heads, experts in every layer."""
    own = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "rope_theta": 5000000.0,
        "rotary_dim": 8,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "attn_type_list": [1, 1, 1],
    }
    moe = {
        "num_local_experts": 8,
        "num_experts": None,
        "moe_intermediate_size": None,
        "norm_topk_prob": None,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "shared_intermediate_size": 0,
    }
    return qwen3_moe_config(**(_NOT_QWEN3 | own | moe | changes))


def glm4_moe_lite_config(**changes: Any) -> dict[str, Any]:
    """As GLM-4.7-Flash: latent attention, one group of experts."""
    own = {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.8,
        "rope_interleave": None,
        "scoring_func": None,
        "partial_rotary_factor": 1.0,
    }
    return deepseek_v3_config(**(own | changes))


def gpt_oss_config(**changes: Any) -> dict[str, Any]:
    """As gpt-oss: a window on every other layer, here of 12 positions, biases and YaRN. The limit
    of the activation is low, so that some values meet it.
    """
    num_layers = changes.get("num_hidden_layers", 3)
    own = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "sliding_window": 12,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)],
        "swiglu_limit": 1.5,
        "rope_theta": 150000.0,
        "rope_scaling": GPT_OSS_YARN,
        "max_position_embeddings": 2048,
    }
    moe = {
        "num_local_experts": 8,
        "num_experts": None,
        "moe_intermediate_size": None,
        "norm_topk_prob": None,
        "num_experts_per_tok": 3,
    }
    return qwen3_moe_config(**(_NOT_QWEN3 | own | moe | changes))


def mistral4_config(**changes: Any) -> dict[str, Any]:
    """As Mistral-Small-4: queries grow, here every 16 positions, and no layer is dense."""
    own = {
        "architectures": ["Mistral4ForCausalLM"],
        "model_type": "mistral4",
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "rope_theta": None,
        "rope_parameters": MISTRAL_ROPE,
    }
    return deepseek_v3_config(**(_ABSENT | own | changes))


def hy_v3_config(**changes: Any) -> dict[str, Any]:
    """As Hy3: norms of queries and keys, a shared expert, the first layer dense."""
    own = {
        "architectures": ["HYV3ForCausalLM"],
        "model_type": "hy_v3",
        "rms_norm_eps": 1e-5,
        "rope_theta": 11158840.0,
        "num_shared_experts": 1,
        "router_scaling_factor": 2.826,
        "first_k_dense_replace": 1,
        "norm_topk_prob": None,
    }
    return qwen3_moe_config(**(_NOT_QWEN3 | own | changes))


def deepseek_v32_config(**changes: Any) -> dict[str, Any]:
    """As DeepSeek-V3.2, whose indexer chooses 16 positions here. With eight index heads hardly any
    score is zero, of which transformers would choose others.
    """
    own = {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "rope_interleave": None,
        "index_n_heads": 8,
        "index_head_dim": 16,
        "index_topk": 16,
    }
    return deepseek_v3_config(**(own | changes))


def glm_moe_dsa_config(**changes: Any) -> dict[str, Any]:
    """As GLM-5, whose indexers choose 16 positions here."""
    own = {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "rms_norm_eps": 1e-5,
        "n_group": 1,
        "topk_group": 1,
    }
    return deepseek_v32_config(**(own | changes))


CONFIGS: dict[str, Callable[..., dict[str, Any]]] = {
    "qwen3_moe": qwen3_moe_config,
    "deepseek_v3": deepseek_v3_config,
    "deepseek_v2": deepseek_v2_config,
    "kimi_k2": kimi_k2_config,
    "mixtral": mixtral_config,
    "qwen2_moe": qwen2_moe_config,
    "glm4_moe": glm4_moe_config,
    "minimax_m2": minimax_m2_config,
    "glm4_moe_lite": glm4_moe_lite_config,
    "gpt_oss": gpt_oss_config,
    "hy_v3": hy_v3_config,
    "mistral4": mistral4_config,
    "deepseek_v32": deepseek_v32_config,
    "glm_moe_dsa": glm_moe_dsa_config,
}
