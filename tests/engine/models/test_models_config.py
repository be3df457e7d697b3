"""config.json: the description read from it, and errors for unsupported values."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lockstep.engine.models.config import GqaConfig, MlaConfig, ModelConfig, load_config
from support.engine.models.checkpoints import YARN, deepseek_v3_config, qwen3_moe_config


def load(path: Path, config: dict[str, Any]) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(config))
    return load_config(path)


def test_qwen3_moe(tmp_path: Path) -> None:
    config = load(tmp_path, qwen3_moe_config(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]))
    assert (config.family, config.moe_layers, config.dtype) == ("qwen3_moe", (1, 5), "float32")
    assert config.attention == GqaConfig(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True)
    assert (config.moe.scoring, config.moe.normalise, config.moe.selection_bias, config.moe.shared_width) == (
        "softmax",
        True,
        False,
        0,
    )
    assert config.kv_shapes("bf16", 0) == ((2, 16), (2, 16))


def test_deepseek_v3(tmp_path: Path) -> None:
    config = load(tmp_path, deepseek_v3_config(q_lora_rank=None, n_shared_experts=2))
    assert (config.family, config.moe_layers) == ("deepseek_v3", (1, 2))
    assert isinstance(config.attention, MlaConfig)
    assert (config.attention.q_latent, config.attention.kv_latent, config.attention.scale) == (
        None,
        32,
        24**-0.5,
    )
    assert (config.moe.num_groups, config.moe.top_groups, config.moe.shared_width, config.moe.scale) == (
        4,
        2,
        64,
        2.5,
    )
    assert config.kv_shapes("fp32", 0) == ((40,),)


def test_both_generations_of_rope_fields_mean_the_same(tmp_path: Path) -> None:
    four = load(tmp_path, deepseek_v3_config(rope_theta=5000.0, rope_scaling=YARN))
    parameters = {name: value for name, value in YARN.items() if name != "type"} | {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
    }
    five = load(
        tmp_path,
        deepseek_v3_config(rope_theta=None, rope_parameters=parameters, torch_dtype=None, dtype="float32"),
    )
    assert four == five
    assert four.rope.yarn is not None
    assert four.rope.theta == 5000.0
    assert four.max_position == 2048


def test_yarn_stretches_the_context(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert load(tmp_path, qwen3_moe_config(rope_scaling=scaling)).max_position == 8192


def test_end_ids_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert load(tmp_path, qwen3_moe_config(eos_token_id=7)).eos_ids == (7, 5)
    assert load(tmp_path, qwen3_moe_config(eos_token_id=None)).eos_ids == (5, 7)


def test_the_architecture_may_come_from_the_model_type(tmp_path: Path) -> None:
    assert load(tmp_path, deepseek_v3_config(architectures=None)).family == "deepseek_v3"
    assert load(tmp_path, deepseek_v3_config(model_type="kimi_k2")).family == "deepseek_v3"


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

QWEN_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"architectures": ["LlamaForCausalLM"]},
        "architectures is .*Llama.*supported architectures: .*Qwen3MoeForCausalLM",
    ),
    "no architecture": (
        {"architectures": None, "model_type": "llama"},
        "model_type is .llama.; supported architectures",
    ),
    "other kind": (
        {"quantization_config": FP8 | {"quant_method": "awq"}},
        'quantization_config: quant_method is "awq"; supported: "fp8"',
    ),
    "one number": (
        {"quantization_config": FP8 | {"weight_block_size": [64]}},
        r"weight_block_size is .64.; expected the rows and columns",
    ),
    "no rows": (
        {"quantization_config": FP8 | {"weight_block_size": [0, 128]}},
        r"weight_block_size is .0, 128.; expected the rows",
    ),
    "other eight bits": (
        {"quantization_config": FP8 | {"fmt": "e5m2"}},
        'quantization_config: fmt is "e5m2"; supported: "e4m3"',
    ),
    "static": (
        {"quantization_config": FP8 | {"activation_scheme": "static"}},
        'activation_scheme is "static"; supported: "dynamic"',
    ),
    "activation": ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; supported: "silu"'),
    "window": ({"use_sliding_window": True}, "use_sliding_window is true; supported: false"),
    "layer types": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*full_attention"),
    "rope kind": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        'rope_scaling: rope_type is "dynamic"; supported: "default", "yarn"',
    ),
    "rope part": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1"),
    "rope factor": (
        {"rope_scaling": {"type": "yarn", "factor": -1}},
        "rope_scaling: factor is -1; expected a number above 0",
    ),
    "rope text": ({"rope_scaling": "yarn"}, 'rope_scaling is "yarn"; expected an object'),
    "odd rope": ({"head_dim": 15}, "rotary dimension is 15"),
    "missing": ({"hidden_size": None}, "hidden_size is missing"),
    "negative": ({"hidden_size": -8}, "hidden_size is -8; expected an integer of at least 1"),
    "text": ({"vocab_size": "many"}, 'vocab_size is "many"; expected an integer'),
    "truth": ({"num_hidden_layers": True}, "num_hidden_layers is true; expected an integer"),
    "flag": ({"norm_topk_prob": 1}, "norm_topk_prob is 1; expected true or false"),
    "heads": (
        {"num_key_value_heads": 3},
        "num_key_value_heads is 3; expected a divisor of num_attention_heads",
    ),
    "choices": (
        {"num_experts_per_tok": 9},
        "num_experts_per_tok is 9; expected at most the number of experts",
    ),
    "no experts": ({"mlp_only_layers": [0, 1, 2]}, "no layer holds experts"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is .*supported: .bfloat16."),
    "end id": ({"eos_token_id": 320}, "eos_token_id is .320.; expected ids below vocab_size"),
    "end ids": ({"eos_token_id": ["</s>"]}, "eos_token_id .*expected non-negative integers"),
}
DEEPSEEK_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "scoring": ({"scoring_func": "softmax"}, 'scoring_func is "softmax"; supported: "sigmoid"'),
    "method": ({"topk_method": "greedy"}, 'topk_method is "greedy"; supported: "noaux_tc"'),
    "frequency": ({"moe_layer_freq": 2}, "moe_layer_freq is 2; supported: 1"),
    "groups": ({"n_group": 3}, "n_group is 3; expected groups of equal size"),
    "small groups": ({"n_group": 8}, "n_group is 8"),
    "best groups": ({"topk_group": 5}, "topk_group is 5; expected at most n_group"),
    "choices": (
        {"num_experts_per_tok": 5},
        "num_experts_per_tok is 5; expected at most the experts of topk_group",
    ),
    "all dense": ({"first_k_dense_replace": 3}, "no layer holds experts"),
    "latent": ({"q_lora_rank": 0}, "q_lora_rank is 0; expected an integer of at least 1"),
}


@pytest.mark.parametrize("case", QWEN_ERRORS)
def test_qwen3_moe_errors_name_the_field(case: str, tmp_path: Path) -> None:
    changes, message = QWEN_ERRORS[case]
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, qwen3_moe_config(**changes))
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("case", DEEPSEEK_ERRORS)
def test_deepseek_v3_errors_name_the_field(case: str, tmp_path: Path) -> None:
    changes, message = DEEPSEEK_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        load(tmp_path, deepseek_v3_config(**changes))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: not a directory"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        load_config(tmp_path)
    for content, message in (
        (b"{", "not readable as JSON"),
        (b"\xff\xfe{}", "not readable as JSON"),
        (b"[]", "holds a list"),
    ):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json: cannot be read: Is a directory"):
        load_config(tmp_path)


def test_imports_without_torch() -> None:
    code = "import sys, lockstep.engine.models.config, lockstep.engine.models.checkpoint;"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
