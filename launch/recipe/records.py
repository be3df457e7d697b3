"""Checks on this machine of what a recipe asks frontends to record: spans, and a file of lines."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from .recipe import Recipe

INSTALL = "pip install 'lockstep[otel]'"


def check_records(recipe: Recipe) -> list[str]:
    """Problems that would drop every span or line; no file is made."""
    frontend, found = recipe.frontend, []
    if frontend.tracing != "off" and not (_installed("sdk") and _installed("exporter.otlp.proto.http")):
        found.append(f"frontend.tracing = {frontend.tracing}: OpenTelemetry is not installed; {INSTALL}")
    if frontend.access_log_file is not None:
        path = Path(frontend.access_log_file).expanduser().absolute()
        if path.is_dir():
            found.append(f"frontend.access_log_file = {frontend.access_log_file}: is a directory")
        elif not path.parent.is_dir():
            found.append(f"frontend.access_log_file = {frontend.access_log_file}: no folder {path.parent}")
        elif not os.access(path if path.exists() else path.parent, os.W_OK):
            found.append(f"frontend.access_log_file = {frontend.access_log_file}: cannot be written to")
    return found


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(f"opentelemetry.{module}") is not None
    except ModuleNotFoundError:  # a package above it
        return False
