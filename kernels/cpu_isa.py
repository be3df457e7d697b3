"""The instructions of a CPU, and how bf16 weights are held for them. Without torch, because
``launch plan`` asks, too.

With AVX512-BF16 and without AMX weights lie in blocks (``cpu_blocks``), otherwise in oneDNN's
layout where oneDNN computes in bf16. Expert slots in oneDNN's layout are held twice
(``cpu_linear.PackedSlots``).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

Isa = Literal["avx2", "avx512", "avx512_bf16", "amx"]
Form = Literal["plain", "onednn", "blocks"]

COLUMNS = 16  # of a block: one vector of float32 sums

_ORDER: tuple[Isa, ...] = get_args(Isa)
# oneDNN computes in bf16 with any of these: AVX-512, AVX2-VNNI-2, or bf16 on ARM. Named as LLVM
# does.
_ONEDNN = (
    {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    {"avxvnni", "avxvnniint8", "avxneconvert"},
    {"bf16"},
)


def features() -> frozenset[str]:
    """The features, named as LLVM does, that this process compiles for: those of the CPU, or what
    ``cluster.isa`` leaves of them.
    """
    from numba.core.registry import cpu_target

    words = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return frozenset(word[1:] for word in words if word.startswith("+"))


def isa_of(features: Collection[str]) -> Isa:
    """The kind of CPU with these features: ``avx512`` is any on which oneDNN computes in bf16,
    ``avx2`` any other.
    """
    if "amx-bf16" in features:
        return "amx"
    if "avx512bf16" in features:
        return "avx512_bf16"
    return "avx512" if any(needed <= set(features) for needed in _ONEDNN) else "avx2"


def here() -> Isa:
    """The kind that this process computes on."""
    return isa_of(features())


def lesser(one: Isa, other: Isa) -> Isa:
    """The one with fewer instructions."""
    return min(one, other, key=_ORDER.index)


def check() -> None:
    """Raises ValueError where ``cluster.isa`` asks for instructions that this CPU does not have."""
    from llvmlite import binding

    own = isa_of([name for name, there in binding.get_host_cpu_features().items() if there])
    if lesser(here(), own) != here():
        raise ValueError(f"cluster.isa = {here()}: this CPU has {own} only; use auto or {own}")


def fit(num_columns: int, num_inner: int) -> bool:
    """Whether a weight of this shape can be packed into blocks."""
    return num_columns % COLUMNS == 0 and num_inner % 2 == 0 and num_columns * num_inner > 0


def weight_form(isa: Isa, num_columns: int, num_inner: int) -> Form:
    """How a bf16 weight [N, D] is held."""
    if isa == "avx512_bf16" and fit(num_columns, num_inner):
        return "blocks"
    return "plain" if isa == "avx2" else "onednn"


def slot_form(isa: Isa, hidden: int, width: int) -> Form:
    """How the bf16 weights of expert slots are held, w13 [S, 2F, D] and w2 [S, D, F]: both in the
    same form.
    """
    forms = {weight_form(isa, width, hidden), weight_form(isa, hidden, width)}
    return "blocks" if forms == {"blocks"} else next(iter(forms - {"blocks"}))
