"""How the fleet is, for people and for `headrace status --json`. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace.fleet.quota_status import TenantRow
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
    utilisation: float | None = None  # of its GPUs, or of its cores, 0..1


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
    phases_s: tuple[tuple[str, float], ...] = ()  # of its last start, or of its waking
    waits_for_gpus: bool = False  # that tenants share; `reason` says why it has none

    @property
    def is_ready(self) -> bool:
        return self.state is ReplicaState.READY


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """One pool: how many replicas it should have."""

    pool: str  # `model`, or `model/role`
    model: str
    role: Role
    ready: int
    target: int  # what the configuration or the autoscaler asks for
    pin: int | None = None  # what a person asks for instead
    least: int | None = None  # of an autoscaled pool
    most: int | None = None
    is_dry_run: bool = False
    reason: str = ""  # of the target
    needs: Mapping[str, float] = field(default_factory=dict)  # replicas that each input asks for
    doubts: tuple[str, ...] = ()  # why the metrics were not believed
    cold_start_s: float | None = None  # of the last starts the median

    @property
    def wanted(self) -> int:
        return self.target if self.pin is None else self.pin


@dataclass(frozen=True, slots=True)
class GatewayStatus:
    """The gateway on one node; that of `headrace serve` is not among them."""

    address: str  # of the node
    state: str  # starting, serving, failed
    state_s: float  # seconds in that state
    url: str = ""
    failures: int = 0  # in a row
    is_fatal: bool = False  # it failed in a way that will happen again
    reason: str = ""  # why it does not serve

    @property
    def is_serving(self) -> bool:
        return self.state == "serving"


@dataclass(frozen=True, slots=True)
class RolloutStatus:
    """How far the last change to the fleet has come."""

    id: str
    what: str  # "apply", "restart of smollm2"
    state: str  # rolling, done, stopped
    replaced: int
    total: int  # replicas that were to be replaced
    reason: str = ""  # why it stopped


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """The whole fleet at one moment."""

    fleet: str
    epoch: str
    version: int  # of the membership
    replicas: tuple[ReplicaStatus, ...]
    pools: tuple[PoolStatus, ...] = ()
    is_surveyed: bool = True  # False in the first moments, when the controller does not know its cluster yet
    gpus: tuple[TenantRow, ...] = ()  # of tenants that share some
    rollout: RolloutStatus | None = None  # the last one
    drain_timeout_s: float = 30.0  # as configured now
    gateways: tuple[GatewayStatus, ...] = ()  # on nodes of the cluster

    @property
    def num_ready(self) -> int:
        return sum(replica.is_ready for replica in self.replicas)
