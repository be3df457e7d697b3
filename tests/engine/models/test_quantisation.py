"""The ``quantization_config`` of checkpoints with experts in 4 bits, and errors for others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.engine.models.config import ModelConfig, load_config
from lockstep.kernels.formats.four_bit_format import INT4, INT4_FP16, MXFP4, NVFP4, FourBitFormat
from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config
from support.engine.models.four_bit_checkpoints import CONFIGS

KIMI_IGNORES = [
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
]


def described(tmp_path: Path, config: dict[str, Any], quantisation: dict[str, Any]) -> ModelConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"quantization_config": quantisation}))
    return load_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype", "format", "layout"),
    [
        ("int4", "bfloat16", INT4, "compressed"),
        ("int4", "float16", INT4_FP16, "compressed"),
        ("nvfp4", "bfloat16", NVFP4, "compressed"),
        ("nvfp4 of Model Optimizer", "bfloat16", NVFP4, "modelopt"),
        ("mxfp4", "bfloat16", MXFP4, "compressed"),
        ("mxfp4 of gpt-oss", "bfloat16", MXFP4, "stacked"),
    ],
)
def test_formats_are_recognised(
    name: str, dtype: str, format: FourBitFormat, layout: str, tmp_path: Path
) -> None:
    config = described(tmp_path, deepseek_v3_config(torch_dtype=dtype), CONFIGS[name])
    assert config.four_bit is not None and config.fp8 is None
    assert (config.four_bit.format, config.four_bit.layout) == (format, layout)


def test_what_kimi_k2_thinking_ignores(tmp_path: Path) -> None:
    stored = described(
        tmp_path, deepseek_v3_config(torch_dtype="bfloat16"), CONFIGS["int4"] | {"ignore": KIMI_IGNORES}
    ).four_bit
    assert stored is not None
    assert stored.stores("model.layers.1.mlp.experts.3.up_proj")
    for kept in ("self_attn.kv_b_proj", "mlp.shared_experts.down_proj", "mlp.gate_proj"):
        assert not stored.stores(f"model.layers.1.{kept}")
    assert not stored.stores("lm_head")


def test_names_with_wildcards_are_ignored_with_all_below_them(tmp_path: Path) -> None:
    ignored = ["lm_head", "model.layers.*.self_attn", "*.shared_experts*", "model.layers.0.mlp*"]
    quantisation = CONFIGS["nvfp4 of Model Optimizer"] | {"ignore": ignored}
    stored = described(tmp_path, deepseek_v3_config(), quantisation).four_bit
    assert stored is not None and not stored.stores("model.layers.0.mlp.up_proj")
    assert stored.stores("model.layers.1.mlp.experts.0.up_proj")


def test_targets_may_name_the_experts_alone(tmp_path: Path) -> None:
    assert described(
        tmp_path, qwen3_moe_config(), changed(targets=["re:.*mlp\\.experts\\..*"], ignore=[])
    ).four_bit


def changed(name: str = "int4", *, targets: list[str] | None = None, **fields: Any) -> dict[str, Any]:
    """A quantisation with other fields, of the weights where those have them."""
    quantisation = json.loads(json.dumps(CONFIGS[name]))
    group = quantisation["config_groups"]["group_0"]
    for field, value in fields.items():
        holder = group["weights"] if field in group["weights"] else quantisation
        holder[field] = value
    if targets is not None:
        group["targets"] = targets
    return quantisation


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"quant_method": "gptq"}, 'quant_method is "gptq"; supported: "fp8", "compressed'),
    "another format": (
        changed(format="int-quantized"),
        'format is "int-quantized"; supported: "pack-quantized", "nvfp4-pack-quantized"',
    ),
    "eight bits": (changed(num_bits=8), "weights: num_bits is 8; supported: 4"),
    "no bits": (changed(num_bits=None), "weights: num_bits is missing"),
    "wide groups": (changed(group_size=128), "weights: group_size is 128; supported: 32"),
    "wide groups of nvfp4": (changed("nvfp4", group_size=32), "weights: group_size is 32; supported: 16"),
    "zero points": (changed(symmetric=False), "weights: symmetric is false; supported: true"),
    "permuted columns": (changed(actorder="group"), 'weights: actorder is "group"; supported: false'),
    "a scale per row": (changed(strategy="channel"), 'weights: strategy is "channel"; supported: "group"'),
    "two groups": (
        CONFIGS["int4"] | {"config_groups": {"group_0": {}, "group_1": {}}},
        "config_groups is .*; supported: one group",
    ),
    "ignore without names": (CONFIGS["int4"] | {"ignore": [3]}, "ignore is .*; expected a list of names"),
    "a broken expression": (
        CONFIGS["int4"] | {"ignore": ["re:("]},
        r"ignore is \[\"re:\(\"\]; re:\( is no regular expression",
    ),
    "attention in 4 bits": (
        CONFIGS["int4"] | {"ignore": ["lm_head"]},
        r"model\.layers\.0\.self_attn\.o_proj is in int4; supported: 4 bits in routed experts only, "
        "every other linear layer in ignore",
    ),
    "the head in 4 bits": (CONFIGS["int4"] | {"ignore": ["re:.*self_attn.*"]}, "lm_head is in int4"),
    "experts ignored": (
        CONFIGS["int4"] | {"ignore": ["lm_head", "re:.*self_attn.*", r"re:.*layers\.2\..*"]},
        r"ignore leaves model\.layers\.2\.mlp\.experts\.0\.gate_proj out of int4",
    ),
    "another algorithm": (
        CONFIGS["nvfp4 of Model Optimizer"] | {"quant_algo": "W4A8_AWQ"},
        'quant_algo is "W4A8_AWQ"; supported: "NVFP4"',
    ),
    "experts not converted": (
        CONFIGS["mxfp4 of gpt-oss"] | {"modules_to_not_convert": ["model.layers.1.mlp.experts"]},
        r"modules_to_not_convert leaves model\.layers\.1\.mlp\.experts\.0\.gate_proj out of mxfp4",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_field(case: str, tmp_path: Path) -> None:
    quantisation, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as error:
        described(tmp_path, qwen3_moe_config(), quantisation)
    assert "config.json: quantization_config" in str(error.value)


def test_rows_of_experts_hold_whole_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expert width is 36; expected a multiple of 8 for experts in int4"):
        described(tmp_path, qwen3_moe_config(moe_intermediate_size=36), CONFIGS["int4"])
