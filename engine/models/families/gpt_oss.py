"""gpt-oss (arXiv 2508.10925): grouped-query attention with biases and sinks, every other layer over
a window; experts with biases and a clamped activation, chosen by logits with a bias.
"""

from __future__ import annotations

from ....kernels.activation import Activation
from ....moe.config import MoEConfig
from ..config import Blocks, CheckpointNames, Family
from ..config_blocks import check_choice, read_gqa, read_rope, read_windows
from ..config_fields import Fields

_NAMES = CheckpointNames(renamed=(("mlp.gate.", "mlp.router."),), transposed_experts=True, gate_up_turns=True)
_THETA = 150000.0


def _read(fields: Fields) -> Blocks:
    if not (fields.has("rope_scaling") or fields.has("rope_parameters")):
        raise fields.refuse("rope_scaling", "expected that of YaRN, or rope_parameters")
    bias = fields.flag("attention_bias", True)
    attention = read_gqa(fields, qkv_bias=bias, out_bias=bias, sinks=True)
    moe = MoEConfig(
        hidden=fields.integer("hidden_size"),
        expert_width=fields.integer("intermediate_size"),
        num_experts=fields.integer("num_local_experts"),
        top_k=fields.integer("num_experts_per_tok", 4),
        logit_bias=True,
        activation=Activation(
            "clamped", fields.number("swiglu_alpha", 1.702), fields.number("swiglu_limit", 7.0)
        ),
        expert_bias=True,
    )
    rope = read_rope(fields, attention.head_dim, interleaved=False, theta=_THETA)
    layers = tuple(range(fields.integer("num_hidden_layers")))
    return Blocks(attention, rope, check_choice(fields, moe), layers, _NAMES, windows=read_windows(fields))


FAMILY = Family("gpt_oss", ("GptOssForCausalLM",), ("gpt_oss",), _read, norm_eps=1e-5)
