"""The words and phrases of the generator: ``phrases.yaml``, a section a family, the grammars of ``frames.yaml``, and ``final.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Sides:
    """A list of phrases or words as training has it, as held-out cases have it, and as those of the final evaluation have it."""

    training: list[str]
    held_out: list[str]
    final: list[str]

    @property
    def unseen(self) -> frozenset[str]:
        """What training must not say, where the sides differ."""
        return frozenset(self.held_out + self.final)


def sides(section: str, name: str, *keys: str) -> Sides:
    """The list ``name`` of a section, or what is under ``keys`` in it; a side that has none of its own takes that of the one before."""
    texts = phrases(section)
    training = texts[name]
    held_out = texts.get(f"{name}_unseen", training)
    final = phrases(section, "final").get(name, held_out)
    for key in keys:
        training, held_out, final = training[key], held_out[key], final[key]
    return Sides(training, held_out, final)


def phrases(section: str, file: str = "phrases") -> Any:
    return _read(file)[section]


@cache
def _read(file: str) -> dict[str, Any]:
    text = Path(__file__).with_name(f"{file}.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return found
