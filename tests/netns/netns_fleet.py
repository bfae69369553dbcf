"""A fleet of simulated replicas on a cluster of namespaces."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster import Cluster
from load import Load
from network import Host
from served import Served

NAME = "netns"
NUM_REPLICAS = 6
CONFIG = {
    "fleet": {"name": NAME, "ports": "20000-20999", "drain_timeout_s": 5},
    "models": [
        {
            "name": "sim",
            "backend": "simulated",
            "pools": [{"replicas": NUM_REPLICAS}],
            "simulated": {"step_s": 0.01},
        }
    ],
    # A fixed port meets nobody: every host has all of its own.
    "gateway": {"host": "0.0.0.0", "nodes": "every", "policy": "round_robin", "access_log": False},
}

RAYLET = "raylet/raylet"
REPLICA = "ray::ReplicaActor"
GATEWAY = "ray::GatewayActor"
CONTROLLER = "ray::Controller"

_PATIENCE_S = 120.0
_POLL_S = 0.1

Value = TypeVar("Value")


async def until(look: Callable[[], Value], patience_s: float = _PATIENCE_S) -> Value:
    """What `look` says as soon as that is true of anything; it may block. Raises TimeoutError."""
    async with asyncio.timeout(patience_s):
        while not (value := await asyncio.to_thread(look)):
            await asyncio.sleep(_POLL_S)
    return value


@dataclass(frozen=True, slots=True)
class Fleet:
    """`headrace serve` on the head's host, and replicas wherever they are. What asks blocks."""

    cluster: Cluster
    served: Served

    @property
    def hosts(self) -> list[Host]:
        return self.cluster.hosts

    def others(self, host: Host) -> list[Host]:
        return [one for one in self.hosts if one is not host]

    def url(self, host: Host) -> str:
        """Of the gateway there."""
        return f"http://{host.address}:{self.served.url.rpartition(':')[2]}"

    def status(self) -> dict[str, Any]:
        """As the controller sees it."""
        return self.cluster.observer.status(NAME)

    def replicas(self, host: Host | None = None) -> list[dict[str, Any]]:
        """In the order of their ids; those of one host, or all."""
        replicas = self.status().get("replicas", [])
        return [one for one in replicas if host is None or one["node"] == host.address]

    def is_whole(self, *hosts: Host, count: int = NUM_REPLICAS) -> bool:
        """Whether so many replicas are ready and every gateway serves, on these hosts alone."""
        addresses = {host.address for host in hosts}
        status = self.status()
        replicas, gateways = status.get("replicas", []), status.get("gateways", [])
        serving = {one["address"] for one in gateways if one["state"] == "serving"}
        return (
            len(replicas) == count
            and all(one["state"] == "ready" and one["node"] in addresses for one in replicas)
            and len(gateways) == len(serving)
            and serving | {self.cluster.head.address} == addresses
        )

    def num_ready(self, *hosts: Host) -> int:
        """Replicas on these hosts that serve."""
        addresses = {host.address for host in hosts}
        return sum(one["state"] == "ready" and one["node"] in addresses for one in self.replicas())

    def has_left(self, boot_ids: set[str]) -> bool:
        """Whether none of these replicas is a member any more."""
        replicas = self.replicas()
        return bool(replicas) and not boot_ids & {one["boot_id"] for one in replicas}

    def check_integrity(self) -> None:
        """One controller, each replica once, one gateway on each node: as the controller, Ray and the hosts' processes
        have it."""
        replicas, nodes = self.replicas(), self.cluster.observer.nodes()
        actors = [name for name in self.cluster.observer.actors() if name.startswith(f"{NAME}/")]
        ours = [f"{NAME}/controller", *(f"{NAME}/{one['id']}" for one in replicas)]
        ours += [f"{NAME}/gateway"] * (len(nodes) - 1)
        assert sorted(_without_suffix(name) for name in actors) == sorted(ours)
        for host in self.hosts:
            here = host.address in nodes
            assert len(host.running(CONTROLLER)) == (host is self.cluster.head), host
            assert len(host.running(GATEWAY)) == (here and host is not self.cluster.head), host
            assert sorted(host.running(REPLICA)) == sorted(one["pid"] for one in self.replicas(host)), host

    async def mend(self) -> None:
        """Return once every node is there, with its gateway and its part of the replicas."""
        for host in self.hosts:
            host.heal()
        alive = self.cluster.observer.nodes()
        for host in self.hosts[1:]:
            if host.address not in alive or not host.running(RAYLET):
                host.kill()
                await asyncio.to_thread(self.cluster.start_node, host)
        await self.joined(*self.hosts)
        await until(lambda: self.is_whole(*self.hosts))
        # Replicas stay where they are when a node joins; one that is started again goes where the fewest are.
        while len(most := max(map(self.replicas, self.hosts), key=len)) > NUM_REPLICAS / len(self.hosts):
            os.kill(most[0]["pid"], signal.SIGKILL)
            boot = {most[0]["boot_id"]}
            await until(lambda gone=boot: self.has_left(gone) and self.is_whole(*self.hosts))

    async def joined(self, *hosts: Host) -> None:
        """Return once Ray's nodes are exactly these."""
        addresses = sorted(host.address for host in hosts)
        await until(lambda: sorted(self.cluster.observer.nodes()) == addresses)


def _without_suffix(actor: str) -> str:
    """`fleet/replica-id/random` and `fleet/gateway@node` without what differs each time."""
    return actor.partition("@")[0] if "@" in actor else re.sub(r"^(.+/.+)/.+$", r"\1", actor)


class Figures:
    """What took how long, for people."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def took(self, what: str, since_s: float) -> None:
        self.lines.append(f"{what}: {time.monotonic() - since_s:.1f} s")

    def counted(self, what: str, load: Load) -> None:
        self.lines.append(
            f"{what}: {load.answered + load.streamed} answered, {len(load.failed)} failed, "
            f"{len(load.broken)} streams broken off"
        )
