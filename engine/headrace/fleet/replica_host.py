"""Replica actors as Ray knows them: made, found again by name, ended.

Actor names are `fleet/replica-id/random`: a successor need not wait until Ray has let go of the old name, and a
restarted controller finds its replicas by the prefix.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from headrace.fleet import room
from headrace.fleet.gpu_quota_spec import Spot
from headrace.fleet.placement import Node
from headrace.fleet.replica import ReplicaActor, ReplicaOrder
from headrace_router.types import ReplicaId

NAMESPACE = "headrace"
CONTROLLER = "controller"

_NODE_LABEL = "ray.io/node-id"  # Ray's own label of every node

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


class ReplicaHost:
    """Makes and ends the replica actors of one fleet."""

    def __init__(self, fleet: str) -> None:
        self._fleet = fleet

    async def create(self, order: ReplicaOrder) -> Hosted:
        """Ask Ray for a replica actor. Returns before it is placed, except where GPUs must be found first."""
        spec = order.spec
        name = f"{self._fleet}/{spec.id}/{secrets.token_hex(4)}"
        group = None
        strategy: Any = "DEFAULT"
        num_cpus, num_gpus = spec.cpus, 0
        if order.placement is not None:
            strategy = NodeAffinitySchedulingStrategy(node_id=order.placement.node_id, soft=False)
        elif spec.num_gpus:
            # One node: the actor takes all GPUs and vLLM's own processes use them. Several (a pipeline): the
            # actor takes none, vLLM's Ray executor finds one bundle per worker in the actor's own group.
            spans_nodes = spec.pipeline_parallel > 1
            bundles = room.bundles(spec, is_placed=bool(order.spots))
            group = placement_group(
                bundles,
                strategy="PACK" if spans_nodes else "STRICT_PACK",
                name=name,
                lifetime="detached",  # as the replica: it outlives a controller
                bundle_label_selector=_selectors(order.spots, len(bundles)),
            )
            try:
                await group.ready()
            except BaseException:  # it was given up, perhaps after a long wait
                remove_placement_group(group)
                raise
            num_cpus, num_gpus = (0.0, 0) if spans_nodes else (spec.cpus, spec.num_gpus)
            strategy = PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=0, placement_group_capture_child_tasks=spans_nodes
            )
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
        return Hosted(name, actor, group)

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


def _selectors(spots: Sequence[Spot], num_bundles: int) -> list[dict[str, str]] | None:
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


def _own_cores() -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(0)))


async def survey() -> tuple[Node, ...]:
    """Nodes of the cluster and the cores that each lets replicas use."""
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
    here = ray.get_runtime_context().get_node_id()
    probe = ray.remote(num_cpus=0)(_own_cores)
    found = []
    for node in nodes:
        if node["NodeID"] == here:
            cores = _own_cores()
        else:
            affinity = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            cores = await probe.options(scheduling_strategy=affinity).remote()
        num_cores = int(node["Resources"].get("CPU", 0))
        found.append(Node(node["NodeID"], node["NodeManagerAddress"], cores[:num_cores]))
    return tuple(found)
