"""The launch command with ranks on a device that is late: ``python -m
support.launch.launch_late_ranks --recipe R``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from lockstep.launch import cli
from lockstep.launch.cluster.cluster import Task
from lockstep.launch.run import start

from .launch_dummies import TESTS


def late_rank_task(*args: Any) -> Task:
    task = _rank_task(*args)
    path = {"PYTHONPATH": os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])}
    changed = {**task.environment, **path}
    return replace(task, module="support.launch.late_rank", environment=changed, imports=None)


if __name__ == "__main__":
    _rank_task = start.rank_task
    start.rank_task = late_rank_task
    cli.main()
