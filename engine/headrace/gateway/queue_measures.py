"""What is measured of waiting in the gateway, and how Prometheus reads it.

Tenants that no configuration names are one label, so that clients cannot invent labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from headrace.gateway.metrics import Histogram

if TYPE_CHECKING:
    from headrace.gateway.admission import Admission

DEFAULT_TENANT = "default"
OTHER = "other"
_WAIT_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)


class QueueMeasures:
    """Counts of what became of those that waited."""

    def __init__(self, configured: Collection[str]) -> None:
        """`configured` tenants have labels of their own."""
        self._configured = configured
        self.outcomes: Counter[tuple[str, str, str]] = Counter()  # (model, tenant label, outcome)
        self.waits: dict[str, Histogram] = {}  # by model, of those let in

    def label(self, tenant: str) -> str:
        """Of a tenant, in metrics."""
        return tenant if tenant == DEFAULT_TENANT or tenant in self._configured else OTHER

    def ended(self, model: str, tenant: str, outcome: str) -> None:
        """refused, evicted, expired, left, no_replica or dispatched."""
        self.outcomes[model, self.label(tenant), outcome] += 1

    def let_in(self, model: str, tenant: str, waited_s: float) -> None:
        """It waited, and a replica has room for it."""
        self.ended(model, tenant, "dispatched")
        waits = self.waits.get(model)
        if waits is None:
            waits = self.waits[model] = Histogram(_WAIT_S)
        waits.observe(waited_s)

    def counts(self, model: str) -> dict[str, int]:
        """Outcomes of one model, all tenants together."""
        counts: Counter[str] = Counter()
        for (name, _, outcome), count in self.outcomes.items():
            if name == model:
                counts[outcome] += count
        return dict(counts)


class QueueCollector(Collector):
    """For a Prometheus registry."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus-client at each scrape."""
        labels = ("model", "tenant")
        sizes = {
            what: GaugeMetricFamily(f"headrace_queue_{what}", text, labels=labels)
            for what, text in (
                ("requests", "Requests that wait in the gateway."),
                ("bytes", "Of their bodies."),
                ("tokens", "Of their prompts and expected answers."),
            )
        }
        waits = HistogramMetricFamily(
            "headrace_queue_wait_seconds", "In the gateway, of requests that were let in.", labels=("model",)
        )
        outcomes = CounterMetricFamily(
            "headrace_queue_outcomes",
            "Requests that had to wait in the gateway, by what became of them.",
            labels=("model", "tenant", "outcome"),
        )
        measures = self._admission.measures
        waiting: Counter[tuple[str, str, str]] = Counter()
        for model, line in self._admission.lines.items():
            for held in line:
                tenant = measures.label(held.tenant)
                waiting["requests", model, tenant] += 1
                waiting["bytes", model, tenant] += held.size_bytes
                waiting["tokens", model, tenant] += held.tokens
        for model, tenant, _ in measures.outcomes:  # an empty queue reads 0, not nothing
            for what in sizes:
                waiting.setdefault((what, model, tenant), 0)
        for (what, model, tenant), value in waiting.items():
            sizes[what].add_metric((model, tenant), value)
        for model, histogram in measures.waits.items():
            waits.add_metric((model,), buckets=histogram.cumulative(), sum_value=histogram.sum_s)
        for (model, tenant, outcome), count in measures.outcomes.items():
            outcomes.add_metric((model, tenant, outcome), count)
        yield from (*sizes.values(), waits, outcomes)
