"""No scaling at all."""

from __future__ import annotations

from headrace_bench.scaling_sample import FleetSample


class Fixed:
    """The same number at all times."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas

    def target(self, sample: FleetSample) -> int:
        return self._replicas
