"""The parameters of a controller without sockets, for tests of its parts."""

from __future__ import annotations

from lockstep.engine.protocol.specs import ControllerSpec, SchedulerSpec
from lockstep.parallel.mesh import Mesh

SCHEDULER = SchedulerSpec(max_running=4, max_batch_tokens=32)


def controller_spec(mesh: Mesh, *, survivors: bool) -> ControllerSpec:
    """Deadlines of 20 s for ranks and 5 s for a collective; contexts of 96 tokens."""
    return ControllerSpec(
        host="",
        secret="",
        public="",
        allowed=(),
        mesh=mesh,
        scheduler=SCHEDULER,
        model_max_len=96,
        max_len=None,
        rank_deadline=20.0,
        collective_deadline=5.0,
        survivors=survivors,
    )
