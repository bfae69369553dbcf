"""The controller: brings the fleet to what the configuration says and keeps it there.

A named, detached Ray actor. Decisions are `reconcile`'s; here is what happens of them.

    supervise ── reconcile(desired, observed, now) ──> Start | Kill | Stop
    one task per replica ── create, start, watch ──> ready ... failed(reason)
    every change of the members ── version + 1 ──> long polls of the gateways return

A controller that Ray restarts knows nothing but its arguments; it finds its replicas by name, and their `start`
answers at once with what they started as. Gateways see a new epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import Any

import ray

from headrace.backends.base import Started
from headrace.config import Config
from headrace.errors import FatalStartError, HeadraceError, StartError
from headrace.fleet import placement
from headrace.fleet.external import ExternalMembers
from headrace.fleet.membership_board import MembershipBoard
from headrace.fleet.reconcile import Action, Kill, Start, Stop, reconcile
from headrace.fleet.replica import ReplicaOrder
from headrace.fleet.replica_host import NAMESPACE, ReplicaHost, controller_name, survey
from headrace.fleet.slot import Slot
from headrace.fleet.specs import Device, ReplicaSpec, expand
from headrace.fleet.status import FleetStatus
from headrace_router.types import Membership, ReplicaId, ReplicaState

log = logging.getLogger(__name__)

_TICK_S = 0.25
_PULSE_TIMEOUT_S = 0.5
_LONGEST_POLL_S = 30.0
_END_TIMEOUT_S = 10.0


class Controller:
    """One fleet. Async: every method runs on the actor's loop."""

    def __init__(self, config: Config, internal_token: str, host: str | None) -> None:
        """`internal_token` is an argument, not drawn here, so that Ray's restart of this actor keeps it.

        `host`: address that replicas listen on, None for each node's own.
        """
        self._config = config
        self._token = internal_token
        self._host = host
        self._replica_host = ReplicaHost(config.fleet.name)
        self._slots: dict[ReplicaId, Slot] = {}
        self._desired: dict[ReplicaId, ReplicaSpec] = {}
        self._nodes: tuple[placement.Node, ...] = ()
        self._external = ExternalMembers(config, self._publish)
        self._board = MembershipBoard(model.name for model in config.models)
        self._supervising: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._is_surveyed = False

    async def begin(self) -> None:
        """Start to work; every other method does it too. Idempotent."""
        if self._supervising is None:
            self._supervising = asyncio.ensure_future(self._supervise())

    async def watch(self, epoch: str, version: int, timeout_s: float) -> Membership:
        """The membership, as soon as it is not the known one; after `timeout_s` in any case."""
        await self.begin()
        return await self._board.watch(epoch, version, min(timeout_s, _LONGEST_POLL_S))

    async def status(self) -> FleetStatus:
        """Every replica, with pulses taken now; a replica too busy to answer shows its last one."""
        await self.begin()
        await asyncio.gather(*(self._take_pulse(slot) for slot in self._slots.values()))
        now_s = time.monotonic()
        rows = [slot.row(now_s) for _, slot in sorted(self._slots.items())] + self._external.rows()
        membership = self._board.current
        return FleetStatus(
            self._config.fleet.name, membership.epoch, membership.version, tuple(rows), self._is_surveyed
        )

    async def process_id(self) -> int:
        """Of this actor's process, for people who look into it."""
        return os.getpid()

    async def shutdown(self, drain_s: float) -> None:
        """End every replica, letting what runs finish for at most `drain_s`. The actor itself stays."""
        if self._supervising is not None:
            self._supervising.cancel()
        self._external.stop()
        await asyncio.gather(*(self._stop(slot, drain_s) for slot in self._slots.values()))

    async def _supervise(self) -> None:
        await self._survey()
        self._external.start()
        found = await self._replica_host.find()
        for replica_id, hosted in found.items():
            spec = self._desired.get(replica_id)
            if spec is None:
                self._replica_host.end(hosted)
                continue
            slot = self._slots[replica_id] = Slot(
                spec, ReplicaState.STARTING, time.monotonic(), hosted=hosted
            )
            slot.life = asyncio.ensure_future(self._live(slot))
        while True:
            try:
                observed = {replica_id: slot.observed for replica_id, slot in self._slots.items()}
                fleet = self._config.fleet
                for action in reconcile(
                    self._desired,
                    observed,
                    time.monotonic(),
                    start_timeout_s=fleet.start_timeout_s,
                    max_backoff_s=fleet.max_restart_backoff_s,
                ):
                    self._do(action)
                self._is_surveyed = True
            except Exception:  # supervision boundary: one failed round must not end supervision
                log.exception("a round of supervision failed")
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _TICK_S)

    async def _survey(self) -> None:
        self._nodes = await survey()
        resources: dict[str, float] = await asyncio.to_thread(ray.cluster_resources)
        num_cores = sum(len(node.cores) for node in self._nodes)
        specs = expand(self._config, num_cores, int(resources.get("GPU", 0)))
        self._desired = {spec.id: spec for spec in specs}

    def _do(self, action: Action) -> None:
        now_s = time.monotonic()
        match action:
            case Start(replica_id):
                slot = self._slots.setdefault(
                    replica_id, Slot(self._desired[replica_id], ReplicaState.PENDING, now_s)
                )
                slot.enter(ReplicaState.PENDING, now_s)
                slot.life = asyncio.ensure_future(self._live(slot))
            case Kill(replica_id, reason):
                slot = self._slots[replica_id]
                if slot.life is not None:
                    slot.life.cancel()
                self._failed(slot, reason, is_fatal=False)
            case Stop(replica_id):
                slot = self._slots[replica_id]
                slot.enter(ReplicaState.DRAINING, now_s)
                self._publish()
                slot.life = asyncio.ensure_future(self._stop(slot, self._config.fleet.drain_timeout_s))

    async def _live(self, slot: Slot) -> None:
        """One replica's life, from placing to death."""
        try:
            await self._bring_up(slot)
            assert slot.hosted is not None
            outcome = await slot.hosted.actor.start.remote()
            if not isinstance(outcome, Started):
                self._failed(slot, outcome.reason, outcome.is_fatal)
                return
            await self._take_pulse(slot)
            slot.become_ready(outcome, time.monotonic())
            self._publish()
            reason = await slot.hosted.actor.watch.remote()
            self._failed(slot, reason, is_fatal=False)
        except HeadraceError as error:
            self._failed(slot, error.message, is_fatal=False)
        except ray.exceptions.RayActorError as error:
            self._failed(slot, _death(error), is_fatal=False)
        except Exception as error:  # supervision boundary: a replica's trouble is a reason, never ours
            log.exception("supervising %s failed", slot.spec.id)
            self._failed(slot, f"{type(error).__name__}: {error}".splitlines()[0][:300], is_fatal=False)

    async def _bring_up(self, slot: Slot) -> None:
        if slot.hosted is not None:
            return
        slot.starts += 1
        spec = slot.spec
        if spec.device is Device.CPU:
            if slot.failures:
                self._nodes = await survey()  # its node may be what failed
            slot.placement = await self._place(spec)
        order = ReplicaOrder(
            spec,
            self._token,
            self._config.fleet.report_interval_s,
            slot.placement.cores if slot.placement else (),
            self._host,
        )
        slot.hosted = await self._replica_host.create(order, slot.placement)

    async def _place(self, spec: ReplicaSpec) -> placement.Placement:
        taken = [slot.placement for slot in self._slots.values() if slot.placement is not None]
        try:
            return placement.place(spec, self._nodes, taken)
        except StartError:
            self._nodes = await survey()  # a node may have joined
            return placement.place(spec, self._nodes, taken)

    def _failed(self, slot: Slot, reason: str, is_fatal: bool) -> None:
        hosted, slot.hosted = slot.hosted, None
        if hosted is not None:
            self._replica_host.end(hosted)
        slot.fail(reason, is_fatal, time.monotonic())
        log.warning("%s failed: %s", slot.spec.id, reason)
        self._publish()
        self._wake.set()

    async def _stop(self, slot: Slot, drain_s: float) -> None:
        if slot.life is not None and slot.life is not asyncio.current_task():
            slot.life.cancel()
        hosted, slot.hosted = slot.hosted, None
        if hosted is not None:
            if drain_s > 0:
                await _within(hosted.actor.stop.remote(drain_s), drain_s + _END_TIMEOUT_S)
            self._replica_host.end(hosted)
        slot.placement = slot.started = slot.pulse = None
        slot.enter(ReplicaState.STOPPED, time.monotonic())
        self._publish()
        if slot.spec.id not in self._desired:
            self._slots.pop(slot.spec.id, None)

    async def _take_pulse(self, slot: Slot) -> None:
        if slot.hosted is None:
            return
        pulse = await _within(slot.hosted.actor.pulse.remote(), _PULSE_TIMEOUT_S)
        if pulse is not None and slot.hosted is not None:
            slot.pulse = pulse
            if slot.state is ReplicaState.PENDING:
                # Not `enter`: the start's clock runs from when it was asked for.
                slot.state = ReplicaState.STARTING

    def _publish(self) -> None:
        replicas = [
            replica for _, slot in sorted(self._slots.items()) if (replica := slot.replica) is not None
        ]
        self._board.publish((*replicas, *self._external.replicas()))


def create(config: Config, internal_token: str, host: str | None) -> Any:
    """Start the controller actor of a fleet on the connected cluster and return its handle.

    Raises FatalStartError when a fleet of that name runs there already.
    """
    options: dict[str, Any] = {
        "name": controller_name(config.fleet.name),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": -1,
        "max_task_retries": -1,  # a poll under way when it dies is asked again of its successor
        "max_concurrency": 1000,
        "num_cpus": 0,
    }
    try:
        return ray.remote(Controller).options(**options).remote(config, internal_token, host)
    except ValueError as error:  # the name is taken
        raise FatalStartError(
            f"fleet {config.fleet.name!r} runs on this cluster already; see `headrace status`, or set another "
            "fleet.name"
        ) from error


async def _within(reference: Any, timeout_s: float) -> Any:
    """What a call to a replica returns, None when it fails or takes too long."""
    try:
        return await asyncio.wait_for(reference, timeout_s)
    except (TimeoutError, ray.exceptions.RayError):
        return None


def _death(error: Exception) -> str:
    """Ray's report of a death in one line."""
    # Ray's memory monitor says so; a death of any other kind lists the kernel's OOM killer among possible causes.
    if "running low on memory" in str(error):
        return "its process was killed: the node ran out of memory"
    return "its process died"
