"""Clusters of dummy roles, and waiting with a deadline."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from lockstep.launch.cluster.cluster import Cluster, Death, Imports, Task
from lockstep.launch.cluster.local import LocalCluster

TESTS = Path(__file__).parent.parent.parent


def dummy(index: int, do: str, role: str = "rank", *, imports: Imports | None = None, **spec: object) -> Task:
    """A task of ``dummy_role``; ``imports``: as in ``Task``."""
    path = {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])}
    node = 0 if role == "rank" else None
    return Task(
        role,
        index,
        json.dumps({"do": do, **spec}).encode(),
        node=node,
        environment=path,
        module="support.launch.dummy_role",
        imports=imports,
    )


def make(backend: str, folder: Path) -> Cluster:
    if backend == "local":
        return LocalCluster(folder)
    from lockstep.launch.environment import prepare_ray

    prepare_ray()
    from lockstep.launch.cluster.ray_cluster import Needs, RayCluster

    return RayCluster(folder, Needs(1, 2, gpus=False), address=None)


def next_deaths(cluster: Cluster, count: int, seconds: float = 60.0) -> list[Death]:
    found: list[Death] = []
    deadline = time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} deaths in {seconds:g} s"
        found += cluster.deaths()
        time.sleep(0.01)
    return found


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.02)
