"""A node that is lost under load, and started again."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import load
import pytest
from netns_fleet import NUM_REPLICAS, REPLICA, Figures, Fleet, until
from network import Host
from served import serving

pytestmark = [pytest.mark.ray, pytest.mark.netns]


@pytest.mark.parametrize("end", [Host.kill, Host.lose_power])
async def test_a_lost_node_costs_no_client_an_error_and_is_replaced(
    fleet: Fleet, figures: Figures, end: Callable[[Host], None]
) -> None:
    lost = fleet.hosts[2]
    others = fleet.others(lost)
    old = {one["boot_id"] for one in fleet.replicas(lost)}
    assert old
    async with load.load(*map(fleet.url, others)) as clients:
        await clients.more(100)
        end(lost)
        lost_s = time.monotonic()
        await until(lambda: fleet.has_left(old))
        figures.took(f"{end.__name__}: until {len(old)} lost replicas were no members", lost_s)
        await until(lambda: fleet.num_ready(*others) == NUM_REPLICAS)
        figures.took(f"{end.__name__}: until their successors were ready", lost_s)
        await until(lambda: fleet.is_whole(*others))
        figures.took(f"{end.__name__}: until its gateway was no longer looked for", lost_s)
        await clients.more(100)
    figures.counted(end.__name__, clients)
    assert clients.failed == []
    assert all(begun_s <= lost_s for begun_s in clients.broken), "a stream began on a replica that was gone"
    await fleet.joined(*others)
    fleet.check_integrity()


async def test_a_node_that_is_started_again_gets_a_gateway_and_replicas(fleet: Fleet) -> None:
    node = fleet.hosts[2]
    others = fleet.others(node)
    node.kill()
    await fleet.joined(*others)
    await until(lambda: fleet.is_whole(*others))
    fleet.cluster.start_node(node)
    await until(lambda: fleet.is_whole(*fleet.hosts))
    assert await load.ask(fleet.url(node)) in {one["id"] for one in fleet.replicas()}
    fleet.served.command("scale", "sim", str(NUM_REPLICAS + 2))
    try:
        await until(lambda: fleet.is_whole(*fleet.hosts, count=NUM_REPLICAS + 2))
        there = {one["id"] for one in fleet.replicas(node)}
        assert len(there) == 2, "the new ones are where none was"
        answered = {await load.ask(fleet.url(node)) for _ in range(2 * (NUM_REPLICAS + 2))}
        assert there <= answered
    finally:
        fleet.served.command("scale", "sim", "--auto")
    await until(lambda: fleet.is_whole(*fleet.hosts))
    fleet.check_integrity()


async def test_a_fleet_ends_with_the_node_of_its_headrace_serve(fleet: Fleet, tmp_path: Path) -> None:
    node = fleet.hosts[2]
    others = fleet.others(node)
    config = tmp_path / "config.yaml"
    model = {"name": "sim", "backend": "simulated", "pools": [{"replicas": 3}]}
    config.write_text(json.dumps({"fleet": {"name": "guest", "drain_timeout_s": 1}, "models": [model]}))
    cluster = fleet.cluster
    where = {"inside": node.inside, "environment": cluster.environment}
    with serving(config, "--address", cluster.address, "--port", "0", **where) as guest:
        assert await asyncio.to_thread(lambda: guest.url)
        assert sum(name.startswith("guest/") for name in cluster.observer.actors()) == 4
        node.kill()
        await until(lambda: not any(name.startswith("guest/") for name in cluster.observer.actors()))
    await until(lambda: fleet.is_whole(*others))
    await until(lambda: sum(len(host.running(REPLICA)) for host in others) == NUM_REPLICAS)
    fleet.check_integrity()
