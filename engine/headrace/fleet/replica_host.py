"""Replica actors as Ray knows them: made, found again by name, ended.

Actor names are `fleet/replica-id/random`: a successor need not wait until Ray has let go of the old name, and a
restarted controller finds its replicas by the prefix.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from headrace.fleet import room
from headrace.fleet.gpu_quota_spec import Spot
from headrace.fleet.placement import Placement
from headrace.fleet.replica import ReplicaActor, ReplicaOrder
from headrace.fleet.specs import ReplicaSpec
from headrace_router.types import ReplicaId

NAMESPACE = "headrace"
CONTROLLER = "controller"

_NODE_LABEL = "ray.io/node-id"  # Ray's own label of every node

_PREFERRED_NODE_S = 3.0
"""For GPUs that should be free on a node; then any will do."""

_MAX_CONCURRENT_CALLS = 1000
"""Of one actor. `watch` and `start` hold a place for a replica's whole life, and pollers must still get in."""


def controller_name(fleet: str) -> str:
    return f"{fleet}/{CONTROLLER}"


@dataclass(slots=True)
class Hosted:
    """One replica actor and what it holds."""

    name: str
    actor: Any
    group: Any = None  # placement group of its GPUs
    placement: Placement | None = None  # of one that was made here


class ReplicaHost:
    """Makes and ends the replica actors of one fleet."""

    def __init__(self, fleet: str) -> None:
        self._fleet = fleet

    async def create(self, order: ReplicaOrder) -> Hosted:
        """Ask Ray for a replica actor. Returns before it is placed, except where GPUs must be found first."""
        spec = order.spec
        name, group = self._name(spec), None
        strategy: Any = "DEFAULT"
        num_cpus, num_gpus = spec.cpus, 0
        if spec.num_gpus:
            # One node: the actor takes all GPUs and vLLM's own processes use them. Several (a pipeline): the
            # actor takes none, vLLM's Ray executor finds one bundle per worker in the actor's own group.
            spans_nodes = spec.pipeline_parallel > 1
            name, group, order = await self._find_gpus(order)
            num_cpus, num_gpus = (0.0, 0) if spans_nodes else (spec.cpus, spec.num_gpus)
            strategy = PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=0, placement_group_capture_child_tasks=spans_nodes
            )
        elif order.placement is not None:
            strategy = NodeAffinitySchedulingStrategy(node_id=order.placement.node_id, soft=False)
        options: dict[str, Any] = {
            "name": name,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": 0,  # the controller restarts, with backoff and a reason
            "max_concurrency": _MAX_CONCURRENT_CALLS,
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "scheduling_strategy": strategy,
        }
        actor = ray.remote(ReplicaActor).options(**options).remote(order)
        return Hosted(name, actor, group, order.placement)

    def _name(self, spec: ReplicaSpec) -> str:
        return f"{self._fleet}/{spec.id}/{secrets.token_hex(4)}"

    async def _find_gpus(self, order: ReplicaOrder) -> tuple[str, Any, ReplicaOrder]:
        """Wait until a replica has its GPUs. Returns its name, their placement group, which is named alike, and the
        order with the node that they are on.

        The node that was chosen for it is tried first: Ray alone knows what others hold there, and has another if need
        be.
        """
        spec, placed = order.spec, order.placement
        if placed is not None:
            name = self._name(spec)
            group = _reserve(name, order, [{**spec.node_labels, _NODE_LABEL: placed.node_id}])
            if await _is_found(group, _PREFERRED_NODE_S):
                return name, group, order
        bundles = room.bundles(spec, is_placed=bool(order.spots))
        selectors = _spot_selectors(order.spots, len(bundles))
        if selectors is None and spec.node_labels:
            selectors = [dict(spec.node_labels) for _ in bundles]
        name = self._name(spec)
        group = _reserve(name, order, selectors)
        await _is_found(group, None)
        node_id = await asyncio.to_thread(_node_of, group)
        return name, group, replace(order, placement=None if node_id is None else Placement(node_id))

    async def find(self) -> dict[ReplicaId, Hosted]:
        """Replica actors of this fleet that are alive, whoever started them."""
        found: dict[ReplicaId, Hosted] = {}
        for listed in await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True):
            prefix, _, rest = listed["name"].partition("/")
            replica_id, _, suffix = rest.rpartition("/")
            if listed["namespace"] != NAMESPACE or prefix != self._fleet or not replica_id or not suffix:
                continue
            with contextlib.suppress(ValueError):  # it ended since it was listed
                actor = await asyncio.to_thread(ray.get_actor, listed["name"], namespace=NAMESPACE)
                hosted = Hosted(listed["name"], actor, await asyncio.to_thread(_group, listed["name"]))
                if ReplicaId(replica_id) in found:
                    self.end(hosted)
                else:
                    found[ReplicaId(replica_id)] = hosted
        return found

    def end(self, hosted: Hosted) -> None:
        """Kill the actor's process at once; its warden ends the engine's. Safe twice."""
        with contextlib.suppress(Exception):  # already dead, in one of several ways
            ray.kill(hosted.actor, no_restart=True)
        if hosted.group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(hosted.group)
            hosted.group = None


def _reserve(name: str, order: ReplicaOrder, selectors: list[dict[str, str]] | None) -> Any:
    return placement_group(
        room.bundles(order.spec, is_placed=bool(order.spots)),
        strategy="PACK" if order.spec.pipeline_parallel > 1 else "STRICT_PACK",
        name=name,
        lifetime="detached",  # as the replica: it outlives a controller
        bundle_label_selector=selectors,
    )


async def _is_found(group: Any, patience_s: float | None) -> bool:
    """Whether the group has its GPUs within `patience_s`. It is given up otherwise, also when nobody waits longer."""
    try:
        async with asyncio.timeout(patience_s):
            await group.ready()
        return True
    except TimeoutError:
        remove_placement_group(group)
        return False
    except BaseException:
        remove_placement_group(group)
        raise


def _node_of(group: Any) -> str | None:
    """Of its first bundle."""
    nodes: dict[int, str] = placement_group_table(group).get("bundles_to_node_id", {})
    return nodes.get(0)


def _spot_selectors(spots: Sequence[Spot], num_bundles: int) -> list[dict[str, str]] | None:
    """The node of each bundle, where that has been decided."""
    if not spots:
        return None
    if num_bundles == 1:
        return [{_NODE_LABEL: spots[0].node_id}]
    return [{_NODE_LABEL: spot.node_id} for spot in spots for _ in range(spot.gpus)]


def _group(name: str) -> Any:
    """The placement group of that name, None where the replica needed none."""
    try:
        return get_placement_group(name)
    except ValueError:
        return None
