"""A fleet on three nodes: it is on all of them, and every replica answers whoever asks."""

import load
import pytest
from netns_fleet import NUM_REPLICAS, Fleet

pytestmark = [pytest.mark.ray, pytest.mark.netns]


async def test_every_gateway_reaches_every_replica(fleet: Fleet) -> None:
    for host in fleet.hosts:
        answered = {await load.ask(fleet.url(host)) for _ in range(2 * NUM_REPLICAS)}
        assert answered == {one["id"] for one in fleet.replicas()}, host


async def test_streams_come_to_their_end_through_every_gateway(fleet: Fleet) -> None:
    for host in fleet.hosts:
        for _ in range(NUM_REPLICAS):
            await load.stream(fleet.url(host))


def test_each_node_has_its_part_and_nothing_is_there_twice(fleet: Fleet) -> None:
    assert [len(fleet.replicas(host)) for host in fleet.hosts] == [NUM_REPLICAS / 3] * 3
    fleet.check_integrity()


def test_replicas_listen_in_the_configured_range(fleet: Fleet) -> None:
    ports = [int(one["url"].rpartition(":")[2]) for one in fleet.replicas()]
    assert all(20000 <= port <= 20999 for port in ports)
