"""A node that is lost under load, and comes back."""

import time
from collections.abc import Callable

import load
import pytest
from netns_fleet import Figures, Fleet, until
from network import Host

pytestmark = [pytest.mark.ray, pytest.mark.netns]


@pytest.mark.parametrize("end", [Host.kill, Host.lose_power])
async def test_a_lost_node_costs_no_client_an_error_and_is_replaced(
    fleet: Fleet, figures: Figures, end: Callable[[Host], None]
) -> None:
    lost = fleet.busiest()
    old = {one["boot_id"] for one in fleet.of(lost)}
    others = fleet.others(lost)
    assert old
    async with load.load(*map(fleet.url, others[:1])) as clients:
        await clients.more(100)
        end(lost)
        lost_s = time.monotonic()
        await until(lambda: fleet.has_left(old))
        figures.took(f"{end.__name__}: until {len(old)} lost replicas were no members", lost_s)
        await until(lambda: fleet.is_ready(*others))
        figures.took(f"{end.__name__}: until their successors were ready", lost_s)
        await clients.more(100)
    figures.counted("requests and streams answered", clients.answered + clients.streamed)
    figures.counted("streams broken off", len(clients.broken))
    assert clients.failed == []
    assert all(begun_s <= lost_s for begun_s in clients.broken), "a stream began on a replica that was gone"
    await fleet.joined(*others)
    figures.took(f"{end.__name__}: until Ray knew the node lost", lost_s)
    fleet.check_integrity()
