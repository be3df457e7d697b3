"""A served demo, and the clients that speak to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.clients import Address

DEMO = Path(__file__).parents[2] / "recipes/demo/model"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--server", help="base URL of a served demo; every client must then be installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    """With ``--server`` a client that is not there is a failure."""
    report = yield
    if report.skipped and item.config.getoption("--server", None):
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """The demo model, which adds numbers, extracts fields and calls tools."""
    base = request.config.getoption("--server", None)
    if base is not None:
        yield Address.of(base)
        return
    from support.serving.served import serve  # not in an environment of clients

    with serve(tmp_path_factory.mktemp("clients") / "run", f"model.path={DEMO}") as served:
        yield Address.of(served.base)
