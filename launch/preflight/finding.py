"""A finding of a check: a problem or a passed check, its node, and the remedy."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Level = Literal["ok", "warning", "error"]

FINE, ERRORS, WARNINGS = 0, 1, 3  # exit status; 2 is a bad recipe or usage


class Finding(msgspec.Struct, frozen=True):
    """``subject``: the thing checked. ``where``: a node, a pair of nodes, or empty for all.
    ``todo``: the remedy for a problem.
    """

    level: Level
    subject: str
    text: str
    where: str = ""
    todo: str = ""

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        return f"{self.subject}: {where}{self.text}" + (f"; {self.todo}" if self.todo else "")


def exit_status(findings: list[Finding]) -> int:
    """1 if there are errors, 3 if there are only warnings, else 0."""
    levels = {finding.level for finding in findings}
    return ERRORS if "error" in levels else WARNINGS if "warning" in levels else FINE


def to_json(findings: list[Finding]) -> dict[str, Any]:
    """The answer of ``launch check --json``."""
    return {
        "status": exit_status(findings),
        "findings": [msgspec.to_builtins(finding) for finding in findings],
    }
