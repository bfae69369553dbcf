"""The page that the scale test writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from headrace.gateway.merged_metrics import Family

Parts = Sequence[Sequence[Family]]
"""What each gateway process has measured."""


class Reading(NamedTuple):
    """At one moment: of each gateway process, and of all streams."""

    at_s: float
    cpu_ns: tuple[int, ...]
    memory_bytes: tuple[int, ...]
    descriptors: tuple[int, ...]
    open: int
    ended: int
    events: int


class Index(NamedTuple):
    """What the caches hold and what each gateway's index knows of it, after the last token."""

    resident: int  # blocks in all caches
    distinct: int
    known: tuple[int, ...]  # blocks by each gateway, one on n replicas counted n times
    after_s: float  # when that was read, or when all agreed

    @property
    def agrees(self) -> bool:
        return all(count == self.resident for count in self.known)


class Measured(NamedTuple):
    """One run."""

    setting: str
    replicas: int
    started_s: float
    readings: tuple[Reading, ...]  # idle, then from the window's begin to its end
    before: Parts  # at the window's begin
    after: Parts  # and at its end
    final: Parts
    cached: Index


def value(families: Sequence[Family], name: str, **labels: str) -> float:
    """The sum of the samples of a name that carry the labels."""
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and all(dict(sample.labels).get(key) == text for key, text in labels.items())
    )


def quantile_s(families: Sequence[Family], name: str, share: float) -> float:
    """The bucket's upper bound below which a share of a histogram's observations lies."""
    rows = sorted(
        (float(dict(sample.labels)["le"]), sample.value)
        for family in families
        for sample in family.samples
        if sample.name == f"{name}_bucket"
    )
    total = rows[-1][1] if rows else 0.0
    return next((bound for bound, count in rows if total and count >= share * total), 0.0)


def render(measured: Measured, ttft_s: Sequence[float], errors: int) -> str:
    """Markdown."""
    idle, first, last = measured.readings[0], measured.readings[1], measured.readings[-1]
    window_s = last.at_s - first.at_s
    before, after, index = measured.before, measured.after, measured.cached
    gateways = len(first.cpu_ns)
    ordered = sorted(ttft_s)
    cpu = [(b - a) / 1e9 / window_s for a, b in zip(first.cpu_ns, last.cpu_ns, strict=True)]

    def per_s(name: str, **labels: str) -> float:
        pairs = zip(before, after, strict=True)
        return sum(value(b, name, **labels) - value(a, name, **labels) for a, b in pairs) / window_s

    def rate(name: str, kind: str) -> str:
        return f"{per_s(name, kind=kind) / gateways:,.0f}/s"

    def decision_us(share: float) -> str:
        return _each(1e6 * quantile_s(part, "headrace_decision_seconds", share) for part in after)

    def lost(name: str, kind: str) -> float:
        return sum(value(part, name, kind=kind) for part in measured.final)

    ended = last.ended - first.ended
    events_per_s = (last.events - first.events) / window_s
    agreed = "all agreed" if index.agrees else "they had not agreed"
    rows = [
        ("replicas; all started after", f"{measured.replicas}; {measured.started_s:.0f} s"),
        ("gateway processes; window", f"{gateways}; {window_s:.0f} s"),
        ("streams open at the window's begin; end", f"{first.open:,}; {last.open:,}"),
        ("answers ended in it; errors in all", f"{ended:,}; {errors}"),
        ("events to clients", f"{events_per_s:,.0f}/s"),
        ("time to first token, median; p99", f"{_share(ordered, 0.5):.2f}; {_share(ordered, 0.99):.2f} s"),
        ("decisions", f"{per_s('headrace_decision_seconds_count'):.0f}/s"),
        ("a decision takes at most, median, by gateway", f"{decision_us(0.5)} µs"),
        ("... p99", f"{decision_us(0.99)} µs"),
        ("KV event messages that each gateway reads", rate("headrace_kv_feed_total", "messages")),
        ("blocks stored in each index", rate("headrace_index_events_total", "stored")),
        ("CPU of each gateway, cores", ", ".join(f"{one:.2f}" for one in cpu)),
        ("memory of each gateway, idle, MB", _each(one / 1e6 for one in idle.memory_bytes)),
        (
            "descriptors of each gateway, idle; at the end",
            f"{_each(idle.descriptors)}; {_each(last.descriptors)}",
        ),
        ("blocks in all caches; distinct", f"{index.resident:,}; {index.distinct:,}"),
        (
            "... known to each gateway",
            f"{_each(index.known)}: {agreed} {index.after_s:.1f} s after the last token",
        ),
        ("gaps in KV streams", f"{lost('headrace_kv_feed_total', 'gaps'):.0f}"),
        ("... given up", f"{lost('headrace_index_events_total', 'gaps_given_up'):.0f}"),
    ]
    table = "\n".join(f"| {name} | {what} |" for name, what in rows)
    memory = "\n".join(
        f"| {reading.at_s - first.at_s:.0f} | {_each(one / 1e6 for one in reading.memory_bytes)} | {reading.open:,} |"
        for reading in measured.readings[1:]
    )
    return (
        f"# A fleet of {measured.replicas} simulated replicas\n\n{measured.setting}\n\n| what | measured |\n|---|---|\n"
        f"{table}\n\n| s | memory of each gateway, MB | streams open |\n|---|---|---|\n{memory}\n"
    )


def _each(values: Iterable[float]) -> str:
    return ", ".join(f"{one:,.0f}" for one in values)


def _share(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
