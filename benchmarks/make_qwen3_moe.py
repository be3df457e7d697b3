"""Makes the checkpoint that ``bench_vllm`` serves: a Qwen3-MoE of 440 million random bf16 weights
and a byte-level tokenizer.

Random weights take as long to compute with as trained ones. Only the routing differs: here it is
nearly uniform.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 8192,
    "attention_bias": False,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def make_checkpoint(directory: Path) -> Path:
    """Writes the model into ``directory`` unless it exists; returns the directory."""
    if (directory / "model.safetensors").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    _write_tokenizer(directory)
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in _shapes().items():
        values = torch.randn(shape, generator=draw)
        weights[name] = (1 + 0.05 * values if len(shape) == 1 else values * shape[-1] ** -0.5).bfloat16()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _write_tokenizer(directory: Path) -> None:
    """Bytes, their pairs, and numbered special tokens up to the vocabulary size, so that every id
    has a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["every rank executes the plan of one controller"], trainer)
    tokenizer.add_tokens(
        [f" w{number}" for number in range(CONFIG["vocab_size"] - tokenizer.get_vocab_size())]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "model_max_length": 8192,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint under its Hugging Face name."""
    hidden, vocab, width = CONFIG["hidden_size"], CONFIG["vocab_size"], CONFIG["moe_intermediate_size"]
    head = CONFIG["head_dim"]
    queries, keys = head * CONFIG["num_attention_heads"], head * CONFIG["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")
        }
        attention = {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
        }
        attention |= {"q_norm": (head,), "k_norm": (head,)}
        shapes |= {f"{prefix}self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes[f"{prefix}mlp.gate.weight"] = (CONFIG["num_experts"], hidden)
        for expert in range(CONFIG["num_experts"]):
            parts = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
            shapes |= {f"{prefix}mlp.experts.{expert}.{name}.weight": shape for name, shape in parts.items()}
    return shapes
