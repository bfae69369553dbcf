"""Each second, for each autoscaled pool: a sample, a decision, a target.

    replicas' pulses + gateways' demand ── pool_sample ──> History ── decide | decide_pair ──> PoolPlan.target

No effects: a plan goes in, a plan comes out, and what was decided is kept for people.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from headrace.fleet.autoscaler import decide, decide_pair, memory_s
from headrace.fleet.demand_book import DemandBook
from headrace.fleet.fleet_plan import FleetPlan, PoolPlan
from headrace.fleet.pools import PoolKey
from headrace.fleet.scaling_config import scaling_spec
from headrace.fleet.scaling_sample import History, ReplicaLoad, pool_sample
from headrace.fleet.scaling_spec import PoolSample, ScalingDecision, ScalingSpec
from headrace.fleet.status import PoolStatus
from headrace_router.types import Role

_REMEMBERED_STARTS = 5
_LONGEST_START_S = 3600.0


@dataclass(frozen=True, slots=True)
class Decided:
    """One decision with what it was made of, as people and programs read it."""

    at: float  # Unix time
    pool: str
    target: int
    current: int  # ready and starting
    reason: str
    effect: str  # "applied", "dry run", "pinned", "none" where the target is what there is
    pin: int | None
    needs: Mapping[str, float]  # replicas that each input asks for
    doubts: tuple[str, ...]
    inputs: Mapping[str, Any]  # the sample

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Scaler:
    """The autoscaled pools of one fleet: their histories and latest decisions. Mutable, without effects."""

    def __init__(self) -> None:
        self.latest: dict[PoolKey, Decided] = {}
        self._histories: dict[PoolKey, History] = {}
        self._starts_s: dict[PoolKey, deque[float]] = {}

    def started(self, key: PoolKey, took_s: float) -> None:
        """A replica is ready so long after it was asked for."""
        starts = self._starts_s.setdefault(key, deque(maxlen=_REMEMBERED_STARTS))
        starts.append(min(took_s, _LONGEST_START_S))

    def cold_start_s(self, key: PoolKey) -> float | None:
        """Of the last starts the median; None before the first."""
        starts = self._starts_s.get(key)
        return median(starts) if starts else None

    def remembered(self) -> dict[str, list[float]]:
        """What it has learned, as JSON can hold it."""
        return {str(key): [round(one, 3) for one in starts] for key, starts in self._starts_s.items()}

    def recall(self, remembered: Mapping[str, list[float]], pools: Iterable[PoolKey]) -> None:
        """Learn it again."""
        for key in pools:
            for took_s in remembered.get(str(key), ()):
                self.started(key, took_s)

    def step(
        self,
        plan: FleetPlan,
        loads: Mapping[PoolKey, Sequence[ReplicaLoad]],
        demand: DemandBook,
        now_s: float,
        wall_s: float,
    ) -> tuple[FleetPlan, list[Decided]]:
        """The plan with its new targets, and the decision on every autoscaled pool. `loads`: of the members."""
        specs: dict[PoolKey, ScalingSpec] = {}
        samples: dict[PoolKey, list[PoolSample]] = {}
        for key, pool in plan.pools.items():
            if pool.autoscale is None:
                continue
            spec = specs[key] = scaling_spec(pool.autoscale, now_s, wall_s)
            cold_s = self.cold_start_s(key)
            sample = pool_sample(now_s, loads.get(key, ()), pool.wanted, demand.totals(key), cold_s)
            history = self._histories.setdefault(
                key, History(memory_s(spec, spec.cold_start_s if cold_s is None else cold_s))
            )
            history.add(sample)
            samples[key] = history.samples()
        decisions = _decide_all(samples, specs, now_s)
        decided = []
        for key, decision in decisions.items():
            pool = plan.pools[key]
            one = self.latest[key] = _decided(pool, decision, samples[key][-1], wall_s)
            decided.append(one)
            if pool.autoscale is not None and not pool.autoscale.dry_run:
                plan = plan.having(replace(pool, target=decision.target))
        self.latest = {key: one for key, one in self.latest.items() if key in plan.pools}
        return plan, decided


def _decide_all(
    samples: Mapping[PoolKey, Sequence[PoolSample]], specs: Mapping[PoolKey, ScalingSpec], now_s: float
) -> dict[PoolKey, ScalingDecision]:
    decisions: dict[PoolKey, ScalingDecision] = {}
    for key in samples:
        partner = PoolKey(key.model, Role.DECODE)
        if key in decisions:
            continue
        if key.role is Role.PREFILL and partner in samples:
            decisions[key], decisions[partner] = decide_pair(
                samples[key], samples[partner], (specs[key], specs[partner]), now_s
            )
        elif not (key.role is Role.DECODE and PoolKey(key.model, Role.PREFILL) in samples):
            decisions[key] = decide(samples[key], specs[key], now_s)
    return decisions


def _decided(pool: PoolPlan, decision: ScalingDecision, sample: PoolSample, wall_s: float) -> Decided:
    if decision.target == decision.current:
        effect = "none"
    elif pool.autoscale is not None and pool.autoscale.dry_run:
        effect = "dry run"
    else:
        effect = "applied" if pool.pin is None else "pinned"
    return Decided(
        at=wall_s,
        pool=str(pool.key),
        target=decision.target,
        current=decision.current,
        reason=decision.reason,
        effect=effect,
        pin=pool.pin,
        needs={name: round(need, 3) for name, need in decision.needs.items()},
        doubts=decision.doubts,
        inputs={name: value for name, value in asdict(sample).items() if name != "at_s"},
    )


def pool_status(pool: PoolPlan, ready: int, latest: Decided | None, cold_start_s: float | None) -> PoolStatus:
    """A pool for people: how many replicas it should have, and why."""
    scale = pool.autoscale
    if pool.pin is not None:
        reason = f"by hand; otherwise {pool.target}"
    elif scale is None:
        reason = "fixed by the configuration"
    elif latest is None:
        reason = "as at first"
    elif scale.dry_run:
        reason = f"dry run, would be {latest.target}: {latest.reason}"
    else:
        reason = latest.reason
    return PoolStatus(
        pool=str(pool.key),
        model=pool.key.model,
        role=pool.key.role,
        ready=ready,
        target=pool.target,
        pin=pool.pin,
        least=None if scale is None else scale.min_replicas,
        most=None if scale is None else scale.max_replicas,
        is_dry_run=scale is not None and scale.dry_run,
        reason=reason,
        needs={} if latest is None else latest.needs,
        doubts=() if latest is None else latest.doubts,
        cold_start_s=cold_start_s,
    )
