"""Replicas that sleep instead of leaving, on a real local Ray, simulated."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from ray_fleet import Fleet, count_tokens, ray_fleet

from headrace.config import Config, parse
from headrace.fleet.rollout import Pace
from headrace.fleet.status import ReplicaStatus
from headrace_router.types import ReplicaState

pytestmark = [pytest.mark.ray, pytest.mark.long]


def config(warm: int = 1, **simulated: Any) -> Config:
    scaling = {"min_replicas": 1, "max_replicas": 4, "warm": warm, "dry_run": True}
    return parse(
        {
            "fleet": {"name": "sleep-test", "drain_timeout_s": 20},
            "models": [
                {
                    "name": "sim",
                    "backend": "simulated",
                    "pools": [{"replicas": 3, "autoscale": scaling}],
                    "simulated": {"step_s": 0.01, "start_s": 0.5, "wake_s": 0.05, **simulated},
                }
            ],
        }
    )


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with ray_fleet(config()) as running:
        yield running


async def sleeper(fleet: Fleet) -> ReplicaStatus:
    """The one that sleeps, once there is one."""
    while True:
        found = [row for row in (await fleet.status()).replicas if row.state is ReplicaState.SLEEPING]
        if found:
            return found[0]
        await fleet.changed()


async def test_one_that_is_not_needed_sleeps_and_is_woken_before_any_is_started(fleet: Fleet) -> None:
    before = {replica.id: replica.boot_id for replica in (await fleet.ready(3)).replicas}
    async with fleet.gateway(policy="delay") as client:
        assert await count_tokens(client, 20) == 20
        await fleet.scale(1)
        asleep = await sleeper(fleet)
        left = await fleet.ready(1)
        assert asleep.id not in [replica.id for replica in left.replicas], "gateways do not see it"
        assert len((await fleet.status()).replicas) == 2, "the third one went: autoscale.warm is 1"
        assert await count_tokens(client, 20) == 20
        await fleet.scale(2)
        awake = await fleet.ready(2)
        assert {replica.id: replica.boot_id for replica in awake.replicas}.items() <= before.items()
        assert [await count_tokens(client, 20) for _ in range(4)] == [20] * 4


async def test_a_restarted_controller_finds_it_asleep(fleet: Fleet) -> None:
    await fleet.scale(1)
    asleep = await sleeper(fleet)
    before = await fleet.ready(1)
    os.kill(await fleet.controller.process_id.remote(), signal.SIGKILL)
    await fleet.until(lambda now: now.epoch != before.epoch and len(now.replicas) == 1)
    assert (await sleeper(fleet)).boot_id == asleep.boot_id
    await fleet.scale(2)
    assert asleep.boot_id in [replica.boot_id for replica in (await fleet.ready(2)).replicas]


async def test_one_that_dies_asleep_is_forgotten(fleet: Fleet) -> None:
    await fleet.scale(1)
    asleep = await sleeper(fleet)
    assert asleep.pid is not None
    os.kill(asleep.pid, signal.SIGKILL)
    while len((await fleet.status()).replicas) > 1:
        await fleet.changed()
    await fleet.scale(2)
    assert asleep.boot_id not in [replica.boot_id for replica in (await fleet.ready(2)).replicas]


async def test_one_that_wakes_as_another_is_started_anew(fleet: Fleet) -> None:
    await fleet.ready(2)
    await fleet.controller.apply.remote(config(wakes_wrong=True), "wrong", Pace())
    await fleet.rolled("wrong")
    await fleet.scale(1)
    asleep = await sleeper(fleet)
    await fleet.scale(2)
    after = await fleet.ready(2)
    again = next(replica for replica in after.replicas if replica.id == asleep.id)
    assert again.boot_id != asleep.boot_id
    row = next(row for row in (await fleet.status()).replicas if row.id == asleep.id)
    assert "not with" in row.last_failure


async def test_those_of_an_earlier_configuration_do_not_stay_asleep(fleet: Fleet) -> None:
    await fleet.scale(1)
    await sleeper(fleet)
    await fleet.controller.apply.remote(config(wakes_wrong=False), "right", Pace())
    await fleet.rolled("right")
    rows = (await fleet.status()).replicas
    assert [row.state for row in rows] == [ReplicaState.READY]
