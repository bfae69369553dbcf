"""What the gateway measures, and how Prometheus reads it.

The relay touches these on every token, so counting is plain arithmetic (prometheus-client's own `observe` takes a lock
and walks its buckets); a collector turns them into Prometheus families when somebody scrapes. Labels are bounded: the
models of the fleet plus "unknown".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from headrace.gateway.openai import Usage
from headrace_router.router import Router
from headrace_router.types import ReplicaId, Transfer

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.2, 0.5, 1.0, 5.0)
_REQUEST_S = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


USUAL_MEMORY = 0.02  # of what is usual: some fifty requests
ANSWER_TOKENS = 256  # expected of an answer before any has ended


class Histogram:
    """Counts in fixed buckets. `observe` costs one bisection."""

    __slots__ = ("bounds_s", "counts", "sum_s")

    def __init__(self, bounds_s: tuple[float, ...]) -> None:
        self.bounds_s = bounds_s
        self.counts = [0] * (len(bounds_s) + 1)
        self.sum_s = 0.0

    def observe(self, value_s: float) -> None:
        self.counts[bisect_left(self.bounds_s, value_s)] += 1
        self.sum_s += value_s

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus's form: (upper bound, observations at or below it), "+Inf" last."""
        rows: list[tuple[str, float]] = []
        running = 0
        for bound_s, count in zip((*self.bounds_s, float("inf")), self.counts, strict=True):
            running += count
            rows.append(("+Inf" if bound_s == float("inf") else repr(bound_s), running))
        return rows


class ModelMeasures:
    """Everything measured of one model's requests."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.arrived = 0  # requests, also those that had to wait or were refused
        self.arrived_tokens = 0  # of their prompts, uncached as predicted
        self.usual_prompt_tokens = 0.0
        self.usual_answer_tokens = float(ANSWER_TOKENS)
        self.usual_hits = 0.0  # share of a prompt that is cached
        self.ended: dict[tuple[int, str], int] = {}  # (status, error kind) -> requests
        self.time_to_first_token = Histogram(_LATENCY_S)
        self.inter_token = Histogram(_TOKEN_S)
        self.duration = Histogram(_REQUEST_S)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.retries = 0
        self.upstream_errors: dict[str, int] = {}
        self.decisions: dict[str, int] = {}  # reason -> how often
        self.handovers: dict[tuple[str, str], int] = {}  # (reason, outcome) -> how often

    def finish(self, status: int, error_kind: str, duration_s: float, usage: Usage | None) -> None:
        """A request has ended."""
        key = (status, error_kind)
        self.ended[key] = self.ended.get(key, 0) + 1
        self.duration.observe(duration_s)
        if usage is not None:
            self.prompt_tokens += usage.prompt_tokens
            self.completion_tokens += usage.completion_tokens
            self.cached_tokens += usage.cached_tokens
            if status < 400:
                self._learn(usage)

    def _learn(self, usage: Usage) -> None:
        prompt = usage.prompt_tokens
        self.usual_prompt_tokens += USUAL_MEMORY * (prompt - self.usual_prompt_tokens)
        self.usual_answer_tokens += USUAL_MEMORY * (usage.completion_tokens - self.usual_answer_tokens)
        if prompt > 0:
            self.usual_hits += USUAL_MEMORY * (min(usage.cached_tokens, prompt) / prompt - self.usual_hits)

    def decided(self, reason: str) -> None:
        self.decisions[reason] = self.decisions.get(reason, 0) + 1

    def handed_over(self, reason: str, outcome: str) -> None:
        """A hand-over has ended: completed, refused, prefill_failed, decode_failed or abandoned."""
        key = (reason, outcome)
        self.handovers[key] = self.handovers.get(key, 0) + 1

    def count_upstream_error(self, kind: str) -> None:
        self.upstream_errors[kind] = self.upstream_errors.get(kind, 0) + 1


class GatewayMetrics(Collector):
    """The measures of every model, and the router's view of every replica, for a Prometheus registry."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._models: dict[str, ModelMeasures] = {}
        self.received_tokens: dict[ReplicaId, int] = {}  # prompt tokens that replicas got from others
        self.unknown = ModelMeasures()  # requests that named no model of ours

    def of(self, model: str) -> ModelMeasures:
        """The measures of a model that the router knows (so that labels stay bounded)."""
        measures = self._models.get(model)
        if measures is None:
            measures = self._models[model] = ModelMeasures()
        return measures

    def received(self, replica: ReplicaId, transfers: Sequence[Transfer]) -> None:
        """A replica reports prompts that it got from others."""
        tokens = sum(transfer.tokens for transfer in transfers)
        self.received_tokens[replica] = self.received_tokens.get(replica, 0) + tokens

    @property
    def in_flight(self) -> int:
        """Requests of known models not yet ended."""
        return sum(measures.in_flight for measures in self._models.values())

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus-client at each scrape."""
        models = {**self._models, "unknown": self.unknown}
        requests = CounterMetricFamily(
            "headrace_requests",
            "Requests ended, by HTTP status and error kind.",
            labels=("model", "status", "error"),
        )
        tokens = CounterMetricFamily(
            "headrace_tokens", "Tokens as the engines counted them.", labels=("model", "kind")
        )
        retries = CounterMetricFamily(
            "headrace_retries", "Requests moved to another replica.", labels=("model",)
        )
        upstream = CounterMetricFamily(
            "headrace_upstream_errors", "Failures of replicas under a request.", labels=("model", "kind")
        )
        decisions = CounterMetricFamily(
            "headrace_decisions",
            "Routing decisions by the policy's reason.",
            labels=("model", "policy", "reason"),
        )
        handovers = CounterMetricFamily(
            "headrace_handovers",
            "Prompts computed by another replica than the one that answers, by why and how that ended.",
            labels=("model", "reason", "outcome"),
        )
        in_flight = GaugeMetricFamily(
            "headrace_requests_in_flight", "Requests not yet ended.", labels=("model",)
        )
        first = HistogramMetricFamily(
            "headrace_time_to_first_token_seconds",
            "Arrival of a request to the first byte back.",
            labels=("model",),
        )
        inter = HistogramMetricFamily(
            "headrace_inter_token_latency_seconds", "Between relayed pieces of one stream.", labels=("model",)
        )
        duration = HistogramMetricFamily(
            "headrace_request_duration_seconds", "Arrival of a request to its end.", labels=("model",)
        )
        for model, measures in models.items():
            for (status, error), count in measures.ended.items():
                requests.add_metric((model, str(status), error), count)
            tokens.add_metric((model, "prompt"), measures.prompt_tokens)
            tokens.add_metric((model, "cached"), measures.cached_tokens)
            tokens.add_metric((model, "completion"), measures.completion_tokens)
            retries.add_metric((model,), measures.retries)
            for kind, count in measures.upstream_errors.items():
                upstream.add_metric((model, kind), count)
            for reason, count in measures.decisions.items():
                decisions.add_metric((model, self._router.policy.name, reason), count)
            for (reason, outcome), count in measures.handovers.items():
                handovers.add_metric((model, reason, outcome), count)
            in_flight.add_metric((model,), measures.in_flight)
            for family, histogram in (
                (first, measures.time_to_first_token),
                (inter, measures.inter_token),
                (duration, measures.duration),
            ):
                family.add_metric((model,), buckets=histogram.cumulative(), sum_value=histogram.sum_s)
        yield from (
            requests,
            tokens,
            retries,
            upstream,
            decisions,
            handovers,
            in_flight,
            first,
            inter,
            duration,
        )
        yield from self._collect_replicas()

    def _collect_replicas(self) -> Iterator[Metric]:
        labels = ("model", "replica")
        up = GaugeMetricFamily(
            "headrace_replica_up", "1 while the replica takes new requests.", labels=labels
        )
        booked = GaugeMetricFamily(
            "headrace_replica_booked_requests", "Requests of this gateway on the replica.", labels=labels
        )
        running = GaugeMetricFamily(
            "headrace_replica_running", "Requests in the engine's batch.", labels=labels
        )
        waiting = GaugeMetricFamily(
            "headrace_replica_waiting", "Requests queued in the engine.", labels=labels
        )
        kv_use = GaugeMetricFamily(
            "headrace_replica_kv_use", "Share of KV blocks in use, 0 to 1.", labels=labels
        )
        received = CounterMetricFamily(
            "headrace_replica_received_tokens", "Prompt tokens got from other replicas.", labels=labels
        )
        for load in self._router.loads.all():
            key = (load.replica.model, load.replica.id)
            up.add_metric(key, int(load in self._router.eligible(load.replica.model)))
            booked.add_metric(key, load.booked)
            received.add_metric(key, self.received_tokens.get(load.replica.id, 0))
            report = load.last_report
            if report is not None:
                running.add_metric(key, report.running)
                waiting.add_metric(key, report.waiting)
                kv_use.add_metric(key, report.kv_use)
        yield from (up, booked, running, waiting, kv_use, received)
