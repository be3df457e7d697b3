"""``python -m support.launch.launch_dummies --recipe R ...``: the launch command, with dummy roles in
place of the real ones.

Ranks that do no work do not meet either, so the store where they would is not opened: torch, which
holds it, takes a second to import. Deadlines that a test waits for are short, but only where a
dummy was told to misbehave; others must not be met by a machine that is busy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.launch import cli
from lockstep.launch.cluster.cluster import Cluster, Task
from lockstep.launch.run import supervisor
from lockstep.launch.run.rendezvous import Rendezvous
from lockstep.launch.run.replacements import Replacements

TESTS = str(Path(__file__).parent.parent.parent)
HASTE = 20  # a cluster that does not come back is given up after so much less than cluster.start_deadline


class NoStore(Rendezvous):
    """Listens as the real one does; nobody calls."""

    def _open(self) -> None:
        pass


def with_dummy(make_task: Callable[..., Task]) -> Callable[..., Task]:
    def make(*args: Any) -> Task:
        task = make_task(*args)
        path = {"PYTHONPATH": os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])}
        return replace(task, module="support.launch.dummy_cluster", environment={**task.environment, **path})

    return make


def hasty(cluster: Cluster, deadline: float) -> Replacements:
    return Replacements(cluster, deadline / HASTE)


if __name__ == "__main__":
    for name in ("controller_task", "rank_task", "frontend_task"):
        setattr(supervisor, name, with_dummy(getattr(supervisor, name)))
    supervisor.Rendezvous = NoStore  # type: ignore[misc]
    supervisor.Replacements = hasty  # type: ignore[assignment, misc]
    if os.environ.get("DUMMY"):
        for name in ("STOP_SECONDS", "TERMINATE_SECONDS", "FIRST_TOKEN_SECONDS"):
            setattr(supervisor, name, 1.0)
    cli.main()
