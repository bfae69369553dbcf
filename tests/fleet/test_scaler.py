"""From what is seen of a pool to its target. No clock: time is an argument."""

from __future__ import annotations

import datetime
import zoneinfo
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.config import parse
from headrace.config_autoscale import Autoscale
from headrace.fleet.demand_book import DemandBook, PoolTotals
from headrace.fleet.fleet_plan import FleetPlan, initial_plan
from headrace.fleet.pools import PoolKey
from headrace.fleet.scaler import Scaler, pool_status
from headrace.fleet.scaling_config import scaling_spec
from headrace.fleet.scaling_sample import History, ReplicaLoad, pool_sample
from headrace.fleet.scaling_spec import PoolSample
from headrace_router.demand import Demand, PoolDemand
from headrace_router.types import ReplicaState, Role

KEY = PoolKey("m", Role.UNIFIED)
PREFILL, DECODE = PoolKey("m", Role.PREFILL), PoolKey("m", Role.DECODE)
IDLE = ReplicaLoad(ReplicaState.READY, pulse_age_s=0.1, running=0, waiting=0, kv_use=0.0, utilisation=0.0)
BUSY = replace(IDLE, running=8, waiting=6, kv_use=0.5)
STARTING = ReplicaLoad(ReplicaState.STARTING)
TOTALS = PoolTotals(held=0, arrived=0, arrived_work_s=0.0, backlog_s=0.0)
WALL_S = 1_750_000_000.0


def plan(*pools: dict[str, Any]) -> FleetPlan:
    model = {"name": "m", "backend": "simulated", "pools": list(pools)}
    return initial_plan(parse({"models": [model]}), num_cores=4, num_gpus=0).settled(())


def scale(**keys: Any) -> dict[str, Any]:
    return {"min_replicas": 0, "max_replicas": 8, "stabilisation_s": 5, "idle_s": 10, **keys}


class Time:
    """A pool under the scaler's eyes, second by second."""

    def __init__(self, now: FleetPlan, cold_s: float = 1.0) -> None:
        self.plan, self.scaler, self.book, self.now_s = now, Scaler(), DemandBook(), 100.0
        self.held = self.sequence = self.arrived = 0
        for key in now.pools:
            self.scaler.started(key, cold_s)

    def second(
        self, loads: dict[PoolKey, list[ReplicaLoad]], held: int = 0, arrived: int = 0, is_told: bool = True
    ) -> None:
        self.now_s += 1.0
        self.sequence += 1
        self.arrived += arrived
        pools = tuple(
            PoolDemand(
                key.model, key.role, held, self.arrived, self.arrived * 0.1, 0.0 if loads.get(key) else None
            )
            for key in self.plan.pools
        )
        if is_told:
            self.book.tell(Demand("g", self.sequence, pools), self.now_s)
        self.book.forget(self.now_s)
        self.plan, _ = self.scaler.step(self.plan, loads, self.book, self.now_s, WALL_S + self.now_s)
        self.plan = self.plan.settled(())

    def target(self, key: PoolKey = KEY) -> int:
        return self.plan.pools[key].target


def test_a_request_held_at_zero_starts_a_replica_at_the_first_look() -> None:
    time = Time(plan({"autoscale": scale()}))
    assert time.target() == 0
    time.second({}, held=1, arrived=1)
    assert time.target() == 1
    assert time.scaler.latest[KEY].reason == "1 held where no replica runs"


def test_pressure_brings_replicas_and_its_end_takes_them_back_to_zero() -> None:
    time = Time(plan({"autoscale": scale()}))
    time.second({}, held=1, arrived=1)
    time.second({KEY: [BUSY]}, held=6, arrived=20)
    assert time.target() == 3
    targets = []
    for _ in range(60):
        time.second({KEY: [IDLE] * len(time.plan.pools[KEY].members)})
        targets.append(time.target())
    assert targets[-1] == 0
    assert targets == sorted(targets, reverse=True)


def test_a_fleet_that_tells_nothing_does_not_shrink() -> None:
    time = Time(plan({"replicas": 3, "autoscale": scale()}))
    mute = replace(IDLE, pulse_age_s=60.0)
    for _ in range(60):
        time.second({KEY: [IDLE, IDLE, mute]})
    assert time.target() == 3
    assert "is missing" in time.scaler.latest[KEY].reason


def test_without_a_gateway_nothing_shrinks_either() -> None:
    scaler, now = Scaler(), plan({"replicas": 3, "autoscale": scale()})
    for second in range(60):
        now, _ = scaler.step(now, {KEY: [IDLE] * 3}, DemandBook(), 100.0 + second, WALL_S)
    assert now.pools[KEY].target == 3


def test_a_dry_run_says_what_it_would_do_and_does_nothing() -> None:
    time = Time(plan({"replicas": 1, "autoscale": scale(dry_run=True)}))
    for _ in range(3):
        time.second({KEY: [BUSY]}, held=9)
    latest = time.scaler.latest[KEY]
    assert (time.target(), latest.target, latest.effect) == (1, 4, "dry run")
    assert pool_status(time.plan.pools[KEY], 1, latest, None).reason.startswith("dry run, would be 4")


def test_a_pin_holds_whatever_the_load_and_the_target_follows_behind_it() -> None:
    time = Time(plan({"replicas": 1, "autoscale": scale()}))
    time.plan = time.plan.having(time.plan.pools[KEY].pinned(2)).settled(())
    time.second({KEY: [BUSY, BUSY]}, held=30)
    pool = time.plan.pools[KEY]
    assert (len(pool.members), pool.wanted) == (2, 2)
    assert pool.target > 2
    assert time.scaler.latest[KEY].effect == "pinned"


def test_a_replica_that_stands_in_for_another_is_no_capacity_of_its_own() -> None:
    """Or a rolling restart would raise the target by each surge."""
    time = Time(plan({"replicas": 2, "autoscale": scale(min_replicas=1)}))
    pool = time.plan.pools[KEY]
    time.plan = time.plan.having(replace(pool, surge=1)).settled(())
    for _ in range(3):
        time.second({KEY: [replace(BUSY, waiting=4)] * 2 + [STARTING]})
    assert time.scaler.latest[KEY].current == 2
    assert time.target() == 2


def test_prefill_and_decode_wake_together() -> None:
    pools = [{"role": role, "autoscale": scale()} for role in ("prefill", "decode")]
    time = Time(plan(*pools))
    time.second({}, held=1, arrived=1)
    assert (time.target(PREFILL), time.target(DECODE)) == (1, 1)


def test_the_cold_start_is_the_median_of_what_was_seen_and_survives() -> None:
    scaler = Scaler()
    assert scaler.cold_start_s(KEY) is None
    for took_s in (100.0, 30.0, 40.0):
        scaler.started(KEY, took_s)
    assert scaler.cold_start_s(KEY) == 40.0
    again = Scaler()
    again.recall(scaler.remembered(), [KEY])
    assert again.cold_start_s(KEY) == 40.0


def test_a_replica_that_fails_again_and_again_is_not_one_that_starts() -> None:
    failing = ReplicaLoad(ReplicaState.FAILED, failures=1)
    assert pool_sample(0, [IDLE, failing], 2, TOTALS, None).starting == 1
    assert pool_sample(0, [IDLE, replace(failing, failures=9)], 2, TOTALS, None).starting == 0
    assert pool_sample(0, [IDLE, replace(failing, has_given_up=True)], 2, TOTALS, None).starting == 0


def test_a_replica_without_room_is_no_capacity_and_holds_nothing_up() -> None:
    waiting = ReplicaLoad(ReplicaState.PENDING, waits_for_room=True)
    time = Time(plan({"replicas": 2, "autoscale": scale(min_replicas=1, max_replicas=3)}))
    for _ in range(5):
        time.second(
            {
                KEY: [replace(BUSY, waiting=6), replace(BUSY, waiting=6), waiting][
                    : len(time.plan.pools[KEY].members)
                ]
            }
        )
    assert time.target() == 3
    for _ in range(20):
        time.second({KEY: [IDLE, IDLE, waiting][: len(time.plan.pools[KEY].members)]})
    assert time.target() == 1


def test_a_pool_at_zero_is_known_to_be_idle() -> None:
    sample = pool_sample(0, [], 0, PoolTotals(0, 7, 1.0, None), None)
    assert (sample.waiting, sample.running, sample.kv_use, sample.backlog_s) == (0, 0, 0.0, 0.0)


def test_the_schedule_is_told_in_its_own_time_zone_and_summer_time_does_not_shake_the_clock() -> None:
    zone = zoneinfo.ZoneInfo("Europe/Berlin")
    scale = Autoscale.model_validate(
        {
            "max_replicas": 4,
            "time_zone": "Europe/Berlin",
            "schedule": [{"from": "08:00", "until": "18:00", "min_replicas": 3}],
        }
    )
    for day in (1, 28, 29, 30):  # of March 2026; the clocks go forward on the 29th
        for hour, minute, applies in ((7, 59, False), (8, 0, True), (17, 59, True), (18, 0, False)):
            wall_s = datetime.datetime(2026, 3, day, hour, minute, tzinfo=zone).timestamp()
            clock_s = 12_345.0 + day
            (hint,) = scaling_spec(scale, clock_s, wall_s).schedule
            assert hint.applies(clock_s, 0.0) is applies, (day, hour, minute)


def test_a_schedule_of_the_whole_day_always_applies() -> None:
    scale = Autoscale.model_validate(
        {"max_replicas": 4, "schedule": [{"from": "00:00", "until": "24:00", "min_replicas": 3}]}
    )
    (hint,) = scaling_spec(scale, 77.0, WALL_S).schedule
    assert all(hint.applies(moment, 0.0) for moment in range(0, 86_400, 3599))


samples = st.builds(
    PoolSample,
    at_s=st.just(0.0),
    ready=st.integers(0, 5),
    held=st.none() | st.integers(0, 50),
    waiting=st.none() | st.integers(0, 50),
    kv_use=st.none() | st.floats(0, 1),
)


@given(st.lists(samples, min_size=1, max_size=400), st.sampled_from([10.0, 100.0, 300.0]))
def test_history_is_bounded_and_forgets_no_peak(told: list[PoolSample], memory_s: float) -> None:
    history = History(memory_s)
    told = [replace(one, at_s=float(second)) for second, one in enumerate(told)]
    for one in told:
        history.add(one)
    kept = history.samples()
    times = [one.at_s for one in kept]
    assert times == sorted(times)
    assert len(kept) <= 63 + memory_s / 5
    assert kept[-1] == told[-1]
    within = [one for one in told if one.at_s > told[-1].at_s - memory_s + 5]
    for name in ("held", "waiting"):
        was, now = ([getattr(one, name) for one in some] for some in (within, kept))
        if None not in was:
            assert None in now or max(now) >= max(was)


@pytest.mark.parametrize("idle_s", [300, 7 * 86_400])
def test_even_a_week_of_memory_is_some_thousand_samples(idle_s: float) -> None:
    history = History(idle_s)
    for second in range(20_000):
        history.add(PoolSample(float(second), 1))
    assert len(history.samples()) < 2000


@given(
    st.lists(
        st.tuples(
            st.integers(0, 40), st.integers(0, 30), st.sampled_from(["well", "well", "mute", "no gateway"])
        ),
        min_size=1,
        max_size=80,
    ),
    st.integers(1, 6),
)
def test_whatever_happens_a_pool_stays_within_bounds_and_sleeps_only_when_idle(
    seconds: list[tuple[int, int, str]], start_s: int
) -> None:
    """Replicas take `start_s` to come; metrics fail now and then."""
    time = Time(plan({"autoscale": scale(idle_s=5)}), cold_s=float(start_s))
    born: dict[int, float] = {}
    quiet_s = 0
    for held, running, how in seconds:
        members = time.plan.pools[KEY].members
        born = {number: born.get(number, time.now_s) for number in members}
        loads = [
            replace(IDLE, running=running, pulse_age_s=99.0 if how == "mute" else 0.1)
            if time.now_s - born[number] >= start_s
            else STARTING
            for number in members
        ]
        is_idle = held == 0 and (running == 0 or not loads)
        quiet_s = quiet_s + 1 if is_idle else 0
        before = time.target()
        time.second({KEY: loads}, held=held, arrived=held, is_told=how != "no gateway")
        assert 0 <= time.target() <= 8
        if time.target() == 0 < before:
            assert quiet_s >= 5
        if held and how != "no gateway":
            assert time.target() >= 1
