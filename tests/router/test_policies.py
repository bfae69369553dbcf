"""What every policy must do, and what each promises beyond that."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_router.load_table import ReplicaLoad
from headrace_router.policies import POLICIES, make_policy
from headrace_router.types import BootId, Endpoints, Replica, ReplicaId, Request, Role
from headrace_router.view import View

REQUEST = Request("m")


def candidates(booked: list[int]) -> list[ReplicaLoad]:
    loads = []
    for index, count in enumerate(booked):
        load = ReplicaLoad(
            Replica(ReplicaId(f"r{index}"), BootId("b"), "m", Role.UNIFIED, Endpoints("http://127.0.0.1:1"))
        )
        load.booked = count
        load.refresh()
        loads.append(load)
    return loads


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
