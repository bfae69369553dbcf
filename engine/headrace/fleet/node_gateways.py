"""Gateways on the nodes of the cluster, one on each that the configuration asks for, kept there.

    nodes, gateway.nodes ──> wanted ──> make the actor, start, watch ──> again when it has ended, after a pause
                                   └──> a node that is wanted no more: stop, with its time to drain

The gateway of `headrace serve` is not among them: it runs in that process, and its node needs no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headrace.fleet.gateway_actor import GatewayActor, GatewayOrder
from headrace.fleet.replica import StartFailure
from headrace.fleet.replica_host import NAMESPACE
from headrace.fleet.status import GatewayStatus

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_YOUNG_S = 10.0
"""One that ends younger is started again after a pause that doubles."""
_END_TIMEOUT_S = 10.0


def wanted(
    nodes: Literal["here", "every"] | Mapping[str, str], listed: Iterable[Mapping[str, Any]], here: str | None
) -> dict[str, str]:
    """Address by id of the nodes that are to have a gateway, of what `ray.nodes()` lists. Pure.

    `nodes`: gateway.nodes of the configuration; `here`: id of the node that `headrace serve` runs on.
    """
    if nodes == "here":
        return {}
    labels = {} if nodes == "every" else nodes
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in listed
        if node["Alive"]
        and node["NodeID"] != here
        and all(node.get("Labels", {}).get(name) == value for name, value in labels.items())
    }


@dataclass(slots=True)
class _Place:
    """One node's."""

    address: str
    actor: Any = None
    url: str = ""
    reason: str = ""
    failures: int = 0  # in a row
    is_fatal: bool = False
    since_s: float = 0.0
    life: asyncio.Task[None] | None = None

    def row(self, now_s: float) -> GatewayStatus:
        state = "serving" if self.url else "failed" if self.reason else "starting"
        return GatewayStatus(
            self.address, state, now_s - self.since_s, self.url, self.failures, self.is_fatal, self.reason
        )

    def enter(self, url: str = "", reason: str = "") -> None:
        self.url, self.reason, self.since_s = url, reason, time.monotonic()


class NodeGateways:
    """Of one fleet. Belongs to the controller's loop."""

    def __init__(
        self, fleet: str, order: Callable[[str], GatewayOrder], controller: Callable[[], Any]
    ) -> None:
        """`order` makes what a gateway on a node of that address is told; `controller` is whom it follows."""
        self._prefix = f"{fleet}/gateway@"
        self._order = order
        self._controller = controller
        self._places: dict[str, _Place] = {}  # by node id
        self._leaving: set[asyncio.Task[None]] = set()

    def rows(self) -> tuple[GatewayStatus, ...]:
        """For people, by address."""
        now_s = time.monotonic()
        return tuple(
            sorted((place.row(now_s) for place in self._places.values()), key=lambda row: row.address)
        )

    async def adopt(self, nodes: Mapping[str, str]) -> None:
        """After a controller of this fleet that is no more: end its gateways on other nodes than these."""
        for listed in await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True):
            node_id = listed["name"].removeprefix(self._prefix)
            if listed["namespace"] == NAMESPACE and node_id != listed["name"] and node_id not in nodes:
                with contextlib.suppress(ValueError):  # it ended since it was listed
                    _kill(await asyncio.to_thread(ray.get_actor, listed["name"], namespace=NAMESPACE))

    def follow(self, nodes: Mapping[str, str], drain_s: float) -> None:
        """Have a gateway on each of these nodes and on no other."""
        for node_id in nodes.keys() - self._places.keys():
            place = self._places[node_id] = _Place(nodes[node_id], since_s=time.monotonic())
            place.life = asyncio.ensure_future(self._live(node_id, place))
        for node_id in self._places.keys() - nodes.keys():
            leaving = asyncio.ensure_future(self._end(self._places.pop(node_id), drain_s))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def end_all(self, drain_s: float) -> None:
        """Let what they relay finish for at most `drain_s`; end them."""
        self.follow({}, drain_s)
        await asyncio.gather(*self._leaving)

    async def _live(self, node_id: str, place: _Place) -> None:
        while True:
            began_s = time.monotonic()
            try:
                place.actor = self._make(node_id, place.address)  # or that of the controller before this one
                outcome = await place.actor.start.remote()
                if isinstance(outcome, StartFailure):
                    place.is_fatal = outcome.is_fatal
                    reason = outcome.reason
                else:
                    place.enter(url=outcome)
                    place.failures = 0
                    await place.actor.watch.remote()
                    reason = "it was stopped"
            except ray.exceptions.RayError:
                reason = "its process died"
            except Exception as error:  # supervision boundary: one node's gateway must not end the others'
                log.exception("supervising the gateway on %s failed", place.address)
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            log.warning("the gateway on %s: %s; starting another", place.address, reason)
            place.enter(reason=reason)
            _kill(place.actor)
            is_young = time.monotonic() - began_s < _YOUNG_S
            place.failures = place.failures + 1 if is_young else 1
            await asyncio.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (place.failures - 1)))

    def _make(self, node_id: str, address: str) -> Any:
        options: dict[str, Any] = {
            "name": self._prefix + node_id,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "max_restarts": 0,
            "max_concurrency": 100,
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
        }
        return ray.remote(GatewayActor).options(**options).remote(self._order(address), self._controller())

    async def _end(self, place: _Place, drain_s: float) -> None:
        if place.life is not None:
            place.life.cancel()
            await asyncio.gather(place.life, return_exceptions=True)
        if place.actor is not None:
            with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
                async with asyncio.timeout(drain_s + _END_TIMEOUT_S):
                    await place.actor.stop.remote(drain_s)
            _kill(place.actor)


def _kill(actor: Any) -> None:
    """At once; its gateway processes end with it. Safe twice."""
    if actor is not None:
        with contextlib.suppress(Exception):  # already dead, in one of several ways
            ray.kill(actor, no_restart=True)
