"""The body of /admin/timeline."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from ...protocol.timeline import MOST_SECONDS, MOST_STEPS


class TimelineRequest(BaseModel):
    """The next ``steps`` steps, as far as they are planned within ``seconds``. A misspelt field is
    an error.
    """

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(default=64, ge=1, le=MOST_STEPS)
    seconds: float = Field(default=10.0, gt=0, le=MOST_SECONDS)
