"""The nodes of the connected cluster as placing sees them: alive, reached from here, with their cores and labels."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any

import ray

from headrace.fleet.gpu_nodes import gpu_nodes
from headrace.fleet.node_task import on_node
from headrace.fleet.placement import ACCELERATOR_LABEL, Node

log = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 30.0
"""To start a process on a node and hear from it."""

_CONNECT_TIMEOUT_S = 1.0


class NodeList:
    """What a node is does not change while it lives, so that each is asked once."""

    def __init__(self) -> None:
        self._cores: dict[str, tuple[int, ...]] = {}  # by Ray's id of the node

    async def read(self) -> tuple[Node, ...]:
        """Those that live now. One that does not answer is left out: Ray takes 15 s to notice a node's end, and what is
        placed there meanwhile waits as long."""
        listed = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
        reached = await asyncio.gather(*map(is_reached, listed))
        listed = [node for node, is_reached in zip(listed, reached, strict=True) if is_reached]
        new = [node["NodeID"] for node in listed if node["NodeID"] not in self._cores]
        for node_id, cores in zip(new, await asyncio.gather(*map(_cores_of, new)), strict=True):
            if cores is not None:
                self._cores[node_id] = cores
        return tuple(
            _node(node, self._cores[node["NodeID"]]) for node in listed if node["NodeID"] in self._cores
        )


async def is_reached(listed: Mapping[str, Any]) -> bool:
    """Whether the node's raylet accepts connections from here."""
    if listed["NodeID"] == ray.get_runtime_context().get_node_id():
        return True
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(listed["NodeManagerAddress"], listed["NodeManagerPort"])
    except (TimeoutError, OSError):
        log.warning("node %s is not reached", listed["NodeManagerAddress"])
        return False
    writer.close()
    return True


async def _cores_of(node_id: str) -> tuple[int, ...] | None:
    if node_id == ray.get_runtime_context().get_node_id():
        return _own_cores()
    try:
        cores: tuple[int, ...] = await on_node(node_id, _own_cores, timeout_s=_PROBE_TIMEOUT_S)
    except (TimeoutError, ray.exceptions.RayError) as error:
        log.warning("node %s does not answer: %s", node_id, type(error).__name__)
        return None
    return cores


def _own_cores() -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(0)))


def _node(listed: Mapping[str, Any], cores: tuple[int, ...]) -> Node:
    resources: Mapping[str, float] = listed["Resources"]
    labels = dict(listed.get("Labels", {}))
    for gpu_node in gpu_nodes([listed]):
        labels.setdefault(ACCELERATOR_LABEL, gpu_node.kind)
    return Node(
        listed["NodeID"],
        listed["NodeManagerAddress"],
        cores[: int(resources.get("CPU", 0))],
        labels,
        int(resources.get("GPU", 0)),
    )
