"""A DeepSeek-V3-shaped checkpoint of 2.4 million random weights with a tokenizer of its own.

Random weights are the harder test of numerics and of sampling: no token is far more likely than the
rest, and every expert is used. The result depends on nothing but this file: numpy draws the
weights, and the text that the tokenizer is trained on is composed here.
"""

from __future__ import annotations

import atexit
import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 20261121
SHARDS = 2
MAX_POSITION = 4096
SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, not ' ~ message['role']) }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "max_position_embeddings": MAX_POSITION,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


@cache
def random_checkpoint() -> Path:
    """The folder of the checkpoint, made once in a process."""
    folder = Path(tempfile.mkdtemp(prefix="lockstep-random-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_checkpoint(folder)
    return folder


def make_checkpoint(directory: Path) -> None:
    """Writes config, tokenizer and weights into ``directory`` in the form of a Hugging Face
    model.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", CONFIG)
    write_json(directory / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    write_tokenizer(directory)
    write_weights(directory)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------- tokenizer


def sentences(count: int) -> list[str]:
    """Plain English-looking lines, code and numbers, enough for a few hundred merges."""
    draw = random.Random(SEED)
    who = (
        "the controller",
        "a rank",
        "the planner",
        "every frontend",
        "a client",
        "the launcher",
        "an expert",
        "this request",
    )
    verb = (
        "sends",
        "plans",
        "waits for",
        "computes",
        "admits",
        "frees",
        "counts",
        "holds",
        "reads",
        "writes",
        "answers",
        "moves",
    )
    what = (
        "a token",
        "the next step",
        "two prompts",
        "its experts",
        "the page table",
        "a result",
        "the queue",
        "some weights",
    )
    tail = (
        "in order",
        "without delay",
        "at once",
        "when asked",
        "on every node",
        "before the deadline",
        "as before",
        "again and again",
    )
    lines = []
    for _ in range(count):
        a, b, c, d = draw.choice(who), draw.choice(verb), draw.choice(what), draw.choice(tail)
        lines.append(f"{a.capitalize()} {b} {c} {d}{draw.choice('.!?')}")
        if draw.random() < 0.2:
            number = draw.randrange(10 ** draw.randrange(1, 6))
            lines.append(f'{b.split()[0]}({number}, {draw.random():.2f}) == {number * 2}  # {c}: "{d}"')
        if draw.random() < 0.1:
            dogs = draw.randrange(100)
            lines.append(f"- Hello, how are you? I am {a}; the quick brown fox jumps over {dogs} lazy dogs.")
    return lines


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE (any text round-trips) of ``vocab_size`` tokens, with the chat template's
    marks as special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(4000), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "additional_special_tokens": list(SPECIAL[2:]),
        "model_max_length": MAX_POSITION,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(directory / "tokenizer_config.json", settings)


# --------------------------------------------------------------------------- weights


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint under its Hugging Face name."""
    c = CONFIG
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found |= {prefix + name: shape for name, shape in _attention_shapes().items()}
        if layer < c["first_k_dense_replace"]:
            found |= _mlp_shapes(prefix + "mlp.", c["intermediate_size"])
            continue
        found[prefix + "mlp.gate.weight"] = (c["n_routed_experts"], hidden)
        found[prefix + "mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
        for expert in range(c["n_routed_experts"]):
            found |= _mlp_shapes(f"{prefix}mlp.experts.{expert}.", c["moe_intermediate_size"])
        found |= _mlp_shapes(
            prefix + "mlp.shared_experts.", c["moe_intermediate_size"] * c["n_shared_experts"]
        )
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def _attention_shapes() -> dict[str, tuple[int, ...]]:
    c = CONFIG
    hidden, heads, nope, rope = (
        c["hidden_size"],
        c["num_attention_heads"],
        c["qk_nope_head_dim"],
        c["qk_rope_head_dim"],
    )
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_a_proj.weight": (c["q_lora_rank"], hidden),
        "self_attn.q_a_layernorm.weight": (c["q_lora_rank"],),
        "self_attn.q_b_proj.weight": (heads * (nope + rope), c["q_lora_rank"]),
        "self_attn.kv_a_proj_with_mqa.weight": (c["kv_lora_rank"] + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (c["kv_lora_rank"],),
        "self_attn.kv_b_proj.weight": (heads * (nope + c["v_head_dim"]), c["kv_lora_rank"]),
        "self_attn.o_proj.weight": (hidden, heads * c["v_head_dim"]),
    }


def _mlp_shapes(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    hidden = CONFIG["hidden_size"]
    return {
        prefix + "gate_proj.weight": (width, hidden),
        prefix + "up_proj.weight": (width, hidden),
        prefix + "down_proj.weight": (hidden, width),
    }


def draw_weights() -> dict[str, torch.Tensor]:
    """All weights in bf16 (the gate's selection bias in fp32): norms near one, matrices scaled by
    their fan-in.
    """
    draw = np.random.Generator(np.random.PCG64(SEED))
    weights = {}
    for name, shape in shapes().items():
        values = draw.standard_normal(shape, np.float32)
        if name.endswith("e_score_correction_bias"):
            weights[name] = torch.from_numpy(values * 0.05)
            continue
        scaled = 1.0 + 0.05 * values if len(shape) == 1 else values * shape[-1] ** -0.5
        weights[name] = torch.from_numpy(scaled).to(torch.bfloat16)
    weights["lm_head.weight"] *= (
        2.0  # logits far enough apart for greedy decoding to be clear about its choice
    )
    return weights


def write_weights(directory: Path) -> None:
    """Writes the weights as shards with an index, as large checkpoints come."""
    weights = draw_weights()
    total = sum(tensor.nbytes for tensor in weights.values())
    files: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in weights.items():
        if len(files) < SHARDS and sum(stored.nbytes for stored in files[-1].values()) >= total / SHARDS:
            files.append({})
        files[-1][name] = tensor
    index: dict[str, str] = {}
    for number, tensors in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index}
    )
