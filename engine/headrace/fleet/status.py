"""How the fleet is, for people and for `headrace status --json`. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from headrace_router.types import ReplicaId, ReplicaState, Role


@dataclass(frozen=True, slots=True)
class ReplicaPulse:
    """What a replica actor says of itself, at any time in its life."""

    pid: int
    node: str
    phase: str  # of the start; "ready" after it
    phase_s: float  # seconds in that phase
    start_s: float  # seconds from the start's beginning, to its end or to now
    running: int | None = None
    waiting: int | None = None
    kv_use: float | None = None  # 0..1
    backlog_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One row of the table."""

    id: ReplicaId
    model: str
    role: Role
    state: ReplicaState
    state_s: float  # seconds in that state; of a ready replica its uptime
    phase: str = ""
    start_s: float = 0.0
    running: int | None = None
    waiting: int | None = None
    kv_use: float | None = None
    backlog_tokens: int | None = None
    node: str = ""
    pid: int | None = None
    url: str = ""
    boot_id: str = ""
    restarts: int = 0  # starts after the first
    failures: int = 0  # in a row
    is_fatal: bool = False  # it failed in a way that will happen again
    has_given_up: bool = False
    reason: str = ""  # why it is not ready
    last_failure: str = ""  # stays when it is ready again
    is_external: bool = False  # somebody else's server, probed only

    @property
    def is_ready(self) -> bool:
        return self.state is ReplicaState.READY


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """The whole fleet at one moment."""

    fleet: str
    epoch: str
    version: int  # of the membership
    replicas: tuple[ReplicaStatus, ...]
    is_surveyed: bool = True  # False in the first moments, when the controller does not know its cluster yet

    @property
    def num_ready(self) -> int:
        return sum(replica.is_ready for replica in self.replicas)
