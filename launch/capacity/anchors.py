"""Floors beside published figures: ``python -m lockstep.launch.capacity.anchors`` prints
benchmarks/plan_anchors.md.

A floor that a published figure beats is wrong; a ratio far below 1 needs a reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...engine.models.shape import read_shape
from ...parallel.mesh import Mesh
from ..recipe.file import load_recipe
from ..recipe.hardware import load_hardware
from ..recipe.model_folder import description_folder
from ..recipe.recipe import contradictions
from .floors import Floor, decode_work, floor_of, prefill_work, traffic
from .setup import Setup, resolve

CHUNK = 16384  # tokens of a prefill step on a GPU; the floor per token hardly depends on it
_FP8_ROW = 1 + 4 / 128  # DeepEP sends fp8 with a float32 scale per 128 values


@dataclass(frozen=True)
class PublishedRate:
    """A published figure for DeepSeek-V3 or R1.

    ``batch``: per GPU, 0 for prefill. ``rate``: tokens/s per GPU. ``set_up``: published and assumed
    settings. ``reason``: of the gap to the floor.
    """

    system: str
    hardware: str
    ranks: int
    batch: int
    context: int
    rate: float
    set_up: str
    reason: str

    @property
    def tokens(self) -> int:
        """Tokens per step and GPU."""
        return self.batch or CHUNK


@dataclass(frozen=True)
class MeasuredExchange:
    """Microseconds of dispatch and combine, measured with DeepEP low latency."""

    ranks: int
    dispatch_us: float
    combine_us: float


PUBLISHED = (
    PublishedRate(
        "DeepSeek",
        "h800",
        32,
        0,
        4096,
        0.44 * 9200,
        "9.2k less 56 % cache hits; prompts of 4k assumed",
        "a service under changing load, day and night; exchange and computation take equally long, "
        "so that every part not overlapped counts",
    ),
    PublishedRate(
        "DeepSeek",
        "h800",
        144,
        88,
        4989,
        1850,
        "batch from 1.85k / 21 tokens/s/user",
        "a service under changing load; DeepEP takes 1.3 times the floor of its exchange (below), "
        "two microbatches hide a part of it",
    ),
    PublishedRate(
        "SGLang",
        "h100",
        32,
        0,
        2048,
        6800,
        "2k prompts: middle of 6.3k to 7.2k",
        "0.69 with nothing overlapped; uneven experts cost 1.18 times, "
        "FP8 products reach 78 % of peak at best (DeepGEMM)",
    ),
    PublishedRate(
        "SGLang",
        "h100",
        72,
        256,
        2048,
        2800,
        "batch 256, 2k in",
        "the exchange binds and DeepEP takes 1.3 times its floor; attention reaches 67 % of peak (FlashMLA)",
    ),
    PublishedRate(
        "vLLM",
        "h200",
        32,
        256,
        2048,
        2200,
        "32 ranks, batch 256, 2k context assumed",
        "as SGLang on H100; a sustained production-like run whose batch is not published",
    ),
    PublishedRate(
        "SGLang",
        "gb200",
        8,
        0,
        2048,
        26200,
        "8 GPUs, NVFP4 experts, FP8 attention, 2k prompts",
        "0.51 with nothing overlapped; the floor has no gating, quantising and norms, "
        "and takes NVFP4 kernels at peak",
    ),
    PublishedRate(
        "SGLang",
        "gb200",
        48,
        768,
        2048,
        13400,
        "48 GPUs, NVFP4 experts, FP8 attention; batch 768 assumed",
        "0.94 ms a layer against 0.23: the floor has no launches, gating, quantising and norms, "
        "which weigh most where it is so low",
    ),
    PublishedRate(
        "vLLM",
        "gb200",
        2,
        0,
        2048,
        26200,
        "2 GPUs, 2k prompts, formats as SGLang assumed",
        "as SGLang; hardly any exchange to hide",
    ),
    PublishedRate(
        "vLLM",
        "gb200",
        8,
        512,
        3072,
        10100,
        "8 GPUs, 2k in, 2k out; batch 512 and formats assumed",
        "as SGLang's decode: 0.83 ms a layer against 0.26",
    ),
)

# 128 tokens, 7168 wide, fp8 out and bf16 back, H800 with 400 Gb/s each.
EXCHANGES = (
    MeasuredExchange(8, 77, 114),
    MeasuredExchange(16, 118, 195),
    MeasuredExchange(32, 155, 273),
    MeasuredExchange(64, 173, 314),
    MeasuredExchange(128, 192, 369),
    MeasuredExchange(256, 194, 360),
)
EXCHANGE_TOKENS = 128


def deepseek(hardware: str, ranks: int, *, prefill: bool) -> Setup:
    """DeepSeek-V3 as those systems run it: FP8; on Blackwell NVFP4 experts and FP8 attention.

    Prefill passes tokens on inside a node.
    """
    recipe, path = load_recipe("deepseek-h200", check=contradictions)
    device = load_hardware(hardware)
    blackwell = device.fp4_tflops is not None
    base = resolve(recipe, read_shape(description_folder(recipe, path.parent)), device)
    return replace(
        base,
        mesh=Mesh(data=ranks),
        ranks_per_node=device.ranks_per_node,
        dispatch="two_level" if prefill and ranks > device.near_ranks else "by_pair",
        wire_item=_FP8_ROW,
        weights="fp8",
        expert_weights="nvfp4" if blackwell else "fp8",
        attention_dtype="fp8" if blackwell else "bf16",
        expert_dtype="nvfp4" if blackwell else "fp8",
        kv_dtype="fp8" if blackwell else "bf16",
    )


def floor_beside(figure: PublishedRate) -> Floor:
    """The floor of a step at the batch and context of a published figure."""
    setup = deepseek(figure.hardware, figure.ranks, prefill=not figure.batch)
    if figure.batch:
        return floor_of(setup, decode_work(figure.batch, figure.context))
    return floor_of(setup, prefill_work(CHUNK, figure.context))


def markdown() -> str:
    """Both tables."""
    return "\n".join(
        [
            "# Floors of `launch plan` beside published figures",
            "",
            "DeepSeek-V3 and R1. Floor: the slowest of compute, memory and network at data-sheet rates,",
            "perfectly overlapped and even. Ratio: published rate / rate of the floor; in brackets with",
            "nothing overlapped. Times are of one step.",
            "",
            *_rate_lines(),
            "",
            f"## The exchange alone: DeepEP low latency, {EXCHANGE_TOKENS} tokens, H800",
            "",
            *_exchange_lines(),
            "",
            "At 8 ranks all tokens stay on NVLink, where most of the time is start-up latency, which the",
            "floor does not have; at 16 ranks half of them do. From 32 ranks on the adapters bind: DeepEP",
            "moves 43 to 48 of their 50 GB/s, and sends a token once per expert, the floor once per rank.",
            "",
        ]
    )


def _rate_lines() -> list[str]:
    lines = [
        "| system | hardware | step | set-up | compute / memory / network ms | binds | floor tok/s/GPU "
        "| published | ratio | why |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for figure in PUBLISHED:
        floor = floor_beside(figure)
        step = (
            f"decode EP{figure.ranks}, {figure.batch} x {figure.context:,}"
            if figure.batch
            else f"prefill EP{figure.ranks}"
        )
        times = " / ".join(f"{1e3 * part:.1f}" for part in (floor.compute, floor.memory, floor.network))
        per_second = figure.rate / figure.tokens
        ratio = f"{per_second * floor.seconds:.2f} ({per_second * floor.serial:.2f})"
        cells = [figure.system, figure.hardware.upper(), step, figure.set_up, times, floor.binds]
        cells += [f"{figure.tokens / floor.seconds:,.0f}", f"{figure.rate:,.0f}", ratio, figure.reason]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _exchange_lines() -> list[str]:
    lines = [
        "| ranks | dispatch us: floor | measured | ratio | combine us: floor | measured | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for measured in EXCHANGES:
        floor = traffic(deepseek("h800", measured.ranks, prefill=False), EXCHANGE_TOKENS)
        cells = [str(measured.ranks)]
        for seconds, us in (
            (floor.dispatch_seconds, measured.dispatch_us),
            (floor.combine_seconds, measured.combine_us),
        ):
            cells += [f"{1e6 * seconds:.0f}", f"{us}", f"{1e6 * seconds / us:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print(markdown(), end="")
