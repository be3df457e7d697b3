"""CPU instruction sets, and the form in which weights are held for each. Imports no torch, since
``launch plan`` uses it too.

Weights are held once, in blocks (``cpu/codegen/blocks.py``) of 16 columns: those in bf16 on every
CPU, those in float32 on every CPU with AVX2. Of those with other numbers of columns, which few
models have, linear layers in bf16 are held in oneDNN's layout where it computes in bf16, all others
as they are loaded.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

Isa = Literal["avx2", "avx512", "avx512_bf16", "amx"]
Form = Literal["plain", "onednn", "blocks"]

COLUMNS = 16  # per block: one vector of float32 sums

_ORDER: tuple[Isa, ...] = get_args(Isa)
# Names as in LLVM.
_AMX = {"amx-tile", "amx-bf16"}
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


def features() -> frozenset[str]:
    """LLVM's names of the CPU features that this process compiles for: all that the CPU has, or
    those that ``cluster.isa`` allows.
    """
    from numba.core.registry import cpu_target

    words = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return frozenset(word[1:] for word in words if word.startswith("+"))


def isa_of(features: Collection[str]) -> Isa:
    """The instruction set of a CPU with these features; ``avx2`` stands for all that have none of
    the others.
    """
    if set(features) >= _AMX:
        return "amx"
    if "avx512bf16" in features:
        return "avx512_bf16"
    return "avx512" if set(features) >= _AVX512 else "avx2"


def here() -> Isa:
    """The instruction set that this process computes with."""
    return isa_of(features())


def own() -> Isa:
    """The instruction set of this CPU, whatever ``cluster.isa`` allows. Imports no numba, so it is
    quicker than ``here``.
    """
    from llvmlite import binding

    return isa_of([name for name, there in binding.get_host_cpu_features().items() if there])


def lesser(one: Isa, other: Isa) -> Isa:
    """The smaller of two instruction sets."""
    return min(one, other, key=_ORDER.index)


def check() -> None:
    """Raises ValueError if ``cluster.isa`` asks for instructions that this CPU lacks."""
    if lesser(here(), own()) != here():
        raise ValueError(f"cluster.isa = {here()}: this CPU has {own()} only; use auto or {own()}")


def multiplies_bf16(isa: Isa) -> bool:
    """Whether a CPU multiplies bf16 as it is stored; others widen it to float32."""
    return _ORDER.index(isa) >= _ORDER.index("avx512_bf16")


def fit(num_columns: int, num_inner: int) -> bool:
    """Whether a weight of this shape can be packed into blocks."""
    return num_columns % COLUMNS == 0 and num_inner % 2 == 0 and num_columns * num_inner > 0


def weight_form(isa: Isa, num_columns: int, num_inner: int) -> Form:
    """The form in which a bf16 weight [N, D] is held."""
    if fit(num_columns, num_inner):
        return "blocks"
    return "plain" if isa == "avx2" else "onednn"


def slot_form(hidden: int, width: int) -> Form:
    """The form in which the bf16 weights of expert slots are held: the same for w13 [S, 2F, D] and
    w2 [S, D, F].
    """
    return "blocks" if fit(width, hidden) and fit(hidden, width) else "plain"


def float_form(*shapes: tuple[int, int]) -> Form:
    """The form in which this process holds float32 weights of these shapes [N, D]."""
    multiplies = features() >= {"avx2", "fma"}
    return "blocks" if multiplies and all(fit(*shape) for shape in shapes) else "plain"
