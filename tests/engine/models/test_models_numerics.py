"""Logits against ``transformers`` on the same random checkpoints: prefill, chunked prefill and
decode through the paged cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.engine.models.checkpoints import YARN, deepseek_v3_config, qwen3_moe_config, write_checkpoint
from support.engine.models.family_configs import (
    GPT_OSS_YARN,
    MISTRAL_ROPE,
    deepseek_v2_config,
    deepseek_v32_config,
    glm4_moe_config,
    glm4_moe_lite_config,
    glm_moe_dsa_config,
    gpt_oss_config,
    hy_v3_config,
    kimi_k2_config,
    minimax_m2_config,
    mistral4_config,
    mixtral_config,
    qwen2_moe_config,
)
from support.engine.models.local_model import Stepper, load_local
from support.engine.models.reference_models import load_reference, model_class

LITE_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, "factor": 40}
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": qwen3_moe_config(),
    "qwen3_moe-plain-weights": qwen3_moe_config(norm_topk_prob=False, num_experts_per_tok=3),
    "qwen3_moe-dense-layers": qwen3_moe_config(
        num_hidden_layers=5, mlp_only_layers=[3], decoder_sparse_step=2
    ),
    "qwen3_moe-tied-bias": qwen3_moe_config(tie_word_embeddings=True, attention_bias=True),
    "qwen3_moe-yarn": qwen3_moe_config(
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    ),
    "qwen3_moe-v5": qwen3_moe_config(
        rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    ),
    "deepseek_v3": deepseek_v3_config(),
    "deepseek_v3-direct-queries": deepseek_v3_config(q_lora_rank=None, n_group=1, topk_group=1),
    "deepseek_v3-yarn": deepseek_v3_config(rope_scaling=YARN, max_position_embeddings=512),
    "deepseek_v3-halves-bias": deepseek_v3_config(
        rope_interleave=False, attention_bias=True, n_shared_experts=2
    ),
    "deepseek_v3-direct-bias": deepseek_v3_config(
        q_lora_rank=None, attention_bias=True, norm_topk_prob=False
    ),
}
VARIANTS |= {
    "deepseek_v2": deepseek_v2_config(),
    "deepseek_v2-groups": deepseek_v2_config(
        topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0
    ),
    "deepseek_v2-lite": deepseek_v2_config(
        q_lora_rank=None, routed_scaling_factor=1.0, rope_scaling=LITE_YARN, n_group=1, topk_group=1
    ),
    "deepseek_v2-bias": deepseek_v2_config(
        attention_bias=True, num_experts_per_tok=3, first_k_dense_replace=0
    ),
    "deepseek_v2-v5": deepseek_v2_config(
        rope_theta=None, rope_parameters=YARN | {"rope_type": "yarn", "rope_theta": 5000.0}
    ),
    "kimi_k2": kimi_k2_config(),
    "mixtral": mixtral_config(),
    "mixtral-wide-heads": mixtral_config(
        head_dim=24, num_experts_per_tok=3, sliding_window=None, tie_word_embeddings=True
    ),
    "mixtral-v5": mixtral_config(
        rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 3000.0}
    ),
    "qwen2_moe": qwen2_moe_config(),
    "qwen2_moe-dense-layers": qwen2_moe_config(
        num_hidden_layers=5, mlp_only_layers=[3], decoder_sparse_step=2, norm_topk_prob=True
    ),
    "qwen2_moe-no-bias": qwen2_moe_config(qkv_bias=False, num_experts_per_tok=4, tie_word_embeddings=True),
    "qwen2_moe-yarn": qwen2_moe_config(
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    ),
    "glm4_moe": glm4_moe_config(),
    "glm4_moe-air": glm4_moe_config(use_qk_norm=False, routed_scaling_factor=1.0),
    "glm4_moe-groups": glm4_moe_config(
        n_group=4, topk_group=2, n_shared_experts=2, attention_bias=False, first_k_dense_replace=2
    ),
    "glm4_moe-v5": glm4_moe_config(
        partial_rotary_factor=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.75},
    ),
}
VARIANTS |= {
    "minimax_m2": minimax_m2_config(),
    "minimax_m2-v5": minimax_m2_config(
        rotary_dim=None,
        rope_theta=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.75},
        num_experts_per_tok=3,
        tie_word_embeddings=True,
    ),
    "glm4_moe_lite": glm4_moe_lite_config(),
    "glm4_moe_lite-groups": glm4_moe_lite_config(n_group=4, topk_group=2, q_lora_rank=None),
    "glm4_moe_lite-v5": glm4_moe_lite_config(
        first_k_dense_replace=None,
        mlp_layer_types=["dense", "sparse", "sparse"],
        partial_rotary_factor=None,
        rope_theta=None,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rope_interleave=False,
    ),
}
VARIANTS |= {
    "mistral4": mistral4_config(),
    "mistral4-groups": mistral4_config(
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=False,
        rope_interleave=False,
        rope_parameters=MISTRAL_ROPE | {"llama_4_scaling_beta": 0},
    ),
    "hy_v3": hy_v3_config(),
    "hy_v3-bias": hy_v3_config(
        first_k_dense_replace=None,
        mlp_layer_types=["sparse", "dense", "sparse"],
        attention_bias=True,
        num_shared_experts=2,
        rope_theta=None,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    ),
    "gpt_oss": gpt_oss_config(),
    "gpt_oss-all-windows": gpt_oss_config(
        layer_types=["sliding_attention"] * 3, sliding_window=40, swiglu_limit=None, num_experts_per_tok=1
    ),
    "gpt_oss-no-bias": gpt_oss_config(
        layer_types=["full_attention"] * 3, attention_bias=False, swiglu_alpha=1.2, tie_word_embeddings=True
    ),
    "gpt_oss-v5": gpt_oss_config(
        rope_theta=None, rope_scaling=None, rope_parameters=GPT_OSS_YARN | {"rope_theta": 5000.0}
    ),
}
VARIANTS |= {
    "deepseek_v32": deepseek_v32_config(),
    "deepseek_v32-sees-all": deepseek_v32_config(index_topk=93, num_hidden_layers=2),
    "deepseek_v32-yarn-bias": deepseek_v32_config(
        rope_scaling=YARN,
        max_position_embeddings=512,
        attention_bias=True,
        index_topk=40,
        index_head_dim=24,
        first_k_dense_replace=None,
        mlp_layer_types=["sparse", "dense", "sparse"],
    ),
}
VARIANTS |= {
    "glm_moe_dsa": glm_moe_dsa_config(),
    "glm_moe_dsa-wide-values": glm_moe_dsa_config(
        qk_nope_head_dim=24, v_head_dim=32, num_hidden_layers=2, index_n_heads=16
    ),
}
VARIANTS |= {
    "glm_moe_dsa-followers": glm_moe_dsa_config(
        num_hidden_layers=5, indexer_types=["full", "shared", "full", "shared", "shared"], index_n_heads=16
    ),
}
BF16_VARIANTS = (
    "qwen3_moe",
    "qwen3_moe-plain-weights",
    "deepseek_v3",
    "deepseek_v3-direct-queries",
    "deepseek_v3-yarn",
    "deepseek_v2",
    "deepseek_v2-groups",
    "deepseek_v2-lite",
    "kimi_k2",
    "mixtral",
    "qwen2_moe",
    "qwen2_moe-dense-layers",
    "glm4_moe",
    "glm4_moe-air",
    "minimax_m2",
    "glm4_moe_lite",
    "gpt_oss",
    "hy_v3",
    "mistral4",
    "deepseek_v32",
    "glm_moe_dsa",
)

LENGTHS = (93, 41, 7)


def _prompts(vocab: int, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def _reference(path: Path, dtype: torch.dtype, prompts: list[list[int]]) -> list[Tensor]:
    """transformers' logits [tokens, V] of each prompt, computed alone and in one piece, as
    float32.
    """
    model = load_reference(path, dtype)
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].float() for prompt in prompts]


def _whole(stepper: Stepper, prompts: list[list[int]]) -> list[Tensor]:
    """All prompts in one step."""
    return list(stepper.step(dict(enumerate(prompts))).values())


def _chunked(stepper: Stepper, prompts: list[list[int]]) -> list[Tensor]:
    """Chunks of growing size, each prompt beside the others."""
    parts: list[list[Tensor]] = [[] for _ in prompts]
    for begin, end in ((0, 3), (3, 4), (4, 21), (21, 40), (40, 93)):
        rows = {i: prompt[begin:end] for i, prompt in enumerate(prompts) if prompt[begin:end]}
        for i, logits in stepper.step(rows).items():
            parts[i].append(logits)
    return [torch.cat(part) for part in parts]


def _decoded(stepper: Stepper, prompts: list[list[int]]) -> list[Tensor]:
    """A few tokens as a prompt, the rest one by one, while the next sequence prefills in the same
    step.
    """
    parts: list[list[Tensor]] = [[] for _ in prompts]
    for step in range(max(map(len, prompts)) + len(prompts)):
        decode, extend = {}, {}
        for i, prompt in enumerate(prompts):
            done = stepper.lengths.get(i, 0)
            if done == 0 and step == i:
                extend[i] = prompt[:5]
            elif 0 < done < len(prompt):
                decode[i] = prompt[done : done + 1]
        for i, logits in stepper.step(decode | extend, num_decode=len(decode)).items():
            parts[i].append(logits)
    return [torch.cat(part) for part in parts]


WAYS = {"whole": _whole, "chunked": _chunked, "decoded": _decoded}


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_equals_transformers(variant: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", VARIANTS[variant])
    prompts = _prompts(VARIANTS[variant]["vocab_size"])
    reference = _reference(path, torch.float32, prompts)
    model = load_local(path, torch.float32)
    for name, way in WAYS.items():
        ours = way(Stepper(model, torch.float32), prompts)
        for prompt, expected, got in zip(prompts, reference, ours, strict=True):
            assert got.shape == (len(prompt), VARIANTS[variant]["vocab_size"])
            error = (got - expected).abs().max() / expected.abs().max()
            assert error <= 1e-4, f"{name}, prompt of {len(prompt)}: {error:.2e}"


def test_deepseek_v2_weights_are_normalised_or_scaled(tmp_path: Path) -> None:
    """As in the model's own code. transformers scales only, so its routers are corrected here."""
    config = deepseek_v2_config(norm_topk_prob=True, routed_scaling_factor=16.0)
    path = write_checkpoint(tmp_path / "m", config)
    model = load_reference(path, torch.float32)
    routers = [module for module in model.modules() if type(module).__name__ == "DeepseekV2TopkRouter"]
    for router in routers:
        router.register_forward_hook(
            lambda module, inputs, output: (output[0], output[1] / output[1].sum(-1, keepdim=True), output[2])
        )
    prompt = _prompts(config["vocab_size"])[0]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0]
    (got,) = _whole(Stepper(load_local(path, torch.float32), torch.float32), [prompt])
    assert len(routers) == 2 and (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("variant", BF16_VARIANTS)
def test_bfloat16_is_as_good_as_transformers(variant: str, tmp_path: Path) -> None:
    """Both errors are against float32 on the same bf16 weights and positions: the norm of the
    difference at a position, its median and its mean. The mean holds the positions where a router
    turned to another expert, of which a few hundred positions have too few to compare.
    """
    path = write_checkpoint(tmp_path / "m", VARIANTS[variant], dtype=torch.bfloat16)
    prompts = _prompts(VARIANTS[variant]["vocab_size"], [93] * 16)
    exact = torch.cat(_reference(path, torch.float32, prompts))
    theirs = (torch.cat(_reference(path, torch.bfloat16, prompts)) - exact).norm(dim=-1)
    model = load_local(path, torch.bfloat16)
    for name, way in WAYS.items():
        ours = (torch.cat(way(Stepper(model, torch.bfloat16, num_pages=256), prompts)) - exact).norm(dim=-1)
        ratios = (float(ours.median() / theirs.median()), float(ours.mean() / theirs.mean()))
        print(variant, name, ratios)
        assert max(ratios) <= 1.5, f"{name}: ours over theirs: median {ratios[0]:.2f}, mean {ratios[1]:.2f}"


@pytest.mark.parametrize(
    "variant",
    [
        *("qwen3_moe-tied-bias", "deepseek_v3-yarn", "deepseek_v2-lite", "mixtral", "qwen2_moe", "glm4_moe"),
        *("minimax_m2", "glm4_moe_lite", "gpt_oss", "hy_v3", "mistral4", "deepseek_v32", "glm_moe_dsa"),
    ],
)
def test_directories_written_by_transformers_are_read(variant: str, tmp_path: Path) -> None:
    config = VARIANTS[variant]
    path = write_checkpoint(tmp_path / "m", config)
    theirs = model_class(config["model_type"]).from_pretrained(path)
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").is_file()
    saved, plain = (load_local(directory, torch.float32) for directory in (tmp_path / "saved", path))
    assert saved.config == plain.config
    assert saved.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name
