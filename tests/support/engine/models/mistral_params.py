"""Mistral's own description of Mistral-Large-3."""

from __future__ import annotations

from typing import Any

COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": [
        "model.embed_tokens",
        "re:vision_encoder.*",
        "re:.*kv_a_proj_with_mqa$",
        "re:.*gate$",
        "lm_head",
    ],
    "config_groups": {
        "FP8_BLOCK": {
            "format": "float-quantized",
            "targets": ["Linear"],
            "input_activations": {"dynamic": True, "group_size": 128, "num_bits": 8, "strategy": "group"},
            "output_activations": None,
            "weights": {
                "block_structure": [128, 128],
                "dynamic": False,
                "group_size": None,
                "num_bits": 8,
                "strategy": "block",
                "symmetric": True,
                "type": "float",
            },
        }
    },
}
# As published (https://huggingface.co/mistralai/Mistral-Large-3-675B-Instruct-2512), less most of
# the vision encoder's.
LARGE_3: dict[str, Any] = {
    "dim": 7168,
    "n_layers": 61,
    "head_dim": 192,
    "hidden_dim": 16384,
    "n_heads": 128,
    "n_kv_heads": 128,
    "norm_eps": 1e-6,
    "vocab_size": 131072,
    "rope_theta": 10000.0,
    "max_position_embeddings": 294912,
    "tied_embeddings": False,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe": {
        "expert_hidden_dim": 4096,
        "expert_model_parallel": 1,
        "expert_parallel": 1,
        "first_k_dense_replace": 3,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "num_shared_experts": 1,
        "route_every_n": 1,
        "routed_scale": 1.0,
    },
    "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8192},
    "yarn": {
        "alpha": 1,
        "apply_scale": False,
        "beta": 32,
        "factor": 36,
        "original_max_position_embeddings": 8192,
    },
    "quantization_config": COMPRESSED,
    "vision_encoder": {"hidden_size": 1664, "num_hidden_layers": 48},
}
