"""Prefix knowledge as Prometheus reads it: predicted and real hits, how prompts are known, the index's size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.gateway.context import GatewayContext

if TYPE_CHECKING:
    from headrace.gateway.prefixes import Prefixes


class PrefixMetrics(Collector):
    """Of one gateway; nothing while its policy does not ask for prefixes."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus-client at each scrape."""
        if (prefixes := self._context.prefixes) is not None:
            yield from self._collect_prompts(prefixes)
            yield from self._collect_index(prefixes)

    def _collect_prompts(self, prefixes: Prefixes) -> Iterator[Metric]:
        read = CounterMetricFamily(
            "headrace_prompts",
            "Prompts by what they were known by, and why.",
            labels=("model", "basis", "reason"),
        )
        hits = CounterMetricFamily(
            "headrace_prefix_hit_tokens",
            "Prefix hits of the same requests: predicted when routing, and reported by the engines.",
            labels=("model", "basis", "kind"),
        )
        checked = CounterMetricFamily(
            "headrace_token_checks", "Prompt lengths compared with the engine's.", labels=("model", "outcome")
        )
        trusted = GaugeMetricFamily(
            "headrace_tokens_trusted", "1 while our prompt lengths are the engine's.", labels=("model",)
        )
        for model, known in prefixes.prompts.models().items():
            for (how, reason), count in known.read.items():
                read.add_metric((model, how.value, reason), count)
            for how, tokens in known.check.predicted_tokens.items():
                hits.add_metric((model, how.value, "predicted"), tokens)
                hits.add_metric((model, how.value, "actual"), known.check.cached_tokens[how])
            checked.add_metric((model, "equal"), known.check.checked - known.check.mismatched)
            checked.add_metric((model, "different"), known.check.mismatched)
            trusted.add_metric((model,), int(known.check.trusted))
        yield from (read, hits, checked, trusted)

    def _collect_index(self, prefixes: Prefixes) -> Iterator[Metric]:
        index, feed = prefixes.index, prefixes.feed
        yield GaugeMetricFamily("headrace_index_blocks", "Blocks known to be cached.", index.num_blocks)
        yield GaugeMetricFamily("headrace_index_bytes", "Memory of the prefix index.", index.memory_bytes)
        yield GaugeMetricFamily(
            "headrace_kv_streams", "Replicas whose KV events are followed.", feed.num_streams
        )
        yield GaugeMetricFamily(
            "headrace_kv_streams_catching_up", "Of those, not wholly known yet.", feed.num_catching_up
        )
        events = CounterMetricFamily("headrace_index_events", "What KV events brought.", labels=("kind",))
        for kind in (
            "batches",
            "duplicates",
            "foreign",
            "gaps_given_up",
            "stored",
            "removed",
            "orphans",
            "refused",
        ):
            events.add_metric((kind,), getattr(index.counts, kind))
        yield events
        replays = CounterMetricFamily("headrace_kv_feed", "How KV events came in.", labels=("kind",))
        for kind in ("messages", "unreadable", "gaps", "replays", "replayed", "given_up"):
            replays.add_metric((kind,), getattr(feed.counts, kind))
        yield replays
        yield GaugeMetricFamily(
            "headrace_kv_feed_lag_seconds", "Age of the newest KV event batch when read.", feed.counts.lag_s
        )
