"""Checkpoints on disk: tensors that are read or left, and errors for those that do not fit."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lockstep.engine.models.checkpoint_reader import CheckpointReader
from lockstep.engine.models.config import load_config
from lockstep.engine.models.decoder import Model
from lockstep.engine.models.registry import build_model
from lockstep.engine.models.weights import Loaded, load_weights
from lockstep.moe.balance.placement import Placement
from lockstep.moe.dispatch.local import LocalDispatcher
from support.engine.models.checkpoints import (
    deepseek_v3_config,
    qwen3_moe_config,
    random_tensors,
    save_tensors,
    write_checkpoint,
)
from support.engine.models.family_configs import glm4_moe_config, mixtral_config, qwen2_moe_config

CONFIGS = {
    "qwen3_moe": qwen3_moe_config(),
    "deepseek_v3": deepseek_v3_config(num_nextn_predict_layers=1),
    "mixtral": mixtral_config(),
    "qwen2_moe": qwen2_moe_config(),
    "glm4_moe": glm4_moe_config(),
}
CPU = torch.device("cpu")


class _Slots(LocalDispatcher):
    """A dispatcher with the slots of one rank of several; it never runs."""

    def __init__(self, num_layers: int, num_slots: int) -> None:
        everywhere = np.tile(np.arange(num_slots, dtype=np.int32), (num_layers, 1, 1))
        super().__init__(Placement(everywhere, num_slots), CPU)


def load(
    path: Path, experts: list[int], dtype: torch.dtype = torch.float32, seen: list[float] | None = None
) -> tuple[Model, Loaded]:
    """Loads with ``experts`` in the slots of every layer."""
    config = load_config(path)
    model = build_model(config, _Slots(len(config.moe_layers), len(experts)), dtype, CPU)
    progress: Callable[[float], None] = (lambda fraction: None) if seen is None else seen.append
    return model, load_weights(model, CheckpointReader(path), lambda layer: experts, progress)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_tensor_arrives(family: str, num_shards: int, tmp_path: Path) -> None:
    config = CONFIGS[family]
    path = write_checkpoint(tmp_path / "m", config, num_shards=num_shards)
    stored = random_tensors(config)
    model, loaded = load(path, [5, 2, -1])
    for name, tensor in model.checkpoint_tensors().items():
        assert torch.equal(tensor, stored.pop(name)), name
    for layer in model.expert_layers():
        for slot, expert in ((0, 5), (1, 2)):
            names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
            parts = [stored.pop(f"{layer.name}.{expert}.{name}.weight") for name in names]
            assert torch.equal(layer.w13_SFD[slot], torch.cat(parts[:2]))
            assert torch.equal(layer.w2_SDF[slot], parts[2])
    assert stored
    assert all(".experts." in name for name in stored), "only experts without a slot stay behind"
    assert loaded.num_bytes == sum(t.nbytes for t in random_tensors(config).values()) - sum(
        t.nbytes for t in stored.values()
    )


def test_only_the_own_shard_is_opened(tmp_path: Path) -> None:
    """Experts 4 to 7 have a file of their own with a byte too many: its header is readable, but
    opening the file for values fails.
    """
    path = tmp_path / "m"
    path.mkdir()
    config = CONFIGS["qwen3_moe"]
    (path / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config)
    far = {
        name: value
        for name, value in tensors.items()
        if any(f".experts.{expert}." in name for expert in range(4, 8))
    }
    near = {name: value for name, value in tensors.items() if name not in far}
    save_file(near, path / "near.safetensors")
    save_file(far, path / "far.safetensors")
    with (path / "far.safetensors").open("ab") as stream:
        stream.write(b"!")
    weight_map = {name: "far.safetensors" if name in far else "near.safetensors" for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model, loaded = load(path, [0, 1, 2, 3])
    assert (loaded.num_tensors, loaded.num_bytes) == (len(near), sum(value.nbytes for value in near.values()))
    assert torch.equal(
        model.expert_layers()[0].w2_SDF[3], tensors["model.layers.0.mlp.experts.3.down_proj.weight"]
    )
    with pytest.raises(ValueError, match=r"far\.safetensors: not readable as safetensors"):
        load(path, [3, 4])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("served", [torch.bfloat16, torch.float32])
def test_values_are_cast_to_the_serving_dtype(
    stored: torch.dtype, served: torch.dtype, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "m", CONFIGS["deepseek_v3"], dtype=stored)
    model, _ = load(path, list(range(8)), served)
    tensors = random_tensors(CONFIGS["deepseek_v3"], dtype=stored)
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    assert torch.equal(model.checkpoint_tensors()[name], tensors[name].to(served))
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert model.checkpoint_tensors()[bias].dtype == torch.float32
    assert torch.equal(model.checkpoint_tensors()[bias], tensors[bias])


def test_progress_rises_to_one(tmp_path: Path) -> None:
    seen: list[float] = []
    load(write_checkpoint(tmp_path / "m", CONFIGS["qwen3_moe"]), list(range(8)), seen=seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    assert seen == sorted(seen)
    assert 10 < len(seen) < 110


def test_tied_embeddings_need_no_head(tmp_path: Path) -> None:
    config = qwen3_moe_config(tie_word_embeddings=True)
    model, _ = load(write_checkpoint(tmp_path / "m", config), list(range(8)))
    assert model.lm_head is None


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_tensors_that_are_not_used(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = CONFIGS[family]
    path = write_checkpoint(tmp_path / "m", config)
    extra = {
        "model.layers.3.eh_proj.weight": torch.zeros(2, 2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    save_tensors(path, random_tensors(config) | extra)
    with caplog.at_level(logging.INFO):
        load(path, list(range(8)))
    (told,) = [
        record.getMessage()
        for record in caplog.records
        if record.name == "lockstep.engine.models.checkpoint_reader"
    ]
    assert told == f"{path}: 1 tensors of layers from 3 on, which predict further tokens, are not loaded"
    caplog.clear()
    save_tensors(
        path, random_tensors(config) | extra | {"vision.a": torch.zeros(1), "vision.b": torch.zeros(1)}
    )
    with caplog.at_level(logging.WARNING):
        load(path, list(range(8)))
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 2 tensors are not used, the first is vision.a"
    ]
    caplog.clear()
    save_tensors(path, random_tensors(config) | {"model.layers.4.eh_proj.weight": torch.zeros(2, 2)})
    with caplog.at_level(logging.WARNING):
        load(path, list(range(8)))
    assert "1 tensors are not used, the first is model.layers.4" in caplog.text, (
        "config.json announces one layer more, not two"
    )


# --------------------------------------------------------------------------- errors


def _replace(name: str, value: Tensor | None) -> Callable[[Path, dict[str, Tensor]], None]:
    def damage(path: Path, tensors: dict[str, Tensor]) -> None:
        changed = {key: value if key == name and value is not None else old for key, old in tensors.items()}
        if value is None:
            del changed[name]
        save_tensors(path, changed)

    return damage


def _cut(keep: Callable[[int, int], int]) -> Callable[[Path, dict[str, Tensor]], None]:
    """Cuts the file to ``keep(its size, its header's length)`` bytes."""

    def damage(path: Path, tensors: dict[str, Tensor]) -> None:
        file = path / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: keep(len(content), struct.unpack("<Q", content[:8])[0])])

    return damage


def _content(content: bytes) -> Callable[[Path, dict[str, Tensor]], None]:
    def damage(path: Path, tensors: dict[str, Tensor]) -> None:
        (path / "model.safetensors").write_bytes(content)

    return damage


def _header(text: bytes) -> Callable[[Path, dict[str, Tensor]], None]:
    return _content(struct.pack("<Q", len(text)) + text)


def _entry(entry: object) -> Callable[[Path, dict[str, Tensor]], None]:
    return _header(json.dumps({"model.norm.weight": entry}).encode())


def _index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, dict[str, Tensor]], None]:
    """Shards the checkpoint and writes its index after ``change``."""

    def damage(path: Path, tensors: dict[str, Tensor]) -> None:
        (path / "model.safetensors").unlink()
        save_tensors(path, tensors, num_shards=2)
        index = path / "model.safetensors.index.json"
        changed = change(json.loads(index.read_text()))
        index.write_text(changed if isinstance(changed, str) else json.dumps(changed))

    return damage


def _lose_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    _index(lambda index: index)(path, tensors)
    (path / "model-00002-of-00002.safetensors").unlink()


def _lose_all(path: Path, tensors: dict[str, Tensor]) -> None:
    (path / "model.safetensors").unlink()


EXPERT = "model.layers.1.mlp.experts.6.up_proj.weight"
QUERY = "model.layers.2.self_attn.q_proj.weight"
NORM = "model.norm.weight"

ERRORS: dict[str, tuple[Callable[[Path, dict[str, Tensor]], None], str]] = {
    "missing tensor": (_replace(QUERY, None), f"m: 1 of \\d+ tensors are missing: {QUERY}$"),
    "missing expert elsewhere": (_replace(EXPERT, None), f"tensors are missing: {EXPERT}$"),
    "misshapen": (
        _replace(QUERY, torch.zeros(64, 63)),
        f"model.safetensors: {QUERY} has shape .64, 63.; config.json makes it .64, 64.",
    ),
    "misshapen expert elsewhere": (
        _replace(EXPERT, torch.zeros(64, 32)),
        f"{EXPERT} has shape .64, 32.; .* .32, 64.",
    ),
    "integers": (
        _replace(NORM, torch.zeros(64, dtype=torch.int32)),
        f"{NORM} has dtype I32; supported: BF16, F16, F32",
    ),
    "fp8": (
        _replace(QUERY, torch.zeros(64, 64).to(torch.float8_e4m3fn)),
        f"{QUERY} has dtype F8_E4M3; supported",
    ),
    "empty file": (_cut(lambda size, header: 0), "model.safetensors: truncated: 0 bytes"),
    "cut in the header": (_cut(lambda size, header: 8 + header // 2), "truncated: .* its header alone takes"),
    "cut in the values": (_cut(lambda size, header: size - 1), "truncated: .* ends at"),
    "not safetensors": (_content(b"PK\3\4" * 500), "not a safetensors file"),
    "header not JSON": (_header(b"{'a'}"), "header is not JSON"),
    "header not text": (_header(b"\xff\xfe\xfd"), "header is not JSON"),
    "header a list": (_header(b"[1]"), "header is not a JSON object"),
    "entry a number": (_entry(3), f"header entry of {NORM} is malformed: 3"),
    "entry without offsets": (_entry({"dtype": "F32", "shape": [64]}), "is malformed"),
    "entry backwards": (_entry({"dtype": "F32", "shape": [64], "data_offsets": [256, 0]}), "is malformed"),
    "entry of other size": (
        _entry({"dtype": "F32", "shape": [64], "data_offsets": [0, 0]}),
        "takes 0 bytes; shape .64. in F32 takes 256",
    ),
    "no checkpoint": (_lose_all, "m: holds neither model.safetensors nor model.safetensors.index.json"),
    "missing shard": (_lose_shard, "model-00002-of-00002.safetensors: no such file"),
    "index not JSON": (_index(lambda index: "{"), "index.json: not readable as JSON"),
    "index without map": (_index(lambda index: {}), "index.json: weight_map is missing or empty"),
    "index leaves": (
        _index(lambda index: {"weight_map": {NORM: "../x.safetensors"}}),
        "weight_map.*expected the name of a file beside it",
    ),
    "index errs": (
        _index(lambda index: {"weight_map": {"a.b": "model-00001-of-00002.safetensors"}}),
        "holds no tensor a.b, which .* places there",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_file_and_tensor_and_nothing_is_read(case: str, tmp_path: Path) -> None:
    config = CONFIGS["qwen3_moe"]
    path = write_checkpoint(tmp_path / "m", config)
    damage, message = ERRORS[case]
    damage(path, random_tensors(config))
    seen: list[float] = []
    with pytest.raises(ValueError, match=message) as error:
        load(path, [0, 1, 2, 3], seen=seen)
    assert str(path) in str(error.value)
    assert not seen


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", CONFIGS["qwen3_moe"])
    save_tensors(path, {NORM: torch.zeros(64)})
    with pytest.raises(ValueError, match=r"m: 101 of 102 tensors are missing: model\.layers.* and 97 more$"):
        load(path, [0])
