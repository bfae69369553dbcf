"""The words of GPU quotas: what tenants may have, what is there, what is wanted, what was decided. Values only.

They are Kueue's (kueue.sigs.k8s.io/docs/concepts/cluster_queue and .../preemption): a tenant is a ClusterQueue, an
accelerator kind a ResourceFlavor, all tenants together are one cohort, a claim is a Workload.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Quota:
    """What one tenant may have of one accelerator kind, in GPUs. Raises ValueError for negative numbers."""

    nominal: int = 0  # its own
    borrowing_limit: int | None = None  # beyond that, of what others do not use; None: no bound
    lending_limit: int | None = None  # of its own that others may use while it does not; None: all

    def __post_init__(self) -> None:
        for name in ("nominal", "borrowing_limit", "lending_limit"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")

    @property
    def most(self) -> float:
        """GPUs it can ever hold."""
        return inf if self.borrowing_limit is None else self.nominal + self.borrowing_limit

    @property
    def kept_back(self) -> int:
        """Its own GPUs that nobody else ever uses."""
        return 0 if self.lending_limit is None else max(0, self.nominal - self.lending_limit)


NO_QUOTA = Quota(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who shares the GPUs. Raises ValueError where the weight is not above 0."""

    name: str
    quotas: Mapping[str, Quota] = field(
        default_factory=dict
    )  # by accelerator kind; none: it gets none of that kind
    weight: float = 1.0  # of its part of what can be borrowed

    def __post_init__(self) -> None:
        if not 0 < self.weight < inf:
            raise ValueError(
                f"the weight of tenant {self.name!r} must be above 0 and finite, got {self.weight}"
            )


class GpuNode(NamedTuple):
    """One machine with GPUs of one kind."""

    id: str
    kind: str
    gpus: int  # that work


class Spot(NamedTuple):
    """GPUs of one node. Which of them is the node's business."""

    node_id: str
    gpus: int


@dataclass(frozen=True, slots=True)
class Holding:
    """The GPUs that a replica has."""

    spots: tuple[Spot, ...]
    since_s: float
    is_idle: bool = False
    is_draining: bool = False  # it goes, whoever asked for that; its GPUs are free when it is gone


@dataclass(frozen=True, slots=True)
class Claim:
    """One replica that is wanted. It runs whole or not at all: `groups` tensor-parallel groups (its pipeline stages) of
    `group_gpus` GPUs, each group within one node."""

    id: str
    tenant: str
    model: str
    kind: str
    group_gpus: int = 1
    groups: int = 1
    priority: int = 0  # a lower number matters more
    asked_at_s: float = 0.0
    holding: Holding | None = None

    @property
    def gpus(self) -> int:
        """In all."""
        return self.group_gpus * self.groups


class Admission(NamedTuple):
    """A replica to start, and where."""

    claim_id: str
    spots: tuple[Spot, ...]
    reason: str


class Preemption(NamedTuple):
    """A replica to drain."""

    claim_id: str
    reason: str
    for_id: str = ""  # the claim that gets its GPUs; empty where a node or a limit has to be repaired


class TenantUse(NamedTuple):
    """What a tenant has of one kind once this is carried out and the drained are gone, in GPUs."""

    tenant: str
    kind: str
    nominal: int
    held: int
    borrowed: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """What to do now. Whoever is in neither list stays as it is."""

    admitted: tuple[Admission, ...] = ()
    preempted: tuple[Preemption, ...] = ()
    pending: Mapping[str, str] = field(default_factory=dict)  # claim → why it does not run
    lost: tuple[str, ...] = ()  # claims whose node is gone; each is also admitted or pending
    uses: tuple[TenantUse, ...] = ()
    promised: frozenset[str] = frozenset()  # of the pending, those that start when others have gone
