"""llm-d's Workload Variant Autoscaler, saturation analyzer V1.

llm-d-incubation/workload-variant-autoscaler, internal/saturation/analyzer.go and docs/saturation-scaling-config: a
replica is saturated from 80% KV use or 5 waiting requests on; one more where the others have on average less than 0.1
of KV or 3 requests to spare below that, one less where they would still have as much with one fewer; nothing while the
fleet changes; every 30 s. Where all are saturated there is nothing to spare, which asks for one more.

What waits in the gateway is spread over the replicas, where it would wait without one.
"""

from __future__ import annotations

from typing import NamedTuple

from headrace_bench.scaling_sample import Bounds, FleetSample

FEWEST_TO_SHRINK = 2  # MinNonSaturatedReplicasForScaleDown


class WvaSpec(NamedTuple):
    """Keys of the config map."""

    kv_threshold: float = 0.80
    queue_threshold: float = 5.0
    kv_spare: float = 0.10
    queue_spare: float = 3.0
    interval_s: float = 30.0


DEFAULT = WvaSpec()


class Wva:
    """One variant of one model."""

    def __init__(self, bounds: Bounds, spec: WvaSpec = DEFAULT) -> None:
        self._bounds = bounds
        self._spec = spec
        self._ran_s = float("-inf")
        self._target = 0

    def target(self, sample: FleetSample) -> int:
        spec = self._spec
        if not self._target:
            self._target = sample.current
        if sample.at_s - self._ran_s < spec.interval_s - 1e-9:
            return self._target
        self._ran_s = sample.at_s
        if sample.starting or sample.ready != self._target or not sample.replicas:
            return self._target
        held = sample.held / sample.ready
        loads = [(replica.kv_use, replica.waiting + held) for replica in sample.replicas]
        free = [(kv, queue) for kv, queue in loads if kv < spec.kv_threshold and queue < spec.queue_threshold]
        num = len(free)
        kv_load = sum(kv for kv, _ in free) / num if num else spec.kv_threshold
        queue_load = sum(queue for _, queue in free) / num if num else spec.queue_threshold
        if not self._spares(kv_load, queue_load):
            self._target = self._bounds.clip(sample.ready + 1)
        elif num >= FEWEST_TO_SHRINK and self._spares(
            kv_load * num / (num - 1), queue_load * num / (num - 1)
        ):
            self._target = self._bounds.clip(sample.ready - 1)
        return self._target

    def _spares(self, kv_load: float, queue_load: float) -> bool:
        spec = self._spec
        return (
            spec.kv_threshold - kv_load >= spec.kv_spare
            and spec.queue_threshold - queue_load >= spec.queue_spare
        )
