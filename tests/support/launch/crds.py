"""Strict schemas of custom resources: those of their definitions, with unknown fields refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

# Beside the repository, or further up where it is a worktree.
_PLACES = [folder / "shared" / "crds" for folder in Path(__file__).resolve().parents[4:]]
FOLDER = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
_FILES = {
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io_leaderworkersets.yaml",
    "PodMonitor": "podmonitor_v1.json",
    "ScaledObject": "scaledobject_v1alpha1.json",
    "InferencePool": "inference.networking.k8s.io_inferencepools.yaml",
    "RayCluster": "ray.io_rayclusters.yaml",
}
KINDS = frozenset(_FILES)


def check(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError. Skips the test where the definitions are not at hand."""
    path = FOLDER / _FILES[document["kind"]]
    if not path.is_file():
        pytest.skip(f"the definition of {document['kind']} is not at hand: {path}")
    jsonschema.validate(document, _schema(path, document["apiVersion"].rpartition("/")[2]))


@functools.cache
def _schema(path: Path, version: str) -> dict[str, Any]:
    if path.suffix == ".json":
        schema = json.loads(path.read_text())
    else:
        definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        [found] = [item for item in definition["spec"]["versions"] if item["name"] == version]
        schema = found["schema"]["openAPIV3Schema"]
    strict: dict[str, Any] = _strict(schema)
    for name in ("apiVersion", "kind", "metadata"):
        strict["properties"][name] = {}
    return strict


def _strict(schema: Any) -> Any:
    """The schema, with unknown fields refused wherever it names fields."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # Kubernetes writes integers or strings in a way of its own.
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {name: _strict(value) for name, value in schema.items() if name != "format"}
    fields = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if fields and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made
