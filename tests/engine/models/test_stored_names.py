"""Checkpoints whose text model stands behind a prefix, beside a vision tower, or whose experts are
stacked: the same weights arrive as from the plain checkpoint.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lockstep.engine.frontend.requests.sampling import load_defaults
from lockstep.engine.models.checkpoint import read_checkpoint
from lockstep.engine.models.checkpoint_reader import values_of
from lockstep.engine.models.config import CheckpointNames, load_config
from lockstep.engine.models.stored_names import separate_experts
from support.engine.models.checkpoints import (
    deepseek_v3_config,
    qwen3_moe_config,
    random_tensors,
    save_tensors,
    write_checkpoint,
)
from support.engine.models.local_model import load_local

VISION: dict[str, Tensor] = {
    "vision_tower.blocks.0.weight": torch.zeros(4, 4),
    "vision_tower.blocks.0.bias": torch.zeros(4),
    "mm_projector.weight": torch.zeros(4, 4),
}


def write(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_tensors(path, tensors, num_shards=2)
    return path


def nested(config: dict[str, Any], name: str = "text_config", **outer: Any) -> dict[str, Any]:
    """The config.json of a model of text and images around ``config``."""
    return {
        "architectures": ["SomeForConditionalGeneration"],
        "model_type": "some",
        "vision_config": {"hidden_size": 4},
        name: config,
        **outer,
    }


def assert_equal_weights(ours: Path, plain: Path) -> None:
    found, wanted = (load_local(path, torch.float32).state_dict() for path in (ours, plain))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def wrapped(tensors: dict[str, Tensor], inner: bool) -> dict[str, Tensor]:
    if not inner:
        return {f"language_model.{name}": value for name, value in tensors.items()}
    return {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: value
        for name, value in tensors.items()
    }


@pytest.mark.parametrize("inner", [False, True], ids=["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("config_of", [qwen3_moe_config, deepseek_v3_config])
def test_the_text_model_of_a_model_of_text_and_images(
    config_of: Any, inner: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of()
    plain = write_checkpoint(tmp_path / "plain", config)
    vision = {f"model.{name}" if inner else name: value for name, value in VISION.items()}
    path = write(tmp_path / "m", nested(config), wrapped(random_tensors(config), inner) | vision)
    assert load_config(path) == load_config(plain)
    with caplog.at_level(logging.INFO):
        assert_equal_weights(path, plain)
    lines = [line for line in caplog.messages if "only the text model is served" in line]
    assert len(lines) == 1
    assert "mm_projector (1 tensors)" in lines[0] and "vision_tower (2 tensors)" in lines[0]
    assert not [line for line in caplog.messages if "not used" in line]


@pytest.mark.parametrize("name", ["text_config", "llm_config", "language_config"])
def test_a_nested_description(name: str, tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "m"
    for folder, config in (
        (plain, qwen3_moe_config(eos_token_id=[5, 7], torch_dtype="bfloat16")),
        (
            path,
            nested(
                qwen3_moe_config(architectures=None, eos_token_id=None, torch_dtype=None),
                name,
                eos_token_id=[5, 7],
                dtype="bfloat16",
            ),
        ),
    ):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    assert load_config(path) == load_config(plain)
    assert load_defaults(path, None).eos_ids == (5, 7)


def test_the_ends_of_a_text_that_only_the_nested_description_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(nested(qwen3_moe_config(eos_token_id=[3, 4]))))
    assert load_defaults(tmp_path, 9).eos_ids == (3, 4, 9)
    assert load_config(tmp_path).eos_ids == (3, 4)


def test_an_error_in_a_nested_description_names_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(nested(qwen3_moe_config(hidden_size=-1))))
    with pytest.raises(ValueError, match=r"config\.json: text_config: hidden_size is -1"):
        load_config(tmp_path)


# --------------------------------------------------------------------------- stacked experts


def stacked(tensors: dict[str, Tensor], transposed: bool = False, suffix: str = "") -> dict[str, Tensor]:
    """``tensors`` with the experts of each layer in two tensors."""
    found = {name: value for name, value in tensors.items() if ".mlp.experts." not in name}
    layers = {name.split(".mlp.")[0] for name in tensors if ".mlp.experts." in name}
    for layer in sorted(layers):

        def matrices(projection: str, layer: str = layer) -> Tensor:
            names = [f"{layer}.mlp.experts.{expert}.{projection}.weight" for expert in range(8)]
            return torch.stack([tensors[name] for name in names])

        merged, down = torch.cat([matrices("gate_proj"), matrices("up_proj")], 1), matrices("down_proj")
        for name, value in (("gate_up_proj", merged), ("down_proj", down)):
            value = value.mT.contiguous() if transposed else value
            found[f"{layer}.mlp.experts.{name}{suffix}"] = value
    return found


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_stacked_experts(suffix: str, tmp_path: Path) -> None:
    config = qwen3_moe_config()
    plain = write_checkpoint(tmp_path / "plain", config)
    path = write(tmp_path / "m", config, stacked(random_tensors(config), suffix=suffix))
    assert_equal_weights(path, plain)


@pytest.mark.parametrize("transposed", [False, True])
def test_every_matrix_of_stacked_experts_is_found(transposed: bool, tmp_path: Path) -> None:
    config = qwen3_moe_config()
    tensors = random_tensors(config)
    path = write(tmp_path / "m", config, stacked(tensors, transposed))
    stored = read_checkpoint(path)
    parts = separate_experts(stored, CheckpointNames(transposed_experts=transposed))
    assert parts.keys() == tensors.keys()
    for name, part in parts.items():
        assert part.shape == tuple(tensors[name].shape)
        assert part.num_bytes == tensors[name].nbytes
        with safe_open(part.file, framework="pt") as reader:
            assert torch.equal(values_of(reader, part), tensors[name]), name
    assert sum(part.num_bytes for part in parts.values()) == sum(each.num_bytes for each in stored.values())


def test_stacked_experts_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    config = qwen3_moe_config()
    path = write(tmp_path / "m", config, stacked(random_tensors(config), transposed=True))
    with pytest.raises(ValueError, match=r"experts\.0\.\w+\.weight has shape .* config\.json makes it"):
        load_local(path, torch.float32)
