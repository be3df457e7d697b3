"""The words and phrases of the generator: ``phrases.yaml``, a section a family, and the grammars of ``frames.yaml``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml


def phrases(section: str, file: str = "phrases") -> dict[str, Any]:
    found: dict[str, Any] = _read(file)[section]
    return found


@cache
def _read(file: str) -> dict[str, Any]:
    text = Path(__file__).with_name(f"{file}.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return found
