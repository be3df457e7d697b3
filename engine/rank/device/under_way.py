"""Steps that a device has been given, and the rows that draw in them.

Suffixes: C rows that draw.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...protocol.arrays import Int64
from ...protocol.plan import StepPlan
from ...protocol.results import StepResult
from ...protocol.timeline import StepSpans
from ..masks import Masks
from ..slot_sampling import RowSettings
from .step_arrays import Arrays, sample_arrays
from .transfers import Fetched, Mark


@dataclass(frozen=True)
class Drawing:
    """The rows of a step that draw tokens: ``chosen`` [C] of all, ``numbers`` [C] of those that
    sample, the ``lives`` of their slots, and the settings that draw them. ``alone``: no row needs
    the host.
    """

    chosen: Int64
    slots: Int64
    positions: Int64
    numbers: Int64
    lives: Int64
    settings: RowSettings
    alone: bool
    masks: Masks | None

    def arrays(self) -> Arrays:
        return sample_arrays(self.slots, self.settings, self.positions)


@dataclass(frozen=True)
class UnderWay:
    """A step that the device has been given. ``fetched``: tokens; then chosen, ids and values of
    the most likely ones, if any row asks; then the tokens of expert slots, if the plan does; then
    the totals of ``DeviceWaits``. ``since``: monotonic seconds. ``waited`` and ``stalled`` of the
    host.
    """

    plan: StepPlan
    outline: StepResult
    drawing: Drawing
    fetched: Fetched
    began: Mark
    ended: Mark
    since: float
    handed_over: float
    waited: float
    stalled: float
    spans: StepSpans | None = None
