"""How many replicas there should be. No clock: a history is a list.

`AUTOSCALER_EXAMPLES=10000` runs the long version.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from math import inf, nan
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.fleet.autoscaler import decide, decide_pair
from headrace.fleet.scaling_spec import PoolSample, ScalingSpec, ScheduleHint

EXAMPLES = int(os.environ.get("AUTOSCALER_EXAMPLES", "200"))
SPEC = ScalingSpec(min_replicas=1, max_replicas=50, stabilisation_s=120, cold_start_s=60)
STEP_S = 5.0


def sample(at_s: float, ready: int, work: float = 0.0, **changes: float | None) -> PoolSample:
    """A pool in order, to which `work` replica-seconds of work have come so far."""
    plain = PoolSample(
        at_s, ready, held=0, waiting=0, running=4 * ready, kv_use=0.1 if ready else 0.0, backlog_s=0.0,
        arrived=int(work * 2), arrived_work_s=work, utilisation=0.5, cold_start_s=60.0,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def steady(ready: int, rate: Callable[[float], float], for_s: float = 400.0) -> list[PoolSample]:
    """A history in which `rate(t)` replica-seconds of work came per second."""
    history, work = [], 0.0
    for tick in range(int(for_s / STEP_S) + 1):
        history.append(sample(tick * STEP_S, ready, work))
        work += rate(tick * STEP_S) * STEP_S
    return history


def test_the_fleet_stays_while_need_and_supply_agree() -> None:
    decision = decide(steady(6, lambda t: 4.0), SPEC, 400)
    assert (decision.target, decision.doubts) == (6, ())
    assert decision.needs["work"] == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("changes", "name", "target"),
    [
        ({"held": 30, "waiting": 10}, "waiting", 10),
        ({"kv_use": 0.98}, "kv", 8),
        ({"backlog_s": 2.5}, "backlog", 15),
    ],
)
def test_it_grows_at_once_by_what_presses_most(changes: dict[str, float], name: str, target: int) -> None:
    history = steady(6, lambda t: 1.0)
    history[-1] = replace(history[-1], **changes)  # type: ignore[arg-type]
    decision = decide(history, SPEC, 400)
    assert decision.target == target
    assert decision.reason.startswith(f"{name} asks for")


def test_a_long_queue_asks_for_what_catches_up_with_it_not_for_a_fleet() -> None:
    history = steady(6, lambda t: 6.0)
    # 200 requests of 0.5 s each: 100 s of work, in the 30 s that half a cold start takes.
    history[-1] = replace(history[-1], held=200)
    assert decide(history, SPEC, 400).needs["waiting"] == pytest.approx(6 + 100 / 30)
    # Six replicas that cannot do the work of 2 take three times as long for each as is believed.
    history = steady(6, lambda t: 2.0)
    history[-1] = replace(history[-1], held=200)
    assert decide(history, SPEC, 400).needs["waiting"] == pytest.approx(6 + 3 * 100 / 30)


def test_work_that_has_come_asks_for_replicas_before_anything_waits() -> None:
    assert decide(steady(4, lambda t: 9.0), SPEC, 400).target == 12


def test_a_rising_trend_is_provided_for_as_far_ahead_as_a_start_takes() -> None:
    rising = steady(20, lambda t: 4 + t / 30)
    soon, late = replace(rising[-1], cold_start_s=10.0), replace(rising[-1], cold_start_s=180.0)
    assert (
        decide([*rising[:-1], late], SPEC, 400).needs["ahead"]
        > decide([*rising[:-1], soon], SPEC, 400).needs["ahead"]
    )
    assert decide([*rising[:-1], late], SPEC, 400).target > 20


def test_it_gives_back_only_what_was_not_needed_for_a_window() -> None:
    quiet = steady(12, lambda t: 9.0 if t < 300 else 1.0)
    assert decide(quiet, SPEC, 400).target == 12
    assert decide(steady(12, lambda t: 1.0), SPEC, 400).target == 12 - SPEC.max_step_down
    assert "since it grew, of 120" in decide(steady(12, lambda t: 1.0, 60), SPEC, 60).reason


def test_a_longer_cold_start_makes_it_slower_to_give_back() -> None:
    quiet = steady(12, lambda t: 9.0 if t < 200 else 1.0)
    assert decide(quiet, SPEC, 400).target < 12
    slow = [replace(one, cold_start_s=300.0) for one in quiet]
    assert decide(slow, SPEC, 400).target == 12


def test_replicas_that_start_count_and_are_not_given_back() -> None:
    history = steady(6, lambda t: 9.0)
    history[-1] = replace(history[-1], starting=6)
    assert decide(history, SPEC, 400).target == 12
    idle = steady(6, lambda t: 0.1)
    idle[-1] = replace(idle[-1], starting=6)
    assert decide(idle, SPEC, 400).target == 12


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_use": None}, "kv_use is missing"),
        ({"waiting": None}, "waiting is missing"),
        ({"held": -1}, "held is -1"),
        ({"kv_use": nan}, "kv_use is nan"),
        ({"backlog_s": inf}, "backlog_s is inf"),
        ({"utilisation": 7.0}, "utilisation is 7"),
        ({"running": 0, "waiting": 9}, "9 wait in engines where nothing runs"),
        ({"running": 0, "kv_use": 0.9}, "nothing runs, yet 90%"),
        ({"arrived": 1}, "arrived went back"),
        ({"at_s": 100.0}, "old, more than"),
        ({"at_s": 900.0}, "from now"),
    ],
)
def test_metrics_that_cannot_be_believed_never_scale_down_and_it_says_why(
    changes: dict[str, float | None], said: str
) -> None:
    history = steady(12, lambda t: 1.0)
    assert decide(history, SPEC, 400).target < 12
    history[-1] = replace(history[-1], **changes)  # type: ignore[arg-type]
    decision = decide(history, SPEC, 400)
    assert decision.target == 12
    assert said in decision.reason or any(said in doubt for doubt in decision.doubts)


def test_an_absurd_queue_does_not_buy_a_fleet() -> None:
    history = steady(6, lambda t: 1.0)
    history[-1] = replace(history[-1], waiting=10**12)
    assert decide(history, SPEC, 400).target == 6


def test_utilisation_vetoes_but_never_asks() -> None:
    history = steady(12, lambda t: 1.0)
    assert decide([replace(one, utilisation=1.0) for one in history], SPEC, 400).target < 12
    pressed = [replace(one, utilisation=1.0, kv_use=0.5) for one in history]
    assert decide(pressed, SPEC, 400).reason.startswith("vetoed")


ZERO = replace(SPEC, min_replicas=0, idle_s=60.0)


def test_it_goes_to_zero_only_after_silence_and_comes_back_for_one_held_request() -> None:
    silent = [replace(one, running=0, kv_use=0.0) for one in steady(1, lambda t: 0.0)]
    assert decide(silent, ZERO, 400).target == 0
    assert decide([*silent[:-1], replace(silent[-1], running=1)], ZERO, 400).target == 1
    assert decide([*silent[:-1], replace(silent[-1], arrived=1)], ZERO, 400).target == 1
    gone = [replace(one, ready=0) for one in silent]
    assert decide(gone, ZERO, 400).target == 0
    assert decide([*gone[:-1], replace(gone[-1], held=1, arrived=1)], ZERO, 400).target == 1


def test_a_schedule_hint_is_met_before_its_hour() -> None:
    spec = replace(ZERO, schedule=(ScheduleHint(1000, 2000, 7),))
    silent = [replace(one, running=0, kv_use=0.0) for one in steady(1, lambda t: 0.0)]
    later = [replace(one, at_s=one.at_s + 545) for one in silent]
    assert decide(silent, spec, 400).target == 0
    assert decide(later, spec, 945).target == 7  # a cold start of 60 s before it


def test_a_pair_is_there_or_gone_together_and_shrinks_in_step() -> None:
    silent = [replace(one, running=0, kv_use=0.0) for one in steady(1, lambda t: 0.0)]
    busy = steady(6, lambda t: 20.0)
    calm = steady(6, lambda t: 1.0)
    first, second = decide_pair(silent, steady(2, lambda t: 1.0), (ZERO, ZERO), 400)
    assert (first.target, second.target) == (1, 2)
    assert [one.target for one in decide_pair(silent, silent, (ZERO, ZERO), 400)] == [0, 0]
    first, second = decide_pair(busy, calm, (SPEC, SPEC), 400)
    assert first.target > 6
    assert second.target == 6
    assert "prefill pool grows" in second.reason


def walk(seed: int, spec: ScalingSpec, steps: int = 60) -> Iterator[tuple[PoolSample, int, bool]]:
    """A pool that does as decided, under random load, with metrics that are now and then missing or absurd.
    Each sample, the target decided on it, and whether it was believable."""
    rng = Random(seed)
    history: list[PoolSample] = []
    ready, starts, work, arrived = rng.randint(spec.min_replicas, spec.max_replicas), [], 0.0, 0
    level = rng.choice([0.0, 0.5, 3.0, 20.0])
    for tick in range(steps):
        now_s = tick * 10.0
        if rng.random() < 0.05:
            level = rng.choice([0.0, 0.0, 0.5, 3.0, 20.0, 60.0])
        ready += sum(1 for due_s in starts if due_s <= now_s)
        starts = [due_s for due_s in starts if due_s > now_s]
        came = rng.expovariate(1 / level) * 10.0 if level else 0.0
        work, arrived = work + came, arrived + int(came * 2 + (came > 0))
        over = max(0.0, level - ready)
        one = PoolSample(
            now_s,
            ready,
            len(starts),
            held=int(over * 3) if ready else int(came > 0),
            waiting=int(over) if ready else 0,
            running=int(min(level, ready) * 5 + (came > 0)) if ready else 0,
            kv_use=min(1.0, level / ready) if ready else 0.0,
            backlog_s=over / ready if ready else 0.0,
            arrived=arrived,
            arrived_work_s=work,
            utilisation=rng.random(),
            cold_start_s=30.0,
        )
        if one.running == 0:
            one = replace(one, kv_use=0.0, waiting=0, backlog_s=0.0)
        is_sound = rng.random() > 0.1
        if not is_sound:
            name = rng.choice(["held", "waiting", "running", "kv_use", "backlog_s", "arrived"])
            one = replace(one, **{name: rng.choice([None, nan, -3, inf])})
        history.append(one)
        target = decide(history, spec, now_s).target
        yield one, target, is_sound
        current = ready + len(starts)
        starts += [now_s + 30.0] * max(0, target - current)
        for _ in range(max(0, current - target)):
            if starts:
                starts.pop()
            else:
                ready -= 1


specs = st.builds(
    lambda least, more, headroom, window: ScalingSpec(
        min_replicas=least, max_replicas=least + more, headroom=headroom, stabilisation_s=window, idle_s=60.0
    ),
    st.integers(0, 5),
    st.integers(1, 40),
    st.floats(0, 3),
    st.sampled_from([30.0, 60.0, 120.0]),
)


@settings(max_examples=EXAMPLES)
@given(st.integers(0, 2**32), specs)
def test_whatever_the_load_targets_are_within_bounds_and_do_not_flap(seed: int, spec: ScalingSpec) -> None:
    moves, window_s = [], max(spec.stabilisation_s, 30.0)
    for one, target, is_sound in walk(seed, spec):
        current = one.ready + one.starting
        assert spec.min_replicas <= target <= spec.max_replicas
        if not is_sound:
            assert target >= min(current, spec.max_replicas), "a doubt scaled down"
        if target == 0 and current > 0:
            assert (one.held, one.waiting, one.running) == (0, 0, 0), "to zero while something is in flight"
        if target != current:
            moves.append((one.at_s, target - current, window_s if target else min(window_s, spec.idle_s)))
    # A scale-down needs a whole window without need, so between two of them that go the other way lies a window; the
    # last replica goes after silence, however short that may be.
    turns = [
        (at_s, quiet_s) for (_, before, _), (at_s, after, quiet_s) in pairwise(moves) if before > 0 > after
    ]
    assert all(later - earlier >= quiet_s for (earlier, _), (later, quiet_s) in pairwise(turns)), "flaps"


values = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.integers(-5, 10**13))


@settings(max_examples=EXAMPLES)
@given(
    st.lists(st.tuples(st.integers(-2, 60), st.integers(-2, 9), *[values] * 9), max_size=8),
    specs,
    st.floats(-100, 1000),
)
def test_no_metrics_however_absurd_leave_the_bounds_or_raise(
    rows: list[tuple[int, ...]], spec: ScalingSpec, now_s: float
) -> None:
    history = [PoolSample(10.0 * number, *row) for number, row in enumerate(rows)]
    decision = decide(history, spec, now_s)
    assert spec.min_replicas <= decision.target <= spec.max_replicas
    assert decision.reason
    if decision.doubts and history:
        assert decision.target >= min(decision.current, spec.max_replicas)
