"""Small random checkpoints on disk, in the layout of Hugging Face. Names and shapes are written
down here a second time, independently of the model code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def qwen3_moe_config(**changes: Any) -> dict[str, Any]:
    """The config.json of a Qwen3-MoE with 8 experts and 3 layers; ``changes`` replace fields, None
    removes one.
    """
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    return _changed(config, changes)


def deepseek_v3_config(**changes: Any) -> dict[str, Any]:
    """The config.json of a DeepSeek-V3 with 8 experts in 4 groups and 3 layers, the first one
    dense.
    """
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_interleave": True,
        "attention_bias": False,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    return _changed(config, changes)


YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}


def write_checkpoint(
    path: Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
) -> Path:
    """Writes config.json and random weights to the new directory ``path``; the same seed gives the
    same values.
    """
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config | {"torch_dtype": _DTYPE_NAMES[dtype]}))
    save_tensors(path, random_tensors(config, seed, dtype), num_shards)
    return path


def save_tensors(path: Path, tensors: dict[str, Tensor], num_shards: int = 1) -> None:
    """Writes one file, or shards with their index. Consecutive tensors go to different shards."""
    if num_shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    weight_map = {tensor: names[i % num_shards] for i, tensor in enumerate(tensors)}
    for file in names:
        save_file(
            {t: v for t, v in tensors.items() if weight_map[t] == file},
            path / file,
            metadata={"format": "pt"},
        )
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def random_tensors(
    config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Weights whose activations stay near 1: matrices N(0, 1 / columns), norms near 1, biases
    small.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        value = torch.randn(shape, generator=generator)
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            tensors[name] = value * 0.1
            continue
        if name.endswith("sinks"):
            tensors[name] = value.to(dtype)
            continue
        if len(shape) == 1 or name.endswith("proj_bias"):
            value = value * 0.1 + (1.0 if "norm" in name else 0.0)
        else:
            value = value * (1.0 if "embed_tokens" in name else shape[1] ** -0.5)
        tensors[name] = value.to(dtype)
    return tensors


def tensor_shapes(config: dict[str, Any]) -> Shapes:
    """Every tensor of a checkpoint by name."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        shapes |= layer_shapes(config, layer)
    return shapes


def layer_shapes(config: dict[str, Any], layer: int) -> Shapes:
    """The tensors of one layer."""
    hidden = config["hidden_size"]
    parts = (_mla_shapes if "kv_lora_rank" in config else _gqa_shapes)(config)
    if "index_topk" in config and (config.get("indexer_types") or {layer: "full"})[layer] == "full":
        parts |= _index_shapes(config)
    parts |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if not _is_moe(config, layer):
        parts |= _swiglu_shapes("mlp.", config["intermediate_size"], hidden)
    elif config["model_type"] in ("mixtral", "minimax_m2"):
        parts |= _mixtral_shapes(config)
    elif config["model_type"] == "hy_v3":
        parts |= _hy_v3_shapes(config)
    elif config["model_type"] == "gpt_oss":
        parts |= _gpt_oss_shapes(config)
    else:
        parts |= _moe_shapes(config)
    return {f"model.layers.{layer}." + name: shape for name, shape in parts.items()}


def _changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    config = config | changes
    return {name: value for name, value in config.items() if value is not None or name == "q_lora_rank"}


def _is_moe(config: dict[str, Any], layer: int) -> bool:
    if "mlp_layer_types" in config:
        return bool(config["mlp_layer_types"][layer] == "sparse")
    if "first_k_dense_replace" in config:
        return bool(layer >= config["first_k_dense_replace"])
    return (
        layer not in config.get("mlp_only_layers", [])
        and (layer + 1) % config.get("decoder_sparse_step", 1) == 0
    )


def _gqa_shapes(config: dict[str, Any]) -> Shapes:
    hidden, kind = config["hidden_size"], config["model_type"]
    dim = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    shapes: Shapes = {f"self_attn.{name}.weight": (size, hidden) for name, size in rows.items()}
    shapes["self_attn.o_proj.weight"] = (hidden, queries)
    if kind == "minimax_m2":
        shapes |= {"self_attn.q_norm.weight": (queries,), "self_attn.k_norm.weight": (keys,)}
    elif kind in ("qwen3_moe", "hy_v3") or config.get("use_qk_norm"):
        shapes |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    if config.get("attention_bias") or config.get("qkv_bias"):
        shapes |= {f"self_attn.{name}.bias": (size,) for name, size in rows.items()}
        shapes |= {"self_attn.o_proj.bias": (hidden,)} if kind in ("qwen3_moe", "gpt_oss", "hy_v3") else {}
    if kind == "gpt_oss":
        shapes["self_attn.sinks"] = (config["num_attention_heads"],)
    return shapes


def _mla_shapes(config: dict[str, Any]) -> Shapes:
    hidden, heads, q_size = config["hidden_size"], config["num_attention_heads"], config["q_lora_rank"]
    nope, rope, value, kv_size = (
        config[f] for f in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    shapes: Shapes = {
        "kv_a_proj_with_mqa.weight": (kv_size + rope, hidden),
        "kv_a_layernorm.weight": (kv_size,),
        "kv_b_proj.weight": (heads * (nope + value), kv_size),
        "o_proj.weight": (hidden, heads * value),
    }
    if q_size is None:
        shapes["q_proj.weight"] = (heads * (nope + rope), hidden)
    else:
        shapes |= {"q_a_proj.weight": (q_size, hidden), "q_a_layernorm.weight": (q_size,)}
        shapes["q_b_proj.weight"] = (heads * (nope + rope), q_size)
    if config["attention_bias"]:
        shapes |= {"kv_a_proj_with_mqa.bias": (kv_size + rope,), "o_proj.bias": (hidden,)}
        shapes |= {} if q_size is None else {"q_a_proj.bias": (q_size,)}
    return {"self_attn." + name: shape for name, shape in shapes.items()}


def _index_shapes(config: dict[str, Any]) -> Shapes:
    num, dim, hidden = config["index_n_heads"], config["index_head_dim"], config["hidden_size"]
    shapes: Shapes = {"wq_b.weight": (num * dim, config["q_lora_rank"]), "wk.weight": (dim, hidden)}
    shapes |= {"k_norm.weight": (dim,), "k_norm.bias": (dim,), "weights_proj.weight": (num, hidden)}
    return {"self_attn.indexer." + name: shape for name, shape in shapes.items()}


def _moe_shapes(config: dict[str, Any]) -> Shapes:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    num_experts = config.get("n_routed_experts") or config["num_experts"]
    shapes: Shapes = {"mlp.gate.weight": (num_experts, hidden)}
    if config.get("topk_method") == "noaux_tc" or config["model_type"] == "glm4_moe":
        shapes["mlp.gate.e_score_correction_bias"] = (num_experts,)
    if config.get("n_shared_experts"):
        shapes |= _swiglu_shapes("mlp.shared_experts.", width * config["n_shared_experts"], hidden)
    if config["model_type"] == "qwen2_moe":
        shapes |= _swiglu_shapes("mlp.shared_expert.", config["shared_expert_intermediate_size"], hidden)
        shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
    if config["model_type"] == "mistral4":
        stacked: Shapes = {"gate_up_proj": (num_experts, 2 * width, hidden)}
        stacked["down_proj"] = (num_experts, hidden, width)
        return shapes | {f"mlp.experts.{name}": shape for name, shape in stacked.items()}
    for expert in range(num_experts):
        shapes |= _swiglu_shapes(f"mlp.experts.{expert}.", width, hidden)
    return shapes


def _mixtral_shapes(config: dict[str, Any]) -> Shapes:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {"block_sparse_moe.gate.weight": (config["num_local_experts"], hidden)}
    if config["model_type"] == "minimax_m2":
        shapes["block_sparse_moe.e_score_correction_bias"] = (config["num_local_experts"],)
    for expert in range(config["num_local_experts"]):
        for name, shape in {"w1": (width, hidden), "w2": (hidden, width), "w3": (width, hidden)}.items():
            shapes[f"block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return shapes


def _hy_v3_shapes(config: dict[str, Any]) -> Shapes:
    hidden, width, num = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    shapes: Shapes = {"mlp.router.gate.weight": (num, hidden), "mlp.expert_bias": (num,)}
    shapes |= _swiglu_shapes("mlp.shared_mlp.", width * config["num_shared_experts"], hidden)
    for expert in range(num):
        shapes |= _swiglu_shapes(f"mlp.experts.{expert}.", width, hidden)
    return shapes


def _gpt_oss_shapes(config: dict[str, Any]) -> Shapes:
    """Experts of a layer in a tensor each, matrices [in, out]."""
    hidden, width, num = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    return {
        "mlp.router.weight": (num, hidden),
        "mlp.router.bias": (num,),
        "mlp.experts.gate_up_proj": (num, hidden, 2 * width),
        "mlp.experts.gate_up_proj_bias": (num, 2 * width),
        "mlp.experts.down_proj": (num, width, hidden),
        "mlp.experts.down_proj_bias": (num, hidden),
    }


def _swiglu_shapes(prefix: str, width: int, hidden: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }
