"""A rank in a process of its own, started as the launcher starts it but without a lobby."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.process import BaseProcess

from lockstep.engine.specs import RankSpec


def start_rank(spec: RankSpec) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_main, args=(spec,), daemon=True)
    process.start()
    return process


def _main(spec: RankSpec) -> None:
    from lockstep.engine.rank import main

    main(spec)
    assert "transformers" not in sys.modules, "a rank has imported transformers"
