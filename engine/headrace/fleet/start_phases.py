"""How long each phase of a replica's start took. Pure.

asked for ── placing ──> its actor is made ── process ──> the backend's own phases ──> ready
"""

from __future__ import annotations

from collections.abc import Iterable

Phases = tuple[tuple[str, float], ...]
"""Names and seconds, in the order in which they began."""


def of_start(asked_s: float, placed_s: float, ready_s: float, backend: Phases) -> Phases:
    """`backend` are the phases that the backend told; what lies between its actor's making and the first of them is the
    start of a process. Times are on one clock; the sum is the time from asking to ready."""
    took_s = {"placing": placed_s - asked_s, "process": ready_s - placed_s - sum(s for _, s in backend)}
    for name, seconds in backend:
        took_s[name] = took_s.get(name, 0.0) + seconds
    return tuple((name, max(0.0, seconds)) for name, seconds in took_s.items())


def in_words(phases: Iterable[tuple[str, float]]) -> str:
    """`imports 14 s, engine 16 s, weights 0.2 s`; phases that took no time are left out."""
    told = [f"{name} {_seconds(seconds)}" for name, seconds in phases if seconds >= 0.05]
    return ", ".join(told) or "at once"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
