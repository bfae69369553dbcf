"""One place in the fleet: the replica that should be there and what has become of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from headrace.backends.base import Started
from headrace.fleet.gpu_quota_spec import Spot
from headrace.fleet.placement import Placement
from headrace.fleet.reconcile import Observed, failures_after, has_given_up
from headrace.fleet.replica_host import Hosted
from headrace.fleet.specs import ReplicaSpec
from headrace.fleet.start_phases import Phases, of_start
from headrace.fleet.status import ReplicaPulse, ReplicaStatus
from headrace.fleet.victims import Seen
from headrace_router.types import Replica, ReplicaState


@dataclass(slots=True)
class Slot:
    """Mutable; the controller's own."""

    spec: ReplicaSpec
    state: ReplicaState
    since_s: float
    failures: int = 0
    is_fatal: bool = False
    reason: str = ""
    was_ready: bool = False
    starts: int = 0
    placement: Placement | None = None
    spots: tuple[Spot, ...] = ()  # its GPUs, where tenants share them
    hosted: Hosted | None = None
    started: Started | None = None
    pulse: ReplicaPulse | None = None
    pulse_at_s: float = 0.0
    asked_s: float = 0.0  # when the start under way was asked for
    placed_s: float = 0.0  # when its actor was made
    phases_s: Phases = ()  # of the last start that came to its end
    life: asyncio.Task[None] | None = None
    waits_for: str = ""  # room that the cluster has not got, in words
    tried_s: float = 0.0  # when room was last looked for
    is_closing: bool = False  # it drains and takes no more requests
    is_other: bool = False  # it runs as something else than is wanted

    def enter(self, state: ReplicaState, now_s: float) -> None:
        if state is not self.state:
            self.state, self.since_s = state, now_s
        if state is not ReplicaState.PENDING:
            self.waits_for = ""

    def begin_as_another(self) -> None:
        """What follows runs as something else: what its predecessor did says nothing of it."""
        self.failures, self.starts = 0, 0
        self.is_fatal = self.was_ready = False
        self.reason = ""

    def become_ready(self, started: Started, now_s: float) -> None:
        self.started, self.was_ready = started, True
        if self.asked_s:  # not by a controller that is no more
            self.phases_s = of_start(self.asked_s, self.placed_s, now_s, started.phases_s)
        else:
            self.phases_s = started.phases_s
        self.enter(ReplicaState.READY, now_s)

    def wake_up(self, now_s: float) -> None:
        """It slept, and is as it was before."""
        self.phases_s = (("waking", now_s - self.since_s),)
        self.enter(ReplicaState.READY, now_s)

    def fail(self, reason: str, is_fatal: bool, now_s: float) -> None:
        """The replica is gone."""
        self.failures = failures_after(self.observed, now_s)
        self.reason, self.is_fatal = reason, is_fatal
        self.started = self.pulse = self.placement = None
        self.enter(ReplicaState.FAILED, now_s)

    @property
    def node_ids(self) -> set[str]:
        """Ray's ids of the nodes that it is known to use."""
        chosen = set() if self.placement is None else {self.placement.node_id}
        return chosen | {spot.node_id for spot in self.spots}

    @property
    def observed(self) -> Observed:
        return Observed(
            self.spec.id,
            self.state,
            self.tried_s if self.waits_for else self.since_s,
            self.failures,
            self.is_fatal,
            self.was_ready,
            waits_for_room=bool(self.waits_for),
            can_be_recalled=self.can_be_recalled,
            is_other=self.is_other,
        )

    @property
    def can_be_recalled(self) -> bool:
        """It drains, and would still take requests."""
        return self.state is ReplicaState.DRAINING and self.started is not None and not self.is_closing

    @property
    def seen(self) -> Seen:
        """As whoever chooses among replicas sees it."""
        pulse = self.pulse
        return Seen(
            self.state,
            self.spec,
            running=pulse.running if pulse else None,
            waiting=pulse.waiting if pulse else None,
            backlog_tokens=pulse.backlog_tokens if pulse else None,
            since_s=self.since_s,
            can_be_recalled=self.can_be_recalled,
        )

    @property
    def replica(self) -> Replica | None:
        """As the gateways see it, None where there is nothing to see."""
        started = self.started
        if started is None or self.state not in (ReplicaState.READY, ReplicaState.DRAINING):
            return None
        return Replica(
            id=self.spec.id,
            boot_id=started.boot_id,
            model=self.spec.model,
            role=self.spec.role,
            endpoints=started.endpoints,
            state=self.state,
            block_size=started.block_size,
            num_blocks=started.num_blocks,
            max_model_len=started.max_model_len,
            max_running=started.max_running,
            node=self.pulse.node if self.pulse else "",
            kv_connector=started.kv_connector,
        )

    def row(self, now_s: float) -> ReplicaStatus:
        pulse = self.pulse
        return ReplicaStatus(
            id=self.spec.id,
            model=self.spec.model,
            role=self.spec.role,
            state=self.state,
            state_s=now_s - self.since_s,
            phase=pulse.phase if pulse else "",
            start_s=pulse.start_s if pulse else 0.0,
            running=pulse.running if pulse else None,
            waiting=pulse.waiting if pulse else None,
            kv_use=pulse.kv_use if pulse else None,
            backlog_tokens=pulse.backlog_tokens if pulse else None,
            node=pulse.node if pulse else "",
            pid=pulse.pid if pulse else None,
            url=self.started.endpoints.url if self.started else "",
            boot_id=self.started.boot_id if self.started else "",
            restarts=max(0, self.starts - 1),
            failures=self.failures,
            is_fatal=self.is_fatal and self.state is ReplicaState.FAILED,
            has_given_up=has_given_up(self.observed),
            reason="" if self.state is ReplicaState.READY else self.waits_for or self.reason,
            last_failure=self.reason,
            phases_s=self.phases_s,
        )
