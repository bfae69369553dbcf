"""The replicas of one fleet: placed, started, watched, drained, ended. What is to be done is decided elsewhere.

    start ── place, create, start ──> ready ── watch ──> failed(reason)
    sleep ── drained likewise, then asleep ── wake ──> ready, or failed where it is not what it was
    drain ── no new requests, every gateway knows ── nothing left to answer, or the deadline ──> stopped ──> room free
    adopt ── replicas that an earlier controller started ──> as they are

One task per replica carries its life; whoever ends or drains it takes the task over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray

from headrace.backends.base import Started
from headrace.errors import HeadraceError
from headrace.fleet import placement, room
from headrace.fleet.node_list import NodeList
from headrace.fleet.replica import ASLEEP_PHASE, READY_PHASE, ReplicaOrder
from headrace.fleet.replica_host import Hosted, ReplicaHost
from headrace.fleet.slot import Slot
from headrace.fleet.specs import Device, ReplicaSpec
from headrace_router.types import Replica, ReplicaId, ReplicaState

log = logging.getLogger(__name__)

_PULSE_TIMEOUT_S = 0.5
_ADOPT_TIMEOUT_S = 5.0
_END_TIMEOUT_S = 10.0
_SLEEP_TIMEOUT_S = 120.0
"""To copy a replica's weights to host memory."""
_NODES_AGE_S = 1.0
"""How old the list of nodes may be when a place is looked for."""

OrderOf = Callable[[ReplicaSpec, placement.Placement | None], ReplicaOrder]


class ReplicaLives:
    """Belongs to the controller's loop. Every replica that there is has a slot; who reads them does not change them."""

    def __init__(
        self,
        host: ReplicaHost,
        order: OrderOf,
        changed: Callable[[], None],
        heard: Callable[[], Awaitable[bool]],
        started: Callable[[ReplicaSpec, float], None],
    ) -> None:
        """`order` makes what a replica is told that is placed there. `changed` is called after each change of who is
        there and how; `heard` returns once every gateway knows the present members, or is late; `started` hears how
        long a start took, in seconds from asking for it."""
        self.slots: dict[ReplicaId, Slot] = {}
        self.nodes: tuple[placement.Node, ...] = ()
        self._host = host
        self._order = order
        self._changed = changed
        self._heard = heard
        self._started = started
        self._node_list = NodeList()
        self._surveyed_s = float("-inf")
        self._surveying = asyncio.Lock()

    def replicas(self) -> list[Replica]:
        """As gateways see them."""
        return [replica for _, slot in sorted(self.slots.items()) if (replica := slot.replica) is not None]

    async def survey(self) -> None:
        """Look at the nodes of the cluster, unless that was a moment ago."""
        async with self._surveying:
            if time.monotonic() - self._surveyed_s >= _NODES_AGE_S:
                self.nodes = await self._node_list.read()
                self._surveyed_s = time.monotonic()

    async def adopt_all(self) -> None:
        """Take on the replicas of this fleet that run, whoever started them, as far as they have come. Those that do
        not say what they are, are ended."""
        found = await self._host.find()
        await asyncio.gather(*(self._adopt(hosted) for hosted in found.values()))

    async def _adopt(self, hosted: Hosted) -> None:
        order: ReplicaOrder | None = await _within(hosted.actor.order.remote(), _ADOPT_TIMEOUT_S)
        if order is None:
            self._host.end(hosted)
            return
        slot = Slot(order.spec, ReplicaState.STARTING, time.monotonic(), hosted=hosted, starts=1)
        slot.placement, slot.spots = order.placement, order.spots
        self.slots[order.spec.id] = slot
        pulse = await _within(hosted.actor.pulse.remote(), _ADOPT_TIMEOUT_S)
        if pulse is not None and pulse.phase in (READY_PHASE, ASLEEP_PHASE):
            slot.pulse, slot.pulse_at_s = pulse, time.monotonic()
            outcome = await _within(hosted.actor.start.remote(), _ADOPT_TIMEOUT_S)
            if isinstance(outcome, Started):
                slot.become_ready(outcome, time.monotonic())
                if pulse.phase == ASLEEP_PHASE:
                    slot.enter(ReplicaState.SLEEPING, time.monotonic())
        slot.life = asyncio.ensure_future(self._live(slot))

    def start(self, spec: ReplicaSpec) -> None:
        """Begin, or begin again. No effect while a place is being waited for."""
        now_s = time.monotonic()
        slot = self.slots.get(spec.id)
        if slot is None:
            slot = self.slots[spec.id] = Slot(spec, ReplicaState.PENDING, now_s)
        elif slot.waits_for and slot.life is not None and not slot.life.done():
            slot.tried_s = now_s
            return
        if slot.spec != spec:
            slot.begin_as_another()
        slot.spec, slot.is_other, slot.is_closing = spec, False, False
        slot.tried_s = now_s
        if slot.state is not ReplicaState.PENDING or not slot.waits_for:
            slot.asked_s = now_s
        slot.enter(ReplicaState.PENDING, now_s)
        slot.life = asyncio.ensure_future(self._live(slot))

    def kill(self, replica_id: ReplicaId, reason: str) -> None:
        """End it at once and count that as a failure."""
        slot = self.slots[replica_id]
        if slot.life is not None:
            slot.life.cancel()
        self._failed(slot, reason, is_fatal=False)

    def places(self) -> list[tuple[str, int | None]]:
        """Node and process, where it is known, of each replica that there is."""
        return [
            (node_id, None if slot.pulse is None else slot.pulse.pid)
            for slot in self.slots.values()
            if slot.hosted is not None
            for node_id in slot.node_ids
        ]

    def lose_node(self, node_id: str) -> None:
        """It is not reached: what ran there has failed."""
        for replica_id, slot in list(self.slots.items()):
            if slot.hosted is not None and node_id in slot.node_ids:
                self.kill(replica_id, "its node is not reached")

    def drain(self, replica_id: ReplicaId, drain_s: float) -> None:
        """Let it finish for at most `drain_s`, then end it. One that serves nobody ends at once."""
        slot = self.slots[replica_id]
        if slot.life is not None:
            slot.life.cancel()
        slot.enter(ReplicaState.DRAINING, time.monotonic())
        self._changed()
        slot.life = asyncio.ensure_future(self._drain(slot, drain_s))

    def sleep(self, replica_id: ReplicaId, drain_s: float) -> None:
        """Let it finish for at most `drain_s`, then sleep. One that cannot ends instead."""
        slot = self.slots[replica_id]
        if slot.life is not None:
            slot.life.cancel()
        slot.enter(ReplicaState.DRAINING, time.monotonic())
        self._changed()
        slot.life = asyncio.ensure_future(self._fall_asleep(slot, drain_s))

    def wake(self, replica_id: ReplicaId) -> None:
        """Let it serve again. One that does not answer as it did before it slept fails, and is started anew."""
        slot = self.slots[replica_id]
        if slot.life is not None:
            slot.life.cancel()
        slot.enter(ReplicaState.STARTING, time.monotonic())
        slot.life = asyncio.ensure_future(self._live(slot, wakes=True))

    def recall(self, replica_id: ReplicaId) -> None:
        """Drain no longer. Only while `can_be_recalled`."""
        slot = self.slots[replica_id]
        assert slot.can_be_recalled and slot.hosted is not None and slot.life is not None
        slot.life.cancel()
        slot.hosted.actor.resume.remote()
        slot.enter(ReplicaState.READY, time.monotonic())
        self._changed()
        slot.life = asyncio.ensure_future(self._live(slot))

    def forget(self, replica_id: ReplicaId) -> None:
        """Of a replica that is no more."""
        self.slots.pop(replica_id, None)

    async def end_all(self, drain_s: float) -> None:
        """End every replica, letting what runs finish for at most `drain_s`."""
        slots = list(self.slots.values())
        for slot in slots:
            if slot.life is not None:
                slot.life.cancel()
            slot.enter(ReplicaState.DRAINING, time.monotonic())
        self._changed()
        await asyncio.gather(*(self._drain(slot, drain_s) for slot in slots))

    async def take_pulses(self, of: Callable[[Slot], bool] = lambda _: True) -> None:
        """Of these replicas; one too busy to answer keeps its last one."""
        await asyncio.gather(*(self._take_pulse(slot) for slot in list(self.slots.values()) if of(slot)))

    async def _live(self, slot: Slot, *, wakes: bool = False) -> None:
        """One replica's life, from placing, or from its waking, to death."""
        try:
            await self._bring_up(slot)
            assert slot.hosted is not None
            if wakes:
                reason = await slot.hosted.actor.wake.remote()
                if reason:
                    self._failed(slot, reason, is_fatal=False)
                    return
                slot.wake_up(time.monotonic())
                self._changed()
            elif slot.state not in (ReplicaState.READY, ReplicaState.SLEEPING):
                outcome = await slot.hosted.actor.start.remote()
                if not isinstance(outcome, Started):
                    self._failed(slot, outcome.reason, outcome.is_fatal)
                    return
                await self._take_pulse(slot)
                slot.become_ready(outcome, time.monotonic())
                if slot.asked_s:
                    self._started(slot.spec, time.monotonic() - slot.asked_s)
                self._changed()
            reason = await slot.hosted.actor.watch.remote()
            self._failed(slot, reason, is_fatal=False)
        except placement.NoRoom as error:
            slot.waits_for = error.message
            self._changed()
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
        spec = slot.spec
        await self.survey()  # a node may have gone, or have joined
        if spec.device is Device.CUDA:
            slot.waits_for = await room.shortage_now(spec)
            self._changed()
        slot.placement = self._place(spec)
        slot.starts += 1
        order = self._order(spec, slot.placement)
        slot.spots = order.spots
        slot.hosted = await self._host.create(order)
        slot.placement = slot.hosted.placement
        slot.placed_s = time.monotonic()
        if slot.waits_for:
            slot.waits_for, slot.since_s = "", time.monotonic()  # the start's time runs from here

    def _place(self, spec: ReplicaSpec) -> placement.Placement | None:
        """None leaves the choice to Ray, which waits for GPUs. Raises NoRoom for all else that does not fit."""
        taken = [(slot.spec, slot.placement) for slot in self.slots.values() if slot.placement is not None]
        if spec.device is not Device.CUDA:
            return placement.place(spec, self.nodes, taken)
        if spec.pipeline_parallel > 1 or self._order(spec, None).spots:
            return None  # on several nodes, or where its tenant's GPUs are
        with contextlib.suppress(placement.NoRoom):
            return placement.place(spec, self.nodes, taken)
        return None

    def _failed(self, slot: Slot, reason: str, is_fatal: bool) -> None:
        hosted, slot.hosted = slot.hosted, None
        if hosted is not None:
            self._host.end(hosted)
        slot.fail(reason, is_fatal, time.monotonic())
        log.warning("%s failed: %s", slot.spec.id, reason)
        self._changed()

    async def _fall_asleep(self, slot: Slot, drain_s: float) -> None:
        hosted = slot.hosted
        assert hosted is not None
        await self._heard()
        await _within(hosted.actor.drain.remote(drain_s), drain_s + _END_TIMEOUT_S)
        slot.is_closing = True
        failed = await _within(hosted.actor.sleep.remote(), _SLEEP_TIMEOUT_S)
        if failed is None or failed:
            log.warning("%s does not sleep but ends: %s", slot.spec.id, failed or "it did not answer")
            await self._end(slot, cuts=True)
            return
        slot.is_closing = False
        slot.enter(ReplicaState.SLEEPING, time.monotonic())
        self._changed()
        await self._live(slot)

    async def _drain(self, slot: Slot, drain_s: float) -> None:
        deadline_s = time.monotonic() + drain_s

        def left_s() -> float:
            return max(0.0, deadline_s - time.monotonic())

        hosted = slot.hosted
        if hosted is not None and slot.started is not None and drain_s > 0:
            await self._heard()
            # Until here, and while it drains, it answers what still comes; a death on the way ends the wait.
            await _within(hosted.actor.drain.remote(left_s()), left_s() + _END_TIMEOUT_S)
        slot.is_closing = True
        await self._end(slot, cuts=slot.started is not None and drain_s > 0)

    async def _end(self, slot: Slot, *, cuts: bool) -> None:
        """Of its process. With `cuts` what it has not answered by now is cut, so that gateways try it elsewhere."""
        hosted = slot.hosted
        if hosted is not None and cuts:
            await _within(hosted.actor.stop.remote(0.0), _END_TIMEOUT_S)
        slot.hosted = None
        if hosted is not None:
            self._host.end(hosted)
        slot.placement = slot.started = slot.pulse = None
        slot.enter(ReplicaState.STOPPED, time.monotonic())
        self._changed()

    async def _take_pulse(self, slot: Slot) -> None:
        if slot.hosted is None:
            return
        pulse = await _within(slot.hosted.actor.pulse.remote(), _PULSE_TIMEOUT_S)
        if pulse is not None and slot.hosted is not None:
            slot.pulse, slot.pulse_at_s = pulse, time.monotonic()
            if slot.state is ReplicaState.PENDING:
                # Not `enter`: the start's clock runs from when it was asked for.
                slot.state = ReplicaState.STARTING


async def _within(reference: Any, timeout_s: float) -> Any:
    """What a call to a replica returns, None when it fails or takes too long."""
    try:
        async with asyncio.timeout(timeout_s):
            return await reference
    except (TimeoutError, ray.exceptions.RayError):
        return None


def _death(error: Exception) -> str:
    """Ray's report of a death in one line."""
    # Ray's memory monitor says so; a death of any other kind lists the kernel's OOM killer among possible causes.
    if "running low on memory" in str(error):
        return "its process was killed: the node ran out of memory"
    return "its process died"
