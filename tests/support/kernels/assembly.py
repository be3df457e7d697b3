"""Loops in the assembly of compiled kernels."""

from __future__ import annotations

import re


def loops_with(instruction: str, assembly: str) -> list[list[str]]:
    """The instructions of each loop without branches that has one whose name begins so."""
    found = []
    for block in re.split(r"^(?=\.LBB\S+:)", assembly, flags=re.MULTILINE):
        label = block.partition(":")[0]
        lines = [line.strip() for line in block.splitlines() if line.startswith("\t")]
        ends = [i for i, line in enumerate(lines) if line.startswith("j") and line.split()[-1] == label]
        if ends and any(line.startswith(instruction) for line in lines[: ends[0]]):
            found.append(lines[: ends[0]])
    return found
