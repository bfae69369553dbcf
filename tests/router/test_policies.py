"""What every policy must do, and what each promises beyond that."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_router.load_columns import LoadColumns
from headrace_router.load_table import Booking, ReplicaLoad
from headrace_router.policies import POLICIES, make_policy
from headrace_router.types import BootId, Endpoints, LoadReport, Replica, ReplicaId, Request, Role
from headrace_router.view import Decision, Hits, View

REQUEST = Request("m")
PROMPT = Request("m", 4000, prompt_tokens=1000)


def candidates(booked: list[int], tokens: int = 0, **replica: int) -> list[ReplicaLoad]:
    """Loads with that many bookings of `tokens` uncached tokens each."""
    loads = []
    for slot, count in enumerate(booked):
        name, endpoints = ReplicaId(f"r{slot}"), Endpoints("http://127.0.0.1:1")
        load = ReplicaLoad(Replica(name, BootId("b"), "m", Role.UNIFIED, endpoints, **replica), slot)
        for _ in range(count):
            load.add(Booking(load, uncached_tokens=tokens, booked_at_s=1.0))
        loads.append(load)
    return loads


def held(*tokens: int, slow: list[int] | None = None) -> Hits:
    return Hits(np.array(tokens, np.int32), None if slow is None else np.array(slow, np.int32))


def busy(load: ReplicaLoad, *, waiting: int = 0, running: int = 0, kv_use: float = 0.0) -> None:
    """Let the replica report that."""
    load.take(LoadReport(load.replica.id, BootId("b"), 1, running, waiting, kv_use, 0), 0.0, 0.0)


@pytest.mark.parametrize("name", POLICIES)
@given(booked=st.lists(st.integers(0, 100), min_size=1, max_size=50), seed=st.integers(0, 2**32))
def test_choice_is_a_candidate_with_a_reason_and_changes_none(
    name: str, booked: list[int], seed: int
) -> None:
    policy = make_policy(name, seed)
    loads = candidates(booked)
    for _ in range(3):
        decision = policy.choose(REQUEST, View(loads))
        assert decision.load in loads
        assert decision.reason
    assert [load.booked for load in loads] == booked


LOADS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2000)), min_size=1, max_size=12)


@pytest.mark.parametrize("name", POLICIES)
@given(loads=LOADS, seed=st.integers(0, 99))
def test_predicted_hit_is_what_the_chosen_one_holds(
    name: str, loads: list[tuple[int, int]], seed: int
) -> None:
    hits = held(*(tokens % 999 for _, tokens in loads))
    some = candidates([count for count, _ in loads], 100)
    decision = make_policy(name, seed).choose(PROMPT._replace(session="s"), View(some, None, hits))
    assert decision.hit_tokens in (0, hits.tokens[decision.load.slot])
    if POLICIES[name](Random(0)).reads_prefixes:
        assert decision.hit_tokens == hits.tokens[decision.load.slot]
    if decision.costs is not None:
        assert len(decision.costs) == len(decision.candidates) == len(some)


@pytest.mark.parametrize("name", POLICIES)
def test_equal_seeds_choose_equally(name: str) -> None:
    rng = Random(7)
    loads = candidates([rng.randrange(5) for _ in range(16)])
    one, other = make_policy(name, 3), make_policy(name, 3)
    assert [one.choose(REQUEST, View(loads)).load for _ in range(100)] == [
        other.choose(REQUEST, View(loads)).load for _ in range(100)
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_idle_replicas_share_the_work(name: str) -> None:
    policy = make_policy(name, 1)
    loads = candidates([0] * 4)
    counts = Counter(policy.choose(REQUEST, View(loads)).load.replica.id for _ in range(4000))
    assert all(800 < counts[load.replica.id] < 1200 for load in loads)


def test_round_robin_takes_each_in_turn() -> None:
    policy = make_policy("round_robin", 0)
    loads = candidates([9, 0, 5])
    assert [policy.choose(REQUEST, View(loads)).load.replica.id for _ in range(6)] == ["r0", "r1", "r2"] * 2


@given(booked=st.lists(st.integers(0, 100), min_size=1, max_size=50))
def test_least_loaded_takes_the_minimum(booked: list[int]) -> None:
    chosen = make_policy("least_loaded", 0).choose(REQUEST, View(candidates(booked))).load
    assert chosen.booked == min(booked)


@given(booked=st.lists(st.integers(0, 100), min_size=2, max_size=50, unique=True), seed=st.integers(0, 2**32))
def test_power_of_two_never_takes_the_most_loaded(booked: list[int], seed: int) -> None:
    chosen = make_policy("power_of_two", seed).choose(REQUEST, View(candidates(booked))).load
    assert chosen.booked < max(booked)


def choose(name: str, loads: list[ReplicaLoad], hits: Hits | None, request: Request = PROMPT) -> Decision:
    return make_policy(name, 0).choose(request, View(loads, None, hits))


def test_delay_follows_a_prefix_until_waiting_for_it_costs_more() -> None:
    loads = candidates([1, 0], 200)
    assert choose("delay", loads, held(900, 0)).load is loads[0]
    loads = candidates([9, 0], 200)
    decision = choose("delay", loads, held(900, 0))
    assert decision.load is loads[1]
    assert decision.reason == "longest prefix is busy"


def test_delay_waits_neither_for_memory_that_is_not_there() -> None:
    loads = candidates([0, 0], num_blocks=100, block_size=16)
    busy(loads[0], running=1, kv_use=0.9)
    assert choose("delay", loads, held(500, 0)).load is loads[1]


def test_delay_waits_not_for_a_place_where_another_replica_has_one() -> None:
    loads = candidates([0, 0], max_running=4)
    busy(loads[0], running=3)
    assert choose("delay", loads, held(900, 0)).load is loads[0]
    busy(loads[0], running=4)
    assert choose("delay", loads, held(900, 0)).load is loads[1]
    busy(loads[1], running=4, waiting=1)
    assert choose("delay", loads, held(900, 0)).load is loads[0], "fewer wait for one there"


def test_delay_prices_a_slow_tier_between_a_hit_and_none() -> None:
    loads = candidates([0, 0, 0])
    costs = choose("delay", loads, held(0, 800, 800, slow=[0, 800, 0])).costs
    assert costs is not None
    assert costs[2] < costs[1] < costs[0]


@given(
    loads=st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 999), st.floats(0, 1)), min_size=1, max_size=60
    ),
    tokens=st.integers(1, 5000),
    knows=st.sampled_from(["nothing", "prefixes", "slow ones too"]),
)
def test_delay_decides_alike_in_a_loop_and_over_arrays(
    loads: list[tuple[int, int, float]], tokens: int, knows: str
) -> None:
    some = candidates([count for count, _, _ in loads], 100, num_blocks=200, block_size=16, max_running=8)
    columns = LoadColumns(len(some))
    for row, (load, (_, _, kv_use)) in enumerate(zip(some, loads, strict=True)):
        busy(load, running=3, kv_use=kv_use)
        load.attach(columns, row)
    hits = None
    if knows != "nothing":
        found = [min(hit, tokens - 1) for _, hit, _ in loads]
        hits = held(*found, slow=[hit // 2 for hit in found] if knows == "slow ones too" else None)
    request = Request("m", prompt_tokens=tokens)
    one = make_policy("delay", 0).choose(request, View(some, None, hits))
    other = make_policy("delay", 0).choose(request, View(some, columns, hits))
    assert one.load is other.load
    assert one.reason == other.reason
    assert one.cost_s == pytest.approx(other.cost_s)
    assert one.costs is not None
    assert other.costs is not None
    assert np.allclose(one.costs, other.costs)


def test_session_stays_where_it_is_when_others_come_and_go() -> None:
    policy = make_policy("session_affinity", 0)
    loads = candidates([0] * 8)
    sessions = [Request("m", session=f"s{number}") for number in range(200)]
    before = [policy.choose(request, View(loads)).load for request in sessions]
    assert len(set(before)) == 8
    without = loads[:3] + loads[4:]
    moved = [policy.choose(request, View(without)).load for request in sessions]
    assert all(now is was for was, now in zip(before, moved, strict=True) if was is not loads[3])
    assert [policy.choose(request, View(loads)).load for request in sessions] == before
    fresh = make_policy("session_affinity", 9)
    assert [fresh.choose(request, View(loads)).load for request in sessions] == before


def test_prefix_affinity_follows_a_long_prefix_only_while_loads_are_balanced() -> None:
    assert choose("prefix_affinity", candidates([40, 0]), held(400, 0)).load.slot == 0
    assert choose("prefix_affinity", candidates([40, 0]), held(200, 0)).load.slot == 1
    assert choose("prefix_affinity", candidates([80, 0]), held(900, 0)).load.slot == 1


def test_sticky_leaves_a_saturated_replica() -> None:
    loads = candidates([0, 0])
    busy(loads[0], waiting=5, kv_use=0.7)
    assert choose("sticky_until_saturated", loads, held(16, 0)).load is loads[0]
    loads = candidates([0, 0])
    busy(loads[0], kv_use=0.9)
    assert choose("sticky_until_saturated", loads, held(999, 0)).load is loads[1]


def test_kv_blend_weighs_three_two_two() -> None:
    loads = candidates([0, 0])
    busy(loads[0], kv_use=0.5, waiting=4)  # 3 * 0.9 + 2 * 0.5 + 0 < 0 + 2 + 2
    assert choose("kv_blend", loads, held(900, 0)).load is loads[1]
    loads = candidates([0, 0])
    busy(loads[0], kv_use=0.5)  # 3 * 0.9 + 2 * 0.5 + 2 > 0 + 2 + 2
    assert choose("kv_blend", loads, held(900, 0)).load is loads[0]


def test_block_cost_counts_blocks_to_prefill_and_blocks_in_use() -> None:
    loads = candidates([0, 0], num_blocks=100, block_size=16)
    busy(loads[0], kv_use=0.5)
    assert choose("block_cost", loads, held(799, 0)).load is loads[1]
    assert choose("block_cost", loads, held(801, 0)).load is loads[0]
