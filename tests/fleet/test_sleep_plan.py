"""Who sleeps instead of leaving, who is woken, and what the controller does about it. Pure."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from headrace.config import Config, parse
from headrace.errors import ConfigError, FatalStartError
from headrace.fleet import preflight
from headrace.fleet.fleet_plan import PoolPlan, initial_plan, remembered, restored
from headrace.fleet.pools import PoolKey
from headrace.fleet.reconcile import Action, Forget, Observed, Recall, Sleep, Start, Stop, Wake, reconcile
from headrace.fleet.specs import expand
from headrace.fleet.victims import Seen
from headrace_router.types import ReplicaId, ReplicaState, Role

READY, DRAINING, SLEEPING, STARTING, FAILED = (
    ReplicaState.READY,
    ReplicaState.DRAINING,
    ReplicaState.SLEEPING,
    ReplicaState.STARTING,
    ReplicaState.FAILED,
)
KEY = PoolKey("m", Role.UNIFIED)
A = ReplicaId("a")


def config(warm: int = 1, backend: str = "simulated", **pool: object) -> Config:
    scaling = {"min_replicas": 1, "max_replicas": 9, "warm": warm}
    return parse({"models": [{"name": "m", "backend": backend, "pools": [{"autoscale": scaling, **pool}]}]})


def pool(target: int, warm: int = 1) -> PoolPlan:
    plan = initial_plan(config(warm), num_cores=4, num_gpus=0)
    return replace(plan.pools[KEY], target=target).settled({})


def seen(one: PoolPlan, states: dict[int, ReplicaState]) -> dict[int, Seen]:
    specs = {**one.members, **one.asleep}
    return {n: Seen(state, specs[n], running=n, waiting=0) for n, state in states.items()}


def test_those_that_are_too_many_sleep_as_far_as_the_pool_keeps_them_warm() -> None:
    grown = pool(4, warm=2)
    shrunk = replace(grown, target=1).settled(seen(grown, dict.fromkeys(range(4), READY)))
    assert (len(shrunk.members), set(shrunk.asleep)) == (1, {0, 1}), "the least busy go first"


def test_one_that_never_served_does_not_sleep() -> None:
    grown = pool(2)
    shrunk = replace(grown, target=1).settled(seen(grown, {0: READY, 1: STARTING}))
    assert (set(shrunk.members), set(shrunk.asleep)) == ({0}, set())


def test_a_sleeper_is_woken_before_any_is_started() -> None:
    grown = pool(2)
    shrunk = replace(grown, target=1).settled(seen(grown, {0: READY, 1: READY}))
    (asleep,) = shrunk.asleep
    (member,) = shrunk.members
    again = replace(shrunk, target=3).settled(seen(shrunk, {member: READY, asleep: SLEEPING}))
    assert (set(again.members), set(again.asleep)) == ({0, 1, 2}, set())


def test_one_that_died_asleep_is_forgotten() -> None:
    grown = pool(2)
    shrunk = replace(grown, target=1).settled(seen(grown, {0: READY, 1: READY}))
    (asleep,) = shrunk.asleep
    (member,) = shrunk.members
    assert not shrunk.settled(seen(shrunk, {member: READY, asleep: FAILED})).asleep


def test_one_of_an_earlier_configuration_does_not_stay_asleep() -> None:
    grown = pool(2)
    shrunk = replace(grown, target=1).settled(seen(grown, {0: READY, 1: READY}))
    (asleep,) = shrunk.asleep
    new = replace(shrunk, template=replace(shrunk.template, generation=1))
    assert not new.settled(seen(shrunk, {asleep: SLEEPING})).asleep


def test_without_warm_nobody_sleeps() -> None:
    grown = pool(3, warm=0)
    assert not replace(grown, target=1).settled(seen(grown, dict.fromkeys(range(3), READY))).asleep


def test_a_controller_that_is_restarted_remembers_who_sleeps() -> None:
    grown = pool(2)
    shrunk = replace(grown, target=1).settled(seen(grown, {0: READY, 1: READY}))
    plan = initial_plan(config(), num_cores=4, num_gpus=0)
    told = remembered(plan.having(shrunk))
    found = {spec.id: spec for spec in (*shrunk.members.values(), *shrunk.asleep.values())}
    assert restored(plan, told, found).pools[KEY] == shrunk


@given(
    targets=st.lists(st.integers(0, 6), max_size=12),
    warm=st.integers(0, 3),
    dies=st.sets(st.integers(0, 12)),
)
def test_counts_are_kept_whatever_comes(targets: list[int], warm: int, dies: set[int]) -> None:
    one = pool(2, warm)
    there = dict.fromkeys(one.members, READY)
    for step, target in enumerate(targets):
        one = replace(one, target=target).settled(seen(one, {n: there[n] for n in there}))
        assert len(one.members) == target
        assert len(one.asleep) <= warm
        assert not one.members.keys() & one.asleep.keys()
        there = dict.fromkeys(one.members, READY) | dict.fromkeys(one.asleep, SLEEPING)
        if step in dies and one.asleep:
            there[min(one.asleep)] = FAILED


def decide(desired: list[ReplicaId], asleep: list[ReplicaId], replica: Observed) -> tuple[Action, ...]:
    return reconcile(desired, {A: replica}, 5.0, start_timeout_s=100, max_backoff_s=60, asleep=asleep)


def test_the_controller_puts_to_sleep_wakes_and_forgets() -> None:
    assert decide([], [A], Observed(A, READY, 0)) == (Sleep(A),)
    assert decide([], [A], Observed(A, DRAINING, 0)) == ()
    assert decide([], [A], Observed(A, SLEEPING, 0)) == ()
    assert decide([A], [], Observed(A, SLEEPING, 0)) == (Wake(A),)
    assert decide([A], [], Observed(A, DRAINING, 0, can_be_recalled=True)) == (Recall(A),)
    assert decide([A], [], Observed(A, SLEEPING, 0, is_other=True)) == (Stop(A),)
    assert decide([], [], Observed(A, SLEEPING, 0)) == (Stop(A),)
    assert decide([], [A], Observed(A, FAILED, 0, failures=1, was_ready=True)) == (Forget(A),)
    assert decide([A], [], Observed(A, FAILED, 0, failures=1, was_ready=True)) == (Start(A),)


def problems(**pool: object) -> str:
    try:
        config(backend="vllm", **pool)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_pool_on_the_cpu_cannot_be_kept_warm_and_is_told_why() -> None:
    assert "on device 'cpu' it must be 0, since vLLM's sleep mode needs a GPU" in problems(device="cpu")
    assert problems(device="cuda") == problems() == ""


def test_where_a_device_turns_out_to_be_the_cpu_the_fleet_does_not_start() -> None:
    specs = expand(config(backend="vllm"), num_cores=4, num_gpus=0)
    try:
        preflight.check_devices(specs, 4, 0)
        raise AssertionError("it should have been refused")
    except FatalStartError as error:
        assert "where vLLM has no sleep mode" in error.message
    preflight.check_devices(expand(config(backend="vllm"), num_cores=4, num_gpus=1), 4, 1)
