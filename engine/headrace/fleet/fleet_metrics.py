"""The fleet in Prometheus' words, for whoever scrapes a gateway: pools, targets, and what asks for replicas.

`headrace serve` asks its controller for the status each second anyway; this shows the last one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.fleet.status import FleetStatus


class FleetMetrics(Collector):
    """Shows nothing before the first status."""

    def __init__(self) -> None:
        self.status: FleetStatus | None = None

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus-client at each scrape."""
        status = self.status
        if status is None:
            return
        replicas = GaugeMetricFamily(
            "headrace_pool_replicas", "Replicas of a pool, by state.", labels=("pool", "state")
        )
        states = Counter(
            (row.model, row.role, row.state.value) for row in status.replicas if not row.is_external
        )
        target = GaugeMetricFamily(
            "headrace_pool_target",
            "Replicas that a pool should have, a pin by hand included.",
            labels=("pool",),
        )
        pinned = GaugeMetricFamily("headrace_pool_pinned", "1 while a pool is set by hand.", labels=("pool",))
        bounds = GaugeMetricFamily(
            "headrace_pool_bound", "Least and most replicas of an autoscaled pool.", labels=("pool", "bound")
        )
        needs = GaugeMetricFamily(
            "headrace_pool_need",
            "Replicas that each input of the autoscaler asks for.",
            labels=("pool", "input"),
        )
        doubts = GaugeMetricFamily(
            "headrace_pool_doubts",
            "Reasons not to believe a pool's metrics; above 0 it does not shrink.",
            labels=("pool",),
        )
        cold = GaugeMetricFamily(
            "headrace_pool_cold_start_seconds",
            "From asking for a replica until it is ready, learned.",
            labels=("pool",),
        )
        for pool in status.pools:
            name = (pool.pool,)
            for (model, role, state), count in states.items():
                if (model, role) == (pool.model, pool.role):
                    replicas.add_metric((pool.pool, state), count)
            target.add_metric(name, pool.wanted)
            pinned.add_metric(name, int(pool.pin is not None))
            for bound, value in (("least", pool.least), ("most", pool.most)):
                if value is not None:
                    bounds.add_metric((pool.pool, bound), value)
            for source, need in pool.needs.items():
                needs.add_metric((pool.pool, source), need)
            if pool.most is not None:
                doubts.add_metric(name, len(pool.doubts))
            if pool.cold_start_s is not None:
                cold.add_metric(name, pool.cold_start_s)
        gpus = GaugeMetricFamily(
            "headrace_gpus",
            "GPUs of a tenant that shares some: its own, held, borrowed, lent, draining, waited for.",
            labels=("tenant", "kind", "state"),
        )
        for row in status.gpus:
            for state in ("nominal", "held", "borrowed", "lent", "draining", "waiting"):
                gpus.add_metric((row.tenant, row.kind, state), getattr(row, state))
        yield from (gpus, replicas, target, pinned, bounds, needs, doubts, cold)
        yield from self._starts(status)

    def _starts(self, status: FleetStatus) -> Iterator[Metric]:
        starts = GaugeMetricFamily(
            "headrace_replica_start_seconds",
            "Of each replica's last start, by phase; their sum is the time from asking for it until it was ready.",
            labels=("replica", "phase"),
        )
        for replica in status.replicas:
            for phase, seconds in replica.phases_s:
                starts.add_metric((replica.id, phase), seconds)
        yield starts
        if (rollout := status.rollout) is not None:
            yield GaugeMetricFamily(
                "headrace_rollout_running", "1 while replicas are being replaced.", rollout.state == "rolling"
            )
            yield GaugeMetricFamily(
                "headrace_rollout_stopped",
                "1 after a rollout that did not come to its end.",
                rollout.state == "stopped",
            )
            yield GaugeMetricFamily(
                "headrace_rollout_replaced", "Replicas that the last rollout has replaced.", rollout.replaced
            )
