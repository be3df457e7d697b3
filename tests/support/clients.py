"""The served demo as clients see it, and their packages as far as they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import urllib.request
from dataclasses import dataclass
from types import ModuleType

import pytest

PERSON = "Anna is 31 years old."
SUM = "What is 12 + 7?"
WEATHER = "get weather with city Bonn"


@dataclass(frozen=True)
class Address:
    """``base`` is without ``/v1``; ``model`` is the served name."""

    base: str
    model: str

    @classmethod
    def of(cls, base: str) -> Address:
        with urllib.request.urlopen(f"{base}/v1/models", timeout=60) as answer:
            return cls(base, json.load(answer)["data"][0]["id"])

    @property
    def v1(self) -> str:
        return f"{self.base}/v1"


def client_package(name: str, extra: str = "clients") -> ModuleType:
    """The module, or a skip that names the extra that installs it."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed: pip install 'lockstep[{extra}]'")
    return importlib.import_module(name)
