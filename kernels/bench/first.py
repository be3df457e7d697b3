"""The cases that a card measures first: one or a few of each op, at the sizes that decide the speed
of Qwen3-30B-A3B and DeepSeek-V3.
"""

from __future__ import annotations

from collections.abc import Iterator

from .call import Case
from .cases import cases
from .sampler import VOCABULARY

_DECODE_ROWS = (1, 32, 128)
_EXPERT_TOKENS = (16, 64, 256)


def first_cases() -> list[Case]:
    """About 40 of ``cases``, the most valuable ones first."""
    known = {(case.op, case.shape): case for case in cases()}
    return [known[name] for name in _names()]


def _names() -> Iterator[tuple[str, str]]:
    for rows in _DECODE_ROWS:
        for kind in ("", ", FP8 pages"):
            yield "attend", f"Qwen3 decode{kind}: {rows} x 8192"
            yield "mla_attend", f"DeepSeek-V3 decode{kind}: {rows} x 8192"
    for tokens in _EXPERT_TOKENS:
        yield "experts", f"Qwen3-30B-A3B EP 1: {tokens} tokens, 128 slots"
        yield "experts_fp8", f"Qwen3-30B-A3B EP 1: {tokens} tokens, 128 slots"
        yield "experts_fp8", f"DeepSeek-V3 EP 72: {tokens} tokens, 4 slots"
    for layer in ("latents: 64 x 7168 to 2112", "output: 64 x 16384 to 7168", "shared: 64 x 2048 to 7168"):
        yield "linear_fp8", layer
    for settings in ("greedy", "plain", "top-k 50, top-p 0.9"):
        yield "sample", f"64 x {VOCABULARY}, {settings}"
    for model in ("Qwen3", "DeepSeek-V3"):
        yield "gate", f"{model}: 64 tokens"
    for hidden in (2048, 7168):
        yield "permute", f"64 x 8 rows of {hidden}, 16 slots"
        yield "add_rms_norm", f"64 x {hidden}"
    yield "add_rms_norm_fp8", "64 x 7168"
    yield "quantise_rows", "64 x 7168"
    yield "weighted_sum", "64 x 8 x 7168"
    yield "norm_rotate_and_write", "Qwen3, FP8 pages: 64 tokens"
    yield "rotate_and_write_latent", "DeepSeek-V3, FP8 pages: 64 tokens"
    for kind in ("", ", FP8 pages"):
        yield "attend", f"Qwen3 extend{kind}: 2048 over 8192"
        yield "mla_attend", f"DeepSeek-V3 extend{kind}: 2048 over 8192"
