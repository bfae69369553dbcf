"""What every node of the configuration is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Tree(BaseModel):
    """A frozen node. Unknown keys are rejected, and so is `port: yes`: YAML's types must be the field's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Lenient = Field(strict=False)
"""For tuples and enums, which YAML writes as lists and strings."""
