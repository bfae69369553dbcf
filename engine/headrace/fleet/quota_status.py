"""Who has GPUs, who borrows and lends, who waits and why: for people, for `headrace quota --json`, for metrics. Pure.

`held` of a tenant is what its replicas keep; what they are about to give back is `draining`. `borrowed` is held beyond
nominal; `lent` is the part of the others' borrowed GPUs that is this tenant's own, where several could have lent them
in proportion to what each leaves unused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headrace.fleet.gpu_quota_spec import GpuNode, Spot, Tenant
from headrace.fleet.gpu_share import QuotaRules, Sharer, Shares
from headrace_router.types import ReplicaId


@dataclass(frozen=True, slots=True)
class TenantRow:
    """One tenant and one accelerator kind, in GPUs."""

    tenant: str
    kind: str
    nominal: int
    held: int
    borrowed: int
    lent: int
    draining: int
    waiting: int
    borrowing_limit: int | None  # None: no bound
    lending_limit: int | None  # None: all
    weight: float


@dataclass(frozen=True, slots=True)
class HolderRow:
    """A replica that has GPUs."""

    replica: ReplicaId
    tenant: str
    kind: str
    gpus: int
    spots: tuple[Spot, ...]
    held_s: float
    reason: str  # by which it got them; why it gives them back, where it does
    is_draining: bool = False
    drains_for: str = ""  # replica that gets them


@dataclass(frozen=True, slots=True)
class WaiterRow:
    """A replica that is wanted and has none."""

    replica: ReplicaId
    tenant: str
    kind: str
    gpus: int
    waited_s: float
    reason: str
    is_promised: bool  # others drain for it


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A machine's GPUs."""

    node: str
    kind: str
    gpus: int
    held: int  # by replicas, draining ones included


@dataclass(frozen=True, slots=True)
class QuotaStatus:
    """All of it at one moment."""

    fleet: str
    tenants: tuple[TenantRow, ...] = ()
    replicas: tuple[HolderRow, ...] = ()
    waiting: tuple[WaiterRow, ...] = ()
    nodes: tuple[NodeRow, ...] = ()


def quota_status(
    fleet: str,
    *,
    rules: QuotaRules,
    nodes: Sequence[GpuNode],
    sharers: Iterable[Sharer],
    shares: Shares,
    now_s: float,
) -> QuotaStatus:
    """Of the round that made `shares`."""
    known = {sharer.id: sharer for sharer in sharers}
    holders = tuple(_holder(known[name], shares, now_s) for name in sorted(shares.grants) if name in known)
    waiters = tuple(_waiter(known[name], shares, now_s) for name in sorted(shares.waiting) if name in known)
    in_use = Counter[str]()
    for spot in (spot for one in holders for spot in one.spots):
        in_use[spot.node_id] += spot.gpus
    return QuotaStatus(
        fleet,
        _tenant_rows(rules.tenants, nodes, holders, waiters),
        holders,
        waiters,
        tuple(NodeRow(node.id, node.kind, node.gpus, in_use[node.id]) for node in nodes),
    )


def _holder(sharer: Sharer, shares: Shares, now_s: float) -> HolderRow:
    claim, grant = sharer.claim, shares.grants[sharer.id]
    reason = grant.reason
    if grant.taken is not None:
        reason = grant.taken.reason
    elif not sharer.is_wanted:
        reason = "it is no longer wanted"
    return HolderRow(
        sharer.id,
        claim.tenant,
        grant.shape.kind,
        sum(spot.gpus for spot in grant.spots),
        grant.spots,
        now_s - grant.since_s,
        reason,
        grant.taken is not None or not sharer.is_wanted,
        grant.taken.for_id if grant.taken is not None else "",
    )


def _waiter(sharer: Sharer, shares: Shares, now_s: float) -> WaiterRow:
    claim = sharer.claim
    return WaiterRow(
        sharer.id,
        claim.tenant,
        claim.kind,
        claim.gpus,
        now_s - claim.asked_at_s,
        shares.waiting[sharer.id],
        sharer.id in shares.promised,
    )


def _tenant_rows(
    tenants: Sequence[Tenant],
    nodes: Sequence[GpuNode],
    holders: Sequence[HolderRow],
    waiters: Sequence[WaiterRow],
) -> tuple[TenantRow, ...]:
    held, draining, waiting = (
        Counter[tuple[str, str]](),
        Counter[tuple[str, str]](),
        Counter[tuple[str, str]](),
    )
    for one in holders:
        (draining if one.is_draining else held)[one.tenant, one.kind] += one.gpus
    for row in waiters:
        waiting[row.tenant, row.kind] += row.gpus
    rows: list[TenantRow] = []
    for kind in sorted({kind for tenant in tenants for kind in tenant.quotas}):
        own = {tenant.name: tenant for tenant in tenants if kind in tenant.quotas}
        nominal = {name: tenant.quotas[kind].nominal for name, tenant in own.items()}
        borrowed = {name: max(0, held[name, kind] - nominal[name]) for name in own}
        unused = {name: max(0, nominal[name] - held[name, kind]) for name in own}
        nobodys = sum(node.gpus for node in nodes if node.kind == kind) - sum(nominal.values())
        lent = _in_proportion(max(0, sum(borrowed.values()) - max(0, nobodys)), unused)
        for name, tenant in own.items():
            quota = tenant.quotas[kind]
            rows.append(
                TenantRow(
                    tenant=name,
                    kind=kind,
                    nominal=quota.nominal,
                    held=held[name, kind],
                    borrowed=borrowed[name],
                    lent=lent[name],
                    draining=draining[name, kind],
                    waiting=waiting[name, kind],
                    borrowing_limit=quota.borrowing_limit,
                    lending_limit=quota.lending_limit,
                    weight=tenant.weight,
                )
            )
    return tuple(rows)


def _in_proportion(total: int, room: Mapping[str, int]) -> dict[str, int]:
    """`total` in whole parts, none above its room; all rooms filled where that is not enough."""
    left, rooms = total, sum(room.values())
    parts: dict[str, int] = {}
    for name, own in sorted(room.items()):
        parts[name] = min(own, round(left * own / rooms)) if rooms else 0
        left -= parts[name]
        rooms -= own
    return parts
