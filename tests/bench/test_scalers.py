"""The scalers of other projects, against cases worked out by hand from their sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from headrace.fleet.scaling_spec import PoolSample
from headrace_bench.scalers.dynamo import LoadPlanner, LoadScaling, LoadScalingSpec
from headrace_bench.scalers.hpa import Hpa, HpaSpec, concurrency, queue_length
from headrace_bench.scalers.kpa import Kpa, KpaSpec
from headrace_bench.scalers.ray_serve import RayServe, RayServeSpec
from headrace_bench.scalers.wva import Wva
from headrace_bench.scaling_sample import Bounds, FleetSample, ReplicaSample, Scaler

WIDE = Bounds(1, 100)


def fleet(
    at_s: float,
    ready: int,
    *,
    running: int = 0,
    waiting: int = 0,
    kv: float = 0.0,
    held: int = 0,
    starting: int = 0,
) -> FleetSample:
    """`ready` equal replicas with `running` and `waiting` requests each."""
    replicas = (ReplicaSample(running, waiting, kv),) * ready
    return FleetSample(PoolSample(at_s, ready, starting, held=held), replicas)


def ask(scaler: Scaler, moments: Iterable[float], at: Callable[[float], FleetSample]) -> list[int]:
    return [scaler.target(at(moment)) for moment in moments]


def test_hpa_asks_for_the_metric_over_its_target_and_keeps_within_tolerance() -> None:
    # ceil(10 * (12 / 10)) = 12; a ratio of 1.1 is within the tolerance of 0.1.
    assert Hpa(concurrency, 10, WIDE).target(fleet(0, 10, running=12)) == 12
    assert Hpa(concurrency, 10, WIDE).target(fleet(0, 10, running=11)) == 10


def test_hpa_counts_pods_that_start_as_idle_when_it_would_grow() -> None:
    # 10 pods at 20 over 20 pods, of which 10 start: 10 each, the target.
    assert Hpa(concurrency, 10, WIDE).target(fleet(0, 10, running=20, starting=10)) == 20
    # 10 at 30 over 12: 25 each, 2.5 times the target: 30, of which at most max(4, 100%) more than 12.
    assert Hpa(concurrency, 10, WIDE).target(fleet(0, 10, running=30, starting=2)) == 24


def test_hpa_grows_by_four_pods_or_to_the_double_in_15_s() -> None:
    assert Hpa(concurrency, 1, WIDE).target(fleet(0, 2, running=50)) == 6
    assert Hpa(concurrency, 1, WIDE).target(fleet(0, 10, running=50)) == 20


def test_hpa_shrinks_to_the_highest_recommendation_of_five_minutes() -> None:
    hpa = Hpa(concurrency, 10, WIDE)
    assert hpa.target(fleet(0, 10, running=10)) == 10
    asked = ask(hpa, range(15, 301, 15), lambda at: fleet(at, 10, running=2))
    assert set(asked) == {10}
    assert hpa.target(fleet(315, 10, running=2)) == 2
    assert Hpa(concurrency, 10, WIDE, HpaSpec(down_stabilisation_s=0)).target(fleet(0, 10, running=3)) == 3


def test_hpa_decides_every_15_s_and_sees_what_waits_in_the_gateway() -> None:
    hpa = Hpa(queue_length, 2, WIDE)
    assert hpa.target(fleet(0, 4, held=12)) == 6
    assert hpa.target(fleet(14, 4, held=90)) == 6
    assert hpa.target(fleet(15, 4, waiting=1, held=8)) == 6


def test_kpa_holds_70_percent_of_the_target_over_a_minute() -> None:
    # 60 concurrent over 10 * 0.7 each: ceil(8.57) = 9.
    kpa = Kpa(KpaSpec(10))
    assert ask(kpa, range(61), lambda at: fleet(at, 6, running=10))[-1] == 9


def test_kpa_panics_at_twice_what_is_ready_and_does_not_shrink_until_a_minute_after() -> None:
    kpa = Kpa(KpaSpec(10))
    calm = ask(kpa, range(60), lambda at: fleet(at, 2, running=7))
    assert set(calm) == {2}
    # Six seconds of 28 concurrent: ceil(28 / 7) = 4, twice the ready two.
    burst = ask(kpa, range(60, 68), lambda at: fleet(at, 2, running=14))
    assert max(burst) == 4
    after = ask(kpa, range(68, 120), lambda at: fleet(at, 4, running=1))
    assert set(after) == {4}
    assert ask(kpa, range(120, 200), lambda at: fleet(at, 4, running=1))[-1] == 2  # no faster than to a half


def test_kpa_delays_scale_down_by_the_highest_of_the_delay() -> None:
    kpa = Kpa(KpaSpec(10, down_delay_s=100))
    ask(kpa, range(60), lambda at: fleet(at, 4, running=7))
    assert ask(kpa, range(60, 110), lambda at: fleet(at, 4, running=1))[-1] == 4
    assert ask(kpa, range(110, 260), lambda at: fleet(at, 4, running=1))[-1] == 2


def test_wva_adds_one_where_little_is_to_spare() -> None:
    assert Wva(WIDE).target(fleet(0, 4, kv=0.71)) == 5  # 0.80 - 0.71 < 0.10
    assert Wva(WIDE).target(fleet(0, 4, kv=0.69)) == 4  # 0.69 * 4 / 3 leaves less than 0.10
    assert Wva(WIDE).target(fleet(0, 4, kv=0.1, waiting=3)) == 5  # 5 - 3 < 3
    assert Wva(WIDE).target(fleet(0, 4, kv=0.1, held=12)) == 5  # the same, held in the gateway
    assert Wva(WIDE).target(fleet(0, 4, kv=0.95)) == 5  # all are saturated


def test_wva_removes_one_where_the_others_could_take_its_load() -> None:
    assert Wva(WIDE).target(fleet(0, 4, kv=0.5)) == 3  # 0.5 * 4 / 3 = 0.67 <= 0.70
    assert Wva(WIDE).target(fleet(0, 1, kv=0.0)) == 1  # fewer than two free ones


def test_wva_waits_for_what_it_asked_for() -> None:
    wva = Wva(WIDE)
    assert wva.target(fleet(0, 4, kv=0.9)) == 5
    assert wva.target(fleet(30, 4, kv=0.9, starting=1)) == 5
    assert wva.target(fleet(60, 5, kv=0.9)) == 6


def test_ray_serve_grows_after_half_a_minute_and_shrinks_after_ten() -> None:
    ray = RayServe(WIDE, RayServeSpec(target_ongoing_requests=2))
    asked = ask(ray, range(31), lambda at: fleet(at, 2, running=5))
    assert asked[:30] == [2] * 30
    assert asked[30] == 5  # ceil(10 / 2)
    asked = ask(ray, range(31, 700), lambda at: fleet(at, 5, running=1))
    assert asked.index(3) in range(598, 632)  # the mean of 30 s falls below first
    assert asked[-1] == 3


def test_ray_serve_starts_its_delay_anew_when_it_changes_its_mind() -> None:
    ray = RayServe(WIDE, RayServeSpec(2, look_back_period_s=1))
    asked = ask(ray, range(58), lambda at: fleet(at, 2, running=2 if at == 29 else 5))
    assert set(asked) == {2}


def test_dynamo_planner_moves_by_one_per_interval_and_waits_three_after_it_grew() -> None:
    planner = LoadPlanner(WIDE)
    assert ask(planner, range(31), lambda at: fleet(at, 4, kv=0.95))[-1] == 5
    assert ask(planner, range(31, 60), lambda at: fleet(at, 4, kv=0.95, starting=1))[-1] == 5
    # The grace of 3 counts the interval in which it grew: two more pass without a step down.
    idle = ask(planner, range(60, 200), lambda at: fleet(at, 5, kv=0.1))
    assert idle[60] == 5
    assert idle[-1] == 4


def test_dynamo_planner_counts_what_waits_as_memory() -> None:
    # 0.85 + 0.02 * 3 is above 0.9.
    assert ask(LoadPlanner(WIDE), range(31), lambda at: fleet(at, 2, kv=0.85, waiting=1, held=4))[-1] == 3
    assert ask(LoadPlanner(WIDE), range(31), lambda at: fleet(at, 2, kv=0.7))[-1] == 2


def test_dynamo_load_scaling_grows_for_one_and_shrinks_for_all() -> None:
    assert LoadScaling(WIDE).target(fleet(0, 3, kv=0.99, waiting=1)) == 4
    assert LoadScaling(WIDE).target(fleet(0, 3, kv=0.8)) == 3
    assert LoadScaling(WIDE).target(fleet(0, 3, kv=0.5)) == 2
    latency = LoadScalingSpec(0.4, 0.1)
    assert LoadScaling(WIDE, latency).target(fleet(0, 3, kv=0.45)) == 4
    assert LoadScaling(WIDE, latency).target(fleet(0, 3, kv=0.2)) == 3


@pytest.mark.parametrize("ready", [1, 2])
def test_nobody_shrinks_to_nothing(ready: int) -> None:
    scalers: tuple[Scaler, ...] = (
        Wva(WIDE),
        RayServe(WIDE, RayServeSpec(downscale_delay_s=0)),
        LoadPlanner(WIDE),
        LoadScaling(WIDE),
    )
    for scaler in scalers:
        assert min(ask(scaler, range(100), lambda at: fleet(at, ready))) >= 1


@pytest.mark.parametrize("make", [Wva, LoadScaling, LoadPlanner, RayServe])
def test_at_a_bound_nobody_waits_for_a_change_that_cannot_come(make: Callable[[Bounds], Scaler]) -> None:
    narrow = Bounds(2, 4)
    scaler = make(narrow)
    asked = ask(scaler, range(1300), lambda at: fleet(at, 2, kv=0.01))
    assert set(asked) == {2}
    # Load comes: it still grows.
    assert ask(scaler, range(1300, 1500), lambda at: fleet(at, 2, running=20, waiting=9, kv=1.0))[-1] > 2
    full = make(narrow)
    assert max(ask(full, range(200), lambda at: fleet(at, 4, running=20, waiting=9, kv=1.0))) == 4
    # And goes: it still shrinks.
    assert ask(full, range(200, 1300), lambda at: fleet(at, 4, kv=0.01))[-1] < 4
