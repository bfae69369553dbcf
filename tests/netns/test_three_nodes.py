"""A fleet on three nodes: every replica answers, whoever asks."""

import load
import pytest
from netns_fleet import NUM_REPLICAS, Fleet

pytestmark = [pytest.mark.ray, pytest.mark.netns]


async def test_every_replica_of_every_node_answers(fleet: Fleet) -> None:
    url = fleet.url(fleet.hosts[0])
    answered = {await load.ask(url) for _ in range(2 * NUM_REPLICAS)}
    assert answered == {one["id"] for one in fleet.replicas()}
    fleet.check_integrity()


async def test_streams_come_to_their_end(fleet: Fleet) -> None:
    for _ in range(NUM_REPLICAS):
        await load.stream(fleet.url(fleet.hosts[0]))
