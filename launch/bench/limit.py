"""Lower bounds on the times of a load, from the capacity plan of the server's recipe."""

from __future__ import annotations

from dataclasses import dataclass

from ..capacity.floors import Work, floor_of
from ..capacity.plan import CapacityPlan
from .workload import Workload


@dataclass(frozen=True)
class Limit:
    """Bounds that no server with this plan's model and hardware can beat. ``binds``: what bounds
    decode.

    ``ttft``: seconds to compute one prompt alone. ``tpot``: seconds of a decode step with all
    requests in flight. ``output_per_second``: their tokens in that time.
    """

    ttft: float
    tpot: float
    output_per_second: float
    binds: str


def limit_of(plan: CapacityPlan, workload: Workload, in_flight: float) -> Limit:
    """The limit at the mean length of a running request. Rows are spread evenly over the data
    indices and, with pipelines, over the cohorts that take turns; their number is bounded by slots
    and pages.
    """
    mesh = plan.setup.mesh
    running = max(1e-9, min(in_flight, plan.largest_batch or in_flight))
    rows = running / mesh.data / mesh.pipeline
    context = workload.input + workload.output / 2
    decode = floor_of(plan.setup, Work(rows, rows, rows * context, rows * context, rows, True))
    fresh = workload.input - workload.shared
    attended = fresh * (workload.shared + workload.input) / 2
    prompt = floor_of(plan.setup, Work(fresh, 1, attended, workload.input, fresh / mesh.data, False))
    # Its exchange is not counted: that floor is for prompts on all ranks.
    alone = max(prompt.compute, prompt.memory)
    return Limit(alone, decode.seconds, running / decode.seconds, decode.binds)
