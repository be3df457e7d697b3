"""A rank in a process of its own, started as the launcher starts it but without a lobby."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

from lockstep.engine.protocol.specs import RankSpec


@contextmanager
def start_rank(spec: RankSpec) -> Iterator[BaseProcess]:
    """The process, which is killed at the end where it has not left by itself."""
    process = multiprocessing.get_context("spawn").Process(target=_main, args=(spec,), daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _main(spec: RankSpec) -> None:
    from lockstep.engine.rank.process import main

    main(spec)
    assert "transformers" not in sys.modules, "a rank has imported transformers"
