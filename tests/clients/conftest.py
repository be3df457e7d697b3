"""A served demo, and the clients that speak to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.clients import Address
from support.serving.served import serve

DEMO = Path(__file__).parents[2] / "recipes/demo/model"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """The demo model, which adds numbers, extracts fields and calls tools."""
    with serve(tmp_path_factory.mktemp("clients") / "run", f"model.path={DEMO}") as served:
        model = served.http.get("/v1/models").json()["data"][0]["id"]
        yield Address(served.base, model)
