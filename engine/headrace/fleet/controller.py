"""The controller: brings the fleet to what it should be and keeps it there.

A named, detached Ray actor on the head node. Decisions are pure and elsewhere; here is what happens of them.

    config, targets, pins ──> FleetPlan.settled ──> desired replicas        fleet_plan, victims
    desired, observed ── reconcile ──> Start | Stop | Recall | ... ──> lives
    every change of the members ── version + 1 ──> long polls of the gateways return

A controller that Ray restarts knows nothing but its arguments: it finds its replicas by name and asks each what it
is, and the rest (targets, pins, who is a member) is in its memory. No gateway is told anything before that, so that
what runs goes on. Gateways see a new epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import ray

from headrace.config import Config
from headrace.errors import BadRequest, FatalStartError
from headrace.fleet import scaling_log
from headrace.fleet.changes import FleetChanges, num_replaced
from headrace.fleet.config_diff import ConfigDiff
from headrace.fleet.external import ExternalMembers
from headrace.fleet.fleet_plan import FleetPlan, coming, initial_plan, remembered, restored
from headrace.fleet.front import settings_of
from headrace.fleet.gateway_actor import GatewayOrder
from headrace.fleet.gpu_book import GpuBook
from headrace.fleet.gpu_nodes import gpu_nodes
from headrace.fleet.gpu_share import QuotaRules
from headrace.fleet.lives import ReplicaLives
from headrace.fleet.lost_nodes import LostNodes
from headrace.fleet.membership_board import MembershipBoard
from headrace.fleet.memory import ClusterMemory
from headrace.fleet.node_gateways import NodeGateways, wanted
from headrace.fleet.owner import Owner, until_gone
from headrace.fleet.placement import Placement
from headrace.fleet.pools import PoolKey, named
from headrace.fleet.quota_status import QuotaStatus
from headrace.fleet.reconcile import (
    Action,
    Forget,
    Kill,
    Observed,
    Recall,
    Sleep,
    Start,
    Stop,
    Wake,
    reconcile,
)
from headrace.fleet.replica import ReplicaOrder
from headrace.fleet.replica_host import NAMESPACE, ReplicaHost, controller_name
from headrace.fleet.rollout import Fleet, Pace, Present, Rollout
from headrace.fleet.room import NodeRequest
from headrace.fleet.scaler import pool_status
from headrace.fleet.scaling_log import ScalingLog
from headrace.fleet.scaling_loop import ScalingLoop
from headrace.fleet.slot import Slot
from headrace.fleet.specs import ReplicaSpec, number_of
from headrace.fleet.status import FleetStatus, PoolStatus, RolloutStatus
from headrace.fleet.victims import Seen
from headrace.gateway.settings import GatewaySettings
from headrace_router.demand import Demand
from headrace_router.types import Membership, ReplicaId, ReplicaState

log = logging.getLogger(__name__)

_TICK_S = 0.25
_LOOK_S = 1.0
_LONGEST_POLL_S = 30.0
_HEARD_S = 2.0
"""How long a drain waits for gateways to say that they know. One that is cut off is refused then, and asks another."""
_MOST_REPLICAS = 4096
_HEAD_RESOURCE = "node:__internal_head__"
"""That Ray gives its head node, and that Ray Serve places its controller by."""


class Controller:
    """One fleet. Async: every method runs on the actor's loop."""

    def __init__(
        self, config: Config, internal_token: str, host: str | None, owner: Owner | None = None
    ) -> None:
        """`internal_token` is an argument, not drawn here, so that Ray's restart of this actor keeps it.

        `host`: address that replicas listen on, None for each node's own. `owner`: whose end is the fleet's; None where
        somebody else sees to that and to gateways.
        """
        self._owner = owner
        self._gateways = NodeGateways(
            config.fleet.name, self._gateway_order, lambda: ray.get_runtime_context().current_actor
        )
        self._gateways_looked_s = float("-inf")
        self._watching_owner: asyncio.Task[None] | None = None
        self._changes = FleetChanges(config)
        self._reconfigured = asyncio.Event()  # set, and replaced, with each configuration
        self._token = internal_token
        self._host = host
        self._lives = ReplicaLives(
            ReplicaHost(config.fleet.name), self._order, self._changed, self._heard, self._started
        )
        self._plan = FleetPlan({})
        self._memory = ClusterMemory(config.fleet.name, internal_token)
        self._saved: dict[str, Any] | None = None
        self._saving = asyncio.Lock()
        self._gpus = GpuBook(QuotaRules.of(config))
        self._looked_s = float("-inf")
        self._feeling: asyncio.Future[None] | None = None
        self._runnable: dict[ReplicaId, ReplicaSpec] = {}  # what of the plan may run now
        self._scaling = ScalingLoop(
            self._lives,
            ScalingLog(scaling_log.path_of(config.fleet.name)),
            lambda: self._plan,
            self._take,
            lambda replica_id: replica_id in self._gpus.hopeless,
        )
        self._nodes = NodeRequest()
        self._lost_nodes = LostNodes(
            lambda: self._config.fleet.node_timeout_s, self._lives.places, self._lives.lose_node
        )
        self._watching_nodes: asyncio.Task[None] | None = None
        self._external = ExternalMembers(config, self._publish)
        self._board = MembershipBoard(model.name for model in config.models)
        self._supervising: asyncio.Task[None] | None = None
        self._watching_load: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._is_surveyed = asyncio.Event()

    async def begin(self) -> None:
        """Start to work; every other method does it too. Idempotent."""
        if self._supervising is None:
            self._supervising = asyncio.ensure_future(self._supervise())

    async def watch(self, epoch: str, version: int, timeout_s: float, reader: str = "") -> Membership:
        """The membership, as soon as it is not the known one; after `timeout_s` in any case. A `reader` names itself
        to be waited for when a replica is to drain."""
        await self.begin()
        await self._is_surveyed.wait()
        return await self._board.watch(epoch, version, min(timeout_s, _LONGEST_POLL_S), reader)

    async def demand(self, demand: Demand) -> None:
        """A gateway's report of the work that comes."""
        await self.begin()
        self._scaling.tell(demand)

    async def status(self) -> FleetStatus:
        """Every replica, with pulses taken now; a replica too busy to answer shows its last one."""
        await self.begin()
        await self._lives.take_pulses()
        now_s = time.monotonic()
        own = [slot.row(now_s) for slot in self._lives.slots.values()]
        rows = sorted(self._gpus.told(own, now_s), key=lambda row: row.id) + self._external.rows()
        membership = self._board.current
        return FleetStatus(
            self._config.fleet.name,
            membership.epoch,
            membership.version,
            tuple(rows),
            self._pool_rows(),
            self._is_surveyed.is_set(),
            () if (shared := self._gpus.status(self._config.fleet.name, now_s)) is None else shared.tenants,
            self._rollout_status(),
            self._config.fleet.drain_timeout_s,
            self._gateways.rows(),
        )

    async def settings(self, version: int, timeout_s: float) -> GatewaySettings:
        """What gateways go by, as soon as it is not the known version; after `timeout_s` in any case."""
        await self.begin()
        await self._is_surveyed.wait()
        if version == self._changes.revision:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(timeout_s, _LONGEST_POLL_S)):
                    await self._reconfigured.wait()
        return replace(settings_of(self._config), version=self._changes.revision)

    def _answer_polls(self) -> None:
        """Those who wait for other settings get the present ones."""
        self._reconfigured.set()
        self._reconfigured = asyncio.Event()

    async def difference(self, config: Config) -> ConfigDiff:
        """What applying this configuration would need. Raises what `apply` raises."""
        await self.begin()
        await self._is_surveyed.wait()
        return self._changes.difference(config)

    async def apply(self, config: Config, id: str, pace: Pace) -> Rollout | None:
        """Go over to another configuration, by the least that the difference needs. The rollout goes on by itself;
        `status` tells how far it is. None where there is nothing to do and there never was a rollout.

        Raises ConfigError for what cannot change while the fleet runs, FatalStartError where devices are too few.
        """
        await self.begin()
        await self._is_surveyed.wait()
        old = self._config
        self._take(self._changes.apply(self._plan, config, id, pace))
        if self._config != old:
            self._answer_polls()
            self._external.go_by(self._config)
            self._gpus.go_by(QuotaRules.of(self._config))
        await self._save()
        return self._changes.rollout

    async def restart(self, name: str | None, is_rolling: bool, id: str, pace: Pace) -> Rollout:
        """Replace one replica, or, rolling, those of a pool or all, one after another. Likewise. Raises NotFound."""
        await self.begin()
        await self._is_surveyed.wait()
        self._take(self._changes.restart(self._plan, name, is_rolling, id, pace))
        await self._save()
        assert self._changes.rollout is not None
        return self._changes.rollout

    async def quota(self) -> QuotaStatus | None:
        """Who has the GPUs that tenants share, None where nobody shares."""
        await self.begin()
        await self._is_surveyed.wait()
        return self._gpus.status(self._config.fleet.name, time.monotonic())

    async def scale(self, pool: str, count: int | None) -> PoolStatus:
        """Give a pool `count` replicas, whatever its load; None leaves that to its configuration again.

        Raises NotFound for a pool that there is not, BadRequest for a number that cannot be.
        """
        await self.begin()
        await self._is_surveyed.wait()
        if count is not None and not 0 <= count <= _MOST_REPLICAS:
            raise BadRequest(f"the number of replicas is {count}; it must be 0 to {_MOST_REPLICAS}")
        key = named(pool, self._plan.pools)
        before = self._plan.pools[key]
        self._take(self._plan.having(before.pinned(count)))
        self._scaling.pinned(self._plan.pools[key], before.pin)
        await self._save()
        return next(row for row in self._pool_rows() if (row.model, row.role) == key)

    async def decisions(self, pool: str | None, last: int) -> dict[str, Any]:
        """Why the pools have the targets that they have: {"latest": of each autoscaled pool, "changes": the last
        decisions that changed something, newest last}. Raises NotFound for a pool that there is not."""
        await self.begin()
        await self._is_surveyed.wait()
        key = None if pool is None else named(pool, self._plan.pools)
        latest = [one.as_data() for name, one in self._scaling.scaler.latest.items() if key in (None, name)]
        changes = self._scaling.decisions.latest(None if key is None else str(key), last)
        return {"latest": latest, "changes": changes, "log": str(self._scaling.decisions.path)}

    async def process_id(self) -> int:
        """Of this actor's process, for people who look into it."""
        return os.getpid()

    async def shutdown(self, drain_s: float) -> None:
        """End every replica, letting what runs finish for at most `drain_s`. The actor itself stays."""
        for task in (self._supervising, self._watching_load, self._watching_nodes, self._feeling):
            if task is not None:
                task.cancel()
        self._answer_polls()  # Ray complains to the user of each that its actor's end cuts
        self._external.stop()
        deadline_s = time.monotonic() + drain_s
        await self._gateways.end_all(drain_s)
        await self._lives.end_all(max(0.0, deadline_s - time.monotonic()))
        await self._nodes.follow((), ())
        with contextlib.suppress(
            Exception
        ):  # the fleet is gone; what is left of it in the cluster harms nobody
            await self._memory.clear()

    async def _supervise(self) -> None:
        await self._take_over()
        while True:
            try:
                await self._look()
                await self._follow_gateways()
                self._round()
                await self._save()
                short = self._gpus.short
                waiting = [slot for slot in self._lives.slots.values() if slot.waits_for]
                await self._nodes.follow([*self._runnable.values(), *short], [*waiting, *short])
            except Exception:  # supervision boundary: one failed round must not end supervision
                log.exception("a round of supervision failed")
            self._is_surveyed.set()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._wake.wait()

    async def _take_over(self) -> None:
        """From whoever was before: the replicas that run, the targets and pins."""
        await self._lives.survey()
        resources: dict[str, float] = await asyncio.to_thread(ray.cluster_resources)
        num_cores = sum(len(node.cores) for node in self._lives.nodes)
        self._changes.on(num_cores, int(resources.get("GPU", 0)))
        saved: dict[str, Any] = {}
        try:
            saved = await self._memory.load() or {}
            if saved:
                self._changes.restore(saved["changes"])
        except Exception:  # supervision boundary: a fleet that forgot its targets is better than none
            log.exception("what was remembered of the fleet cannot be read; it begins anew")
        self._saved = saved
        plan = initial_plan(self._config, num_cores, self._changes.num_gpus)
        await self._lives.adopt_all()
        self._gpus.go_by(QuotaRules.of(self._config))
        self._gpus.adopt(self._lives.slots, time.monotonic())
        found = {replica_id: slot.spec for replica_id, slot in self._lives.slots.items()}
        self._plan = restored(plan, saved.get("pools", ()), found)
        self._scaling.scaler.recall(saved.get("starts_s", {}), self._plan.pools)
        self._watching_load = asyncio.ensure_future(self._scaling.run())
        self._watching_nodes = asyncio.ensure_future(self._lost_nodes.run())
        if self._owner is not None:
            await self._gateways.adopt(await self._gateway_nodes(self._owner))
            if self._owner.job_id is not None:
                self._watching_owner = asyncio.ensure_future(self._end_with(self._owner.job_id))
        self._external.start()
        self._external.go_by(self._config)

    async def _look(self) -> None:
        """At what sharing GPUs depends on: which nodes have some, which replicas are idle."""
        rules, now_s = self._gpus.rules, time.monotonic()
        if rules is None or now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        if not rules.simulated_nodes:
            try:
                self._gpus.nodes = gpu_nodes(await asyncio.to_thread(ray.nodes))
            except Exception:  # supervision boundary: the nodes of a moment ago will do
                log.exception("Ray does not list its nodes")
        if self._feeling is None or self._feeling.done():
            # Not waited for: one that is slow to answer must not hold up the others.
            self._feeling = asyncio.ensure_future(self._lives.take_pulses(lambda slot: bool(slot.spots)))

    async def _follow_gateways(self) -> None:
        """Have a gateway on each node that the configuration means, also on one that has just joined."""
        owner, now_s = self._owner, time.monotonic()
        if owner is None or now_s - self._gateways_looked_s < _LOOK_S:
            return
        self._gateways_looked_s = now_s
        self._gateways.follow(await self._gateway_nodes(owner), self._config.fleet.drain_timeout_s)

    async def _gateway_nodes(self, owner: Owner) -> dict[str, str]:
        nodes = self._config.gateway.nodes
        return {} if nodes == "here" else wanted(nodes, await asyncio.to_thread(ray.nodes), owner.node_id)

    def _gateway_order(self, address: str) -> GatewayOrder:
        config, owner = self._config, self._owner
        assert owner is not None
        fixed = {name: getattr(owner.gateway, name) for name in ("host", "port", "processes")}
        return GatewayOrder(
            settings_of(config, config.gateway.model_copy(update=fixed)), self._token, address
        )

    async def _end_with(self, job_id: str) -> None:
        """End the fleet once its owner has gone without doing so."""
        await until_gone(job_id)
        log.warning("the process that this fleet belongs to has ended; ending the fleet")
        await self.shutdown(self._config.fleet.drain_timeout_s)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    def _round(self) -> None:
        slots = self._lives.slots
        self._plan = self._changes.advance(self._plan, _present(slots, self._gpus.waiting), time.monotonic())
        self._plan = self._plan.settled((number_of(id), slot.seen) for id, slot in slots.items())
        wanted = self._plan.desired()
        for replica_id, slot in slots.items():
            slot.is_other = replica_id in wanted and wanted[replica_id] != slot.spec
        asleep = self._plan.asleep()
        allowed = self._gpus.round({**wanted, **asleep}, slots, time.monotonic())
        desired = self._runnable = {name: spec for name, spec in allowed.items() if name in wanted}
        for replica_id in self._gpus.lost:
            if replica_id in slots and slots[replica_id].state is not ReplicaState.FAILED:
                self._lives.kill(replica_id, "the node of its GPUs is gone")
        fleet = self._config.fleet
        for action in reconcile(
            desired,
            {replica_id: slot.observed for replica_id, slot in slots.items()},
            time.monotonic(),
            start_timeout_s=fleet.start_timeout_s,
            max_backoff_s=fleet.max_restart_backoff_s,
            asleep=allowed.keys() & asleep.keys(),
        ):
            self._do(action, desired)
        self._publish()

    def _do(self, action: Action, desired: dict[ReplicaId, ReplicaSpec]) -> None:
        match action:
            case Start(replica_id):
                self._lives.start(desired[replica_id])
            case Kill(replica_id, reason):
                self._lives.kill(replica_id, reason)
            case Stop(replica_id):
                self._lives.drain(replica_id, self._config.fleet.drain_timeout_s)
            case Sleep(replica_id):
                self._lives.sleep(replica_id, self._config.fleet.drain_timeout_s)
            case Wake(replica_id):
                self._lives.wake(replica_id)
            case Recall(replica_id):
                self._lives.recall(replica_id)
            case Forget(replica_id):
                self._lives.forget(replica_id)

    def _take(self, plan: FleetPlan) -> None:
        """Go by this plan from now on."""
        if plan != self._plan:
            self._plan = plan
            self._wake.set()

    async def _save(self) -> None:
        async with self._saving:
            value = {
                "pools": remembered(self._plan),
                "changes": self._changes.remembered(),
                "starts_s": self._scaling.scaler.remembered(),
            }
            if value != self._saved:
                await self._memory.save(value)
                self._saved = value

    def _order(self, spec: ReplicaSpec, placed: Placement | None) -> ReplicaOrder:
        return ReplicaOrder(
            spec, self._token, spec.report_interval_s, placed, self._host, self._gpus.spots(spec.id)
        )

    @property
    def _config(self) -> Config:
        """As it is now."""
        return self._changes.config

    def _rollout_status(self) -> RolloutStatus | None:
        rollout = self._changes.rollout
        if rollout is None:
            return None
        slots = self._lives.slots
        ready = {replica_id for replica_id, slot in slots.items() if slot.state is ReplicaState.READY}
        replaced = num_replaced(rollout, self._plan, ready)
        return RolloutStatus(
            rollout.id, rollout.what, rollout.state.value, replaced, rollout.total, rollout.reason
        )

    def _changed(self) -> None:
        self._publish()
        self._wake.set()

    async def _heard(self) -> bool:
        return await self._board.heard(self._board.current.version, _HEARD_S)

    def _started(self, spec: ReplicaSpec, took_s: float) -> None:
        self._scaling.scaler.started(PoolKey(spec.model, spec.role), took_s)

    def _publish(self) -> None:
        observed = {replica_id: slot.observed for replica_id, slot in self._lives.slots.items()}
        self._board.publish(
            (*self._lives.replicas(), *self._external.replicas()),
            coming(self._plan, observed, self._gpus.hopeless),
            [model.name for model in self._config.models],
        )

    def _pool_rows(self) -> tuple[PoolStatus, ...]:
        ready = Counter(
            PoolKey(slot.spec.model, slot.spec.role)
            for slot in self._lives.slots.values()
            if slot.state is ReplicaState.READY
        )
        scaler = self._scaling.scaler
        return tuple(
            pool_status(pool, ready[key], scaler.latest.get(key), scaler.cold_start_s(key))
            for key, pool in self._plan.pools.items()
        )


def _present(slots: Mapping[ReplicaId, Slot], waiting: Iterable[tuple[ReplicaSpec, float]]) -> Fleet:
    """What there is, as a rollout sees it: those that wait for GPUs are there and have no room."""
    fleet: dict[PoolKey, dict[int, Present]] = {}
    for spec, since_s in waiting:
        observed = Observed(spec.id, ReplicaState.PENDING, since_s, waits_for_room=True)
        fleet.setdefault(PoolKey(spec.model, spec.role), {})[number_of(spec.id)] = Present(
            observed, Seen(ReplicaState.PENDING, spec), since_s
        )
    for replica_id, slot in slots.items():
        key = PoolKey(slot.spec.model, slot.spec.role)
        fleet.setdefault(key, {})[number_of(replica_id)] = Present(
            slot.observed, slot.seen, slot.since_s, slot.reason
        )
    return fleet


def create(config: Config, internal_token: str, host: str | None, owner: Owner | None = None) -> Any:
    """Start the controller actor of a fleet on the connected cluster and return its handle. The arguments are the
    actor's.

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
        # On the head. Elsewhere a cut between the two would have Ray start a second one before the first has ended.
        "resources": {_HEAD_RESOURCE: 0.001},
    }
    try:
        return ray.remote(Controller).options(**options).remote(config, internal_token, host, owner)
    except ValueError as error:  # the name is taken
        raise FatalStartError(
            f"fleet {config.fleet.name!r} runs on this cluster already; see `headrace status`, or set another "
            "fleet.name"
        ) from error
