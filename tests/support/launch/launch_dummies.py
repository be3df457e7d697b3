"""The launch command with dummy processes: ``python -m support.launch.launch_dummies --recipe R``.

Deadlines are short only where a dummy was told to misbehave, so that a busy machine does
not miss the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.launch import cli
from lockstep.launch.cluster.cluster import Cluster, Task
from lockstep.launch.run import replacements, start, supervisor
from lockstep.launch.run.replacements import Replacements

TESTS = str(Path(__file__).parent.parent.parent)
HASTE = 20  # divides the time until a cluster that does not come back is given up


def with_dummy(make_task: Callable[..., Task]) -> Callable[..., Task]:
    def make(*args: Any) -> Task:
        task = make_task(*args)
        path = {"PYTHONPATH": os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])}
        changed = {**task.environment, **path}
        return replace(task, module="support.launch.dummy_cluster", environment=changed, imports=None)

    return make


def hasty(cluster: Cluster, deadline: float) -> Replacements:
    return Replacements(cluster, deadline / HASTE)


if __name__ == "__main__":
    for name in ("controller_task", "rank_task", "frontend_task"):
        setattr(start, name, with_dummy(getattr(start, name)))
    replacements.FIRST_DELAY /= HASTE
    supervisor.Replacements = hasty  # type: ignore[assignment, misc]
    if os.environ.get("DUMMY"):
        supervisor.STOP_SECONDS = supervisor.TERMINATE_SECONDS = start.FIRST_TOKEN_SECONDS = 1.0
    cli.main()
