"""Checkpoints with routed experts in 4 bits: loaded as they are, computed with as what they stand
for; and the errors for those that do not fit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lockstep.engine.models.checkpoint_reader import CheckpointReader
from lockstep.engine.models.config import load_config
from lockstep.engine.models.weights import load_experts
from lockstep.kernels.reference.four_bit import dequantise
from lockstep.moe.experts import read_slot, slot_form, write_slot
from support.engine.models.checkpoints import deepseek_v3_config, qwen3_moe_config, save_tensors
from support.engine.models.family_configs import gpt_oss_config
from support.engine.models.four_bit_checkpoints import CONFIGS, write_pair
from support.engine.models.local_model import Stepper, load_local
from support.engine.models.reference_models import load_reference

# The last group of a row of w2 is not full, but for gpt-oss, whose blocks are.
SIZES = {"hidden_size": 96, "moe_intermediate_size": 72, "num_experts_per_tok": 3}
FAMILIES = {"qwen3_moe": qwen3_moe_config(**SIZES), "deepseek_v3": deepseek_v3_config(**SIZES)}
HELD = (*FAMILIES, "gpt_oss")  # the last by tests of its own
PROMPTS = {0: list(range(40, 60)), 1: [7, 8, 9]}


def pair_of(kind: str, family: str, folder: Path, **options: int) -> tuple[Path, Path]:
    config = FAMILIES[family]
    if kind == "mxfp4 of gpt-oss":
        config = config | {"moe_intermediate_size": 64}
    return write_pair(folder, config, kind, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_the_dequantised_checkpoint(
    kind: str, family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    four_bit, plain = pair_of(kind, family, tmp_path, num_shards=3)
    for dtype in (torch.float32, torch.bfloat16):
        models = [load_local(path, dtype, "reference") for path in (four_bit, plain)]
        found, expected = (Stepper(model, dtype).step(PROMPTS) for model in models)
        for sequence in PROMPTS:
            assert torch.equal(found[sequence], expected[sequence])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], (
        "shapes and scales of inputs are known"
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_cpu_column_computes_with_experts_in_4_bits(kind: str, tmp_path: Path) -> None:
    """Within what bf16 costs; a router may turn on that, hence the median."""
    four_bit, plain = pair_of(kind, "qwen3_moe", tmp_path)
    model = load_local(four_bit, torch.bfloat16, "cpu")
    model.pack()
    found = torch.cat(list(Stepper(model, torch.bfloat16).step(PROMPTS).values()))
    expected = torch.cat(
        list(Stepper(load_local(plain, torch.float32, "reference"), torch.float32).step(PROMPTS).values())
    )
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.03


def test_gpt_oss_as_on_disk(tmp_path: Path) -> None:
    """Biased experts in MXFP4, stacked, rows of gate and up in turns: the greedy tokens and logits
    of transformers' model of the dequantised weights.
    """
    config = gpt_oss_config(hidden_size=96, intermediate_size=64)
    four_bit, plain = write_pair(tmp_path, config, "mxfp4 of gpt-oss", dtype=torch.float32)
    theirs, text = load_reference(plain, torch.float32), [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.inference_mode():
        for _ in range(20):
            text.append(int(theirs(torch.tensor([text])).logits[0, -1].argmax()))
        expected = theirs(torch.tensor([text])).logits[0]
    for column in ("reference", "cpu"):
        model = load_local(four_bit, torch.float32, column)
        model.pack()
        stepper, found = Stepper(model, torch.float32), list(text[:8])
        parts = [stepper.step({0: found})[0]]
        for _ in range(20):
            found.append(int(parts[-1][-1].argmax()))
            parts.append(stepper.step({0: found[-1:]}, num_decode=1)[0])
        assert found == text, column
        assert (torch.cat(parts) - expected).abs().max() <= 1e-4 * expected.abs().max(), column


def test_biased_experts_move_and_are_loaded_again_with_their_biases(tmp_path: Path) -> None:
    config = gpt_oss_config(hidden_size=96, intermediate_size=64)
    for path in write_pair(tmp_path, config, "mxfp4 of gpt-oss"):
        model, other = (load_local(path, torch.bfloat16, "reference") for _ in range(2))
        experts = model.experts()[1]
        biases = experts.form.biases
        assert biases is not None and not torch.equal(biases[0][3], biases[0][6])
        write_slot(other.experts()[1], 6, read_slot(experts, 3))
        assert torch.equal(read_slot(other.experts()[1], 6), read_slot(experts, 3))
        load_experts(model, CheckpointReader(path), {1: {3: 6}})
        assert torch.equal(biases[0][3], biases[0][6]) and torch.equal(biases[1][3], biases[1][6])
        assert torch.equal(read_slot(experts, 3), read_slot(experts, 6))


@pytest.mark.skipif(torch.cuda.is_available(), reason="steps a model on the CPU, through the interpreter")
def test_the_triton_column_computes_with_experts_in_4_bits(tmp_path: Path) -> None:
    four_bit, plain = pair_of("nvfp4", "qwen3_moe", tmp_path)
    rows = {0: [3, 4, 5, 6], 1: [9]}
    found, expected = (
        Stepper(load_local(path, torch.float32, column), torch.float32).step(rows)
        for path, column in ((four_bit, "triton"), (plain, "reference"))
    )
    for sequence in rows:
        error = (found[sequence] - expected[sequence]).norm(dim=-1) / expected[sequence].norm(dim=-1)
        assert error.median() < 1e-4


@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_are_held_in_the_bytes_of_their_format(kind: str, tmp_path: Path) -> None:
    path, plain = pair_of(kind, "qwen3_moe", tmp_path)
    model, wide = load_local(path, torch.bfloat16), load_local(plain, torch.bfloat16)
    stored, moe = model.config.four_bit, model.config.moe
    assert stored is not None
    up = stored.format.matrix_bytes(moe.expert_width, moe.hidden)
    down = stored.format.matrix_bytes(moe.hidden, moe.expert_width)
    for experts in model.experts():
        held = sum(parameter.nbytes for parameter in experts.parameters())
        assert held == moe.num_experts * (2 * up + down)
        assert len(read_slot(experts, 0)) == 2 * up + down
    for layer, other in zip(model.expert_layers(), wide.expert_layers(), strict=True):
        assert layer.four_bit is not None
        assert torch.equal(dequantise(layer.four_bit[0]).bfloat16(), other.w13_SFD)
        assert torch.equal(dequantise(layer.four_bit[1]).bfloat16(), other.w2_SDF)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_expert_moves_as_it_is(kind: str, tmp_path: Path) -> None:
    path, _ = pair_of(kind, "qwen3_moe", tmp_path)
    one, other = (load_local(path, torch.bfloat16).experts()[1] for _ in range(2))
    assert slot_form(one) == slot_form(other) and "uint8 144x48" in slot_form(one).replace("128x48", "144x48")
    sent = read_slot(one, 3)
    assert not torch.equal(sent, read_slot(other, 5))
    write_slot(other, 5, sent)
    assert torch.equal(read_slot(other, 5), sent) and torch.equal(read_slot(other, 4), read_slot(one, 4))


def test_formats_that_differ_in_their_scales_do_not_exchange_experts(tmp_path: Path) -> None:
    forms = set()
    for number, (kind, dtype) in enumerate(
        (
            ("int4", torch.bfloat16),
            ("int4", torch.float16),
            ("mxfp4", torch.bfloat16),
            ("nvfp4", torch.bfloat16),
        )
    ):
        path, _ = write_pair(tmp_path / str(number), FAMILIES["qwen3_moe"], kind, dtype=dtype)
        forms.add(slot_form(load_local(path, torch.float32).experts()[0]))
    assert len(forms) == 4


@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_are_loaded_again_into_slots(kind: str, tmp_path: Path) -> None:
    """After the loss of the rank that held them."""
    path, _ = pair_of(kind, "deepseek_v3", tmp_path)
    model = load_local(path, torch.bfloat16)
    experts = model.experts()[1]
    load_experts(model, CheckpointReader(path), {1: {4: 6, 0: 2}})
    assert torch.equal(read_slot(experts, 4), read_slot(experts, 6))
    assert torch.equal(read_slot(experts, 0), read_slot(experts, 2))
    assert not torch.equal(read_slot(experts, 4), read_slot(experts, 0))


MATRIX = "model.layers.1.mlp.experts.6.up_proj"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def without(name: str) -> Change:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def having(name: str, value: Tensor) -> Change:
    return lambda tensors: tensors | {name: value}


def renamed(name: str, other: str) -> Change:
    return lambda tensors: {other if key == name else key: value for key, value in tensors.items()}


QUERY = "model.layers.2.self_attn.q_proj.weight"
ERRORS: dict[str, tuple[str, Change, str]] = {
    "no codes": (
        "int4",
        without(f"{MATRIX}.weight_packed"),
        rf"1 tensors of experts in int4 are missing: {MATRIX}\.weight_packed",
    ),
    "no scales": ("mxfp4", without(f"{MATRIX}.weight_scale"), rf"missing: {MATRIX}\.weight_scale"),
    "no factor": (
        "nvfp4",
        without(f"{MATRIX}.weight_global_scale"),
        rf"missing: {MATRIX}\.weight_global_scale",
    ),
    "groups of another size": (
        "int4",
        having(f"{MATRIX}.weight_scale", torch.ones(72, 1, dtype=torch.bfloat16)),
        rf"{MATRIX}\.weight_scale has shape \[72, 1\]; a matrix of 72 x 96 in int4 has \[72, 3\]",
    ),
    "codes in bytes": (
        "int4",
        having(f"{MATRIX}.weight_packed", torch.zeros(72, 12, dtype=torch.uint8)),
        rf"{MATRIX}\.weight_packed has dtype U8; supported: I32",
    ),
    "scales in another dtype": (
        "int4",
        having(f"{MATRIX}.weight_scale", torch.ones(72, 3)),
        rf"{MATRIX}\.weight_scale has dtype F32; supported: BF16",
    ),
    "attention in 4 bits": (
        "int4",
        renamed(QUERY, f"{QUERY}_packed"),
        rf"{QUERY} is stored in 4 bits; supported: 4 bits in routed experts only",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_file_and_tensor(case: str, tmp_path: Path) -> None:
    kind, change, message = ERRORS[case]
    path, _ = write_pair(tmp_path, FAMILIES["qwen3_moe"], kind)
    save_tensors(path, change(load_file(path / "model.safetensors")))
    with pytest.raises(ValueError, match=message) as error:
        load_local(path, torch.float32)
    assert str(path) in str(error.value)


def test_an_expert_in_bf16_among_those_in_4_bits_is_refused(tmp_path: Path) -> None:
    path, plain = write_pair(tmp_path, FAMILIES["qwen3_moe"], "int4")
    wide = load_file(plain / "model.safetensors")[f"{MATRIX}.weight"]
    tensors = without(f"{MATRIX}.weight_packed")(load_file(path / "model.safetensors"))
    save_tensors(path, tensors | {f"{MATRIX}.weight": wide})
    with pytest.raises(ValueError, match="1 tensors of experts in int4 are missing"):
        load_local(path, torch.float32)
    assert load_config(path).four_bit
