"""Metrics of several processes as those of one.

Counters and histograms add up, and what a process that has ended counted stays in: a sum that went down would look to
Prometheus like a restart of everything. Gauges add up where each process has its own share (requests in flight), and
not where each says the same of the fleet (a replica's KV use).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

Labels = tuple[tuple[str, str], ...]


class Sample(NamedTuple):
    """One number."""

    name: str
    labels: Labels
    value: float


class Family(NamedTuple):
    """Everything under one name."""

    name: str
    documentation: str
    kind: str  # "counter", "gauge", "histogram"
    samples: list[Sample]


_OF_THE_FLEET: dict[str, Callable[[Iterable[float]], float]] = {
    "headrace_replica_up": min,
    "headrace_replica_running": max,
    "headrace_replica_waiting": max,
    "headrace_replica_kv_use": max,
    "headrace_tokens_trusted": min,
    "headrace_index_blocks": max,
    "headrace_kv_streams": max,
    "headrace_kv_streams_catching_up": max,
    "headrace_kv_feed_lag_seconds": max,
}
"""Gauges that every process has of the same thing, and what counts where they differ a moment. All others add up."""

_COUNTED_ONCE = ("headrace_replica_received_tokens", "headrace_index_events", "headrace_kv_feed")
"""Counters of what comes from the fleet, which every process hears."""


def collect(registry: CollectorRegistry) -> list[Family]:
    """What a registry holds, as values."""
    return [
        Family(
            family.name,
            family.documentation,
            family.type,
            [
                Sample(sample.name, tuple(sorted(sample.labels.items())), float(sample.value))
                for sample in family.samples
            ],
        )
        for family in registry.collect()
    ]


def merge(parts: Sequence[Sequence[Family]], ended: Sequence[Family] = ()) -> list[Family]:
    """Those of all processes; `ended` adds what processes that have ended counted."""
    families: dict[str, Family] = {}
    values: dict[str, dict[tuple[str, Labels], list[float]]] = {}
    for part in (*parts, ended):
        for family in part:
            if part is ended and family.kind == "gauge":
                continue
            families.setdefault(family.name, family)
            known = values.setdefault(family.name, {})
            for sample in family.samples:
                known.setdefault((sample.name, sample.labels), []).append(sample.value)
    return [
        family._replace(
            samples=[
                Sample(sample, labels, _rule(family)(found))
                for (sample, labels), found in values[name].items()
            ]
        )
        for name, family in families.items()
    ]


def _rule(family: Family) -> Callable[[Iterable[float]], float]:
    if family.kind == "gauge":
        return _OF_THE_FLEET.get(family.name, sum)
    return max if family.name in _COUNTED_ONCE else sum


def render(families: Sequence[Family]) -> bytes:
    """Prometheus's text."""
    registry = CollectorRegistry()
    registry.register(_Given(families))
    text: bytes = generate_latest(registry)
    return text


class _Given(Collector):
    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.documentation, family.kind)
            for sample in family.samples:
                metric.add_sample(sample.name, dict(sample.labels), sample.value)
            yield metric
