"""The books of one accelerator kind while it is being allocated: GPUs by node, GPUs by tenant. Mutable, used once.

Kept twice, as it is and as it will be when those that drain are gone: what starts is placed in the first, what has a
right to GPUs that others still leave is reserved in the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from headrace.fleet.gpu_quota_spec import NO_QUOTA, Claim, GpuNode, Quota, Spot, Tenant


def fit(claim: Claim, free: Mapping[str, int]) -> tuple[Spot, ...] | None:
    """Where a whole claim fits, None where it does not. On few nodes, of those the fullest, so that large holes stay
    for large groups. Groups are of one size, so taking the roomiest first never misses a fit."""
    room = {node: gpus // claim.group_gpus for node, gpus in free.items() if gpus >= claim.group_gpus}
    if sum(room.values()) < claim.groups:
        return None
    spots, missing = [], claim.groups
    while missing:
        whole = [node for node in room if room[node] >= missing]
        if whole:
            node = min(whole, key=lambda one: (free[one], one))
        else:
            node = max(room, key=lambda one: (room[one], -free[one], one))
        groups = min(missing, room.pop(node))
        spots.append(Spot(node, groups * claim.group_gpus))
        missing -= groups
    return tuple(spots)


class Ledger:
    """`used` and `later` are without those that leave; `occupied` and `now` know that they are still there."""

    def __init__(self, kind: str, nodes: Iterable[GpuNode], tenants: Iterable[Tenant]) -> None:
        self.kind = kind
        self.nodes = {node.id: node.gpus for node in nodes if node.kind == kind}
        self.now = dict(self.nodes)  # free GPUs of each node; below 0 where a node has lost some
        self.later = dict(self.nodes)
        self._tenants = {tenant.name: tenant for tenant in tenants}
        self.used = dict.fromkeys(self._tenants, 0)
        self.occupied = dict(self.used)
        quotas = [self.quota(name) for name in self._tenants]
        own = sum(quota.nominal for quota in quotas)
        # What is nobody's own anyone may borrow: a quota of the cohort itself, in Kueue's words.
        self.lendable = sum(q.nominal - q.kept_back for q in quotas) + max(0, sum(self.nodes.values()) - own)

    def quota(self, tenant: str) -> Quota:
        """Of this kind."""
        found = self._tenants.get(tenant)
        return NO_QUOTA if found is None else found.quotas.get(self.kind, NO_QUOTA)

    def weight(self, tenant: str) -> float:
        """Of a tenant."""
        found = self._tenants.get(tenant)
        return 1.0 if found is None else found.weight

    def share(self, tenant: str, used: Mapping[str, int] | None = None) -> float:
        """GPUs that it borrows, for its weight."""
        held = (self.used if used is None else used).get(tenant, 0)
        return max(0, held - self.quota(tenant).nominal) / self.weight(tenant)

    # --- writing

    def hold(self, claim: Claim) -> None:
        """It has GPUs already."""
        assert claim.holding is not None
        self._count(claim.tenant, claim.gpus, claim.gpus)
        for spot in claim.holding.spots:
            self.now[spot.node_id] -= spot.gpus
            self.later[spot.node_id] -= spot.gpus

    def leave(self, claim: Claim) -> None:
        """It has GPUs and will be gone."""
        assert claim.holding is not None
        self._count(claim.tenant, -claim.gpus, 0)
        for spot in claim.holding.spots:
            self.later[spot.node_id] += spot.gpus

    def start(self, claim: Claim, spots: Iterable[Spot]) -> None:
        """It gets GPUs that are free now."""
        for node, gpus in spots:
            self.now[node] -= gpus
        self.reserve(claim, spots)

    def reserve(self, claim: Claim, spots: Iterable[Spot]) -> None:
        """It starts as soon as those that leave are gone: nobody else gets what it will need."""
        self._count(claim.tenant, claim.gpus, claim.gpus)
        for node, gpus in spots:
            self.later[node] -= gpus

    def _count(self, tenant: str, used: int, occupied: int) -> None:
        self.used[tenant] = self.used.get(tenant, 0) + used
        self.occupied[tenant] = self.occupied.get(tenant, 0) + occupied

    # --- reading

    def free_now(self) -> dict[str, int]:
        """GPUs that can be given at once."""
        return {node: max(0, min(gpus, self.later[node])) for node, gpus in self.now.items()}

    def left_to_borrow(self, used: Mapping[str, int]) -> int:
        """What all lend together, less what is used beyond what is kept back (Kueue's cohort check); below 0 where too
        much is lent."""
        taken = (max(0, held - self.quota(name).kept_back) for name, held in used.items())
        return self.lendable - sum(taken)

    def cannot_borrow(self, claim: Claim) -> str | None:
        """Why the claim's tenant may not have that many more by its quota, None where it may. Those that drain still
        count: a limit holds at every moment."""
        quota, held = self.quota(claim.tenant), self.occupied.get(claim.tenant, 0)
        if held + claim.gpus > quota.most:
            return (
                f"tenant {claim.tenant!r} holds {held} {self.kind}, {claim.gpus} more exceed its {quota.nominal} and "
                f"{quota.borrowing_limit} borrowed"
            )
        if self.left_to_borrow({**self.occupied, claim.tenant: held + claim.gpus}) < 0:
            left = max(0, self.left_to_borrow(self.occupied))
            return f"it would borrow {claim.gpus} {self.kind} of {left} left: others use or keep back theirs"
        return None

    def cannot_ever(self, claim: Claim) -> str | None:
        """Why the claim would not fit were nothing else there, None where it would."""
        if fit(claim, self.nodes) is None:
            biggest = max(self.nodes.values(), default=0)
            if biggest < claim.group_gpus:
                return (
                    f"it asks for {claim.group_gpus} {self.kind} of one node, the biggest node has {biggest}"
                )
            return f"it asks for {claim.groups} groups of {claim.group_gpus} {self.kind}, more than the nodes have"
        most = self.quota(claim.tenant).most
        if claim.gpus > most:
            return f"it asks for {claim.gpus} {self.kind}, tenant {claim.tenant!r} may have {most:g} at most"
        return None
