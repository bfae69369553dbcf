"""Fleets that grow and shrink on a real local Ray, with simulated replicas, under a client's eyes."""

import asyncio
import json
import os
import secrets
import signal
from collections.abc import Iterator

import pytest
import pytest_asyncio
from ray_fleet import PATIENCE_S, Fleet, count_tokens, ray_fleet

from headrace.config import parse
from headrace.errors import NotFound
from headrace.fleet.status import ReplicaStatus
from headrace_router.demand import Demand, PoolDemand
from headrace_router.types import ReplicaState, Role

pytestmark = [pytest.mark.ray, pytest.mark.long]

CONFIG = parse(
    {
        "fleet": {"name": "scaling-test", "drain_timeout_s": 20},
        "models": [
            {
                "name": "sim",
                "backend": "simulated",
                "pools": [{"replicas": 2}],
                "simulated": {"step_s": 0.02, "max_running": 512},
            },
            {
                "name": "auto",
                "backend": "simulated",
                "pools": [
                    {
                        "autoscale": {
                            "min_replicas": 0,
                            "max_replicas": 3,
                            "stabilisation_s": 1,
                            "idle_s": 3,
                        }
                    }
                ],
            },
            {
                "name": "big",
                "source": "org/big",
                "pools": [
                    {"device": "cpu", "cpus": 640, "autoscale": {"min_replicas": 0, "max_replicas": 2}}
                ],
            },
        ],
    }
)


@pytest.fixture(scope="module")
def running() -> Iterator[Fleet]:
    with ray_fleet(CONFIG) as fleet:
        yield fleet


@pytest_asyncio.fixture
async def fleet(running: Fleet) -> Fleet:
    """With its two replicas, whatever a test before has left."""
    await running.scale(None)
    await running.ready(2)
    return running


async def test_a_pool_has_as_many_replicas_as_a_person_says(fleet: Fleet) -> None:
    row = await fleet.scale(4)
    assert (row.target, row.pin, row.wanted) == (2, 4, 4)
    await fleet.ready(4)
    await fleet.scale(None)
    await fleet.ready(2)
    with pytest.raises(NotFound, match="no pool 'other'"):
        await fleet.scale(1, "other")


async def test_two_hundred_streams_lose_nothing_while_their_fleet_shrinks(fleet: Fleet) -> None:
    async with fleet.gateway() as client:
        begun = [asyncio.Event() for _ in range(200)]
        streams = [asyncio.create_task(count_tokens(client, 400, one)) for one in begun]
        await asyncio.gather(*(one.wait() for one in begun))
        victim = await fleet.shrink(1)
        later = [asyncio.create_task(count_tokens(client, 20)) for _ in range(20)]
        counts = await asyncio.gather(*streams)
        assert counts == [400] * 200
        assert await asyncio.gather(*later) == [20] * 20
        left = await fleet.ready(1)
        assert victim.id not in [replica.id for replica in left.replicas]


async def test_a_drain_that_is_taken_back_costs_no_start(fleet: Fleet) -> None:
    before = await fleet.ready(2)
    async with fleet.gateway() as client:
        begun = [asyncio.Event() for _ in range(2)]
        streams = [asyncio.create_task(count_tokens(client, 150, one)) for one in begun]
        await asyncio.gather(*(one.wait() for one in begun))
        await fleet.shrink(1)
        await fleet.scale(None)
        after = await fleet.ready(2)
        assert await asyncio.gather(*streams) == [150, 150]
    assert {one.boot_id for one in after.replicas} == {one.boot_id for one in before.replicas}


async def test_a_controller_restarted_within_a_drain_goes_on_with_it(fleet: Fleet) -> None:
    before = await fleet.ready(2)
    async with fleet.gateway() as client:
        begun = [asyncio.Event() for _ in range(4)]
        streams = [asyncio.create_task(count_tokens(client, 200, one)) for one in begun]
        await asyncio.gather(*(one.wait() for one in begun))
        victim = await fleet.shrink(1)
        os.kill(await fleet.controller.process_id.remote(), signal.SIGKILL)
        first = await fleet.until(lambda now: now.epoch != before.epoch)
        assert {one.id: one.state for one in first.replicas}[victim.id] is ReplicaState.DRAINING
        assert {one.boot_id for one in first.replicas} == {one.boot_id for one in before.replicas}
        assert await asyncio.gather(*streams) == [200] * 4, "a controller's death reaches no stream"
        left = await fleet.ready(1)
        assert victim.id not in [replica.id for replica in left.replicas]
    row = (await fleet.status()).pools[0]
    assert (row.target, row.pin) == (2, 1), "pins survive too"


async def test_a_draining_replica_that_dies_is_gone_and_not_replaced(fleet: Fleet) -> None:
    async with fleet.gateway() as client:
        begun = [asyncio.Event() for _ in range(2)]
        streams = [asyncio.create_task(count_tokens(client, 400, one)) for one in begun]
        await asyncio.gather(*(one.wait() for one in begun))
        victim = await fleet.shrink(1)
        pid = next(row.pid for row in (await fleet.status()).replicas if row.id == victim.id)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await fleet.ready(1)
        ended = await asyncio.gather(*streams, return_exceptions=True)
        assert 400 in ended, "the other one's stream is untouched"
    assert victim.id not in [row.id for row in (await fleet.status()).replicas]


class Load:
    """A gateway that tells of load which nobody brings, each tenth of a second until it is told otherwise."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.held = 0
        self._arrived = 0

    async def __aenter__(self) -> "Load":
        self._telling = asyncio.create_task(self._tell())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._telling.cancel()
        await asyncio.gather(self._telling, return_exceptions=True)

    async def _tell(self) -> None:
        name, sequence = secrets.token_hex(4), 0
        while True:
            sequence += 1
            self._arrived += self.held
            pool = PoolDemand("auto", Role.UNIFIED, self.held, self._arrived, self._arrived * 0.01, 0.0)
            await self._fleet.controller.demand.remote(Demand(name, sequence, (pool,)))
            await asyncio.sleep(0.1)  # the pace of a gateway, not a wait for anything


async def test_a_pool_wakes_grows_and_goes_back_to_sleep_with_its_load(fleet: Fleet) -> None:
    asleep = await fleet.until(lambda now: True)
    assert [one.model for one in asleep.replicas] == ["sim", "sim"]
    assert "auto" in asleep.coming, "its requests may wait for a replica"
    async with Load(fleet) as load:
        load.held = 1
        await fleet.ready(1, "auto")
        load.held = 12
        await fleet.ready(3, "auto")
        pid = await fleet.controller.process_id.remote()
        os.kill(pid, signal.SIGKILL)
        await fleet.until(lambda now: now.epoch != asleep.epoch)
        row = (await fleet.status()).pools[1]
        assert (row.target, row.ready) == (3, 3), "a restarted controller keeps its targets"
        assert row.cold_start_s is not None, "and what it has learned of starts"
        load.held = 0
        await fleet.ready(0, "auto")
        told = await fleet.controller.decisions.remote("auto", 50)
    effects = [(one["current"], one["target"]) for one in told["changes"]]
    assert effects[0] == (0, 1)
    assert (1, 3) in effects
    assert effects[-1][1] == 0
    assert all(one["reason"] and one["inputs"] for one in told["changes"])
    (latest,) = told["latest"]
    assert latest["pool"] == "auto"


async def test_a_replica_without_room_waits_says_for_what_and_asks_for_a_node(fleet: Fleet) -> None:
    from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
    from ray.experimental.internal_kv import _internal_kv_get

    await fleet.scale(1, "big")

    async def rows() -> list[ReplicaStatus]:
        return [row for row in (await fleet.status()).replicas if row.model == "big"]

    async with asyncio.timeout(PATIENCE_S):
        while not (found := await rows()) or not found[0].reason:
            await asyncio.sleep(0.05)
    (row,) = found
    assert (row.state, row.failures) == (ReplicaState.PENDING, 0)
    assert row.reason.startswith("waits for 640 free CPU cores on one node: ")

    def asked() -> list[dict[str, float]]:
        kept = _internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
        wanted: list[dict[str, float]] = json.loads(kept or "[]")
        return wanted

    async with asyncio.timeout(PATIENCE_S):
        while asked() != [{"CPU": 640.0}]:
            await asyncio.sleep(0.05)
        await fleet.scale(None, "big")
        while await rows() or asked():
            await asyncio.sleep(0.05)
