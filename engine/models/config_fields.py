"""Checked access to the fields of a ``config.json``: every error names the file, the field, its
value and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The fields that hold the text model's description where a file describes a model of text and
# images, and those beside them that hold for the text model too.
_TEXT_MODELS = ("text_config", "llm_config", "language_config")
_SHARED = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings", "eos_token_id")


class Fields:
    """A JSON object of ``source`` (a file, or a path inside one). A field that is absent or null
    takes its default.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source = source

    @classmethod
    def read(cls, path: Path) -> Fields:
        """The object in the file ``path``. Raises ValueError where there is none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            wanted = "a model directory holds config.json and *.safetensors"
            raise ValueError(f"{path}: no such file; {wanted}") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not readable as JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: holds a {type(values).__name__}; expected a JSON object")
        return cls(values, str(path))

    def text_model(self) -> Fields:
        """The description of the text model: these fields, unless one of them holds it."""
        for name in _TEXT_MODELS:
            inner = self._values.get(name)
            if isinstance(inner, dict):
                shared = {key: self._values[key] for key in _SHARED if self.has(key)}
                own = {key: value for key, value in inner.items() if value is not None}
                return Fields(shared | own, f"{self.source}: {name}")
        return self

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def raw(self, name: str) -> Any:
        return self._values.get(name)

    def names(self) -> tuple[str, ...]:
        """The fields that are there."""
        return tuple(name for name in self._values if self.has(name))

    def refuse(self, name: str, allowed: str) -> ValueError:
        """Makes the error for a value of ``name`` that is not allowed; the caller raises it."""
        return ValueError(f"{self.source}: {name} is {json.dumps(self._values.get(name))}; {allowed}")

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refuse(name, f"expected an integer of at least {minimum}")
        return value

    def optional_integer(self, name: str) -> int | None:
        return self.integer(name) if self.has(name) else None

    def number(self, name: str, default: float | None = None, minimum: float = 0.0) -> float:
        """A finite number above ``minimum``."""
        value = self._get(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not minimum < value < float("inf")
        ):
            raise self.refuse(name, f"expected a number above {minimum:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "expected true or false")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """An integer or a list of integers; empty if absent."""
        value = self._values.get(name)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items):
            raise self.refuse(name, "expected non-negative integers")
        return tuple(items)

    def expect(self, name: str, *allowed: object) -> None:
        """Refuses a value other than ``allowed``; an absent field passes."""
        if self.has(name) and self._values[name] not in allowed:
            raise self.refuse(name, "supported: " + ", ".join(json.dumps(value) for value in allowed))

    def nested(self, name: str) -> Fields | None:
        """The object in field ``name``, or None where it is absent."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refuse(name, "expected an object")
        return Fields(value, f"{self.source}: {name}")

    def _get(self, name: str, default: object) -> object:
        value = self._values.get(name)
        if value is not None:
            return value
        if default is None:
            raise ValueError(f"{self.source}: {name} is missing")
        return default
