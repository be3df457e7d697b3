"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434): latent attention, softmax gate, shared experts.

V2 chooses among the groups with the best experts, V2-Lite among all experts (``topk_method``, which
then ignores the groups in the file). V2-Lite projects its queries directly (``q_lora_rank`` null).
"""

from __future__ import annotations

from ....moe.config import MoEConfig
from ..config import Blocks, Family
from ..config_blocks import check_choice, layers_after_dense, read_mla, read_rope
from ..config_fields import Fields


def _read(fields: Fields) -> Blocks:
    fields.expect("scoring_func", "softmax")
    fields.expect("topk_method", "greedy", "group_limited_greedy")
    fields.expect("rope_interleave", True)
    grouped = fields.raw("topk_method") == "group_limited_greedy"
    width = fields.integer("moe_intermediate_size")
    top_k = fields.integer("num_experts_per_tok")
    # As in the model's own code, weights are either divided by their sum or scaled; transformers 5
    # only scales.
    normalise = fields.flag("norm_topk_prob", False) and top_k > 1
    scale = fields.number("routed_scaling_factor", 1.0)
    moe = MoEConfig(
        hidden=fields.integer("hidden_size"),
        expert_width=width,
        num_experts=fields.integer("n_routed_experts"),
        top_k=top_k,
        normalise=normalise,
        scale=1.0 if normalise else scale,
        num_groups=fields.integer("n_group") if grouped else 1,
        top_groups=fields.integer("topk_group") if grouped else 1,
        group_quality="best",
        shared_width=width * fields.integer("n_shared_experts", 0, minimum=0),
    )
    rope = read_rope(fields, fields.integer("qk_rope_head_dim"), interleaved=True)
    return Blocks(read_mla(fields), rope, check_choice(fields, moe), layers_after_dense(fields))


FAMILY = Family("deepseek_v2", ("DeepseekV2ForCausalLM",), ("deepseek_v2",), _read)
