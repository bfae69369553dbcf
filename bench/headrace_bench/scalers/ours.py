"""Headrace's own: the history and the decision of the controller, each second (`headrace.fleet.scaler`)."""

from __future__ import annotations

from headrace.fleet.autoscaler import decide, memory_s
from headrace.fleet.scaling_sample import History
from headrace.fleet.scaling_spec import ScalingDecision, ScalingSpec
from headrace_bench.scaling_sample import FleetSample


class Ours:
    """One pool."""

    def __init__(self, spec: ScalingSpec) -> None:
        self._spec = spec
        self._history: History | None = None
        self.changes: list[tuple[float, ScalingDecision]] = []  # decisions to change something

    def target(self, sample: FleetSample) -> int:
        if self._history is None:
            cold_s = sample.pool.cold_start_s
            self._history = History(
                memory_s(self._spec, self._spec.cold_start_s if cold_s is None else cold_s)
            )
        self._history.add(sample.pool)
        decision = decide(self._history.samples(), self._spec, sample.at_s)
        if decision.target != decision.current:
            self.changes.append((sample.at_s, decision))
        return decision.target
