"""Which metrics can be believed. Pure.

A fleet that scales down on a lie drops the load that it cannot see, so one doubt is enough to stay; a fleet that scales
up on one pays for GPUs, so a doubtful field is left out there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from headrace.fleet.scaling_spec import PoolSample

MOST_REQUESTS = 10_000_000
MOST_BACKLOG_S = 86_400.0
MOST_REPLICAS = 100_000
FULL = 1.0 + 1e-6

NEEDED = ("held", "waiting", "running", "kv_use", "backlog_s", "arrived")
"""Without one of these nobody can say that a replica is not needed."""

_BOUNDS: dict[str, float] = {
    "held": MOST_REQUESTS, "waiting": MOST_REQUESTS, "running": MOST_REQUESTS, "kv_use": FULL,
    "backlog_s": MOST_BACKLOG_S, "arrived": 1e15, "arrived_work_s": 1e15, "utilisation": FULL,
    "cold_start_s": MOST_BACKLOG_S,
}  # fmt: skip


def believable(sample: PoolSample) -> tuple[PoolSample, tuple[str, ...]]:
    """The sample without what cannot be, and every doubt about it in words."""
    doubts = []
    absurd: dict[str, Any] = {}
    for name, most in _BOUNDS.items():
        value = getattr(sample, name)
        if value is not None and not (isfinite(value) and 0 <= value <= most):
            doubts.append(f"{name} is {value:g}, not within 0..{most:g}")
            absurd[name] = None
    doubts += [
        f"{name} is {getattr(sample, name)}"
        for name in ("ready", "starting")
        if not 0 <= getattr(sample, name) <= MOST_REPLICAS
    ]
    if absurd:
        sample = replace(sample, **absurd)
    doubts += [
        f"{name} is missing" for name in NEEDED if getattr(sample, name) is None and name not in absurd
    ]
    if contradictions := _contradictions(sample):
        doubts += contradictions
        # What contradicts each other cannot both ask for replicas; the gateway's own queue and arrivals may.
        sample = replace(sample, waiting=None, kv_use=None, backlog_s=None)
    return sample, tuple(doubts)


def _contradictions(sample: PoolSample) -> list[str]:
    said = []
    running, waiting = sample.running or 0, sample.waiting or 0
    if sample.ready <= 0 and (running or waiting):
        said.append(f"no replica is ready, yet {running} run and {waiting} wait in engines")
    if sample.running == 0 and sample.kv_use is not None and sample.kv_use > 0.5:
        said.append(f"nothing runs, yet {sample.kv_use:.0%} of the KV cache is held")
    if sample.running == 0 and waiting > 0:
        said.append(f"{waiting} wait in engines where nothing runs")
    if waiting == 0 and sample.held == 0 and sample.running == 0 and (sample.backlog_s or 0) > 1.0:
        said.append(f"nothing waits or runs, yet the backlog is {sample.backlog_s:.1f} s")
    return said


def history_doubts(history: Sequence[PoolSample], now_s: float, stale_s: float) -> tuple[str, ...]:
    """What is wrong with the history as a whole: empty, old, from the future, counters that went back."""
    if not history:
        return ("there are no metrics",)
    latest = history[-1]
    doubts = []
    if not isfinite(latest.at_s) or latest.at_s > now_s + 1.0:
        doubts.append(f"the latest metrics are of {latest.at_s - now_s:.1f} s from now")
    elif now_s - latest.at_s > stale_s:
        doubts.append(f"the latest metrics are {now_s - latest.at_s:.1f} s old, more than {stale_s:g}")
    if len(history) > 1:
        before = history[-2]
        for name in ("at_s", "arrived", "arrived_work_s"):
            then, now = getattr(before, name), getattr(latest, name)
            if then is not None and now is not None and now < then:
                doubts.append(f"{name} went back from {then:g} to {now:g}")
    return tuple(doubts)
