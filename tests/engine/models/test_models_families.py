"""Each family: the description read from its config.json, quirks of the files, errors for
unsupported values.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GlmMoeDsaConfig

import lockstep
from lockstep.engine.models.config import (
    GqaConfig,
    IndexerConfig,
    MlaConfig,
    ModelConfig,
    QueryGrowth,
    families,
    load_config,
)
from support.engine.models.checkpoints import YARN, deepseek_v3_config
from support.engine.models.family_configs import (
    CONFIGS,
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

PACKAGED = Path(lockstep.__file__).parent / "recipes" / "configs"


def load(path: Path, config: dict[str, Any]) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(config))
    return load_config(path)


def test_every_file_is_a_family_and_none_claims_the_names_of_another() -> None:
    folder = Path(lockstep.__file__).parent / "engine" / "models" / "families"
    assert [family.name for family in families()] == sorted(
        file.stem for file in folder.glob("*.py") if file.stem != "__init__"
    )
    for names in ("architectures", "model_types"):
        claimed = [name for family in families() for name in getattr(family, names)]
        assert len(claimed) == len(set(claimed)), names


@pytest.mark.parametrize("name", CONFIGS)
def test_by_architecture_or_by_model_type(name: str, tmp_path: Path) -> None:
    family = "deepseek_v3" if name == "kimi_k2" else name
    assert load(tmp_path, CONFIGS[name]()) == load(tmp_path, CONFIGS[name](architectures=None))
    assert load_config(tmp_path).family == family


def test_deepseek_v2_chooses_by_groups_where_the_file_says_so(tmp_path: Path) -> None:
    plain = load(tmp_path, deepseek_v2_config(n_group=8, topk_group=3, num_experts_per_tok=6)).moe
    assert (plain.scoring, plain.num_groups, plain.top_groups, plain.normalise, plain.scale) == (
        "softmax",
        1,
        1,
        False,
        4.0,
    )
    grouped = load(tmp_path, deepseek_v2_config(topk_method="group_limited_greedy")).moe
    assert (grouped.num_groups, grouped.top_groups, grouped.group_quality, grouped.shared_width) == (
        4,
        2,
        "best",
        64,
    )
    assert not grouped.selection_bias
    unsaid = load(tmp_path, deepseek_v2_config(topk_method=None, n_group=None, topk_group=None)).moe
    assert unsaid.num_groups == 1


def test_deepseek_v2_normalises_or_scales(tmp_path: Path) -> None:
    both = load(tmp_path, deepseek_v2_config(norm_topk_prob=True, routed_scaling_factor=16.0)).moe
    assert (both.normalise, both.scale) == (True, 1.0)
    one = load(
        tmp_path, deepseek_v2_config(norm_topk_prob=True, routed_scaling_factor=16.0, num_experts_per_tok=1)
    ).moe
    assert (one.normalise, one.scale) == (False, 16.0)


def test_deepseek_v2_lite_as_published() -> None:
    config = load_config(PACKAGED / "deepseek-v2-lite")
    assert isinstance(config.attention, MlaConfig) and config.rope.yarn is not None
    assert config.attention.q_latent is None and config.rope.interleaved
    assert config.rope.yarn.magnitude == 1.0, "mscale and mscale_all_dim cancel in cos and sin"
    assert config.attention.scale == pytest.approx(192**-0.5 * 1.2608**2, rel=1e-4), (
        "and stay in the scores: 0.1 x 0.707 x ln 40 + 1"
    )
    assert (config.moe.normalise, config.moe.scale, config.moe.num_groups, config.max_position) == (
        False,
        1.0,
        1,
        163840,
    )


def test_mixtral(tmp_path: Path) -> None:
    config = load(tmp_path, mixtral_config(rope_theta=None, rms_norm_eps=None, sliding_window=None))
    assert config.attention == GqaConfig(num_heads=4, num_kv_heads=2, head_dim=16)
    assert (config.rope.theta, config.norm_eps) == (1e6, 1e-5), "the family's where the file has none"
    assert (config.moe.expert_width, config.moe.normalise, config.moe.shared_width, config.moe_layers) == (
        96,
        True,
        0,
        (0, 1, 2),
    )
    assert config.names.of("mlp.gate.weight") == "block_sparse_moe.gate.weight"
    assert load_config(PACKAGED / "mixtral-8x7b").moe.num_experts == 8


def test_qwen2_moe(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        qwen2_moe_config(qkv_bias=None, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]),
    )
    assert config.attention == GqaConfig(num_heads=4, num_kv_heads=2, head_dim=16, qkv_bias=True)
    assert (config.moe_layers, config.moe.shared_width, config.moe.shared_gate, config.moe.normalise) == (
        (1, 5),
        48,
        True,
        False,
    )
    assert config.names.of("mlp.shared_experts.gate.weight") == "mlp.shared_expert_gate.weight"
    assert config.names.of("mlp.shared_experts.gate_proj.weight") == "mlp.shared_expert.gate_proj.weight"
    assert config.names.of("mlp.gate.weight") == "mlp.gate.weight"


def test_glm4_moe(tmp_path: Path) -> None:
    config = load(tmp_path, glm4_moe_config())
    assert config.attention == GqaConfig(
        num_heads=4, num_kv_heads=2, head_dim=16, qkv_bias=True, qk_norm=True
    )
    assert (config.rope.dim, config.rope.interleaved, config.moe_layers) == (8, False, (1, 2))
    assert (config.moe.scoring, config.moe.selection_bias, config.moe.shared_width, config.norm_eps) == (
        "sigmoid",
        True,
        32,
        1e-5,
    )
    assert load(tmp_path, glm4_moe_config(partial_rotary_factor=None)).rope.dim == 8, (
        "half, where the file says nothing"
    )
    five = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    assert (
        load(
            tmp_path, glm4_moe_config(partial_rotary_factor=None, rope_theta=None, rope_parameters=five)
        ).rope.dim
        == 4
    )
    air = load(tmp_path, glm4_moe_config(use_qk_norm=None)).attention
    assert isinstance(air, GqaConfig) and not air.qk_norm


def test_minimax_m2(tmp_path: Path) -> None:
    config = load(tmp_path, minimax_m2_config())
    assert config.attention == GqaConfig(
        num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True, wide_norm=True
    )
    assert (config.rope.dim, config.rope.theta, config.moe_layers) == (8, 5e6, (0, 1, 2))
    assert (config.moe.scoring, config.moe.selection_bias, config.moe.normalise) == ("sigmoid", True, True)
    assert config.names.of("mlp.gate.weight") == "block_sparse_moe.gate.weight"
    bias = "e_score_correction_bias"
    assert config.names.of(f"mlp.gate.{bias}") == f"block_sparse_moe.{bias}"
    whole = load(tmp_path, minimax_m2_config(rotary_dim=None, attn_type_list=None))
    assert whole.rope.dim == 16, "all of a head, where the file says nothing"
    with pytest.raises(ValueError, match="a norm over all heads cannot be split into 2 parts"):
        config.attention.split(2)
    packaged = load_config(PACKAGED / "minimax-m2")
    assert packaged.kernel_fp8 and packaged.rope.dim == 64


def test_gpt_oss(tmp_path: Path) -> None:
    config = load(tmp_path, gpt_oss_config())
    assert config.attention == GqaConfig(
        num_heads=4, num_kv_heads=2, head_dim=16, qkv_bias=True, out_bias=True, sinks=True
    )
    assert (config.windows, config.moe.logit_bias, config.moe.expert_bias) == ((12, 0, 12), True, True)
    assert [config.window(layer) for layer in range(3)] == [12, 0, 12]
    assert (config.moe.activation.kind, config.moe.activation.alpha) == ("clamped", 1.702)
    assert config.rope.yarn is not None and not config.rope.yarn.truncate
    assert config.names.of("mlp.gate.bias") == "mlp.router.bias"
    assert load(tmp_path, gpt_oss_config(layer_types=None)).windows == (12, 0, 12), "every other layer"
    assert load(tmp_path, gpt_oss_config(layer_types=["full_attention"] * 3)).windows == ()


def test_hy_v3(tmp_path: Path) -> None:
    config = load(tmp_path, hy_v3_config())
    assert config.attention == GqaConfig(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True)
    assert (config.moe.scoring, config.moe.scale, config.moe.shared_width) == ("sigmoid", 2.826, 32)
    assert (config.moe_layers, config.moe.selection_bias, config.moe.normalise) == ((1, 2), True, True)
    assert config.names.of("mlp.gate.weight") == "mlp.router.gate.weight"
    assert config.names.of("mlp.gate.e_score_correction_bias") == "mlp.expert_bias"
    assert load(tmp_path, hy_v3_config(first_k_dense_replace=None)).moe_layers == (1, 2)


def test_mistral4(tmp_path: Path) -> None:
    config = load(tmp_path, mistral4_config())
    assert isinstance(config.attention, MlaConfig) and config.rope.interleaved and config.rope.dim == 16
    assert config.rope.growth == QueryGrowth(beta=0.5, length=16)
    assert config.rope.yarn is not None and config.rope.yarn.magnitude == 1.0
    assert (config.moe.scoring, config.moe.selection_bias, config.moe.shared_width) == ("softmax", False, 32)
    assert load(tmp_path, mistral4_config(first_k_dense_replace=None)).moe_layers == (0, 1, 2)
    still = load(tmp_path, mistral4_config(rope_parameters=MISTRAL_ROPE | {"llama_4_scaling_beta": 0}))
    assert still.rope.growth is None


def test_glm4_moe_lite(tmp_path: Path) -> None:
    config = load(tmp_path, glm4_moe_lite_config())
    assert isinstance(config.attention, MlaConfig) and config.rope.interleaved
    assert (config.moe.shared_width, config.moe.scale, config.moe_layers) == (32, 1.8, (1, 2))
    assert load(tmp_path, glm4_moe_lite_config(first_k_dense_replace=None)).moe_layers == (1, 2)
    kinds = ["sparse", "dense", "sparse"]
    assert load(tmp_path, glm4_moe_lite_config(mlp_layer_types=kinds)).moe_layers == (0, 2)
    assert load_config(PACKAGED / "glm-4.7-flash").eos_ids == (154820, 154827, 154829)


def test_deepseek_v32(tmp_path: Path) -> None:
    config = load(tmp_path, deepseek_v32_config())
    assert isinstance(config.attention, MlaConfig) and config.rope.interleaved
    assert config.attention.indexer == IndexerConfig(num_heads=8, head_dim=16, top_k=16)
    assert config.kv_shapes("fp32", 0) == ((40,), (1, 16)) and config.kv_shapes("fp8", 2) == ((52,), (20,))
    assert config.attention.split(2).indexer == config.attention.indexer, "whole in every part"
    sizes = {"index_n_heads": None, "index_head_dim": None, "index_topk": None}
    published = load(tmp_path, deepseek_v32_config(**sizes)).attention
    assert isinstance(published, MlaConfig) and published.indexer == IndexerConfig(64, 128, 2048)


def test_glm_moe_dsa(tmp_path: Path) -> None:
    every = load(tmp_path, glm_moe_dsa_config()).attention
    assert isinstance(every, MlaConfig)
    assert every.indexer == IndexerConfig(num_heads=8, head_dim=16, top_k=16, interleaved=True)
    kinds: list[dict[str, object]] = [
        {"index_topk_freq": 3, "index_skip_topk_offset": 3},
        {"index_topk_pattern": "FFFSSFSS"},
        {"indexer_types": ["full"] * 3 + ["shared"] * 2 + ["full"] + ["shared"] * 2},
    ]
    for changes in kinds:
        config = load(tmp_path, glm_moe_dsa_config(num_hidden_layers=8, **changes))
        theirs = GlmMoeDsaConfig(**glm_moe_dsa_config(num_hidden_layers=8, **changes))
        assert isinstance(config.attention, MlaConfig) and config.attention.indexer is not None
        followers = config.attention.indexer.followers
        assert followers == (3, 4, 6, 7), changes
        assert followers == tuple(i for i, kind in enumerate(theirs.indexer_types) if kind == "shared")
    assert [config.kv_shapes("fp32", layer) for layer in (2, 3)] == [((40,), (1, 16)), ((40,),)]


def test_kimi_k2(tmp_path: Path) -> None:
    config = load(
        tmp_path, kimi_k2_config(auto_map={"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"})
    )
    assert (config.family, config.moe.num_groups, config.moe.scale, config.rope.theta) == (
        "deepseek_v3",
        1,
        2.827,
        50000.0,
    )
    assert config.rope.yarn is not None and config.rope.yarn.beta_fast == config.rope.yarn.beta_slow == 1.0


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "v2 scoring": (
        deepseek_v2_config(scoring_func="sigmoid"),
        'scoring_func is "sigmoid"; supported: "softmax"',
    ),
    "v2 method": (
        deepseek_v2_config(topk_method="noaux_tc"),
        'topk_method is "noaux_tc"; supported: "greedy", "group_limited_greedy"',
    ),
    "v2 halves": (deepseek_v2_config(rope_interleave=False), "rope_interleave is false; supported: true"),
    "v2 without groups": (
        deepseek_v2_config(topk_method="group_limited_greedy", n_group=None),
        "n_group is missing",
    ),
    "v2 odd groups": (
        deepseek_v2_config(topk_method="group_limited_greedy", n_group=3),
        "n_group is 3; expected groups of equal size",
    ),
    "v2 choices": (
        deepseek_v2_config(topk_method="group_limited_greedy", num_experts_per_tok=5),
        r"num_experts_per_tok is 5; expected at most the experts of topk_group \(2\) groups",
    ),
    "v2 frequency": (deepseek_v2_config(moe_layer_freq=2), "moe_layer_freq is 2; supported: 1"),
    "v2 rope": (
        deepseek_v2_config(rope_scaling=YARN | {"type": "linear"}),
        'type is "linear"; supported: "default", "yarn"',
    ),
    "mixtral window": (mixtral_config(sliding_window=4096), "sliding_window is 4096; supported: null"),
    "mixtral choices": (
        mixtral_config(num_experts_per_tok=9),
        "num_experts_per_tok is 9; expected at most the number of experts",
    ),
    "mixtral experts": (mixtral_config(num_local_experts=None), "num_local_experts is missing"),
    "mixtral rope": (mixtral_config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5; supported: 1"),
    "qwen2 window": (
        qwen2_moe_config(use_sliding_window=True),
        "use_sliding_window is true; supported: false",
    ),
    "qwen2 layers": (
        qwen2_moe_config(layer_types=["full_attention", "sliding_attention"]),
        'layer_types .*"full_attention" in every',
    ),
    "qwen2 shared": (
        qwen2_moe_config(shared_expert_intermediate_size=0),
        "shared_expert_intermediate_size is 0; expected an integer",
    ),
    "qwen2 bias": (qwen2_moe_config(qkv_bias="yes"), 'qkv_bias is "yes"; expected true or false'),
    "qwen2 dense": (qwen2_moe_config(decoder_sparse_step=4), "no layer holds experts"),
    "glm scoring": (
        glm4_moe_config(scoring_func="softmax"),
        'scoring_func is "softmax"; supported: "sigmoid"',
    ),
    "glm rotated": (
        glm4_moe_config(partial_rotary_factor=1.5),
        "partial_rotary_factor is 1.5; expected at most 1",
    ),
    "glm odd": (
        glm4_moe_config(partial_rotary_factor=0.3125),
        "rotary dimension is 5; expected an even number",
    ),
    "glm norm": (glm4_moe_config(use_qk_norm=1), "use_qk_norm is 1; expected true or false"),
    "glm groups": (glm4_moe_config(n_group=2, topk_group=3), "topk_group is 3; expected at most n_group"),
    "minimax windows": (minimax_m2_config(attn_type_list=[1, 0, 1]), "attn_type_list .*supported: 1"),
    "minimax norms": (minimax_m2_config(qk_norm_type="per_head"), 'qk_norm_type is "per_head"'),
    "minimax shared": (minimax_m2_config(shared_intermediate_size=8), "shared_intermediate_size is 8"),
    "hy3 weights": (hy_v3_config(route_norm=False), "route_norm is false; supported: true"),
    "mistral rope": (
        mistral4_config(rope_parameters=None),
        "rope_parameters is null; expected those of YaRN",
    ),
    "mistral rotated": (
        mistral4_config(rope_parameters=MISTRAL_ROPE | {"partial_rotary_factor": 0.25}),
        "partial_rotary_factor is 0.25; supported: 0.5",
    ),
    "v3.2 direct queries": (deepseek_v32_config(q_lora_rank=None), "q_lora_rank is missing"),
    "v3.2 index keys": (
        deepseek_v32_config(index_head_dim=6),
        r"index_head_dim is 6; expected at least qk_rope_head_dim \(8\)",
    ),
    "v3.2 choice": (deepseek_v32_config(index_topk=0), "index_topk is 0; expected an integer of at least 1"),
    "v3.2 halves": (deepseek_v32_config(rope_interleave=False), "rope_interleave is false; supported: true"),
    "glm-5 pattern": (
        glm_moe_dsa_config(index_topk_pattern="FSX"),
        'expected "full" or "shared" for each of 3',
    ),
    "glm-5 first": (
        glm_moe_dsa_config(indexer_types=["shared", "full", "full"]),
        'indexer_types .*expected "full" for the first layer',
    ),
    "v3.2 layers": (
        deepseek_v32_config(layer_types=["indexed_attention", "full_attention", "indexed_attention"]),
        'layer_types .*supported: "indexed_attention" in every layer',
    ),
    "queries that grow": (
        deepseek_v3_config(rope_scaling=YARN | {"llama_4_scaling_beta": 0.1}),
        "rope_scaling: llama_4_scaling_beta is 0.1; supported: 0",
    ),
    "lite layers": (
        glm4_moe_lite_config(mlp_layer_types=["dense", "sparse"]),
        'mlp_layer_types .*expected "dense" or "sparse" for each of 3',
    ),
    "gpt-oss layers": (
        gpt_oss_config(layer_types=["full_attention", "linear_attention", "full_attention"]),
        'layer_types .*expected "sliding_attention" or "full_attention" for each of 3 layers',
    ),
    "gpt-oss rope": (gpt_oss_config(rope_scaling=None), "rope_scaling is null; expected"),
    "gpt-oss in FP8": (
        gpt_oss_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
        "quantization_config is .*supported: biased experts in 4, 16 or 32 bits",
    ),
    "kimi vision": (
        kimi_k2_config(architectures=["KimiK25ForConditionalGeneration"]),
        "architectures is .*KimiK25.*supported",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_field(case: str, tmp_path: Path) -> None:
    config, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, config)
    assert str(tmp_path / "config.json") in str(error.value)


def test_contributing_shows_a_whole_family() -> None:
    root = Path(lockstep.__file__).parent
    shown = (root / "CONTRIBUTING.md").read_text().split("```python\n")[1].split("```")[0]
    file = (root / "engine" / "models" / "families" / "mixtral.py").read_text()
    assert file.endswith(shown) and file.removesuffix(shown).count("\n") < 12, (
        "imports and a docstring are all that is left out"
    )


def test_families_are_read_without_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from lockstep.engine.models.config import load_config\n"
        f"load_config(Path({str(PACKAGED / 'mixtral-8x7b')!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
