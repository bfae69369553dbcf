"""The words of scaling: what is observed of a pool, what is asked of it, what was decided. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PoolSample:
    """One pool at one moment. None: nobody could tell."""

    at_s: float
    ready: int
    starting: int = 0
    held: int | None = None  # requests that wait in the gateways
    waiting: int | None = None  # requests that wait in the engines
    running: int | None = None
    kv_use: float | None = None  # mean over ready replicas, 0..1
    backlog_s: float | None = (
        None  # of one replica, on average: predicted seconds until what waits is prefilled
    )
    arrived: int | None = None  # counter of requests, held ones included
    arrived_work_s: float | None = None
    """Counter: replica-seconds of work that these brought, by the learned pace and the usual length of an answer."""
    utilisation: float | None = None  # of GPU or CPU, mean over ready replicas, 0..1
    cold_start_s: float | None = (
        None  # from asking for a replica to its first request, learned; None: never seen
    )


@dataclass(frozen=True, slots=True)
class ScheduleHint:
    """At least so many replicas between two moments of the day, on the clock that `now_s` counts. Recurs daily."""

    from_s: float  # of the day
    until_s: float
    min_replicas: int

    def applies(self, now_s: float, ahead_s: float) -> bool:
        """Whether the replicas must be there now, or as soon as a start takes."""
        moments = (now_s % 86_400, (now_s + ahead_s) % 86_400)
        if self.from_s <= self.until_s:
            return any(self.from_s <= moment < self.until_s for moment in moments)
        return any(moment >= self.from_s or moment < self.until_s for moment in moments)


@dataclass(frozen=True, slots=True)
class ScalingSpec:
    """What is asked of one pool. The defaults are meant to be kept."""

    min_replicas: int = 1
    max_replicas: int = 8
    target_waiting: float = 4.0  # requests that may wait for each replica, gateway and engine together
    target_kv: float = 0.8
    target_wait_s: float = 1.0  # predicted wait that is still good
    headroom: float = 1.0
    """Replicas kept beyond the work that comes, in square roots of it: 1 keeps 6 for the work of 4, 42 for 36."""
    tolerance: float = 0.1  # relative change that is not worth a step
    stabilisation_s: float = 120.0  # scale-down follows the highest need of so long
    max_step_up: int = 1000  # replicas per decision
    max_step_down: int = 4
    idle_s: float = 300.0  # without work before the last replica goes; only where min_replicas is 0
    stale_s: float = 15.0  # age at which a sample says nothing of now
    busy_utilisation: float = 0.9  # above it, utilisation vetoes a scale-down that leaves too little
    cold_start_s: float = 60.0  # believed until one was seen
    schedule: tuple[ScheduleHint, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(
                f"replicas must be 0 <= min <= max and max >= 1, got {self.min_replicas} and {self.max_replicas}"
            )
        if min(self.target_waiting, self.target_kv, self.target_wait_s) <= 0:
            raise ValueError("target_waiting, target_kv and target_wait_s must be above 0")
        if min(self.max_step_up, self.max_step_down) < 1:
            raise ValueError("steps must be at least 1 replica")
        if min(self.headroom, self.tolerance, self.stabilisation_s, self.idle_s, self.cold_start_s) < 0:
            raise ValueError(
                "headroom, tolerance, stabilisation_s, idle_s and cold_start_s must not be negative"
            )


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """How many replicas there should be, and why, for people: `headrace scale --why` shows exactly this."""

    target: int
    current: int  # ready and starting
    reason: str
    needs: Mapping[str, float] = field(default_factory=dict)  # replicas that each input asks for
    doubts: tuple[str, ...] = ()  # why the metrics were not believed; empty where they were
