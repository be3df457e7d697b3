"""Checkpoints in Mistral's own format, ``params.json`` and ``consolidated*.safetensors``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lockstep.engine.models.config import MlaConfig, QueryGrowth, load_config
from lockstep.engine.models.quantisation import StoredFp8
from support.engine.models.checkpoints import random_tensors, save_tensors
from support.engine.models.family_configs import MISTRAL_ROPE, mistral4_config
from support.engine.models.fp8_checkpoints import SCALES, dequantised, quantised
from support.engine.models.local_model import Stepper, load_local
from support.engine.models.mistral_params import COMPRESSED, FOLDER, LARGE_3
from support.engine.models.reference_models import load_reference

ROPE = {name: value for name, value in MISTRAL_ROPE.items() if not name.startswith("mscale")}
SIZES = {"hidden_size": 140, "kv_lora_rank": 132, "q_lora_rank": 140, "moe_intermediate_size": 136}
CONFIG = mistral4_config(
    first_k_dense_replace=1,
    routed_scaling_factor=1.5,
    eos_token_id=2,
    rope_parameters=ROPE | {"attention_factor": 1.0},
    **SIZES,
)
NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_a_layernorm": "attention.q_a_norm",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a_with_mqa",
    "self_attn.kv_a_layernorm": "attention.kv_a_norm",
    "self_attn.kv_b_proj": "attention.wkv_b",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate.": "gate.",
    "mlp.experts": "experts",
    "mlp.shared_experts": "shared_experts",
    "mlp.": "feed_forward.",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}


def params_of(config: dict[str, Any]) -> dict[str, Any]:
    """Mistral's words for a config.json of ``mistral4``."""
    rope = config["rope_parameters"]
    length = rope["original_max_position_embeddings"]
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_attention_heads"],
        "hidden_dim": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"],
        "dtype": config["torch_dtype"],
        **{name: config[name] for name in ("vocab_size", "q_lora_rank", "kv_lora_rank", "v_head_dim")},
        **{
            name: config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "max_position_embeddings")
        },
        "moe": {
            "num_experts": config["n_routed_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
            "expert_hidden_dim": config["moe_intermediate_size"],
            "num_shared_experts": config["n_shared_experts"],
            "first_k_dense_replace": config["first_k_dense_replace"],
            "routed_scale": config["routed_scaling_factor"],
            "route_every_n": 1,
        },
        "rope_theta": rope["rope_theta"],
        "llama_4_scaling": {
            "beta": rope["llama_4_scaling_beta"],
            "original_max_position_embeddings": length,
        },
        "yarn": {
            "factor": rope["factor"],
            "beta": rope["beta_fast"],
            "alpha": rope["beta_slow"],
            "apply_scale": False,
            "original_max_position_embeddings": length,
        },
    }


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with a tensor for each expert's matrix."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        layer, _, projection = name.rpartition(".experts.")
        if value.dim() != 3:
            found[name] = value
            continue
        for expert, matrix in enumerate(value):
            place = f"{layer}.experts.{expert}"
            if projection == "gate_up_proj":
                gate, up = matrix.chunk(2)
                found |= {f"{place}.gate_proj.weight": gate.clone(), f"{place}.up_proj.weight": up.clone()}
            else:
                found[f"{place}.down_proj.weight"] = matrix.clone()
    return found


def mistrals(tensors: dict[str, Tensor], scale: str = ".weight_scale") -> dict[str, Tensor]:
    """The same by Mistral's names, beside an image encoder."""
    found: dict[str, Tensor] = {
        "vision_encoder.transformer.layers.0.attention.wq.weight": torch.zeros(4, 4),
        "vision_language_adapter.w_in.weight": torch.zeros(4, 4),
        "patch_merger.merging_layer.weight": torch.zeros(4, 4),
        "pre_mm_projector_norm.weight": torch.zeros(4),
    }
    for name, value in tensors.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        found[name.replace(f".weight{SCALES}", scale)] = value
    return found


def write(folder: Path, params: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    if shards == 1:
        save_file(tensors, folder / "consolidated.safetensors")
        return folder
    save_tensors(folder, tensors, shards)
    for file in list(folder.glob("model*")):
        text = file.name.replace("model", "consolidated")
        if file.suffix == ".json":
            (folder / text).write_text(file.read_text().replace("model-", "consolidated-"))
            file.unlink()
        else:
            file.rename(folder / text)
    return folder


def write_plain(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_tensors(folder, tensors)
    return folder


def test_mistral_large_3_as_it_is_published() -> None:
    config = load_config(FOLDER)
    assert (config.family, config.num_layers, config.hidden, config.dense_width) == (
        "mistral4",
        61,
        7168,
        16384,
    )
    assert isinstance(config.attention, MlaConfig) and config.attention.scale == 192**-0.5
    assert config.rope.yarn is not None and config.rope.yarn.magnitude == 1.0 and config.rope.interleaved
    assert config.rope.growth == QueryGrowth(0.1, 8192)
    assert (config.max_position, config.eos_ids, config.moe_layers) == (294912, (2,), tuple(range(3, 61)))
    assert config.fp8 == StoredFp8((128, 128)) and config.kernel_fp8 and config.dtype == "bfloat16"


@pytest.mark.parametrize("shards", [1, 2])
def test_logits_are_those_of_transformers(
    shards: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = random_tensors(CONFIG, 0, torch.float32)
    plain = write_plain(tmp_path / "plain", tensors)
    path = write(tmp_path / "m", params_of(CONFIG), mistrals(separate(tensors)), shards)
    assert load_config(path) == load_config(plain)
    with caplog.at_level(logging.INFO):
        model = load_local(path, torch.float32)
    [line] = [line for line in caplog.messages if "only the text model is served" in line]
    assert "patch_merger (1 tensors), pre_mm_projector_norm (1 tensors), vision_encoder (1 tensors)" in line
    assert not [line for line in caplog.messages if "not used" in line]
    prompt = torch.randint(0, 320, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        expected = load_reference(plain, torch.float32)(torch.tensor([prompt])).logits[0]
    [got] = Stepper(model, torch.float32).step({0: prompt}).values()
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_fp8_by_block_as_mistral_large_3_has_it(tmp_path: Path) -> None:
    eight = quantised(separate(random_tensors(CONFIG, 0, torch.bfloat16)))
    plain = write_plain(tmp_path / "plain", dequantised(eight))
    params = params_of(CONFIG) | {"dtype": None, "quantization_config": COMPRESSED}
    path = write(tmp_path / "m", params, mistrals(eight))
    found, wanted = (load_local(folder, torch.float32) for folder in (path, plain))
    assert found.config.fp8 == StoredFp8((128, 128))
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_fp8_by_matrix_as_mistral_small_4_has_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    eight, plain = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in separate(random_tensors(CONFIG, 0, torch.bfloat16)).items():
        if not name.endswith("proj.weight"):
            eight[name], plain[name] = value, value.float()
            continue
        scale = (value.float().abs().max() / 448 * 1.01).bfloat16()
        eight[name] = (value.float() / scale.float()).to(torch.float8_e4m3fn)
        eight[name + SCALES], plain[name] = scale, eight[name].float() * scale.float()
    tensors = mistrals(eight, ".qscale_weight")
    tensors |= {
        name.replace("qscale_weight", "qscale_act"): torch.ones(())
        for name in tensors
        if name.endswith("qscale_weight")
    }
    stored = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    path = write(tmp_path / "m", params_of(CONFIG) | {"dtype": None, "quantization": stored}, tensors)
    found, wanted = (
        load_local(folder, torch.float32) for folder in (path, write_plain(tmp_path / "plain", plain))
    )
    assert found.config.fp8 == StoredFp8((128, 128), whole=True)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], "no unused scales"


def test_transformers_format_comes_first(tmp_path: Path) -> None:
    """Mistral-Small-4 is published in both."""
    tensors = random_tensors(CONFIG, 0, torch.float32)
    plain = write_plain(tmp_path / "m", tensors)
    (plain / "params.json").write_text("no JSON")
    (plain / "consolidated.safetensors").write_text("no tensors")
    assert load_local(plain, torch.float32).config.family == "mistral4"


def changed(part: str | None, **fields: Any) -> dict[str, Any]:
    params: dict[str, Any] = json.loads(json.dumps(LARGE_3))
    (params if part is None else params[part]).update(fields)
    return params


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (changed(None, moe=None), "moe is null; supported in this format: latent attention and experts"),
        (changed(None, qk_nope_head_dim=None), "qk_nope_head_dim is null; supported in this format"),
        (changed(None, sliding_window=4096), "sliding_window is 4096; supported: null"),
        (changed(None, dim="x"), r"dim is \"x\"; expected an integer"),
        (changed(None, yarn=None), "yarn is null"),
        (changed(None, activation="gelu"), 'in the words of transformers: hidden_act is "gelu"'),
        (changed("yarn", apply_scale=True), "yarn: apply_scale is true; supported: false"),
        (changed("llama_4_scaling", original_max_position_embeddings=9), "supported: 8192"),
        (changed("moe", route_every_n=2), "moe: route_every_n is 2; supported: 1"),
        (changed("moe", use_load_balancing_bias=True), "use_load_balancing_bias is true"),
        (changed("moe", num_experts_per_tok=200), "num_experts_per_tok is 200; expected at most"),
        (changed(None, quantization={"qformat_weight": "int4"}), 'qformat_weight is "int4"'),
        (
            changed("quantization_config", format="int-quantized"),
            'format is "int-quantized"; supported: .*"float-quantized"',
        ),
    ],
)
def test_descriptions_that_are_refused(params: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(ValueError, match=rf"params\.json.*{message}"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_bits", 4), ("strategy", "channel"), ("block_structure", [128]), ("dynamic", True)],
)
def test_other_compressed_fp8_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    params = changed(None)
    params["quantization_config"]["config_groups"]["FP8_BLOCK"]["weights"][field] = value
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(ValueError, match=f"weights: {field} is "):
        load_config(tmp_path)
