"""A node that the others do not reach for a while."""

import asyncio
import sys
import time

import load
import pytest
from netns_fleet import GATEWAY, NUM_REPLICAS, RAYLET, REPLICA, Figures, Fleet, until
from network import Host

pytestmark = [pytest.mark.ray, pytest.mark.netns, pytest.mark.timeout(600)]

SHORT_CUT_S = 5.0


async def test_a_short_cut_costs_no_replica_and_no_client_an_error(fleet: Fleet, figures: Figures) -> None:
    host = fleet.hosts[1]
    others = fleet.others(host)
    before, there = fleet.replicas(), {one["id"] for one in fleet.replicas(host)}
    assert there
    async with load.load(*map(fleet.url, others)) as clients:
        await clients.more(100)
        host.cut()
        cut_s = time.monotonic()
        try:
            # A client on the cut node has its own gateway, and the replicas that this one reaches.
            asking = [sys.executable, load.__file__, fleet.url(host)]
            answered = await asyncio.to_thread(fleet.cluster.run, host, *asking)
            while time.monotonic() - cut_s < SHORT_CUT_S:
                await clients.more(20)
        finally:
            host.heal()
        await clients.more(100)
    figures.counted(f"cut of {SHORT_CUT_S:g} s", clients)
    assert clients.failed == []
    assert answered.strip() in there
    await until(lambda: fleet.is_whole(*fleet.hosts))
    after = fleet.replicas()
    for key in ("id", "boot_id", "pid", "node"):
        assert [one[key] for one in after] == [one[key] for one in before], key
    fleet.check_integrity()
    for gateway in fleet.hosts:
        await used(fleet, gateway, there)
        await used(fleet, gateway, {one["id"] for one in fleet.replicas(others[0])})


async def used(fleet: Fleet, gateway: Host, replicas: set[str]) -> None:
    """Return once each of these has answered through that gateway."""
    left = set(replicas)
    async with asyncio.timeout(30):
        while left:
            left.discard(await load.ask(fleet.url(gateway)))


async def test_a_cut_that_ray_does_not_notice_leaves_no_replica_twice(fleet: Fleet, figures: Figures) -> None:
    """Longer than `fleet.node_timeout_s`, so that successors start, and healed before Ray gives the node up."""
    host = fleet.hosts[1]
    others = fleet.others(host)
    old_pids = sorted(host.running(REPLICA))
    assert old_pids
    async with load.load(*map(fleet.url, others)) as clients:
        await clients.more(100)
        host.cut()
        cut_s = time.monotonic()
        await until(lambda: fleet.num_ready(*others) == NUM_REPLICAS)
        figures.took("middling cut: until successors were ready", cut_s)
        assert sorted(host.running(REPLICA)) == old_pids, "they run on, where nobody reaches them"
        host.heal()
        healed_s = time.monotonic()
        await until(lambda: not host.running(REPLICA))
        figures.took("middling cut: until what was left there had ended, once it was healed", healed_s)
        await clients.more(100)
    figures.counted("middling cut", clients)
    assert clients.failed == []
    await until(lambda: fleet.is_whole(*fleet.hosts))
    fleet.check_integrity()
    await used(fleet, host, {fleet.replicas(others[0])[0]["id"]})


async def test_a_long_cut_ends_what_was_cut_off_and_leaves_nothing_twice(
    fleet: Fleet, figures: Figures
) -> None:
    host = fleet.hosts[1]
    others = fleet.others(host)
    old = {one["boot_id"] for one in fleet.replicas(host)}
    old_pids = sorted(host.running(REPLICA))
    assert old and old_pids
    async with load.load(*map(fleet.url, others)) as clients:
        await clients.more(100)
        host.cut()
        cut_s = time.monotonic()
        await until(lambda: fleet.has_left(old))
        figures.took(f"long cut: until {len(old)} cut replicas were no members", cut_s)
        await until(lambda: fleet.num_ready(*others) == NUM_REPLICAS)
        figures.took("long cut: until their successors were ready", cut_s)
        await fleet.joined(*others)
        figures.took("long cut: until Ray knew the node lost", cut_s)
        await until(lambda: fleet.is_whole(*others))
        assert sorted(host.running(REPLICA)) == old_pids, "they run on, where nobody reaches them"
        await clients.more(100)
        host.heal()
        healed_s = time.monotonic()
        await until(lambda: not any(map(host.running, (RAYLET, REPLICA, GATEWAY))))
        figures.took("long cut: until what was cut off had ended, once it was healed", healed_s)
        await clients.more(100)
    figures.counted("long cut", clients)
    assert clients.failed == []
    assert fleet.is_whole(*others)
    assert len(fleet.replicas()) == NUM_REPLICAS
    fleet.check_integrity()
