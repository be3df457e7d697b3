"""Grids of cases in which every two values of different dimensions meet, but not all of them."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest
from allpairspy import AllPairs


def pairwise(dimensions: dict[str, Iterable[Any]]) -> pytest.MarkDecorator:
    """``parametrize`` over a thinned grid; for dimensions that the code treats independently.

    A name may be several ("dtype, tolerance"), whose values then come as tuples. Six by six by
    three by two values make 36 cases instead of 216.
    """
    values = [list(each) for each in dimensions.values()]
    cases = [
        [mine[index] for mine, index in zip(values, chosen, strict=True)]
        for chosen in sorted(AllPairs([range(len(mine)) for mine in values]))
    ]
    joint = ["," in names for names in dimensions]
    return pytest.mark.parametrize(
        ", ".join(dimensions),
        [
            pytest.param(
                *(
                    part
                    for value, several in zip(case, joint, strict=True)
                    for part in (value if several else [value])
                ),
                id="-".join(map(_name, case)),
            )
            for case in cases
        ],
    )


def _name(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(_name(part) for part in value)
    if isinstance(value, ModuleType):
        return value.__name__.removeprefix("lockstep.kernels.")
    return str(value).removeprefix("torch.") if not isinstance(value, float) else f"{value:g}"
