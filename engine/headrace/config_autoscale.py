"""The configuration of autoscaling: how the number of a pool's replicas follows its load."""

from __future__ import annotations

import zoneinfo
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from headrace.config_tree import Lenient, Tree


def _minutes(text: object) -> object:
    """YAML reads an unquoted 18:00 as 18 times 60 and 0, which is just the minutes."""
    if isinstance(text, int) and not isinstance(text, bool) and 0 <= text <= 24 * 60:
        return f"{text // 60:02d}:{text % 60:02d}"
    return text


DayTime = Annotated[
    str,
    BeforeValidator(_minutes),
    Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$|^24:00$", description='A time of the day: "08:00".'),
]


def _of_zone(name: str) -> str:
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise PydanticCustomError("time_zone", "not a time zone") from None
    return name


class Hint(Tree):
    """At least so many replicas between two times of every day, started early enough to be there."""

    from_: DayTime = Field(alias="from")
    until: DayTime
    min_replicas: int = Field(ge=1, le=4096)


class Autoscale(Tree):
    """How many replicas a pool has follows its load, between two bounds. The defaults are meant to be kept."""

    min_replicas: int = Field(1, ge=0, le=4096, description="0: without work for idle_s none is left.")
    max_replicas: int = Field(ge=1, le=4096)
    target_waiting: float = Field(
        4.0, gt=0, le=1e6, description="Requests that may wait for each replica, gateway and engine together."
    )
    target_kv: float = Field(0.8, gt=0, le=1, description="Share of KV blocks in use.")
    target_wait_s: float = Field(
        1.0, gt=0, le=3600, description="Predicted wait before a prefill that is still good."
    )
    headroom: float = Field(
        1.0, ge=0, le=10, description="Replicas kept beyond the work that comes, in square roots of it."
    )
    tolerance: float = Field(0.1, ge=0, le=1, description="Relative change that is not worth a step.")
    stabilisation_s: float = Field(
        120.0,
        ge=0,
        le=86400,
        description="Scale-down follows the highest need of so long, or of a cold start.",
    )
    max_step_up: int = Field(1000, ge=1, le=4096, description="Most replicas asked for at once.")
    max_step_down: int = Field(4, ge=1, le=4096, description="Most replicas given back at once.")
    idle_s: float = Field(
        300.0,
        ge=1,
        le=7 * 86400,
        description="Without work before the last replica goes, with min_replicas 0.",
    )
    warm: int = Field(
        0,
        ge=0,
        le=4096,
        description="Replicas that sleep instead of leaving, and are woken before any is started. CUDA only.",
    )
    sleep_level: Literal[1, 2] = Field(
        1,
        description="Of vLLM's sleep mode. 1 keeps the weights in host memory, 2 reads them from disk again.",
    )
    schedule: Annotated[tuple[Hint, ...], Lenient] = ()
    time_zone: Annotated[str, AfterValidator(_of_zone)] = Field(
        "UTC", description="Of the schedule: `Europe/Berlin`."
    )
    dry_run: bool = Field(False, description="Decide and say so, change nothing.")
