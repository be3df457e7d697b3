"""The generator's words and phrases, a section per family. ``training.yaml`` holds those of
training; ``held_out.yaml`` and ``final.yaml`` hold, under the same names, those that training never
uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Sides:
    """A list of phrases or words for each side: training, held-out cases, final evaluation."""

    training: list[str]
    held_out: list[str]
    final: list[str]

    @property
    def unseen(self) -> frozenset[str]:
        """Phrases that training must not use."""
        return frozenset(self.held_out + self.final)


def sides(section: str, *keys: str | int) -> Sides:
    """The list under ``keys`` in a section, on each side. All sides have it."""
    return Sides(*(_under(phrases(section, file), keys) for file in ("training", "held_out", "final")))


def phrases(section: str, file: str = "training") -> Any:
    return _read(file)[section]


def _under(texts: Any, keys: tuple[str | int, ...]) -> list[str]:
    for key in keys:
        texts = texts[key]
    found: list[str] = texts
    return found


@cache
def _read(file: str) -> dict[str, Any]:
    text = Path(__file__).with_name(f"{file}.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return found
