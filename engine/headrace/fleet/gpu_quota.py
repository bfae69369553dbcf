"""Which replicas get GPUs when several tenants share them. Pure.

Each accelerator kind by itself, in this order:

    1. repair    where a node has fewer GPUs than are held there, replicas go until it fits
    2. entitled  within its tenant's nominal: gets free GPUs, or displaces those that borrow (reclaimWithinCohort: Any)
                 and its own tenant's less important ones (withinClusterQueue: LowerPriority)
    3. repair    where limits or what is lent are exceeded, borrowers go
    4. the rest  borrows what is free, and displaces nobody (borrowWithinCohort: Never), unless others leave for its
                 tenant: who displaces somebody to reach its nominal does not exceed it in the meantime

Within 2 and 4 whoever holds least for its weight comes first, then the more important, then who asked first. Semantics
and defaults are those of Kueue's classic preemption (kueue.sigs.k8s.io/docs/concepts/preemption) with admission by fair
sharing. Different: kinds are not weighed against each other, GPUs beyond all nominal quotas can be borrowed, and a
victim is drained, so that its GPUs are reserved for whom it goes until it has gone.

Which claims are entitled depends on what is claimed and held, not on what is free, and an entitled replica is never
displaced by another tenant: each preemption lets one more entitled replica run, so they end. An entitled claim waits
only for minimum run times, and where GPUs are in pieces: with all claims of a kind in groups of one size, which divides
every node and every nominal quota, or with a single node, no entitled claim waits for good, as long as all nominal
quotas together are no more than there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headrace.fleet.gpu_quota_round import Round
from headrace.fleet.gpu_quota_spec import Admission, Allocation, Claim, GpuNode, Preemption, Tenant, TenantUse
from headrace.fleet.gpu_quota_victims import Judge

MIN_RUN_S = 300.0
"""A replica that has just loaded its weights for minutes is not sent away for a while."""


def allocate(
    tenants: Sequence[Tenant],
    nodes: Sequence[GpuNode],
    claims: Sequence[Claim],
    now_s: float,
    min_run_s: float = MIN_RUN_S,
) -> Allocation:
    """What to start and what to drain now, and why the others wait. Ids of claims are unique, and what drains is passed
    until it is gone, wanted or not.

    A claim whose node is gone, or has another kind, has lost its GPUs: it is in `lost`, and again admitted or pending.
    """
    there = {(node.id, node.kind) for node in nodes}
    lost = {
        claim.id
        for claim in claims
        if claim.holding and not all((spot.node_id, claim.kind) in there for spot in claim.holding.spots)
    }
    # Of what drained there nobody here knows whether it is still wanted: the caller asks again.
    pending = {
        one.id: "it drained on a node that is gone" for one in claims if one.id in lost and _drains(one)
    }
    present = [
        replace(claim, holding=None) if claim.id in lost else claim
        for claim in claims
        if claim.id not in pending
    ]
    alive = {claim.id: claim for claim in present if claim.holding and not _drains(claim)}
    admitted: list[Admission] = []
    preempted: list[Preemption] = []
    uses: list[TenantUse] = []
    promised: set[str] = set()
    judge = Judge(now_s, min_run_s)
    for kind in sorted({claim.kind for claim in present} | {node.kind for node in nodes}):
        one = Round(kind, tenants, nodes, present, judge=judge, alive=alive.values())
        one.run()
        admitted += one.admitted
        preempted += one.preempted
        pending |= one.pending
        promised |= one.promised
        uses += one.uses()
        for victim in one.preempted:
            del alive[victim.claim_id]  # for the other kinds: it is no longer among its model's replicas
    return Allocation(
        tuple(admitted), tuple(preempted), pending, tuple(sorted(lost)), tuple(uses), frozenset(promised)
    )


def _drains(claim: Claim) -> bool:
    return claim.holding is not None and claim.holding.is_draining
