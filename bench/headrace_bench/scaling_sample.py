"""What a scaler sees each second, and what it is: the words of autoscaling in simulation. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from headrace.errors import CallerError
from headrace.fleet.scaling_spec import PoolSample

TICK_S = 1.0
"""How often scalers are asked."""


class ReplicaSample(NamedTuple):
    """One ready replica, as its engine's metrics would say."""

    running: int
    waiting: int
    kv_use: float  # 0..1


@dataclass(frozen=True, slots=True)
class FleetSample:
    """The fleet at one moment. Draining replicas are in neither list: as of a pod that terminates, nobody asks them."""

    pool: PoolSample  # what Headrace's own autoscaler is given
    replicas: tuple[ReplicaSample, ...]

    @property
    def at_s(self) -> float:
        return self.pool.at_s

    @property
    def ready(self) -> int:
        return self.pool.ready

    @property
    def starting(self) -> int:
        return self.pool.starting

    @property
    def current(self) -> int:
        return self.pool.ready + self.pool.starting

    @property
    def held(self) -> int:
        """Requests that wait in the gateway."""
        return self.pool.held or 0

    @property
    def queued(self) -> int:
        """Requests that wait anywhere."""
        return self.held + sum(replica.waiting for replica in self.replicas)

    @property
    def concurrency(self) -> int:
        """Requests that wait or run."""
        return self.queued + sum(replica.running for replica in self.replicas)


class Bounds(NamedTuple):
    """What every scaler must keep to."""

    min_replicas: int
    max_replicas: int

    def check(self) -> None:
        """Raises `CallerError` unless 1 <= min <= max <= 1024."""
        if not 1 <= self.min_replicas <= self.max_replicas <= 1024:
            raise CallerError(
                f"replicas must be 1 <= min <= max <= 1024, got {self.min_replicas}:{self.max_replicas}"
            )

    def clip(self, replicas: int) -> int:
        return min(self.max_replicas, max(self.min_replicas, replicas))


class Scaler(Protocol):
    """Says how many replicas there should be. Mutable, one per run: it remembers what it has seen."""

    def target(self, sample: FleetSample) -> int:
        """Asked every `TICK_S`, in order of time. Whoever decides less often repeats what it said last. Replicas that
        are beyond it are drained, those that still start first; what is missing is started."""
        ...
