"""What all gateways together tell of the work that comes. Pure: time is an argument.

Gateways come and go, and each counts from its own start. The totals here only grow: what a gateway has added stays when
it goes, and one that was already counting when it is first heard of (after a restart of the controller) adds only what
comes from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.fleet.pools import PoolKey
from headrace_router.demand import Demand, PoolDemand

SILENT_S = 5.0
"""After so long without a report a gateway is gone. It makes one each second."""


@dataclass(frozen=True, slots=True)
class PoolTotals:
    """One pool, of all gateways together."""

    held: int  # requests of the model that wait in gateways now
    arrived: int  # counter
    arrived_work_s: float  # counter, replica-seconds
    backlog_s: float | None  # mean over the gateways that see a replica


@dataclass(slots=True)
class _Gateway:
    sequence: int
    heard_s: float
    pools: Mapping[PoolKey, PoolDemand]


class DemandBook:
    """Mutable: `tell` and `forget` change it."""

    def __init__(self) -> None:
        self._gateways: dict[str, _Gateway] = {}
        self._counted: dict[PoolKey, tuple[int, float]] = {}

    def tell(self, demand: Demand, now_s: float) -> None:
        """Take in a report. One that is older than another of the same gateway changes nothing."""
        known = self._gateways.get(demand.gateway)
        if known is not None and demand.sequence <= known.sequence:
            return
        pools = {PoolKey(one.model, one.role): one for one in demand.pools}
        for key, one in pools.items():
            before = None if known is None else known.pools.get(key)
            if before is not None:
                arrived, work_s = one.arrived - before.arrived, one.arrived_work_s - before.arrived_work_s
            elif known is not None or demand.sequence <= 1:
                arrived, work_s = one.arrived, one.arrived_work_s
            else:
                arrived, work_s = 0, 0.0
            counted = self._counted.get(key, (0, 0.0))
            self._counted[key] = (counted[0] + max(0, arrived), counted[1] + max(0.0, work_s))
        if known is not None:
            pools = {**known.pools, **pools}
        self._gateways[demand.gateway] = _Gateway(demand.sequence, now_s, pools)

    def forget(self, now_s: float) -> None:
        """Those that have fallen silent."""
        self._gateways = {
            name: one for name, one in self._gateways.items() if now_s - one.heard_s <= SILENT_S
        }

    @property
    def num_gateways(self) -> int:
        return len(self._gateways)

    def totals(self, key: PoolKey) -> PoolTotals | None:
        """Of one pool; None where no gateway tells of anything, so that nobody knows."""
        if not self._gateways:
            return None
        told = [one.pools[key] for one in self._gateways.values() if key in one.pools]
        # A line is of a model, whichever its pools: a gateway that has never seen a replica of it knows no roles yet.
        lines = [
            [pool.held for (model, _), pool in one.pools.items() if model == key.model]
            for one in self._gateways.values()
        ]
        backlogs_s = [one.backlog_s for one in told if one.backlog_s is not None]
        arrived, work_s = self._counted.get(key, (0, 0.0))
        return PoolTotals(
            held=sum(max(held, default=0) for held in lines),
            arrived=arrived,
            arrived_work_s=work_s,
            backlog_s=sum(backlogs_s) / len(backlogs_s) if backlogs_s else None,
        )
