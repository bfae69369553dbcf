"""A node that the others do not reach for a while."""

import time

import load
import pytest
from netns_fleet import RAYLET, REPLICA, Figures, Fleet, until

pytestmark = [pytest.mark.ray, pytest.mark.netns, pytest.mark.timeout(600)]

SHORT_CUT_S = 5.0


async def test_a_short_cut_costs_no_replica_and_no_client_an_error(fleet: Fleet, figures: Figures) -> None:
    before = fleet.replicas()
    host = fleet.busiest()
    others = fleet.others(host)
    async with load.load(*map(fleet.url, others[:1])) as clients:
        await clients.more(100)
        host.cut()
        cut_s = time.monotonic()
        try:
            while time.monotonic() - cut_s < SHORT_CUT_S:
                await clients.more(20)
        finally:
            host.heal()
        await clients.more(100)
    figures.counted("short cut: streams broken off", len(clients.broken))
    assert clients.failed == []
    await until(lambda: fleet.is_ready(*fleet.hosts))
    after = fleet.replicas()
    for key in ("id", "boot_id", "pid", "node"):
        assert [one[key] for one in after] == [one[key] for one in before]
    there = {one["id"] for one in fleet.of(host)}
    asked: set[str] = set()

    async with load.load(fleet.url(others[0])) as clients:
        await clients.more(20)
    for _ in range(100):
        asked.add(await load.ask(fleet.url(others[0])))
    assert there <= asked, "they are used again"
    fleet.check_integrity()


async def test_a_long_cut_ends_what_was_cut_off_and_leaves_nothing_twice(
    fleet: Fleet, figures: Figures
) -> None:
    host = fleet.busiest()
    others = fleet.others(host)
    old = {one["boot_id"] for one in fleet.of(host)}
    old_pids = host.running(REPLICA)
    assert old and old_pids
    async with load.load(*map(fleet.url, others[:1])) as clients:
        await clients.more(100)
        host.cut()
        cut_s = time.monotonic()
        await fleet.joined(*others)
        figures.took("long cut: until Ray knew the node lost", cut_s)
        await until(lambda: fleet.has_left(old))
        figures.took(f"long cut: until {len(old)} cut replicas were no members", cut_s)
        await until(lambda: fleet.is_ready(*others))
        figures.took("long cut: until their successors were ready", cut_s)
        assert sorted(host.running(REPLICA)) == sorted(old_pids), "they run on, where nobody reaches them"
        await clients.more(100)
        host.heal()
        healed_s = time.monotonic()
        await until(lambda: not host.running(RAYLET) and not host.running(REPLICA))
        figures.took("long cut: until what was cut off had ended, once it was healed", healed_s)
        await clients.more(100)
    figures.counted("long cut: streams broken off", len(clients.broken))
    assert clients.failed == []
    assert fleet.is_ready(*others)
    fleet.check_integrity()
