"""Which node a replica goes to, and which of its cores. Pure.

Replicas of a pool spread over the nodes, so that one node's end takes few of them; among nodes with equally many a
prefilling replica goes where decoding ones of its model are, and the other way round, since KV blocks then stay on one
machine; then where most is free. What one replica computes on (a tensor-parallel group) is never spread.

Two unbound CPU engines on two cores fall to 2 s per token, since each spins on every core; bound to a core of
its own each decodes at 30-35 tokens/s. So a core is never given twice, unless a pool asks for part of one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.errors import StartError
from headrace.fleet.specs import Device, ReplicaSpec
from headrace_router.types import Role

ACCELERATOR_LABEL = "ray.io/accelerator-type"
"""Ray's label for the kind of a node's GPUs."""

_COUNTERPART = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}


class NoRoom(StartError):
    """Not now; perhaps when a replica has gone or a node has joined."""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of the cluster."""

    id: str  # Ray's
    address: str
    cores: tuple[int, ...] = ()  # that replicas may use, by the kernel's numbers
    labels: Mapping[str, str] = field(default_factory=dict)  # as Ray has them
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Cores of one node. `share` of each is taken: 1.0, or less where a pool asks for part of a core."""

    node_id: str
    cores: tuple[int, ...] = ()
    share: float = 1.0


Placed = tuple[ReplicaSpec, Placement]
"""A replica that has its place."""


def place(spec: ReplicaSpec, nodes: Sequence[Node], taken: Iterable[Placed]) -> Placement:
    """Room for one more replica. Of one on GPUs only the node is chosen: Ray knows which of them are free.

    Raises NoRoom when no node has it.
    """
    taken = list(taken)
    eligible = [node for node in nodes if has_labels(node, spec)]
    if not eligible:
        raise NoRoom(f"waits for a node with {wanted_labels(spec)}; no node of the cluster has")
    pool = Counter(at.node_id for other, at in taken if (other.model, other.role) == (spec.model, spec.role))
    near = Counter(at.node_id for other, at in taken if _are_counterparts(spec, other))
    use = _use(taken)
    options = [option for node in eligible if (option := _on_node(spec, node, use, taken)) is not None]
    if not options:
        raise NoRoom(_shortage(spec, eligible, use))

    def merit(option: tuple[float, Placement]) -> tuple[int, int, float]:
        free, at = option
        return -pool[at.node_id], near[at.node_id], free

    return max(options, key=merit)[1]


def has_labels(node: Node, spec: ReplicaSpec) -> bool:
    """Whether the node is one of those that the replica may go to."""
    kind = spec.accelerator if spec.device is Device.CUDA else None
    if kind is not None and node.labels.get(ACCELERATOR_LABEL) != kind:
        return False
    return all(node.labels.get(name) == value for name, value in spec.node_labels.items())


def wanted_labels(spec: ReplicaSpec) -> str:
    """In words."""
    kind = [f"{spec.accelerator} GPUs"] if spec.device is Device.CUDA and spec.accelerator else []
    labels = [f"{name}={value}" for name, value in sorted(spec.node_labels.items())]
    return " and ".join([*kind, *(["label " + ", ".join(labels)] if labels else [])]) or "room"


def split(cores: Sequence[int], num_workers: int) -> tuple[tuple[int, ...], ...]:
    """Cores of each worker of one replica; they share all of them when there are too few."""
    if not cores:
        return ()
    each = len(cores) // num_workers
    if each == 0:
        return tuple(tuple(cores) for _ in range(num_workers))
    return tuple(tuple(cores[rank * each : (rank + 1) * each]) for rank in range(num_workers))


def _are_counterparts(spec: ReplicaSpec, other: ReplicaSpec) -> bool:
    return other.model == spec.model and _COUNTERPART.get(spec.role) is other.role


def _shortage(spec: ReplicaSpec, nodes: Sequence[Node], use: Mapping[tuple[str, int], float]) -> str:
    if spec.device is Device.CUDA:
        biggest = max(node.gpus for node in nodes)
        return f"waits for {spec.num_gpus} free GPUs on one node; the biggest node has {biggest} in all"
    biggest = max(len(node.cores) for node in nodes)
    free = max(sum(1.0 - use.get((node.id, core), 0.0) for core in node.cores) for node in nodes)
    advice = "" if spec.cpus <= biggest else "; lower pools[].cpus"
    return (
        f"waits for {spec.cpus:g} free CPU cores on one node: {free:g} are free where most are, the biggest node has "
        f"{biggest} in all{advice}"
    )


def _use(taken: Iterable[Placed]) -> Mapping[tuple[str, int], float]:
    use: dict[tuple[str, int], float] = {}
    for _, placement in taken:
        for core in placement.cores:
            use[placement.node_id, core] = use.get((placement.node_id, core), 0.0) + placement.share
    return use


def _on_node(
    spec: ReplicaSpec, node: Node, use: Mapping[tuple[str, int], float], taken: Sequence[Placed]
) -> tuple[float, Placement] | None:
    """What is free there, as a measure among nodes, and the placement; None when it does not fit."""
    others = [other for other, at in taken if at.node_id == node.id]
    if spec.device is Device.NONE:
        return -float(len(others)), Placement(node.id)
    if spec.device is Device.CUDA:
        left = node.gpus - sum(other.num_gpus for other in others)
        return (float(left), Placement(node.id)) if left >= spec.num_gpus else None
    free = {core: 1.0 - use.get((node.id, core), 0.0) for core in node.cores}
    share = min(1.0, spec.cpus)
    wanted = max(1, math.ceil(spec.cpus))
    # The most used core that still has room, so that parts of a core do not spread over all of them; a replica
    # that asks for nothing goes where the least runs.
    order = sorted(free, key=lambda core: (free[core] if share else -free[core], core))
    fitting = [core for core in order if free[core] + 1e-9 >= share]
    if len(fitting) < wanted:
        return None
    cores = tuple(sorted(fitting[:wanted]))
    return sum(free.values()) - share * wanted, Placement(node.id, cores, share)
