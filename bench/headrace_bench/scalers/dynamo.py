"""NVIDIA Dynamo's planner, both of its modes that follow load.

`LoadPlanner`: ai-dynamo/dynamo, examples/llm/components/planner.py and docs/architecture/load_planner.md. KV use taken
each second, a waiting request counted as 0.02 of a cache; every 30 s one worker more where the mean is above 0.9, one
less below 0.5, not within 3 intervals of an addition; nothing is sampled or decided while a worker starts.

`LoadScaling`: components/src/dynamo/planner/core/load_scaling.py (`_agg_easy_decision`), the present one. Every 5 s, of
each worker the tokens that run and wait over those that fit its cache: one more where any is above 1.0, one less where
all are below 0.6 (target `throughput`), or 0.4 and 0.1 (`latency`); nothing while it scales.

What waits in the gateway is spread over the workers, where it would wait without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from headrace_bench.scalers.one_by_one import Held, OneByOne
from headrace_bench.scaling_sample import Bounds, FleetSample

WAITING_KV = 0.02
GRACE_INTERVALS = 3  # NEW_DECODE_WORKER_GRACE_PERIOD


class LoadPlannerSpec(NamedTuple):
    """Options of the planner."""

    kv_up: float = 0.9
    kv_down: float = 0.5
    interval_s: float = 30.0


DEFAULT_PLANNER = LoadPlannerSpec()


class LoadPlanner:
    """Aggregated workers."""

    def __init__(self, bounds: Bounds, spec: LoadPlannerSpec = DEFAULT_PLANNER) -> None:
        self._bounds = bounds
        self._spec = spec
        self._loads: list[float] = []
        self._began_s: float | None = None
        self._grace = 0
        self._target = 0

    def target(self, sample: FleetSample) -> int:
        if not self._target:
            self._target = sample.current
        if self._began_s is None:
            self._begin(sample.at_s)
        if sample.starting or not sample.ready:
            self._begin(sample.at_s)
            return self._target
        held = sample.held / sample.ready
        self._loads += [one.kv_use + WAITING_KV * (one.waiting + held) for one in sample.replicas]
        assert self._began_s is not None
        if sample.at_s - self._began_s < self._spec.interval_s - 1e-9:
            return self._target
        load = sum(self._loads) / len(self._loads)
        self._target = sample.ready
        if load < self._spec.kv_down and not self._grace:
            self._target = self._bounds.clip(sample.ready - 1)
        if load > self._spec.kv_up and sample.ready < self._bounds.max_replicas:
            self._target, self._grace = sample.ready + 1, GRACE_INTERVALS
        self._grace = max(0, self._grace - 1)
        self._begin(sample.at_s)
        return self._target

    def _begin(self, now_s: float) -> None:
        self._loads, self._began_s = [], now_s


class LoadScalingSpec(NamedTuple):
    """Thresholds of KV use, what waits included."""

    up: float = 1.0
    down: float = 0.6
    interval_s: float = 5.0
    waiting_kv: float = 0.025  # of one waiting request: the usual prompt over the cache


DEFAULT_SCALING = LoadScalingSpec()


class LoadScaling(OneByOne):
    """Aggregated workers, a target other than `sla`."""

    def __init__(self, bounds: Bounds, spec: LoadScalingSpec = DEFAULT_SCALING) -> None:
        super().__init__(bounds, spec.interval_s)
        self._spec = spec

    def _step(self, held: Sequence[Held]) -> int:
        spec = self._spec
        loads = [one.kv_use + spec.waiting_kv * one.waiting for one in held]
        if any(load > spec.up for load in loads):
            return 1
        return -1 if all(load < spec.down for load in loads) else 0
