"""The cluster that most tests of the served product share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.mixed_asks import Oracle
from support.serving import Served, serve


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The demo recipe with room for 200 requests at once on two ranks."""
    with serve(tmp_path_factory.mktemp("demo") / "run", "scheduler.max_running=128") as served:
        yield served


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()
