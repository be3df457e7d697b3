"""A launch refuses to trace without OpenTelemetry, and to write lines where it cannot."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from lockstep.launch.preflight.check import preflight, refuse_errors
from lockstep.launch.recipe.file import parse_recipe
from lockstep.launch.recipe.records import check_records

MODEL = "model: {path: model}\n"


def problems(*overrides: str) -> list[str]:
    return check_records(parse_recipe(MODEL, list(overrides)))


@pytest.mark.parametrize("module", ["opentelemetry", "opentelemetry.sdk"])
def test_without_the_extra_tracing_is_refused_with_the_command(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if (name + ".").startswith(module + ".")]:
        monkeypatch.delitem(sys.modules, name)
    find = importlib.util.find_spec

    def absent(name: str, package: str | None = None) -> object:
        if (name + ".").startswith(module + "."):
            if name != module:
                raise ModuleNotFoundError(name=module)
            return None
        return find(name, package)

    monkeypatch.setattr("lockstep.launch.recipe.records.importlib.util.find_spec", absent)
    assert problems() == []
    [text] = problems("frontend.tracing=on")
    assert text.startswith("frontend.tracing = on") and "pip install 'lockstep[otel]'" in text
    recipe = parse_recipe(MODEL, ["frontend.tracing=http://127.0.0.1:4318"])
    with pytest.raises(ValueError, match="pip install 'lockstep"):
        refuse_errors(preflight(recipe, tmp_path))


def test_with_the_extra_tracing_is_taken() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")
    assert problems("frontend.tracing=on") == []


def test_a_file_of_lines_needs_a_folder(tmp_path: Path) -> None:
    assert problems(f"frontend.access_log_file={tmp_path}/lines") == []
    assert list(tmp_path.iterdir()) == []
    [text] = problems(f"frontend.access_log_file={tmp_path}/no/lines")
    assert "frontend.access_log_file" in text and f"no folder {tmp_path}/no" in text
    [text] = problems(f"frontend.access_log_file={tmp_path}")
    assert "is a directory" in text
