"""How many replicas a pool should have. Pure.

    desired = ceil(max over the inputs of the replicas that each asks for)

    waiting   (held + waiting) / target_waiting, but no more than R and what catches up with their work
    backlog   R · backlog_s / target_wait_s          kv        R · kv_use / target_kv
    work      D + headroom · sqrt(D)
    ahead     the same with D as it will be when a replica asked for now is ready

The first three see trouble that is there; with a cold start of a minute that is a minute late. `work` sees what comes:
D is the replica-seconds of work that arrive per second, by the paces that the replicas' own steps have shown. Kept
beyond it is a square root (Halfin and Whitt, Operations Research 29, 1981): what a small fleet needs as reserve, a
large one wastes. `ahead` follows the trend of D over the time that a start takes. Windows grow with the cold start:
what comes and goes faster than replicas do is not chased. Measured in bench/results/scaling_study.md.

Up at once; down to the highest need of the last `stabilisation_s` (or of a cold start, if that is longer: what is given
back too early costs one), and by a few at a time. Utilisation never asks for replicas, for a decoding GPU reads 100% at
any load; it only vetoes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil, sqrt
from typing import NamedTuple

from headrace.fleet.arriving_work import ArrivingWork
from headrace.fleet.scaling_spec import PoolSample, ScalingDecision, ScalingSpec
from headrace.fleet.scaling_trust import believable, history_doubts

WORK_WINDOW_S = 30.0
"""Over which arriving work is averaged at least: long enough for some dozens of requests."""

WORK_WINDOW_COLD = 0.5
"""And at least so much of a cold start: what comes and goes faster cannot be followed."""

DRAIN_S = 15.0
DRAIN_COLD = 0.5
"""Time in which those that are added are to catch up with a queue: at least, and of a cold start."""

TREND_WINDOW_S = 60.0
TREND_WINDOW_COLD = 0.5
"""Of the three windows that must rise one after the other before it counts as a trend: at least, and of a cold start.
A burst makes the last one rise, not the one before."""


def decide(history: Sequence[PoolSample], spec: ScalingSpec, now_s: float) -> ScalingDecision:
    """`history` is of one pool, oldest first, the last sample of now. Of it, no more is looked at than `memory_s`.
    Never raises on what the samples say."""
    doubts = history_doubts(history, now_s, spec.stale_s)
    if not history:
        return ScalingDecision(spec.min_replicas, 0, f"{doubts[0]}: the minimum", doubts=doubts)
    latest, own_doubts = believable(history[-1])
    doubts += own_doubts
    current = max(0, latest.ready) + max(0, latest.starting)
    cold_s = spec.cold_start_s if latest.cold_start_s is None else latest.cold_start_s
    since_s = latest.at_s - memory_s(spec, cold_s)
    recent = [sample for sample in history[:-1] if since_s <= sample.at_s <= latest.at_s]
    samples = [*(believable(sample)[0] for sample in recent), latest]
    usable = not any("old, more than" in doubt or "from now" in doubt for doubt in doubts)
    needs = _needs(samples, spec, cold_s) if usable else {}
    floor = _floor(spec, now_s, cold_s)
    if doubts:
        return _doubted(current, floor, spec, needs, doubts)
    if _is_idle(samples, spec, now_s) and floor == 0:
        return ScalingDecision(
            0, current, f"no arrivals for {spec.idle_s:g} s and nothing in flight: to zero", needs
        )
    least = max(floor, 1 if current or latest.held else 0)
    if current == 0 and latest.held:
        needs = {**needs, "held": 1.0}
    now = _Now(samples, spec, current, least, cold_s, needs)
    wanted = min(spec.max_replicas, max(least, _rounded(needs)))
    return _up(now, wanted) if wanted >= current else _down(now, wanted)


def memory_s(spec: ScalingSpec, cold_s: float) -> float:
    """As far back as `decide` looks."""
    window_s = _work_window_s(cold_s)
    longest = max(spec.stabilisation_s, cold_s) + window_s, spec.idle_s, 3 * _trend_window_s(cold_s)
    return max(longest) + 2 * WORK_WINDOW_S


def _doubted(
    current: int, floor: int, spec: ScalingSpec, needs: Mapping[str, float], doubts: tuple[str, ...]
) -> ScalingDecision:
    target = max(current, min(_rounded(needs), current + spec.max_step_up), floor)
    return ScalingDecision(
        min(spec.max_replicas, target), current, f"not below {current}: {doubts[0]}", needs, doubts
    )


class _Now(NamedTuple):
    """What a decision is made of, believed."""

    samples: Sequence[PoolSample]
    spec: ScalingSpec
    current: int
    least: int
    cold_s: float
    needs: Mapping[str, float]

    @property
    def strongest(self) -> str:
        return max(self.needs, key=lambda one: self.needs[one], default="minimum")

    def decision(self, target: int, reason: str) -> ScalingDecision:
        return ScalingDecision(target, self.current, reason, self.needs)


def decide_pair(
    prefill: Sequence[PoolSample],
    decode: Sequence[PoolSample],
    specs: tuple[ScalingSpec, ScalingSpec],
    now_s: float,
) -> tuple[ScalingDecision, ScalingDecision]:
    """Prefill and decode pool of one model. Either alone serves nothing, so both are there or neither is; and while
    one grows the other does not shrink: what presses on the first arrives at the second a moment later."""
    first, second = decide(prefill, specs[0], now_s), decide(decode, specs[1], now_s)
    if (first.target == 0) != (second.target == 0):
        first, second = _not_zero(first, specs[0]), _not_zero(second, specs[1])
    if first.target > first.current and second.target < second.current:
        second = replace(second, target=second.current, reason="kept: its prefill pool grows")
    elif second.target > second.current and first.target < first.current:
        first = replace(first, target=first.current, reason="kept: its decode pool grows")
    return first, second


def _not_zero(decision: ScalingDecision, spec: ScalingSpec) -> ScalingDecision:
    if decision.target:
        return decision
    one = min(spec.max_replicas, max(1, spec.min_replicas))
    return replace(decision, target=one, reason="one kept: the other pool of the pair serves")


def _up(now: _Now, wanted: int) -> ScalingDecision:
    spec, current, name = now.spec, now.current, now.strongest
    need = now.needs.get(name, 0.0)
    if wanted == current:
        return now.decision(current, f"{name} asks for what is there")
    if current >= now.least and need - current <= spec.tolerance * current:
        return now.decision(current, f"{name} asks for {need:.1f}: within tolerance")
    target = max(min(wanted, current + spec.max_step_up), now.least)
    held = now.samples[-1].held
    if current == 0 and held:
        return now.decision(target, f"{held} held where no replica runs")
    if need <= now.least:
        return now.decision(target, f"at least {now.least}")
    bound = f", {target} is the bound" if target < ceil(need - 1e-6) else ""
    return now.decision(target, f"{name} asks for {need:.1f}{bound}")


def _down(now: _Now, wanted: int) -> ScalingDecision:
    spec, current, samples = now.spec, now.current, now.samples
    latest = samples[-1]
    if current > spec.max_replicas:
        return now.decision(spec.max_replicas, f"more than the maximum of {spec.max_replicas}")
    if latest.starting:
        # They were asked for a moment ago; what they are for has not been seen to pass.
        return now.decision(current, f"{latest.starting} start: nothing is given back")
    window_s = max(spec.stabilisation_s, now.cold_s)
    seen_s = latest.at_s - _last_growth_s(samples)
    if seen_s < window_s:
        return now.decision(current, f"{seen_s:.0f} s since it grew, of {window_s:g} before a scale-down")
    highest = min(spec.max_replicas, max(wanted, _highest(samples, spec, latest.at_s - window_s, now.cold_s)))
    if highest >= current or (highest > 0 and current - highest < spec.tolerance * current):
        return now.decision(current, f"{highest} were needed within {window_s:g} s")
    target = max(highest, now.least, current - spec.max_step_down)
    busy = latest.utilisation
    if busy is not None and busy > spec.busy_utilisation and _is_pressed(latest, spec):
        return now.decision(current, f"vetoed: {busy:.0%} busy, and pressed")
    return now.decision(target, f"at most {highest} were needed within {window_s:g} s")


def _last_growth_s(samples: Sequence[PoolSample]) -> float:
    """When the pool was last asked to grow, or the first moment that is known: whatever asked for it, a trend that
    did not hold included, no replica is given back within a window of its being asked for."""
    for before, after in pairwise(reversed(samples)):
        if before.ready + before.starting > after.ready + after.starting:
            return before.at_s
    return samples[0].at_s


def _is_pressed(sample: PoolSample, spec: ScalingSpec) -> bool:
    return (sample.held or 0) + (sample.waiting or 0) > 0 or (sample.kv_use or 0.0) > 0.5 * spec.target_kv


def _needs(samples: Sequence[PoolSample], spec: ScalingSpec, cold_s: float) -> dict[str, float]:
    """Replicas that each input asks for now."""
    arriving, now_s, window_s = ArrivingWork(samples), samples[-1].at_s, _work_window_s(cold_s)
    work = arriving.rate(now_s - window_s, now_s, covered=1 / 3)
    needs = _pressing(samples[-1], spec, work, cold_s)
    if work is not None:
        needs["work"] = _staffed(work, spec)
        ahead = work + arriving.trend(now_s, _trend_window_s(cold_s)) * (cold_s + window_s / 2)
        needs["ahead"] = _staffed(min(ahead, 2 * work), spec)  # a trend is not believed beyond a doubling
    return needs


def _work_window_s(cold_s: float) -> float:
    return max(WORK_WINDOW_S, WORK_WINDOW_COLD * cold_s)


def _trend_window_s(cold_s: float) -> float:
    return max(TREND_WINDOW_S, TREND_WINDOW_COLD * cold_s)


def _pressing(sample: PoolSample, spec: ScalingSpec, work: float | None, cold_s: float) -> dict[str, float]:
    needs = {}
    ready = sample.ready
    if sample.held is not None or sample.waiting is not None:
        queued = (sample.held or 0) + (sample.waiting or 0)
        needs["waiting"] = queued / spec.target_waiting
        if work and sample.arrived and sample.arrived_work_s:
            # No more than catches up in time: by its length alone a queue that grows while replicas start buys a fleet
            # that stands idle once it is there. Where work that these replicas should manage queues up, requests take
            # that much more than is believed.
            queued_work_s = queued * sample.arrived_work_s / sample.arrived * max(1.0, ready / work)
            added = queued_work_s / max(DRAIN_S, DRAIN_COLD * cold_s)
            caught_up = ready + max(added, 1.0 + spec.tolerance * ready)
            needs["waiting"] = min(needs["waiting"], caught_up)
    if sample.kv_use is not None and ready > 0:
        needs["kv"] = ready * sample.kv_use / spec.target_kv
    if sample.backlog_s is not None and ready > 0:
        needs["backlog"] = ready * sample.backlog_s / spec.target_wait_s
    return needs


def _staffed(work: float, spec: ScalingSpec) -> float:
    return work + spec.headroom * sqrt(work)


def _highest(samples: Sequence[PoolSample], spec: ScalingSpec, since_s: float, cold_s: float) -> int:
    """The most that was needed at any moment since then."""
    arriving, window_s = ArrivingWork(samples), _work_window_s(cold_s)
    highest = 0
    for sample in reversed(samples):
        if sample.at_s < since_s:
            break
        work = arriving.rate(sample.at_s - window_s, sample.at_s, covered=1 / 3)
        needs = _pressing(sample, spec, work, cold_s)
        if work is not None:
            needs["work"] = _staffed(work, spec)
        highest = max(highest, _rounded(needs))
    return highest


def _rounded(needs: Mapping[str, float]) -> int:
    # A millionth less: 3 · 0.8 / 0.8 is 3.0000000000000004 and asks for no fourth.
    return ceil(max(needs.values(), default=0.0) - 1e-6)


def _floor(spec: ScalingSpec, now_s: float, cold_s: float) -> int:
    hints = [hint.min_replicas for hint in spec.schedule if hint.applies(now_s, cold_s)]
    return min(spec.max_replicas, max([spec.min_replicas, *hints]))


def _is_idle(samples: Sequence[PoolSample], spec: ScalingSpec, now_s: float) -> bool:
    if spec.min_replicas > 0 or samples[0].at_s > now_s - spec.idle_s:
        return False
    window = [sample for sample in samples if sample.at_s >= now_s - spec.idle_s]
    quiet = all(
        (sample.held, sample.waiting, sample.running) == (0, 0, 0) and sample.arrived == samples[-1].arrived
        for sample in window
    )
    return quiet and len(window) > 1
