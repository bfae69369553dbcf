"""What the autoscaler sees of a pool, put together from its replicas and its gateways. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headrace.fleet.demand_book import PoolTotals
from headrace.fleet.scaling_spec import PoolSample
from headrace_router.types import ReplicaState

STALE_PULSE_S = 5.0
"""A replica that has not told its load for so long tells nothing of now."""

MANY_FAILURES = 3
"""So many failed starts in a row, and a replica no longer counts as one that comes."""

RECENT_S = 60.0
_LEAST_SPACING_S = 5.0
_MOST_BUCKETS = 1500


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One member of a pool. None: it did not tell."""

    state: ReplicaState
    pulse_age_s: float | None = None
    running: int | None = None
    waiting: int | None = None
    kv_use: float | None = None
    utilisation: float | None = None
    failures: int = 0
    has_given_up: bool = False
    waits_for_room: bool = False


def pool_sample(
    at_s: float,
    members: Iterable[ReplicaLoad],
    wanted: int,
    totals: PoolTotals | None,
    cold_start_s: float | None,
) -> PoolSample:
    """The pool at one moment. Members beyond `wanted` stand in for others that are being replaced, and do not count.

    What no replica could tell is None, never 0: an overloaded replica falls silent first.
    """
    members = list(members)
    serving = [one for one in members if one.state is ReplicaState.READY]
    ready = min(len(serving), wanted)
    starting = min(sum(map(_is_starting, members)), max(0, wanted - ready))
    fresh = [
        one for one in serving if one.pulse_age_s is not None and one.pulse_age_s <= STALE_PULSE_S
    ]  # all of them, or nobody can say how busy the pool is
    told = fresh if len(fresh) == len(serving) else []
    backlog_s = None if totals is None else totals.backlog_s
    return PoolSample(
        at_s=at_s,
        ready=ready,
        starting=starting,
        held=None if totals is None else totals.held,
        waiting=_total([one.waiting for one in told], serving),
        running=_total([one.running for one in told], serving),
        kv_use=_mean([one.kv_use for one in told], 0.0 if not serving else None),
        backlog_s=0.0 if not serving and totals is not None else backlog_s,
        arrived=None if totals is None else totals.arrived,
        arrived_work_s=None if totals is None else totals.arrived_work_s,
        utilisation=_mean([one.utilisation for one in told], None),
        cold_start_s=cold_start_s,
    )


def _is_starting(one: ReplicaLoad) -> bool:
    if one.waits_for_room:
        return False  # it may wait for ever, and while any starts nothing is given back
    if one.state is ReplicaState.FAILED:
        return not one.has_given_up and one.failures < MANY_FAILURES
    return one.state in (ReplicaState.PENDING, ReplicaState.STARTING)


def _total(values: Sequence[int | None], serving: Sequence[ReplicaLoad]) -> int | None:
    if not serving:
        return 0
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(serving) else None


def _mean(values: Sequence[float | None], default: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else default


class History:
    """Samples of one pool, each second for the last minute, thinned before: gauges at their highest, counters as they
    ended. Bounded, however long the memory."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._spacing_s = max(_LEAST_SPACING_S, memory_s / _MOST_BUCKETS)
        self._old: deque[PoolSample] = deque()
        self._recent: deque[PoolSample] = deque()

    def add(self, sample: PoolSample) -> None:
        """`at_s` does not fall."""
        self._recent.append(sample)
        while self._recent[0].at_s < sample.at_s - RECENT_S:
            self._settle(self._recent.popleft())
        while self._old and self._old[0].at_s < sample.at_s - self._memory_s:
            self._old.popleft()

    def samples(self) -> list[PoolSample]:
        """Oldest first."""
        return [*self._old, *self._recent]

    def _settle(self, sample: PoolSample) -> None:
        last = self._old[-1] if self._old else None
        if last is not None and last.at_s // self._spacing_s == sample.at_s // self._spacing_s:
            self._old[-1] = _merged(last, sample)
        else:
            self._old.append(sample)


def _merged(first: PoolSample, second: PoolSample) -> PoolSample:
    highest: dict[str, Any] = {
        name: _highest(getattr(first, name), getattr(second, name))
        for name in ("held", "waiting", "running", "kv_use", "backlog_s", "utilisation")
    }
    return replace(second, **highest)


def _highest(first: Any, second: Any) -> Any:
    # What was missing once is missing: nobody can say that it was low then.
    return None if first is None or second is None else max(first, second)
