"""Checkpoints in block-scaled FP8: widened as they are read, or kept for experts; and the errors
for those that do not fit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lockstep.engine.models.checkpoint_reader import CheckpointReader
from lockstep.engine.models.config import load_config
from lockstep.engine.models.decoder import Model
from lockstep.engine.models.quantisation import StoredFp8
from lockstep.engine.models.registry import ModelPart, build_model
from lockstep.engine.models.weights import load_weights
from lockstep.kernels.reference.fp8 import Quantised, quantise_blocks, widen_blocks, widen_into
from lockstep.kernels.table import Column
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.dispatch.local import LocalDispatcher
from lockstep.parallel.dense import split_as_attention
from lockstep.parallel.stages import whole_model
from lockstep.parallel.tensor import UNSPLIT, TensorSplit, Unsplit
from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config, save_tensors
from support.engine.models.family_configs import deepseek_v32_config, hy_v3_config, mistral4_config
from support.engine.models.fp8_checkpoints import SCALES, write_pair, write_whole_pair
from support.engine.models.local_model import Stepper, load_local

# Several blocks in both dims, the last ones not full.
SIZES = {"hidden_size": 160, "intermediate_size": 200, "moe_intermediate_size": 144, "num_experts_per_tok": 3}
CONFIGS = {
    "qwen3_moe": qwen3_moe_config(head_dim=64, **SIZES),
    "deepseek_v3": deepseek_v3_config(kv_lora_rank=132, q_lora_rank=140, **SIZES),
    "deepseek_v32": deepseek_v32_config(kv_lora_rank=132, q_lora_rank=140, index_n_heads=16, **SIZES),
}
CPU = torch.device("cpu")
PROMPTS = {0: list(range(40, 75)), 1: [7, 8, 9]}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp(request.param), CONFIGS[request.param], num_shards=3)


def load_in_fp8(
    path: Path,
    dtype: torch.dtype,
    column: Column,
    experts: list[int] | None = None,
    split: TensorSplit = UNSPLIT,
) -> Model:
    """Loads with matrices kept in FP8. ``experts``: those in the slots of every layer, by default
    all.
    """
    config = load_config(path)
    placement = contiguous(len(config.moe_layers), config.moe.num_experts, 1)
    part = ModelPart(whole_model(config.num_layers, config.moe_layers), split_as_attention(split))
    dispatcher = LocalDispatcher(placement, CPU)
    model = build_model(config, dispatcher, dtype, CPU, column, keep_fp8=True, part=part)
    load_weights(
        model,
        CheckpointReader(path),
        lambda layer: experts or placement.experts_of(0, layer),
        lambda fraction: None,
    )
    return model


def test_logits_are_those_of_the_dequantised_checkpoint(pair: tuple[Path, Path]) -> None:
    eight, plain = (load_local(path, torch.float32) for path in pair)
    assert eight.config.fp8 == StoredFp8((128, 128)) and plain.config.fp8 is None
    for name, tensor in plain.state_dict().items():
        assert torch.equal(eight.state_dict()[name], tensor), name
    steps = [Stepper(model, torch.float32).step(PROMPTS) for model in (eight, plain)]
    for sequence in PROMPTS:
        assert torch.equal(steps[0][sequence], steps[1][sequence])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_a_model_in_bf16_holds_the_rounded_values(scale_dtype: torch.dtype, tmp_path: Path) -> None:
    eight, plain = write_pair(tmp_path, CONFIGS["qwen3_moe"], scale_dtype=scale_dtype)
    for name, tensor in load_local(plain, torch.bfloat16).state_dict().items():
        assert torch.equal(load_local(eight, torch.bfloat16).state_dict()[name], tensor), name


def test_widened_matrices_are_logged_once(pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lockstep"):
        load_local(pair[0], torch.float32)
    (line,) = [record.getMessage() for record in caplog.records if "FP8" in record.getMessage()]
    assert "matrices in FP8 are widened as they are read, 0 stay in FP8" in line
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], (
        "scales are no unused tensors"
    )


def test_experts_stay_in_fp8(pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lockstep"):
        model = load_in_fp8(pair[0], torch.bfloat16, "reference", experts=[5, 2, -1, 0, 1, 3, 4, 6])
    kept = len(model.checkpoint_scales()) + 7 * 3 * len(model.config.moe_layers)
    assert any(f"{kept} stay in FP8" in record.getMessage() for record in caplog.records)
    stored = tensors_of(pair[0])
    for layer in model.expert_layers():
        assert layer.scales is not None and layer.w13_SFD.dtype == torch.float8_e4m3fn
        for slot, expert in ((0, 5), (1, 2), (7, 6)):
            names = [f"{layer.name}.{expert}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
            gate, up, down = (stored[name].view(torch.uint8) for name in names)
            assert torch.equal(layer.w13_SFD[slot].view(torch.uint8), torch.cat([gate, up]))
            assert torch.equal(layer.w2_SDF[slot].view(torch.uint8), down)
            assert torch.equal(
                layer.scales[0][slot], torch.stack([stored[name + SCALES] for name in names[:2]])
            )
            assert torch.equal(layer.scales[1][slot], stored[names[2] + SCALES])
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    wide = sum(
        p.nbytes for name, p in load_local(pair[0], torch.bfloat16).named_parameters() if ".experts." in name
    )
    assert 0.5 < experts / wide < 0.51


# Linear layers whose rows and columns are cut and stacked at the borders of blocks.
EVEN = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128}
EVEN_CONFIGS = {
    "qwen3_moe": qwen3_moe_config(head_dim=64, num_attention_heads=4, num_key_value_heads=4, **EVEN),
    "deepseek_v3": deepseek_v3_config(kv_lora_rank=128, q_lora_rank=128, num_attention_heads=16, **EVEN),
}


class PartOf(Unsplit):
    """A rank among others that never meet."""

    def __init__(self, index: int, size: int) -> None:
        self.index, self.size = index, size


@pytest.mark.parametrize("family", EVEN_CONFIGS)
@pytest.mark.parametrize("size", [1, 2])
def test_linear_layers_stay_in_fp8_and_are_cut_with_their_scales(
    family: str, size: int, tmp_path: Path
) -> None:
    path, plain = write_pair(tmp_path, EVEN_CONFIGS[family])
    wide = tensors_of(plain)
    for index in range(size):
        model = load_in_fp8(path, torch.bfloat16, "reference", split=PartOf(index, size))
        scales, shards = model.checkpoint_scales(), model.checkpoint_shards()
        assert len(scales) >= 4 * model.config.num_layers
        assert not any("kv_b_proj" in name or "lm_head" in name for name in scales)
        for name, tensor in model.checkpoint_tensors().items():
            if name not in scales:
                continue
            found, whole = widen_blocks(Quantised(tensor, scales[name])), wide[name]
            shard = shards[name]
            start, end = shard.bounds(tensor.shape[shard.dim]) if shard.parts > 1 else (0, len(whole))
            part = whole.narrow(shard.dim, start, end - start) if shard.parts > 1 else whole
            assert tensor.dtype == torch.float8_e4m3fn and torch.equal(found, part), name


def test_a_layer_with_a_matrix_in_bf16_is_widened_as_a_whole(tmp_path: Path) -> None:
    path, plain = write_pair(tmp_path, EVEN_CONFIGS["qwen3_moe"])
    stored = tensors_of(path)
    name = "model.layers.2.self_attn.k_proj.weight"
    del stored[name + SCALES]
    save_tensors(path, stored | {name: tensors_of(plain)[name].bfloat16()})
    model = load_in_fp8(path, torch.bfloat16, "reference")
    scales = model.checkpoint_scales()
    assert name not in scales and name.replace("k_proj", "q_proj") not in scales
    assert name.replace("k_proj", "o_proj") in scales and name.replace("layers.2", "layers.1") in scales
    for other in ("q_proj", "k_proj", "v_proj"):
        found = model.checkpoint_tensors()[name.replace("k_proj", other)]
        assert torch.equal(found, tensors_of(plain)[name.replace("k_proj", other)].bfloat16())


def test_fp8_matrices_compute_what_the_widened_ones_do(pair: tuple[Path, Path]) -> None:
    """Rows are quantised before each product, which costs a few percent; a router may turn on that,
    hence the median.
    """
    exact = torch.cat(list(Stepper(load_local(pair[0], torch.float32), torch.float32).step(PROMPTS).values()))
    found = torch.cat(
        list(Stepper(load_in_fp8(pair[0], torch.float32, "reference"), torch.float32).step(PROMPTS).values())
    )
    error = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 1e-3 < error.median() < 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="steps a model on the CPU, through the interpreter")
@pytest.mark.parametrize("family", EVEN_CONFIGS)
def test_the_triton_column_computes_with_fp8_matrices(family: str, tmp_path: Path) -> None:
    """The same matrices stay in FP8 whether a column merges them or not."""
    path, _ = write_pair(tmp_path, EVEN_CONFIGS[family])
    rows = {0: [3, 4, 5, 6], 1: [9]}
    found, expected = (
        Stepper(load_in_fp8(path, torch.float32, column), torch.float32).step(rows)
        for column in ("triton", "reference")
    )
    for sequence in rows:
        error = (found[sequence] - expected[sequence]).norm(dim=-1) / expected[sequence].norm(dim=-1)
        assert error.median() < 0.01


@pytest.mark.parametrize("block", [(128, 128), (32, 32), (48, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 127), (1024, 256), (1500, 300)])
def test_bands_are_widened_as_the_whole(
    shape: tuple[int, int], dtype: torch.dtype, block: tuple[int, int]
) -> None:
    w = quantise_blocks(torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None], block)
    assert w.scales.shape == (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    target = torch.empty(shape, dtype=dtype)
    widen_into(target, w, block)
    assert torch.equal(target, widen_blocks(w, block).to(dtype))
    assert torch.equal(widen_blocks(w, block), widen_blocks(Quantised(w.values.clone(), w.scales), block))


@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_may_have_other_sizes(family: str, tmp_path: Path) -> None:
    eight, plain = write_pair(tmp_path, CONFIGS[family], block=(48, 20))
    expected = load_local(plain, torch.float32).state_dict()
    found = load_local(eight, torch.float32)
    assert found.config.fp8 == StoredFp8((48, 20))
    assert not found.config.kernel_fp8, "its experts are widened on GPUs too"
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


WHOLE = {
    "hy_v3": hy_v3_config(head_dim=64, **SIZES),
    "mistral4": mistral4_config(kv_lora_rank=132, q_lora_rank=140, **SIZES),
}


@pytest.mark.parametrize("family", WHOLE)
def test_a_scale_per_matrix_holds_for_all_its_blocks(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    eight, plain = write_whole_pair(tmp_path, WHOLE[family])
    found, wanted = (load_local(path, torch.float32) for path in (eight, plain))
    assert found.config.fp8 == StoredFp8((128, 128), whole=True) and found.config.kernel_fp8
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], "no unused scales"
    kept = load_in_fp8(eight, torch.bfloat16, "reference")
    for layer, wide in zip(kept.expert_layers(), wanted.expert_layers(), strict=True):
        assert layer.scales is not None
        gate, up = layer.w13_SFD[5].chunk(2)
        matrices = [(gate, layer.scales[0][5][0]), (up, layer.scales[0][5][1])]
        for (values, scales), whole in zip(matrices, wide.w13_SFD[5].chunk(2), strict=True):
            assert torch.equal(widen_blocks(Quantised(values, scales)), whole)
    assert len(kept.checkpoint_scales()) > 4


def test_more_scales_than_matrices_are_refused(tmp_path: Path) -> None:
    path, _ = write_whole_pair(tmp_path, WHOLE["hy_v3"])
    name = QUERY.removesuffix("weight") + "weight_scale"
    save_tensors(path, tensors_of(path) | {name: torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"q_proj\.weight_scale_inv has shape \[2, 2\]; config\.json makes"):
        load_local(path, torch.float32)


# --------------------------------------------------------------------------- errors

QUERY = "model.layers.2.self_attn.q_proj.weight"
FAR = "model.layers.1.mlp.experts.6.up_proj.weight"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def without(name: str) -> Change:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def having(name: str, value: Tensor) -> Change:
    return lambda tensors: tensors | {name: value}


ERRORS: dict[str, tuple[Change, str]] = {
    "no scales": (
        without(QUERY + SCALES),
        f"model.safetensors: {QUERY} is in F8_E4M3, but {QUERY}_scale_inv is missing",
    ),
    "no scales of an expert elsewhere": (without(FAR + SCALES), f"{FAR}_scale_inv is missing"),
    "misshapen scales": (
        having(QUERY + SCALES, torch.ones(2, 1)),
        rf"{QUERY}_scale_inv has shape \[2, 1\]; "
        rf"{QUERY} of shape \[256, 160\] has \[2, 2\] blocks of 128 x 128",
    ),
    "scales of another kind": (
        having(QUERY + SCALES, torch.ones(2, 2, dtype=torch.int32)),
        f"{QUERY}_scale_inv has dtype I32; supported: BF16, F16, F32",
    ),
    "a norm in FP8": (
        having("model.norm.weight", torch.ones(160).to(torch.float8_e4m3fn)),
        "model.norm.weight has dtype F8_E4M3; supported: BF16, F16, F32, and F8_E4M3 for matrices",
    ),
    "misshapen matrix": (
        having(QUERY, torch.zeros(255, 160).to(torch.float8_e4m3fn)),
        rf"{QUERY} has shape \[255, 160\]; config.json makes",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_file_and_tensor(case: str, tmp_path: Path) -> None:
    config, (change, message) = CONFIGS["qwen3_moe"], ERRORS[case]
    path, _ = write_pair(tmp_path, config)
    save_tensors(path, change(tensors_of(path)))
    with pytest.raises(ValueError, match=message) as error:
        load_local(path, torch.float32)
    assert str(path) in str(error.value)


def test_fp8_without_an_entry_in_config_json_is_refused(tmp_path: Path) -> None:
    path, _ = write_pair(tmp_path, CONFIGS["qwen3_moe"])
    rewrite(
        path, lambda config: {key: value for key, value in config.items() if key != "quantization_config"}
    )
    with pytest.raises(ValueError, match=r"has dtype F8_E4M3; supported: BF16, F16, F32$"):
        load_local(path, torch.float32)


def test_experts_that_are_not_in_fp8_cannot_stay_in_it(tmp_path: Path) -> None:
    path, plain = write_pair(tmp_path, CONFIGS["qwen3_moe"])
    save_tensors(path, tensors_of(plain))
    message = r"experts\.0\.gate_proj\.weight has dtype F32; experts are held in F8_E4M3 here; set model\."
    with pytest.raises(ValueError, match=message + "dtype"):
        load_in_fp8(path, torch.float32, "reference")
    assert load_local(path, torch.float32).config.kernel_fp8, "widened, nothing is in the way"


def test_a_checkpoint_of_several_kinds_of_matrices_is_read(tmp_path: Path) -> None:
    """Modules excluded from quantisation are in bf16 beside those in FP8."""
    path, plain = write_pair(tmp_path, CONFIGS["qwen3_moe"])
    stored = tensors_of(path)
    del stored[QUERY + SCALES]
    save_tensors(path, stored | {QUERY: tensors_of(plain)[QUERY]})
    assert torch.equal(load_local(path, torch.float32).checkpoint_tensors()[QUERY], tensors_of(plain)[QUERY])


def tensors_of(path: Path) -> dict[str, Tensor]:
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            found |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - no mapping
    return found


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    (path / "config.json").write_text(json.dumps(change(json.loads((path / "config.json").read_text()))))
