"""Which node and which cores a CPU replica gets. Pure.

Two unbound CPU engines on two cores fall to 2 s per token, since each spins on every core; bound to a core of
its own each decodes at 30-35 tokens/s. So a core is never given twice, unless a pool asks for part of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headrace.errors import StartError
from headrace.fleet.specs import ReplicaSpec


class NoRoom(StartError):
    """Not now; perhaps when a replica has gone or a node has joined."""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of the cluster."""

    id: str  # Ray's
    address: str
    cores: tuple[int, ...]  # that replicas may use, by the kernel's numbers


@dataclass(frozen=True, slots=True)
class Placement:
    """Cores of one node. `share` of each is taken: 1.0, or less where a pool asks for part of a core."""

    node_id: str
    cores: tuple[int, ...]
    share: float = 1.0


def place(spec: ReplicaSpec, nodes: Sequence[Node], taken: Iterable[Placement]) -> Placement:
    """Room for one more CPU replica, on the node with the most free cores.

    Raises NoRoom when no node has it.
    """
    use = _use(taken)
    options = [option for node in nodes if (option := _on_node(spec, node, use)) is not None]
    if options:
        return max(options, key=lambda option: option[0])[1]
    biggest = max((len(node.cores) for node in nodes), default=0)
    free = max((sum(1.0 - use.get((node.id, core), 0.0) for core in node.cores) for node in nodes), default=0)
    advice = "" if spec.cpus <= biggest else "; lower pools[].cpus"
    raise NoRoom(
        f"waits for {spec.cpus:g} free CPU cores on one node: {free:g} are free where most are, the biggest node has "
        f"{biggest} in all{advice}"
    )


def split(cores: Sequence[int], num_workers: int) -> tuple[tuple[int, ...], ...]:
    """Cores of each worker of one replica; they share all of them when there are too few."""
    if not cores:
        return ()
    each = len(cores) // num_workers
    if each == 0:
        return tuple(tuple(cores) for _ in range(num_workers))
    return tuple(tuple(cores[rank * each : (rank + 1) * each]) for rank in range(num_workers))


def _use(taken: Iterable[Placement]) -> Mapping[tuple[str, int], float]:
    use: dict[tuple[str, int], float] = {}
    for placement in taken:
        for core in placement.cores:
            use[placement.node_id, core] = use.get((placement.node_id, core), 0.0) + placement.share
    return use


def _on_node(
    spec: ReplicaSpec, node: Node, use: Mapping[tuple[str, int], float]
) -> tuple[float, Placement] | None:
    """Free cores left and the placement, None when it does not fit."""
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
