"""A fleet of simulated replicas on a cluster of namespaces."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster import Cluster
from network import Host
from served import Served

NAME = "netns"
NUM_REPLICAS = 6
CONFIG = {
    "fleet": {"name": NAME},
    "models": [
        {
            "name": "sim",
            "backend": "simulated",
            "pools": [{"replicas": NUM_REPLICAS}],
            "simulated": {"step_s": 0.01},
        }
    ],
    "gateway": {"policy": "round_robin", "access_log": False},
}

RAYLET = "raylet/raylet"
REPLICA = "ray::ReplicaActor"
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

    def url(self, host: Host) -> str:
        """Of the gateway there, for clients on this machine."""
        return f"http://{host.address}:{self.served.url.rpartition(':')[2]}"

    def replicas(self) -> list[dict[str, Any]]:
        """As the controller sees them, in the order of their ids."""
        return self.cluster.observer.replicas(NAME)

    def is_ready(self, *hosts: Host) -> bool:
        """Whether all replicas are, on these hosts alone."""
        addresses = {host.address for host in hosts}
        replicas = self.replicas()
        return len(replicas) == NUM_REPLICAS and all(
            one["state"] == "ready" and one["node"] in addresses for one in replicas
        )

    def busiest(self) -> Host:
        """The host with most replicas, the head's apart."""
        count = Counter(one["node"] for one in self.replicas())
        return max(self.hosts[1:], key=lambda host: count[host.address])

    def of(self, host: Host) -> list[dict[str, Any]]:
        """Its replicas."""
        return [one for one in self.replicas() if one["node"] == host.address]

    def others(self, host: Host) -> list[Host]:
        return [one for one in self.hosts if one is not host]

    def has_left(self, boot_ids: set[str]) -> bool:
        """Whether none of these is a member any more."""
        replicas = self.replicas()
        return bool(replicas) and not boot_ids & {one["boot_id"] for one in replicas}

    def check_integrity(self) -> None:
        """One controller, and each replica once: as the controller, Ray and the hosts' processes have it."""
        replicas = self.replicas()
        actors = [name for name in self.cluster.observer.actors() if name.startswith(f"{NAME}/")]
        assert sorted(name.rpartition("/")[0] for name in actors) == sorted(
            [NAME, *(f"{NAME}/{one['id']}" for one in replicas)]
        )
        assert sum(len(host.running(CONTROLLER)) for host in self.hosts) == 1
        for host in self.hosts:
            assert sorted(host.running(REPLICA)) == sorted(one["pid"] for one in self.of(host)), host

    async def mend(self) -> None:
        """Return once every node is there and every replica is ready."""
        for host in self.hosts:
            host.heal()
        alive = self.cluster.observer.nodes()
        for host in self.hosts[1:]:
            if host.address not in alive or not host.running(RAYLET):
                host.kill()
                await asyncio.to_thread(self.cluster.start_node, host)
        await self.joined(*self.hosts)
        await until(lambda: self.is_ready(*self.hosts))

    async def joined(self, *hosts: Host) -> None:
        """Return once Ray's nodes are exactly these."""
        addresses = sorted(host.address for host in hosts)
        await until(lambda: sorted(self.cluster.observer.nodes()) == addresses)


class Figures:
    """What took how long, for people."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def took(self, what: str, since_s: float) -> None:
        self.lines.append(f"{what}: {time.monotonic() - since_s:.1f} s")

    def counted(self, what: str, count: int) -> None:
        self.lines.append(f"{what}: {count}")
