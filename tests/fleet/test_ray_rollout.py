"""Rolling restarts and changed configurations on a real local Ray, with simulated replicas, under clients' eyes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from ray_fleet import Fleet, asking, count_tokens, ray_fleet

from headrace.config import Config, parse
from headrace.errors import ConfigError, HeadraceError, NotFound
from headrace.fleet.membership import ControllerMembership
from headrace.fleet.rollout import Pace
from headrace_router.types import Membership

pytestmark = [pytest.mark.ray, pytest.mark.long]

TOKENS = 40


def config(replicas: int = 2, fleet: str = "rollout-test", **simulated: Any) -> Config:
    return parse(
        {
            "fleet": {"name": fleet, "drain_timeout_s": 30},
            "models": [
                {
                    "name": "sim",
                    "backend": "simulated",
                    "pools": [{"replicas": replicas}],
                    "simulated": {"step_s": 0.1, "max_running": 512, **simulated},
                }
            ],
            "gateway": {"policy": "round_robin", "access_log": False},
        }
    )


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with ray_fleet(config()) as running:
        yield running


def boots(membership: Membership) -> set[str]:
    return {replica.boot_id for replica in membership.replicas}


async def apply(fleet: Fleet, new: Config, id: str) -> Any:
    return await fleet.controller.apply.remote(new, id, Pace())


async def restart(fleet: Fleet, name: str | None, id: str, *, is_rolling: bool = True) -> Any:
    return await fleet.controller.restart.remote(name, is_rolling, id, Pace())


async def back_to(fleet: Fleet, first: Config, id: str) -> Membership:
    """The fleet as the module's first test found it."""
    await apply(fleet, first, id)
    return await fleet.ready(2)


@asynccontextmanager
async def streams(fleet: Fleet, count: int) -> AsyncIterator[list[int]]:
    """So many streams open all the while, each followed by another; yields how many tokens each had."""
    # Two hundred streams keep a small machine busy; what is asked here is not how fast it connects.
    async with (
        fleet.gateway(timeouts={"connect_s": 30.0}) as client,
        asking(count, lambda begun: count_tokens(client, TOKENS, begun)) as had,
    ):
        yield had


async def test_a_rolling_restart_under_two_hundred_streams_drops_none(fleet: Fleet) -> None:
    before = await fleet.ready(2)
    async with streams(fleet, 200) as had:
        await restart(fleet, None, "all")
        status = await fleet.rolled("all")
    assert status.rollout is not None
    assert (status.rollout.state, status.rollout.replaced) == ("done", 2)
    assert len(had) >= 200
    assert set(had) == {TOKENS}
    after = await fleet.ready(2)
    assert not boots(before) & boots(after)


async def test_a_changed_count_restarts_nobody_and_applying_it_again_does_nothing(fleet: Fleet) -> None:
    before = await fleet.ready(2)
    await apply(fleet, config(3), "three")
    assert (await fleet.rolled("three")).num_ready == 3
    after = await fleet.ready(3)
    assert boots(before) < boots(after)
    rollout = await apply(fleet, config(3), "again")
    assert rollout.id == "three", "nothing was begun"
    assert (await fleet.ready(3)).version == after.version
    await back_to(fleet, config(), "two")


async def test_what_replicas_are_made_of_is_replaced_and_streams_go_on(fleet: Fleet) -> None:
    before = await fleet.ready(2)
    async with streams(fleet, 50) as had:
        await apply(fleet, config(max_running=300), "made")
        await fleet.rolled("made")
    assert set(had) == {TOKENS}
    assert not boots(before) & boots(await fleet.ready(2))


async def test_a_broken_model_stops_the_rollout_and_the_old_replicas_serve_on(fleet: Fleet) -> None:
    first = config(max_running=300)
    before = await fleet.ready(2)
    async with streams(fleet, 20) as had:
        await apply(fleet, config(max_running=300, start_error="the weights are broken"), "broken")
        status = await fleet.rolled("broken")
        rollout = status.rollout
        assert rollout is not None
        assert (rollout.state, rollout.replaced) == ("stopped", 0)
        assert "did not start: the weights are broken" in rollout.reason
        assert boots(await fleet.ready(2)) == boots(before)
        await apply(fleet, first, "old")
        rollout = (await fleet.rolled("old")).rollout
        assert rollout is not None and rollout.state == "done"
    assert set(had) == {TOKENS}
    assert boots(await fleet.ready(2)) == boots(before), "nobody had to be replaced"
    await fleet.until(lambda now: len(now.replicas) == 2)


async def test_one_replica_is_restarted_alone(fleet: Fleet) -> None:
    before = await fleet.ready(2)
    named = before.replicas[1]
    await restart(fleet, named.id, "one", is_rolling=False)
    await fleet.rolled("one")
    after = await fleet.ready(2)
    assert boots(before) - boots(after) == {named.boot_id}
    with pytest.raises(NotFound, match="--rolling"):
        await restart(fleet, "sim", "pool", is_rolling=False)
    with pytest.raises(NotFound, match="no replica 'sim-unified-99'; the replicas of this fleet: sim"):
        await restart(fleet, "sim-unified-99", "nobody", is_rolling=False)


async def test_a_restart_that_is_asked_for_twice_is_one(fleet: Fleet) -> None:
    before = await fleet.ready(2)
    await asyncio.gather(restart(fleet, "sim", "twice"), restart(fleet, "sim", "twice"))
    await fleet.rolled("twice")
    await restart(fleet, "sim", "twice")
    after = await fleet.ready(2)
    assert not boots(before) & boots(after)
    status = await fleet.rolled("twice")
    assert boots(await fleet.ready(2)) == boots(after)
    assert status.rollout is not None and status.rollout.total == 2


async def test_a_controller_that_is_killed_in_the_middle_goes_on(fleet: Fleet) -> None:
    before = await fleet.ready(2)
    new = config(max_running=200)
    async with streams(fleet, 100) as had:
        # Looked for from before: one has begun to drain, and another has yet to.
        begun = asyncio.create_task(
            fleet.until(lambda now: bool(boots(now)) and not boots(now) <= boots(before))
        )
        await apply(fleet, new, "killed")
        await begun
        os.kill(await fleet.controller.process_id.remote(), signal.SIGKILL)
        status = await fleet.rolled("killed")
        assert status.rollout is not None and status.rollout.state == "done"
    assert set(had) == {TOKENS}
    after = await fleet.ready(2)
    assert not boots(before) & boots(after)
    assert (await apply(fleet, new, "again")).id == "killed", "it knows what is configured"


async def test_a_controller_that_is_killed_later_still_knows_the_configuration(fleet: Fleet) -> None:
    before = await fleet.ready(2)
    os.kill(await fleet.controller.process_id.remote(), signal.SIGKILL)
    after = await fleet.until(lambda now: now.epoch != before.epoch and len(now.replicas) == 2)
    assert boots(after) == boots(before)


async def test_gateways_take_their_settings_from_the_controller(fleet: Fleet) -> None:
    line = ControllerMembership(fleet.controller)
    known = await line.settings(None)
    waiting = asyncio.create_task(line.settings(known))
    first = config(max_running=200)
    gateway = first.gateway.model_copy(update={"retries": 9})
    before = await fleet.ready(2)
    await apply(fleet, first.model_copy(update={"gateway": gateway}), "gateway")
    told = await waiting
    assert (told.gateway.retries, told.version) == (9, known.version + 1)
    await fleet.rolled("gateway")
    assert boots(await fleet.ready(2)) == boots(before)


async def test_what_cannot_change_is_refused_with_what_to_do(fleet: Fleet) -> None:
    with pytest.raises(ConfigError, match="cannot become other while the fleet runs"):
        await apply(fleet, config(fleet="other"), "name")
    assert (await fleet.status()).fleet == "rollout-test"


async def test_a_model_comes_and_another_goes(fleet: Fleet) -> None:
    await fleet.ready(2)
    first = config(max_running=200)
    other = first.models[0].model_copy(update={"name": "other"})
    await apply(fleet, first.model_copy(update={"models": (*first.models, other)}), "both")
    await fleet.rolled("both")
    await fleet.ready(2, "other")
    both = await fleet.ready(2)
    assert both.models == ("sim", "other")
    await apply(fleet, first.model_copy(update={"models": (other,)}), "only")
    await fleet.rolled("only")
    left = await fleet.until(lambda now: len(now.replicas) == 2)
    assert {replica.model for replica in left.replicas} == {"other"}
    assert left.models == ("other",)
    with pytest.raises(HeadraceError):
        await restart(fleet, "sim", "gone")
