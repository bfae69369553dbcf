"""llm-d's Workload Variant Autoscaler, saturation analyzer V1.

llm-d-incubation/workload-variant-autoscaler, internal/saturation/analyzer.go and docs/saturation-scaling-config: a
replica is saturated from 80% KV use or 5 waiting requests on; one more where the others have on average less than 0.1
of KV or 3 requests to spare below that, one less where they would still have as much with one fewer; nothing while the
fleet changes; every 30 s. Where all are saturated there is nothing to spare, which asks for one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from headrace_bench.scalers.one_by_one import Held, OneByOne
from headrace_bench.scaling_sample import Bounds

FEWEST_TO_SHRINK = 2  # MinNonSaturatedReplicasForScaleDown


class WvaSpec(NamedTuple):
    """Keys of the config map."""

    kv_threshold: float = 0.80
    queue_threshold: float = 5.0
    kv_spare: float = 0.10
    queue_spare: float = 3.0
    interval_s: float = 30.0


DEFAULT = WvaSpec()


class Wva(OneByOne):
    """One variant of one model."""

    def __init__(self, bounds: Bounds, spec: WvaSpec = DEFAULT) -> None:
        super().__init__(bounds, spec.interval_s)
        self._spec = spec

    def _step(self, held: Sequence[Held]) -> int:
        spec = self._spec
        free = [one for one in held if one.kv_use < spec.kv_threshold and one.waiting < spec.queue_threshold]
        num = len(free)
        kv_load = sum(one.kv_use for one in free) / num if num else spec.kv_threshold
        queue_load = sum(one.waiting for one in free) / num if num else spec.queue_threshold
        if not self._spares(kv_load, queue_load):
            return 1
        if num < FEWEST_TO_SHRINK:
            return 0
        return -1 if self._spares(kv_load * num / (num - 1), queue_load * num / (num - 1)) else 0

    def _spares(self, kv_load: float, queue_load: float) -> bool:
        spec = self._spec
        return (
            spec.kv_threshold - kv_load >= spec.kv_spare
            and spec.queue_threshold - queue_load >= spec.queue_spare
        )
