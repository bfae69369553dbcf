"""The controller on a real local Ray, with simulated replicas: births, deaths, versions, the end."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import ray_fleet
from ray_fleet import PATIENCE_S

from headrace.config import parse
from headrace.fleet import cluster, warden
from headrace_router.types import Membership

pytestmark = pytest.mark.ray

NUM_REPLICAS = 3

CONFIG = parse(
    {
        "fleet": {"name": "ray-test"},
        "models": [{"name": "sim", "backend": "simulated", "pools": [{"replicas": NUM_REPLICAS}]}],
    }
)


class Fleet(ray_fleet.Fleet):
    async def complete(self) -> Membership:
        return await self.until(lambda membership: len(membership.replicas) == NUM_REPLICAS)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    stdout = sys.stdout
    connection = cluster.start_local()
    sys.stdout.close()
    sys.stdout = stdout
    from headrace.fleet import controller

    actor = controller.create(CONFIG, "token", "127.0.0.1")
    try:
        yield Fleet(connection, actor)
    finally:
        cluster.leave(connection)
        assert warden.marked(connection.mark) == []


async def test_the_fleet_comes_up_with_its_members_told_apart(fleet: Fleet) -> None:
    membership = await fleet.complete()
    assert [replica.id for replica in membership.replicas] == [
        f"sim-unified-{n}" for n in range(NUM_REPLICAS)
    ]
    assert len({replica.boot_id for replica in membership.replicas}) == NUM_REPLICAS
    assert len({replica.endpoints.url for replica in membership.replicas}) == NUM_REPLICAS
    status = await fleet.status()
    assert status.num_ready == NUM_REPLICAS
    assert all(row.running == 0 and row.pid for row in status.replicas)


async def test_a_killed_replica_leaves_within_a_second_and_comes_back_as_another_boot(fleet: Fleet) -> None:
    before = await fleet.complete()
    victim = before.replicas[1]
    pid = next(row.pid for row in (await fleet.status()).replicas if row.id == victim.id)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    loop = asyncio.get_running_loop()
    killed_s = loop.time()
    without = await fleet.until(
        lambda membership: victim.boot_id not in [replica.boot_id for replica in membership.replicas]
    )
    assert loop.time() - killed_s < 1.0
    assert without.version > before.version
    after = await fleet.complete()
    again = next(replica for replica in after.replicas if replica.id == victim.id)
    assert again.boot_id != victim.boot_id
    assert after.version > without.version
    row = next(row for row in (await fleet.status()).replicas if row.id == victim.id)
    assert (row.restarts, row.reason, row.last_failure) == (1, "", "its process died")


async def test_a_restarted_controller_finds_its_replicas_by_name(fleet: Fleet) -> None:
    before = await fleet.complete()
    pid = await fleet.controller.process_id.remote()
    os.kill(pid, signal.SIGKILL)
    after = await fleet.until(
        lambda membership: membership.epoch != before.epoch and len(membership.replicas) == NUM_REPLICAS
    )
    assert after.replicas == before.replicas, "no replica was restarted"


async def test_shutdown_ends_every_replica(fleet: Fleet) -> None:
    import ray

    await fleet.complete()
    pids = [row.pid for row in (await fleet.status()).replicas]
    descriptors = [os.pidfd_open(pid) for pid in pids if pid is not None]
    await fleet.controller.shutdown.remote(0.0)
    loop = asyncio.get_running_loop()
    for descriptor in descriptors:
        ended = asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        async with asyncio.timeout(PATIENCE_S):
            await ended.wait()
        loop.remove_reader(descriptor)
        os.close(descriptor)
    assert (await fleet.until(lambda _: True)).replicas == ()
    ray.kill(fleet.controller, no_restart=True)


def test_a_cluster_starts_where_ray_was_imported_before() -> None:
    """vLLM imports Ray, and so does a notebook's user; Ray has read its authentication mode by then."""
    program = (
        "import ray, sys\n"
        "from headrace.fleet import cluster\n"
        "for _ in range(2):\n"
        "    connection = cluster.start_local()\n"
        "    print(ray.is_initialized(), connection.auth_token, file=sys.__stdout__)\n"  # the other one is Ray's now
        "    cluster.leave(connection)\n"
    )
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=without, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "True None\n" * 2, done.stderr[-2000:]
