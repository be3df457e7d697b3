"""``python -m support.launch_dummies --recipe R ...``: the launch command, with dummy roles in place of the real ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.launch import cli, supervisor
from lockstep.launch.cluster import Task

TESTS = str(Path(__file__).parent.parent)


def with_dummy(make_task: Callable[..., Task]) -> Callable[..., Task]:
    def make(*args: Any) -> Task:
        task = make_task(*args)
        path = {"PYTHONPATH": os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])}
        return replace(task, module="support.dummy_cluster", environment={**task.environment, **path})

    return make


if __name__ == "__main__":
    for name in ("controller_task", "rank_task", "frontend_task"):
        setattr(supervisor, name, with_dummy(getattr(supervisor, name)))
    for name in ("STOP_SECONDS", "TERMINATE_SECONDS", "FIRST_TOKEN_SECONDS"):
        setattr(supervisor, name, 1.0)
    supervisor.CLOSE_SECONDS = 5.0
    cli.main()
