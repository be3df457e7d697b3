"""The words and phrases of the generator, a section a family: ``training.yaml``, and what training
never says in ``held_out.yaml`` and ``final.yaml``, under the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Sides:
    """A list of phrases or words as training has it, as held-out cases have it, and as those of the
    final evaluation have it.
    """

    training: list[str]
    held_out: list[str]
    final: list[str]

    @property
    def unseen(self) -> frozenset[str]:
        """What training must not say, where the sides differ."""
        return frozenset(self.held_out + self.final)


def sides(section: str, *keys: str | int) -> Sides:
    """The list under ``keys`` in a section, on each side; all sides have it."""
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
