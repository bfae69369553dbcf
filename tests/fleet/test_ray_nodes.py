"""A fleet on several Ray nodes: raylets of one machine here, with addresses of their own in `tests/netns`."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
from ray_fleet import PATIENCE_S, TOKEN

from headrace.config import Config, parse
from headrace.errors import FatalStartError
from headrace.fleet import bring_up, controller, owner
from headrace.fleet.replica_host import NAMESPACE, controller_name
from headrace.fleet.status import FleetStatus

pytestmark = [pytest.mark.ray, pytest.mark.long]

OBJECT_STORE_BYTES = 80 * 2**20


def tree(name: str, replicas: int, nodes: Any = "every", **pool: Any) -> dict[str, Any]:
    return {
        "fleet": {"name": name, "report_interval_s": 0.05, "drain_timeout_s": 1.0, "ports": "21000-21999"},
        "models": [{"name": "sim", "backend": "simulated", "pools": [{"replicas": replicas, **pool}]}],
        "gateway": {"port": 0, "nodes": nodes, "processes": 1},
    }


def config(*args: Any, **pool: Any) -> Config:
    return parse(tree(*args, **pool))


@dataclass
class Nodes:
    cluster: Any
    others: list[Any]  # raylets besides the head

    def add(self) -> Any:
        node = self.cluster.add_node(
            num_cpus=2, object_store_memory=OBJECT_STORE_BYTES, labels={"tier": f"t{len(self.others)}"}
        )
        self.others.append(node)
        self.cluster.wait_for_nodes()
        return node

    def remove(self, node: Any) -> None:
        self.others.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """The head, where this test is, and two more."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False},
    )
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
    found = Nodes(cluster, [])
    try:
        found.add()
        found.add()
        yield found
    finally:
        ray.shutdown()
        cluster.shutdown()


def start(settings: Config) -> Any:
    return controller.create(settings, TOKEN, None, owner.connected(settings.gateway, is_local=False))


async def until(actor: Any, holds: Callable[[FleetStatus], bool]) -> FleetStatus:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            status: FleetStatus = await actor.status.remote()
            if holds(status):
                return status
            await asyncio.sleep(0.1)


def hosts(status: FleetStatus) -> list[int]:
    """How many replicas each raylet has; all nodes have one address here."""
    parents = [
        Path(f"/proc/{one.pid}/stat").read_text().rpartition(")")[2].split()[1] for one in status.replicas
    ]
    return sorted(Counter(parents).values())


def names(fleet: str) -> list[str]:
    """Actors of a fleet that are left."""
    return [name["name"] for name in ray.util.list_named_actors(True) if name["name"].startswith(f"{fleet}/")]


async def ask(url: str) -> str:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.completions.create(model="sim", prompt="Tell me of rivers.", max_tokens=3)
    assert answer.usage is not None
    return f"{answer.usage.completion_tokens} tokens"


async def test_replicas_and_gateways_are_on_every_node_and_follow_the_nodes(nodes: Nodes) -> None:
    actor = start(config("wide", 6))
    status = await bring_up.wait_until_ready(actor, 2 * PATIENCE_S)
    assert hosts(status) == [2, 2, 2]
    assert len(status.gateways) == 2, "the node of this process needs none"
    for gateway in status.gateways:
        assert await ask(gateway.url) == "3 tokens"

    lost = nodes.others[0]
    nodes.remove(lost)
    status = await until(actor, lambda now: len(now.gateways) == 1 and now.num_ready == 6)
    assert hosts(status) == [3, 3]

    nodes.add()
    status = await until(actor, lambda now: [one.state for one in now.gateways] == ["serving"] * 2)
    assert await ask(status.gateways[0].url) == await ask(status.gateways[1].url) == "3 tokens"
    await actor.scale.remote("sim", 9)
    status = await until(actor, lambda now: now.num_ready == 9)
    assert hosts(status) == [3, 3, 3]
    await bring_up.end(actor, 10.0)
    assert names("wide") == []


async def test_a_pool_stays_on_nodes_with_its_labels(nodes: Nodes) -> None:
    actor = start(config("chosen", 4, {"tier": "t1"}, node_labels={"tier": "t1"}))
    status = await bring_up.wait_until_ready(actor, 2 * PATIENCE_S)
    assert hosts(status) == [4]
    assert len(status.gateways) == 1
    assert await ask(status.gateways[0].url) == "3 tokens"
    ports = {int(one.url.rpartition(":")[2]) for one in status.replicas}
    assert all(21000 <= port <= 21999 for port in ports) and len(ports) == 4
    await bring_up.end(actor, 10.0)
    assert names("chosen") == []


async def test_a_controller_that_dies_finds_its_gateways_again(nodes: Nodes) -> None:
    actor = start(config("again", 3))
    before = await bring_up.wait_until_ready(actor, 2 * PATIENCE_S)
    os.kill(await actor.process_id.remote(), signal.SIGKILL)
    after = await until(actor, lambda now: now.is_surveyed and now.num_ready == 3 and len(now.gateways) == 2)
    after = await until(actor, lambda now: all(one.is_serving for one in now.gateways))
    assert {one.url for one in after.gateways} == {one.url for one in before.gateways}
    assert {one.boot_id for one in after.replicas} == {one.boot_id for one in before.replicas}
    assert await ask(after.gateways[0].url) == "3 tokens"
    await bring_up.end(actor, 10.0)
    assert names("again") == []


async def test_a_fleet_ends_with_a_killed_owner(nodes: Nodes) -> None:
    """Its actors are detached, and Ray leaves them."""
    program = (
        "import ray, sys, time; from headrace.config import parse; from headrace.fleet import controller, owner;"
        "ray.init(address=sys.argv[1], namespace='headrace', log_to_driver=False);"
        "config = parse(eval(sys.argv[2]));"
        "actor = controller.create(config, 'token', None, owner.connected(config.gateway, is_local=False));"
        "ray.get(actor.begin.remote()); print('begun', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", program, nodes.cluster.address, repr(tree("orphan", 2))],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == b"begun\n"
        actor = ray.get_actor(controller_name("orphan"), namespace=NAMESPACE)
        await bring_up.wait_until_ready(actor, 2 * PATIENCE_S)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    async with asyncio.timeout(PATIENCE_S):
        while names("orphan"):
            await asyncio.sleep(0.2)


async def test_a_gateway_whose_port_is_taken_fails_the_start_with_the_reason(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = config("taken", 1)
        gateway = settings.gateway.model_copy(update={"port": taken.getsockname()[1]})
        actor = start(settings.model_copy(update={"gateway": gateway}))
        with pytest.raises(
            FatalStartError, match=r"the gateway on .* did not start: cannot listen on .*--port"
        ):
            await bring_up.wait_until_ready(actor, 2 * PATIENCE_S)
    await bring_up.end(actor, 10.0)
    assert names("taken") == []


async def test_gpu_replicas_spread_and_a_full_node_is_passed_over(nodes: Nodes) -> None:
    """What others hold of the chosen node only Ray knows."""
    for _ in range(2):
        nodes.others.append(
            nodes.cluster.add_node(num_cpus=4, num_gpus=2, object_store_memory=OBJECT_STORE_BYTES)
        )
    nodes.cluster.wait_for_nodes()
    actor = start(config("gpus", 2, "here", device="cuda"))
    status = await bring_up.wait_until_ready(actor, 2 * PATIENCE_S)
    assert hosts(status) == [1, 1]
    await bring_up.end(actor, 10.0)

    await ray.util.placement_group([{"GPU": 2}]).ready()  # somebody else's
    actor = start(config("gpus", 2, "here", device="cuda"))
    status = await bring_up.wait_until_ready(actor, 2 * PATIENCE_S)
    assert hosts(status) == [2]
    await bring_up.end(actor, 10.0)
    assert names("gpus") == []
