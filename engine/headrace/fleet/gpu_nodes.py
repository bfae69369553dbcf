"""Machines with GPUs, as Ray lists them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from headrace.fleet.gpu_quota_spec import GpuNode

UNKNOWN_KIND = "GPU"
"""Kind of the GPUs of a node that does not say."""

_RESOURCE = "accelerator_type:"
_LABEL = "ray.io/accelerator-type"


def gpu_nodes(listed: Iterable[Mapping[str, Any]]) -> tuple[GpuNode, ...]:
    """Of what `ray.nodes()` returns, the living ones that have GPUs. Ray knows one kind for each node: it tells it as a
    resource and, of late, as a label."""
    found = []
    for node in listed:
        resources: Mapping[str, float] = node["Resources"]
        gpus = int(resources.get("GPU", 0))
        if node["Alive"] and gpus:
            named = sorted(name.removeprefix(_RESOURCE) for name in resources if name.startswith(_RESOURCE))
            label = node.get("Labels", {}).get(_LABEL)
            kind = named[0] if named else label or UNKNOWN_KIND
            found.append(GpuNode(node["NodeID"], kind, gpus))
    return tuple(found)
