"""What an apply and a restart make of the plan, and what is remembered of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.config import Config, parse
from headrace.errors import ConfigError, FatalStartError, NotFound
from headrace.fleet.changes import FleetChanges, num_replaced
from headrace.fleet.fleet_plan import FleetPlan, initial_plan
from headrace.fleet.pools import PoolKey
from headrace.fleet.rollout import Pace, RolloutState
from headrace.fleet.specs import numbered
from headrace_router.types import Role

KEY = PoolKey("m", Role.UNIFIED)


def config(*models: dict[str, Any], **keys: Any) -> Config:
    return parse({"models": list(models) or [model()], **keys})


def model(name: str = "m", seed: int = 1, **pool: Any) -> dict[str, Any]:
    return {
        "name": name,
        "source": "org/weights",
        "pools": [{"device": "cpu", "replicas": 2, "engine": {"seed": seed}, **pool}],
    }


def begun(first: Config) -> tuple[FleetChanges, FleetPlan]:
    changes = FleetChanges(first)
    changes.on(num_cores=8, num_gpus=0)
    plan = initial_plan(changes.config, 8, 0)
    return changes, plan.settled(())


def test_what_nobody_says_otherwise_stays() -> None:
    changes, plan = begun(config())
    pinned = plan.having(replace(plan.pools[KEY], pin=3)).settled(())
    planned = changes.apply(pinned, config(model(seed=2)), "id", Pace())
    pool = planned.pools[KEY]
    assert (pool.pin, len(pool.members), len(pool.outdated)) == (3, 3, 3)
    assert changes.rollout is not None
    assert (changes.rollout.total, changes.rollout.pools) == (3, (KEY,))


def test_a_count_that_is_configured_anew_takes_the_pin_away() -> None:
    changes, plan = begun(config())
    pinned = plan.having(replace(plan.pools[KEY], pin=5))
    pool = changes.apply(pinned, config(model(replicas=4)), "id", Pace()).pools[KEY]
    assert (pool.wanted, pool.outdated) == (4, ())


def test_an_autoscaled_count_is_kept_within_new_bounds() -> None:
    def scaled(most: int) -> Config:
        return config(model(autoscale={"max_replicas": most}))

    changes, plan = begun(scaled(8))
    grown = plan.having(replace(plan.pools[KEY], target=6))
    assert changes.apply(grown, scaled(7), "a", Pace()).pools[KEY].target == 6
    assert changes.apply(grown, scaled(3), "b", Pace()).pools[KEY].target == 3


def test_applying_the_same_again_begins_nothing() -> None:
    changes, plan = begun(config())
    assert changes.apply(plan, config(), "id", Pace()) == plan
    assert (changes.rollout, changes.revision) == (None, 0)


def test_an_apply_after_one_that_stopped_tries_again() -> None:
    changes, plan = begun(config())
    plan = changes.apply(plan, config(model(seed=2)), "first", Pace())
    assert changes.rollout is not None
    changes.rollout = replace(changes.rollout, state=RolloutState.STOPPED, reason="no memory")
    assert changes.apply(plan, config(model(seed=2)), "second", Pace()) == plan
    assert (changes.rollout.id, changes.rollout.state) == ("second", RolloutState.ROLLING)
    assert changes.rollout.pools == (KEY,)
    assert changes.revision == 1


def test_too_few_devices_are_said_before_anything_changes() -> None:
    changes, plan = begun(config())
    with pytest.raises(FatalStartError, match="the cluster has 8"):
        changes.apply(plan, config(model(replicas=9)), "id", Pace())
    with pytest.raises(ConfigError, match="`headrace serve`"):
        changes.apply(plan, config(gateway={"port": 1}), "id", Pace())
    assert changes.rollout is None
    assert changes.config == FleetChanges(config()).config


def test_a_restart_is_begun_once_for_each_id() -> None:
    changes, plan = begun(config())
    once = changes.restart(plan, "m", True, "id", Pace())
    assert once.pools[KEY].outdated == (0, 1)
    assert changes.restart(once, "m", True, "id", Pace()) is once
    more = changes.restart(once, "m", True, "next", Pace())
    assert more.pools[KEY].template.generation == 2


def test_one_counts_as_replaced_when_its_successor_is_ready() -> None:
    changes, plan = begun(config())
    plan = changes.restart(plan, "m", True, "id", Pace())
    rollout, pool = changes.rollout, plan.pools[KEY]
    assert rollout is not None
    first, second = (spec.id for spec in pool.members.values())
    assert num_replaced(rollout, plan, {first, second}) == 0
    beside = numbered(pool.template, 2)
    surged = plan.having(replace(pool, surge=1, members={**pool.members, 2: beside}))
    assert num_replaced(rollout, surged, {first, second}) == 0, "it only starts"
    relieved = surged.having(replace(surged.pools[KEY].without({0}), surge=0))
    assert num_replaced(rollout, relieved, {second, beside.id}) == 1
    in_place = plan.having(replace(pool, members={**pool.members, 0: pool.successor(0)}))
    assert num_replaced(rollout, in_place, {second}) == 0, "it drains, or starts"
    assert num_replaced(rollout, in_place, {first, second}) == 1


def test_one_replica_is_named_by_its_id() -> None:
    changes, plan = begun(config())
    assert changes.restart(plan, "m-unified-1", False, "id", Pace()).pools[KEY].outdated == (1,)
    with pytest.raises(NotFound, match="--rolling"):
        changes.restart(plan, "m", False, "id2", Pace())


@given(
    st.sampled_from(["nothing", "apply", "restart", "stopped"]),
    st.integers(1, 4),
    st.dictionaries(
        st.sampled_from(["seed", "w", "x"]),
        st.one_of(st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    ),
)
def test_a_successor_remembers_all_of_it(what: str, replicas: int, engine: dict[str, Any]) -> None:
    changes, plan = begun(config(model(engine=engine)))
    if what != "nothing":
        changes.restart(plan, None, True, "id", Pace(2, 0))
    if what in ("apply", "stopped"):
        changes.apply(plan, config(model(replicas=replicas, engine=engine)), "id2", Pace())
    if what == "stopped" and changes.rollout is not None:
        changes.rollout = replace(changes.rollout, state=RolloutState.STOPPED, reason="no memory")
    successor = FleetChanges(config())
    successor.on(num_cores=8, num_gpus=0)
    successor.restore(json.loads(json.dumps(changes.remembered())))
    assert successor.config == changes.config
    assert successor.rollout == changes.rollout
    assert successor.revision == changes.revision
    again = initial_plan(successor.config, 8, 0)
    assert again.pools[KEY].template == initial_plan(changes.config, 8, 0).pools[KEY].template
