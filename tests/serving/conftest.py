"""The clusters that tests of the served product share."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from support.engine.text.tiny_tokenizer import TOOL_TEMPLATE
from support.serving.mixed_asks import Oracle
from support.serving.random_checkpoint import random_checkpoint
from support.serving.served import Served, serve


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The demo recipe with room for 200 requests at once on two ranks."""
    with serve(tmp_path_factory.mktemp("demo") / "run", "scheduler.max_running=128") as served:
        yield served


@pytest.fixture(scope="session")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The same weights with a chat template that shows tools and reasoning. Its ranks may be
    killed, one in a test.
    """
    folder = tmp_path_factory.mktemp("calling")
    model = folder / "model"
    model.mkdir()
    for file in random_checkpoint().iterdir():
        (model / file.name).symlink_to(file)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TOOL_TEMPLATE}))
    with serve(folder / "run", f"model.path={model}") as served:
        yield served


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()
