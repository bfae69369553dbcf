"""The autoscaler at work: looks each second, and at once when somebody waits where nothing runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from headrace.fleet.demand_book import DemandBook
from headrace.fleet.fleet_plan import FleetPlan, PoolPlan
from headrace.fleet.lives import ReplicaLives
from headrace.fleet.pools import PoolKey
from headrace.fleet.reconcile import has_given_up
from headrace.fleet.scaler import Decided, Scaler
from headrace.fleet.scaling_log import ScalingLog
from headrace.fleet.scaling_sample import ReplicaLoad
from headrace.fleet.slot import Slot
from headrace_router.demand import Demand
from headrace_router.types import ReplicaId, ReplicaState

log = logging.getLogger(__name__)

INTERVAL_S = 1.0


class ScalingLoop:
    """Belongs to the controller's loop. Gives every plan with new targets to `take`."""

    def __init__(
        self,
        lives: ReplicaLives,
        decisions: ScalingLog,
        plan: Callable[[], FleetPlan],
        take: Callable[[FleetPlan], None],
        waits: Callable[[ReplicaId], bool] = lambda _: False,
    ) -> None:
        """`waits`: whether a member that has not begun waits for room, for no one knows how long."""
        self.scaler = Scaler()
        self.decisions = decisions
        self._lives = lives
        self._demand = DemandBook()
        self._plan = plan
        self._take = take
        self._waits = waits
        self._look_now = asyncio.Event()

    def tell(self, demand: Demand) -> None:
        """A gateway's report. Where it holds requests that a pool without replicas could serve, that is seen to now."""
        self._demand.tell(demand, time.monotonic())
        waiting = {one.model for one in demand.pools if one.held}
        if any(key.model in waiting and not pool.members for key, pool in self._plan().pools.items()):
            self._look_now.set()

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                await self._look()
            except Exception:  # supervision boundary: one failed look must not end scaling
                log.exception("the autoscaler failed; the targets stay")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S):
                    await self._look_now.wait()
            self._look_now.clear()

    def pinned(self, pool: PoolPlan, before: int | None) -> None:
        """Keep what a person asked for."""
        wanted = "by its configuration" if pool.pin is None else f"{pool.pin}"
        self.decisions.note(
            Decided(
                at=time.time(),
                pool=str(pool.key),
                target=pool.wanted,
                current=len(pool.members),
                reason=f"asked for by hand: {wanted}",
                effect="by hand",
                pin=pool.pin,
                needs={},
                doubts=(),
                inputs={"pin before": before},
            ).as_data()
        )

    async def _look(self) -> None:
        autoscaled = {key for key, pool in self._plan().pools.items() if pool.autoscale is not None}
        if not autoscaled:
            return
        await self._lives.take_pulses(lambda slot: PoolKey(slot.spec.model, slot.spec.role) in autoscaled)
        now_s = time.monotonic()
        self._demand.forget(now_s)
        plan = self._plan()
        plan, decided = self.scaler.step(plan, self._loads(plan, now_s), self._demand, now_s, time.time())
        self._take(plan)
        news = [one.as_data() for one in decided]
        await asyncio.to_thread(self._note, news)

    def _note(self, news: list[dict[str, Any]]) -> None:
        for one in news:
            self.decisions.note(one)

    def _loads(self, plan: FleetPlan, now_s: float) -> Mapping[PoolKey, list[ReplicaLoad]]:
        slots = self._lives.slots
        return {
            key: [
                _load(slots[spec.id], now_s)
                if spec.id in slots
                else ReplicaLoad(ReplicaState.PENDING, waits_for_room=self._waits(spec.id))
                for spec in pool.members.values()
            ]
            for key, pool in plan.pools.items()
            if pool.autoscale is not None
        }


def _load(slot: Slot, now_s: float) -> ReplicaLoad:
    pulse, observed = slot.pulse, slot.observed
    load = ReplicaLoad(
        slot.state,
        failures=slot.failures,
        has_given_up=has_given_up(observed),
        waits_for_room=observed.waits_for_room,
    )
    if pulse is None:
        return load
    return replace(
        load,
        pulse_age_s=now_s - slot.pulse_at_s,
        running=pulse.running,
        waiting=pulse.waiting,
        kv_use=pulse.kv_use,
        utilisation=pulse.utilisation,
    )
