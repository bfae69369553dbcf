"""The fleet's replicas as claims on GPUs, and an allocation as what may start where and what has to drain. Pure.

    replicas, grants ── claims ──> gpu_quota.allocate ── grants ──> may start on these spots | drains | waits, and why

A grant outlives a replica's process: one that crashed or restarts comes back to the GPUs that it had. It ends when the
replica is no longer wanted, or has to give its GPUs back, and its process is gone; or when its node is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from headrace.config import Config
from headrace.fleet.gpu_quota import allocate
from headrace.fleet.gpu_quota_spec import (
    Claim,
    GpuNode,
    Holding,
    Preemption,
    Quota,
    Spot,
    Tenant,
)
from headrace.fleet.specs import Device, ReplicaSpec
from headrace_router.types import ReplicaId, Role


class PoolRule(NamedTuple):
    """Whose GPUs a pool's replicas take."""

    tenant: str
    kind: str
    priority: int


@dataclass(frozen=True, slots=True)
class QuotaRules:
    """What a configuration says of shared GPUs."""

    tenants: tuple[Tenant, ...]
    pools: Mapping[tuple[str, Role], PoolRule]
    min_run_s: float
    simulated_nodes: tuple[GpuNode, ...] = ()

    @classmethod
    def of(cls, config: Config) -> QuotaRules | None:
        """None where nobody shares."""
        if not config.has_gpu_quotas:
            return None
        return cls(
            tuple(
                Tenant(
                    tenant.name,
                    {
                        kind: Quota(gpus.nominal, gpus.borrowing_limit, gpus.lending_limit)
                        for kind, gpus in tenant.gpus.items()
                    },
                    tenant.weight,
                )
                for tenant in config.tenants
            ),
            {
                (model.name, pool.role): PoolRule(pool.tenant, kind, pool.priority)
                for model in config.models
                for pool in model.pools
                if pool.tenant is not None and (kind := config.accelerator_of(pool)) is not None
            },
            config.fleet.quota.min_run_s,
            tuple(
                GpuNode(f"simulated-{number}", node.accelerator, node.gpus)
                for number, node in enumerate(config.fleet.simulated_nodes)
            ),
        )

    def claim(self, spec: ReplicaSpec, asked_at_s: float = 0.0) -> Claim | None:
        """A replica's claim, None where it takes no GPUs that are shared."""
        rule = self.pools.get((spec.model, spec.role))
        takes = spec.device is Device.CUDA or (spec.simulated is not None and bool(self.simulated_nodes))
        if rule is None or not takes:
            return None
        return Claim(
            spec.id,
            rule.tenant,
            spec.model,
            rule.kind,
            spec.tensor_parallel,
            spec.pipeline_parallel,
            rule.priority,
            asked_at_s,
        )


@dataclass(frozen=True, slots=True)
class Sharer:
    """One replica that takes GPUs which tenants share."""

    claim: Claim  # `holding` is None: the grants say
    is_wanted: bool  # by its pool's target
    is_present: bool  # a process of it may hold its GPUs
    is_idle: bool = False

    @property
    def id(self) -> ReplicaId:
        return ReplicaId(self.claim.id)


class Shape(NamedTuple):
    """What a claim takes; of a replica that runs it stays, whatever its successor is to take."""

    kind: str
    group_gpus: int
    groups: int


@dataclass(frozen=True, slots=True)
class Grant:
    """GPUs that a replica has."""

    spots: tuple[Spot, ...]
    shape: Shape
    since_s: float
    reason: str = ""
    taken: Preemption | None = None  # it has to give them back


@dataclass(frozen=True, slots=True)
class Shares:
    """Who has GPUs, who gives them back, who waits. The value between two rounds."""

    grants: Mapping[ReplicaId, Grant] = field(default_factory=dict)
    waiting: Mapping[ReplicaId, str] = field(default_factory=dict)  # and why
    promised: frozenset[ReplicaId] = frozenset()  # of the waiting, those that start when others are gone
    lost: tuple[ReplicaId, ...] = ()  # had GPUs of a node that is gone
    short: frozenset[ReplicaId] = frozenset()  # of the waiting, those that more nodes would help

    def spots(self, replica_id: ReplicaId) -> tuple[Spot, ...] | None:
        """Where a replica may start and run, None where it may not."""
        grant = self.grants.get(replica_id)
        return None if grant is None or grant.taken is not None else grant.spots


def share(
    rules: QuotaRules, nodes: Sequence[GpuNode], sharers: Iterable[Sharer], before: Shares, now_s: float
) -> Shares:
    """The next round. Doing what it says and asking again gives the same until something changes or time passes."""
    known = {sharer.id: sharer for sharer in sharers}
    grants = {
        replica_id: grant
        for replica_id, grant in before.grants.items()
        if (sharer := known.get(replica_id)) is not None and not _is_over(sharer, grant)
    }
    claims = [
        _with_holding(sharer, grants.get(replica_id))
        for replica_id, sharer in known.items()
        if sharer.is_wanted or replica_id in grants
    ]
    allocation = allocate(rules.tenants, nodes, claims, now_s, rules.min_run_s)
    for name in allocation.lost:
        del grants[ReplicaId(name)]
    for admitted in allocation.admitted:
        replica_id = ReplicaId(admitted.claim_id)
        shape = shape_of(known[replica_id].claim)
        grants[replica_id] = Grant(admitted.spots, shape, now_s, admitted.reason)
    for preempted in allocation.preempted:
        replica_id = ReplicaId(preempted.claim_id)
        grants[replica_id] = replace(grants[replica_id], taken=preempted)
    pending = {ReplicaId(name): reason for name, reason in allocation.pending.items()}
    waiting = {
        name: reason for name, reason in pending.items() if name not in grants and known[name].is_wanted
    }
    promised = frozenset(map(ReplicaId, allocation.promised))
    return Shares(
        grants,
        waiting,
        promised,
        tuple(map(ReplicaId, allocation.lost)),
        _within_nominal(rules, known, grants, waiting.keys() - promised),
    )


def _within_nominal(
    rules: QuotaRules,
    known: Mapping[ReplicaId, Sharer],
    grants: Mapping[ReplicaId, Grant],
    waiting: Iterable[ReplicaId],
) -> frozenset[ReplicaId]:
    """Of the waiting, those with which their tenants would still be within their own."""
    held = Counter[tuple[str, str]]()
    for name, grant in grants.items():
        held[known[name].claim.tenant, grant.shape.kind] += sum(spot.gpus for spot in grant.spots)
    nominal = {
        (tenant.name, kind): quota.nominal
        for tenant in rules.tenants
        for kind, quota in tenant.quotas.items()
    }
    found = set()
    claims = sorted(
        (known[name].claim for name in waiting), key=lambda one: (one.priority, one.asked_at_s, one.id)
    )
    for claim in claims:
        key = claim.tenant, claim.kind
        if held[key] + claim.gpus <= nominal.get(key, 0):
            held[key] += claim.gpus
            found.add(ReplicaId(claim.id))
    return frozenset(found)


def shape_of(claim: Claim) -> Shape:
    return Shape(claim.kind, claim.group_gpus, claim.groups)


def _is_over(sharer: Sharer, grant: Grant) -> bool:
    is_other = shape_of(sharer.claim) != grant.shape
    return not sharer.is_present and (grant.taken is not None or not sharer.is_wanted or is_other)


def _with_holding(sharer: Sharer, grant: Grant | None) -> Claim:
    if grant is None:
        return sharer.claim
    is_draining = grant.taken is not None or not sharer.is_wanted
    holding = Holding(grant.spots, grant.since_s, sharer.is_idle, is_draining)
    return replace(sharer.claim, **grant.shape._asdict(), holding=holding)
