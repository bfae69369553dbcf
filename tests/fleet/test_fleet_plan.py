"""Which replicas there should be, and who goes when there are too many."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.config import parse
from headrace.errors import NotFound
from headrace.fleet.fleet_plan import FleetPlan, PoolPlan, coming, initial_plan, remembered, restored
from headrace.fleet.pools import PoolKey, named
from headrace.fleet.reconcile import Observed
from headrace.fleet.specs import number_of, numbered
from headrace.fleet.victims import Seen, is_of, victims
from headrace_router.types import ReplicaId, ReplicaState, Role

READY, DRAINING, STARTING = ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.STARTING
KEY = PoolKey("m", Role.UNIFIED)


def plan(**pool: object) -> FleetPlan:
    return initial_plan(
        parse({"models": [{"name": "m", "backend": "simulated", "pools": [pool]}]}), num_cores=4, num_gpus=0
    )


def pool(target: int = 2, **changes: object) -> PoolPlan:
    return replace(plan(replicas=1).pools[KEY], target=target, **changes)  # type: ignore[arg-type]


def with_members(count: int, **changes: object) -> PoolPlan:
    return pool(count, **changes).settled({})


def seen(one: PoolPlan, number: int, state: ReplicaState = READY, **known: object) -> Seen:
    known.setdefault("running", 0)
    known.setdefault("waiting", 0)
    return Seen(state, one.members.get(number, numbered(one.template, number)), **known)  # type: ignore[arg-type]


def test_new_members_get_the_lowest_free_numbers() -> None:
    assert [spec.id for spec in with_members(3).members.values()] == [
        "m-unified-0",
        "m-unified-1",
        "m-unified-2",
    ]
    gap = replace(with_members(3), members={n: with_members(3).members[n] for n in (0, 2)})
    assert set(gap.settled({}).members) == {0, 1, 2}


def test_a_number_is_not_given_again_while_its_replica_still_drains() -> None:
    grown = with_members(1)
    grown = replace(grown, target=2).settled({0: seen(grown, 0), 1: seen(grown, 1, DRAINING)})
    assert set(grown.members) == {0, 2}


def test_what_drains_is_recalled_before_anything_is_started() -> None:
    grown = replace(with_members(1), target=3)
    there = {0: seen(grown, 0), 5: seen(grown, 5, DRAINING, can_be_recalled=True)}
    assert set(grown.settled(there).members) == {0, 1, 5}


def test_those_that_serve_nobody_go_first_then_the_outdated_the_idle_the_newest() -> None:
    old = with_members(5)
    new = replace(old, template=replace(old.template, generation=1))
    there: dict[int, Seen | None] = {
        0: seen(new, 0, running=1),
        1: Seen(READY, numbered(new.template, 1), running=0, waiting=0, since_s=1.0),
        2: Seen(READY, numbered(new.template, 2), running=0, waiting=0, since_s=9.0),
        3: Seen(READY, numbered(new.template, 3), running=2, waiting=0),
        4: None,
    }
    assert victims(there, new.template, 5) == (4, 0, 2, 1, 3)


def test_a_pin_is_stronger_than_the_target_and_leaves_it_as_it_was() -> None:
    pinned = with_members(2).pinned(4).settled({})
    assert (len(pinned.members), pinned.target) == (4, 2)
    assert len(pinned.pinned(None).settled({}).members) == 2


def test_a_rolling_replacement_is_a_template_and_a_surge() -> None:
    """No moment of it has fewer members than wanted, and in the end none is of the old template."""
    now = with_members(3)
    now = replace(now, template=replace(now.template, generation=1))
    assert now.outdated == (0, 1, 2)
    for _ in range(3):
        there = {number: seen(now, number) for number in now.members}
        now = replace(now, surge=1).settled(there)
        there = {number: seen(now, number) for number in now.members}
        assert len(now.members) == 4
        now = replace(now, surge=0).settled(there)
        assert len(now.members) == 3
    assert now.outdated == ()
    assert all(is_of(now.template, spec) for spec in now.members.values())


def test_a_plan_survives_its_controller() -> None:
    before = plan(autoscale={"min_replicas": 0, "max_replicas": 9})
    one = replace(before.pools[KEY], target=4).settled({}).pinned(3).settled({})
    before = before.having(one)
    found = before.desired()
    again = restored(plan(autoscale={"min_replicas": 0, "max_replicas": 9}), remembered(before), found)
    assert again == before
    lost = dict(list(found.items())[:-1])
    again = restored(plan(replicas=1), remembered(before), lost).settled(
        (number_of(id), Seen(READY, spec)) for id, spec in lost.items()
    )
    assert len(again.desired()) == 3


def test_replicas_of_a_pool_that_nobody_remembers_stay() -> None:
    found = with_members(2).members
    by_id = {spec.id: spec for spec in found.values()}
    assert set(restored(plan(replicas=2), (), by_id).desired()) == set(by_id)


def test_a_model_comes_while_a_replica_starts_or_where_work_alone_would_start_one() -> None:
    fixed = plan(replicas=1).settled(())
    (id,) = fixed.desired()
    for state, is_coming in ((STARTING, True), (READY, False), (ReplicaState.FAILED, True)):
        assert (coming(fixed, {id: Observed(id, state, 0.0)}) == ("m",)) is is_coming
    given_up = Observed(id, ReplicaState.FAILED, 0.0, failures=1, is_fatal=True)
    assert coming(fixed, {id: given_up}) == ()
    asleep = plan(autoscale={"min_replicas": 0, "max_replicas": 2})
    assert coming(asleep, {}) == ("m",)
    assert coming(asleep.having(asleep.pools[KEY].pinned(0)), {}) == ()
    dry = plan(autoscale={"min_replicas": 0, "max_replicas": 2, "dry_run": True})
    assert coming(dry, {}) == ()


def test_pools_are_named_by_model_and_role() -> None:
    pools = [
        PoolKey("org/m", Role.PREFILL),
        PoolKey("org/m", Role.DECODE),
        PoolKey("n", Role.UNIFIED),
        PoolKey("p", Role.DECODE),
    ]
    for one in pools:
        assert named(str(one), pools) == one
    assert named("n/unified", pools) == pools[2]
    assert named("p", pools) == pools[3]
    with pytest.raises(NotFound, match=r"no pool 'org/m'; the pools of this fleet: n, org/m/decode"):
        named("org/m", pools)


STATES = [ReplicaState.READY, ReplicaState.STARTING, ReplicaState.PENDING, ReplicaState.FAILED]


@given(
    targets=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    states=st.lists(st.sampled_from(STATES), min_size=30, max_size=30),
    loads=st.lists(st.none() | st.integers(0, 5), min_size=30, max_size=30),
    recallable=st.booleans(),
)
def test_members_are_always_as_many_as_wanted_and_no_number_is_two_replicas(
    targets: list[int], states: list[ReplicaState], loads: list[int | None], recallable: bool
) -> None:
    now = pool(0)
    drained: set[int] = set()
    for target in targets:
        there = {
            number: seen(now, number, states[number % 30], running=loads[number % 30])
            for number in now.members
        } | {number: seen(now, number, DRAINING, can_be_recalled=recallable) for number in drained}
        before = now
        now = replace(now, target=target).settled(there)
        assert len(now.members) == target
        kept = set(before.members) & set(now.members)
        assert len(kept) == min(len(before.members), target), "none is replaced without need"
        if not recallable:
            assert not set(now.members) & drained
        drained = (drained | set(before.members)) - set(now.members)
        assert all(number_of(spec.id) == number for number, spec in now.members.items())


def test_settling_twice_changes_nothing() -> None:
    one = with_members(3)
    there = {number: seen(one, number) for number in one.members}
    assert one.settled(there) == one


def test_ids_tell_their_numbers() -> None:
    assert number_of(ReplicaId("org-m-3f2a-prefill-12")) == 12
