"""Prompts with their greedy continuation and its margins, for comparing layouts:
``greedy_prompts.json``.

``python -m support.engine.rank.greedy_prompts FAMILY...`` (in tests/) writes those of some families
anew with transformers as the reference. It keeps prompts whose reference run has, at every position
computed, router margins above ``MIN_MARGIN`` and, at every sampled one, a top-2 margin above it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoints import YARN, deepseek_v3_config, qwen3_moe_config, write_checkpoint
from ..models.family_configs import (
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
from ..models.reference_models import load_reference

FILE = Path(__file__).with_name("greedy_prompts.json")
MIN_MARGIN = 1e-5
NUM_PROMPTS, NUM_NEW = 16, 64
FAMILIES = {
    "qwen3_moe": qwen3_moe_config(),
    "deepseek_v3": deepseek_v3_config(),
    "deepseek_v2": deepseek_v2_config(topk_method="group_limited_greedy"),
    "deepseek_v2_lite": deepseek_v2_config(q_lora_rank=None, routed_scaling_factor=1.0, rope_scaling=YARN),
    "kimi_k2": kimi_k2_config(),
    "mixtral": mixtral_config(),
    "qwen2_moe": qwen2_moe_config(mlp_only_layers=[1]),
    "glm4_moe": glm4_moe_config(),
    "minimax_m2": minimax_m2_config(),
    "glm4_moe_lite": glm4_moe_lite_config(),
    "gpt_oss": gpt_oss_config(),
}
# Made of the same parts as others, so that fewer layouts will do.
RELATED = {
    "hy_v3": hy_v3_config(),
    "mistral4": mistral4_config(),
    "deepseek_v32": deepseek_v32_config(index_n_heads=16),
    "glm_moe_dsa": glm_moe_dsa_config(index_n_heads=16, indexer_types=["full", "shared", "full"]),
}
ALL = FAMILIES | RELATED
_ROUTERS = ("TopKRouter", "TopkRouter")  # how transformers' routers end
_INDEXER = "Indexer"


@dataclass(frozen=True)
class GreedyPrompt:
    """``top2_margin``: least difference of the two best logits where a token was chosen.
    ``router_margin``: least difference, over all tokens and layers, between a chosen score and one
    not chosen (experts, groups, and positions that an indexer chooses).
    """

    prompt: list[int]
    tokens: list[int]
    top2_margin: float
    router_margin: float


def load_prompts(family: str) -> list[GreedyPrompt]:
    return [GreedyPrompt(**entry) for entry in json.loads(FILE.read_text())[family]]


def write_family(path: Path, family: str) -> Path:
    return write_checkpoint(path, ALL[family], seed=11)


class Reference:
    """transformers' model of a checkpoint, with the margins of what it decides."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self._config = config
        self._model = load_reference(path, torch.float32)
        self._inputs: list[tuple[Any, tuple[Tensor, ...]]] = []
        for module in self._model.modules():
            if type(module).__name__.endswith((*_ROUTERS, _INDEXER)):
                module.register_forward_hook(
                    lambda module, inputs, output: self._inputs.append((module, inputs))
                )

    @torch.inference_mode()
    def compute(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """logits [T, V] after each of ``tokens``, and the least router margin [T] over all layers
        of each.
        """
        self._inputs.clear()
        logits_TV = self._model(torch.tensor([tokens])).logits[0]
        assert self._inputs, "no router was seen"
        margins = [
            _index_margins(module, *inputs)
            if type(module).__name__.endswith(_INDEXER)
            else self._router_margins(module, *inputs)
            for module, inputs in self._inputs
        ]
        return logits_TV, torch.stack(margins).amin(0)

    def judge(self, prompt: list[int], tokens: list[int]) -> tuple[list[int], float, float]:
        """(best token at each position of ``tokens``, least top-2 margin there, least router
        margin) with all of them as input.
        """
        logits_TV, routers_T = self.compute(prompt + tokens)
        logits_TV = logits_TV[len(prompt) - 1 : -1]
        top = logits_TV.topk(2).values
        return logits_TV.argmax(-1).tolist(), float((top[:, 0] - top[:, 1]).min()), float(routers_T.min())

    @torch.inference_mode()
    def continue_greedily(self, prompt: list[int], num_new: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(num_new):
            tokens.append(int(self._model(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    def _router_margins(self, module: Any, hidden: Tensor, bias_E: Tensor | None = None) -> Tensor:
        scores_TE = hidden.view(-1, hidden.shape[-1]) @ module.weight.T
        if getattr(module, "bias", None) is not None:
            scores_TE = scores_TE + module.bias
        bias_E = getattr(module, "e_score_correction_bias", bias_E)
        corrected = bias_E is not None
        scores_TE = scores_TE.sigmoid() + bias_E if bias_E is not None else scores_TE.softmax(-1)
        if (
            self._config.get("topk_group", 1) == self._config.get("n_group", 1)
            or self._config.get("topk_method") == "greedy"
        ):
            return _gaps(scores_TE, self._config["num_experts_per_tok"])
        scores_TGE = scores_TE.unflatten(-1, (self._config["n_group"], -1))
        groups_TG = scores_TGE.topk(2 if corrected else 1).values.sum(-1)
        best = groups_TG.topk(self._config["topk_group"]).indices
        closed = torch.ones_like(groups_TG, dtype=torch.bool).scatter_(-1, best, False)
        inside = scores_TGE.masked_fill(closed[..., None], -1.0).flatten(1)
        return torch.minimum(
            _gaps(groups_TG, self._config["topk_group"]), _gaps(inside, self._config["num_experts_per_tok"])
        )


def _index_margins(module: Any, hidden: Tensor, latent: Tensor, turn: Any, *_: Any) -> Tensor:
    """As ``_gaps`` for the positions of each token that sees more than are chosen."""
    rotations = vars(import_module(type(module).__module__))
    rotate = rotations.get("apply_rotary_pos_emb") or rotations["apply_rotary_pos_emb_interleave"]
    q, k = module.wq_b(latent).unflatten(-1, (module.n_heads, -1)), module.k_norm(module.wk(hidden))
    first = module.qk_rope_head_dim
    turned = rotate(q[..., :first], k[:, :, None, :first], *turn, unsqueeze_dim=2)
    q, k = (
        torch.cat([turned[0], q[..., first:]], -1)[0],
        torch.cat([turned[1][:, :, 0], k[..., first:]], -1)[0],
    )
    scores_TJL = (q @ k.T).relu() * module.softmax_scale * module.n_heads**-0.5
    scores_TL = (module.weights_proj(hidden)[0, :, :, None] * scores_TJL).sum(1)
    seen = torch.ones_like(scores_TL, dtype=torch.bool).tril()
    chosen, gaps = module.index_topk, torch.full((len(scores_TL),), torch.inf)
    if len(scores_TL) > chosen:
        gaps[chosen:] = _gaps(scores_TL.masked_fill(~seen, -torch.inf)[chosen:], chosen)
    return gaps


def _gaps(scores: Tensor, chosen: int) -> Tensor:
    """Difference [T] between the last score chosen and the first not chosen."""
    top = scores.topk(chosen + 1).values
    return top[:, chosen - 1] - top[:, chosen]


def _collect(family: str) -> list[GreedyPrompt]:
    generator = torch.Generator().manual_seed(23)
    found: list[GreedyPrompt] = []
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(write_family(Path(folder) / "model", family), ALL[family])
        while len(found) < NUM_PROMPTS:
            length = int(torch.randint(1, 80, (1,), generator=generator))
            prompt = torch.randint(2, 320, (length,), generator=generator).tolist()
            tokens = reference.continue_greedily(prompt, NUM_NEW)
            best, top2, router = reference.judge(prompt, tokens)
            if best == tokens and min(top2, router) > MIN_MARGIN:
                found.append(GreedyPrompt(prompt, tokens, top2, router))
    return found


if __name__ == "__main__":
    stored = json.loads(FILE.read_text())
    stored |= {family: [asdict(prompt) for prompt in _collect(family)] for family in sys.argv[1:]}
    FILE.write_text(json.dumps({family: stored[family] for family in ALL}) + "\n")
