"""The body of /admin/drain."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

DRAIN_SECONDS = 600.0
MAX_DRAIN_SECONDS = 86400


class DrainRequest(BaseModel):
    """``deadline`` in seconds. A misspelt field is an error."""

    model_config = ConfigDict(extra="forbid")

    deadline: float = Field(
        default=DRAIN_SECONDS, json_schema_extra={"minimum": 0, "maximum": MAX_DRAIN_SECONDS}
    )
