"""Room in the cluster: what a replica takes of it, in Ray's words, and asking for nodes that are not there.

Ray's autoscaler is told what the whole fleet needs while a replica of it has no room: `request_resources` names what
must fit into the cluster in all, what runs there included (ray.autoscaler.sdk), and stands until it is replaced. A
cluster without an autoscaler takes no notice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable

from headrace.fleet.specs import Device, ReplicaSpec

log = logging.getLogger(__name__)

Bundle = dict[str, float]


def bundles(spec: ReplicaSpec, *, is_placed: bool = False) -> list[Bundle]:
    """What a replica takes, each bundle of one node. Its tensor-parallel group is on one node, the stages of a
    pipeline may be on several: the actor itself sits with the first. `is_placed`: its nodes have been chosen."""
    if spec.device is Device.CUDA:
        spans_nodes = spec.pipeline_parallel > 1
        num_bundles = spec.num_gpus if spans_nodes else 1
        each: Bundle = {"GPU": spec.num_gpus // num_bundles}
        if spec.accelerator is not None and not is_placed:
            # Of a kind's resource each node that has it offers 1, for saying which is meant.
            each[f"accelerator_type:{spec.accelerator}"] = 0.001
        if spec.simulated is not None:
            return [dict(each) for _ in range(num_bundles)]
        cores = [max(1.0, spec.cpus), *(1.0 for _ in range(num_bundles - 1))]
        return [{**each, "CPU": num_cores} for num_cores in cores]
    return [{"CPU": spec.cpus}] if spec.cpus else []


def shortage(spec: ReplicaSpec, total: Bundle, free: Bundle) -> str:
    """Why a replica with GPUs is not placed: what it asks for beside what there is."""
    where = " on one node" if spec.pipeline_parallel == 1 else ""
    return (
        f"waits for {spec.num_gpus} GPUs and {max(1.0, spec.cpus):g} CPUs{where}: {free.get('GPU', 0):g} of the "
        f"cluster's {total.get('GPU', 0):g} GPUs and {free.get('CPU', 0):g} of {total.get('CPU', 0):g} CPUs are free"
    )


async def shortage_now(spec: ReplicaSpec) -> str:
    """The same, asking Ray."""
    import ray

    total, free = await asyncio.gather(
        asyncio.to_thread(ray.cluster_resources), asyncio.to_thread(ray.available_resources)
    )
    return shortage(spec, total, free)


def _ask_ray(wanted: list[Bundle]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=wanted)


class NodeRequest:
    """What Ray's autoscaler has been told."""

    def __init__(self, ask: Callable[[list[Bundle]], None] = _ask_ray) -> None:
        """`ask` tells the autoscaler all that must have room, and may block."""
        self._ask = ask
        self._told: list[Bundle] = []

    async def follow(self, specs: Iterable[ReplicaSpec], waiting: Collection[object]) -> None:
        """Ask for room for `specs` while some are `waiting` for it; take that back when none is. Never raises."""
        wanted = [bundle for spec in specs for bundle in bundles(spec)] if waiting else []
        if wanted == self._told:
            return
        self._told = wanted
        try:
            await asyncio.to_thread(self._ask, wanted)
        except Exception:  # supervision boundary: whoever runs without an autoscaler loses nothing
            log.exception("Ray's autoscaler cannot be told of %d bundles", len(wanted))
