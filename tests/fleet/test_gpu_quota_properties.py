"""What holds of every allocation, and of carrying allocations out until nothing changes.

`QUOTA_EXAMPLES=10000` runs the long version.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.fleet.gpu_quota import allocate
from headrace.fleet.gpu_quota_ledger import Ledger
from headrace.fleet.gpu_quota_round import entitled
from headrace.fleet.gpu_quota_spec import Allocation, Claim, GpuNode, Holding, Quota, Tenant

EXAMPLES = int(os.environ.get("QUOTA_EXAMPLES", "300"))
MIN_RUN_S = 100.0
KINDS = ("h100", "l4")


@dataclass
class Cluster:
    """Does what allocations say: starts at once, and drains within some rounds."""

    tenants: list[Tenant]
    nodes: list[GpuNode]
    claims: dict[str, Claim]
    rng: Random
    now_s: float = 1000.0
    moves: list[tuple[str, str]] = field(default_factory=list)

    def step(self, seconds: float) -> Allocation:
        """One round; checks what must hold of it."""
        before = dict(self.claims)
        allocation = allocate(self.tenants, self.nodes, list(before.values()), self.now_s, MIN_RUN_S)
        again = allocate(self.tenants, self.nodes, list(before.values()), self.now_s, MIN_RUN_S)
        assert again == allocation, "not a function of its arguments"
        for name in allocation.lost:
            self.claims[name] = replace(before[name], holding=None)
        for one in allocation.admitted:
            assert self.claims[one.claim_id].holding is None
            self.claims[one.claim_id] = replace(
                before[one.claim_id], holding=Holding(one.spots, self.now_s, self.rng.random() < 0.2)
            )
        for victim in allocation.preempted:
            holding = self.claims[victim.claim_id].holding
            assert holding is not None
            assert not holding.is_draining, "drained twice"
            self.claims[victim.claim_id] = replace(
                before[victim.claim_id], holding=replace(holding, is_draining=True)
            )
        self.check(before, allocation)
        self.moves += [(one.claim_id, "start") for one in allocation.admitted]
        self.moves += [(one.claim_id, "drain") for one in allocation.preempted]
        for name, claim in self.claims.items():
            if claim.holding and claim.holding.is_draining and self.rng.random() < 0.6:
                self.claims[name] = replace(claim, holding=None)
        self.now_s += seconds
        return allocation

    def used(self, tenant: str, kind: str, *, draining: bool) -> int:
        return sum(
            one.gpus
            for one in self.claims.values()
            if (one.tenant, one.kind) == (tenant, kind)
            and one.holding
            and (draining or not one.holding.is_draining)
        )

    def is_over(self, node: GpuNode) -> bool:
        held = [one for one in self.claims.values() if one.holding and not one.holding.is_draining]
        return node.gpus < sum(
            spot.gpus
            for one in held
            for spot in one.holding.spots
            if spot.node_id == node.id  # type: ignore[union-attr]
        )

    def entitled(self, kind: str) -> set[str]:
        ledger = Ledger(kind, self.nodes, self.tenants)
        claims = [one for one in self.claims.values() if one.kind == kind]
        return entitled([one for one in claims if not (one.holding and one.holding.is_draining)], ledger)

    def check(self, before: dict[str, Claim], allocation: Allocation) -> None:
        starting = {one.claim_id for one in allocation.admitted}
        draining = {one.claim_id for one in allocation.preempted}
        assert not starting & draining
        for name, claim in self.claims.items():
            runs = claim.holding is not None and not claim.holding.is_draining
            assert (name in allocation.pending) != (runs or name in draining), f"{name} is told nothing"
        assert all(allocation.pending.values()), "no reason"
        for node in self.nodes:
            spots = [
                (one, spot)
                for one in self.claims.values()
                if one.holding
                for spot in one.holding.spots
                if spot.node_id == node.id
            ]
            held = sum(spot.gpus for _, spot in spots)
            new = sum(spot.gpus for one, spot in spots if one.id in starting)
            assert not new or held <= node.gpus, "more than there is"
            assert not self.is_over(node), "a node that lost GPUs still holds more"
            assert all(one.kind == node.kind and spot.gpus % one.group_gpus == 0 for one, spot in spots)
        for one in allocation.admitted:
            assert sum(spot.gpus for spot in one.spots) == before[one.claim_id].gpus, "not whole"
        self.check_quotas(before, allocation)

    def check_quotas(self, before: dict[str, Claim], allocation: Allocation) -> None:
        for kind in KINDS:
            ledger = Ledger(kind, self.nodes, self.tenants)
            was = Cluster(self.tenants, self.nodes, before, self.rng)
            lost = {name: replace(before[name], holding=None) for name in allocation.lost}
            was.claims = {**before, **lost}
            right = was.entitled(kind)
            borrowing = [
                self.claims[one.claim_id]
                for one in allocation.admitted
                if before[one.claim_id].kind == kind and one.reason == "it borrows"
            ]
            used = {one.name: self.used(one.name, kind, draining=True) for one in self.tenants}
            for claim in borrowing:
                assert used[claim.tenant] <= ledger.quota(claim.tenant).most, "borrowed beyond its limit"
            if borrowing:
                assert ledger.left_to_borrow(used) >= 0, "more is lent than is lendable"
            for victim in allocation.preempted:
                claim = before[victim.claim_id]
                if claim.kind != kind or not victim.reason.startswith("for "):
                    continue
                holding = claim.holding
                assert holding is not None
                assert victim.claim_id not in right, "displaced although within its nominal"
                assert self.now_s - holding.since_s >= MIN_RUN_S, "displaced before its minimum run time"
                for_whom = before[victim.reason[4:].split(",")[0]]
                assert for_whom.id in right, "who only borrows displaced somebody"
                owner, tenant = for_whom.tenant, claim.tenant
                assert (
                    self.used(owner, kind, draining=False) + for_whom.gpus <= ledger.quota(owner).nominal
                ), "displaced somebody to exceed its nominal"
                if owner == tenant:
                    assert claim.priority > for_whom.priority
                else:
                    assert was.used(tenant, kind, draining=False) > ledger.quota(tenant).nominal


limits = st.one_of(st.none(), st.integers(0, 6))
seeds = st.integers(0, 2**32)


@st.composite
def clusters(draw: st.DrawFn, size: int | None = None, num_nodes: int = 4, kinds: int = 2) -> Cluster:
    """Any tenants, nodes and wishes. With `size`, all groups are of that size, and nodes and quotas multiples of it,
    the quotas together no more than there is."""
    unit = size or 1
    names = "abc"[: draw(st.integers(1, 3))]
    nodes = [
        GpuNode(f"n{number}", draw(st.sampled_from(KINDS[:kinds])), unit * draw(st.integers(1, 8 // unit)))
        for number in range(draw(st.integers(1, num_nodes)))
    ]
    left = {kind: sum(node.gpus for node in nodes if node.kind == kind) // unit for kind in KINDS}
    tenants = []
    for name in names:
        quotas = {}
        for kind in KINDS[:kinds]:
            most = left[kind] if size else 8
            nominal = draw(st.integers(0, most))
            left[kind] -= nominal
            quotas[kind] = Quota(unit * nominal, draw(limits), draw(limits))
        tenants.append(Tenant(name, quotas, draw(st.sampled_from([0.5, 1.0, 4.0]))))
    claims = {}
    for number in range(draw(st.integers(1, 12))):
        tenant = draw(st.sampled_from(names))
        claims[f"{tenant}{number}"] = Claim(
            f"{tenant}{number}",
            tenant,
            draw(st.sampled_from(["m1", "m2", "m3"])),
            draw(st.sampled_from(KINDS[:kinds])),
            size or draw(st.sampled_from([1, 1, 2, 3, 4, 8])),
            draw(st.sampled_from([1, 1, 1, 2])),
            draw(st.integers(0, 2)),
            draw(st.floats(0, 100)),
        )
    return Cluster(tenants, nodes, claims, Random(draw(seeds)))


def change(cluster: Cluster) -> None:
    """Something that nobody decided: nodes go, shrink and come; claims go and come; quotas change."""
    rng, nodes = cluster.rng, cluster.nodes
    what = rng.randrange(6)
    if what == 0 and len(nodes) > 1:
        nodes.pop(rng.randrange(len(nodes)))
    elif what == 1:
        index = rng.randrange(len(nodes))
        nodes[index] = nodes[index]._replace(gpus=rng.randint(0, nodes[index].gpus))
    elif what == 2:
        nodes.append(GpuNode(f"new{cluster.now_s:.0f}", rng.choice(KINDS), rng.randint(1, 8)))
    elif what == 3 and len(cluster.claims) > 1:
        del cluster.claims[rng.choice(list(cluster.claims))]
    elif what == 4:
        old = rng.choice(list(cluster.claims.values()))
        name = f"{old.tenant}x{cluster.now_s:.0f}"
        cluster.claims[name] = replace(
            old, id=name, holding=None, asked_at_s=cluster.now_s, priority=rng.randrange(3)
        )
    else:
        index = rng.randrange(len(cluster.tenants))
        tenant = cluster.tenants[index]
        quota = Quota(rng.randint(0, 8), rng.choice([None, 0, 2]), rng.choice([None, 0, 2]))
        cluster.tenants[index] = replace(tenant, quotas={**tenant.quotas, rng.choice(KINDS): quota})


def settle(cluster: Cluster) -> Allocation:
    """Carry out until nothing has moved for a while and nothing drains. Bounded: each claim starts and goes a few
    times at most."""
    quiet = 0
    for _ in range(20 + 10 * len(cluster.claims)):
        allocation = cluster.step(MIN_RUN_S / 2)
        drains = any(one.holding and one.holding.is_draining for one in cluster.claims.values())
        quiet = 0 if allocation.admitted or allocation.preempted or drains else quiet + 1
        if quiet > 3:  # longer than a minimum run time
            return allocation
    raise AssertionError(f"no end: {cluster.moves[-12:]}")


@settings(max_examples=EXAMPLES, deadline=None)
@given(clusters(), st.integers(0, 8))
def test_whatever_happens_every_round_is_within_what_is_there_and_allowed(
    cluster: Cluster, changes: int
) -> None:
    for _ in range(changes):
        for _ in range(cluster.rng.randint(1, 4)):
            cluster.step(cluster.rng.choice([1.0, 60.0, 200.0]))
        change(cluster)
    settle(cluster)


@settings(max_examples=EXAMPLES, deadline=None)
@given(clusters(), st.integers(0, 6))
def test_it_comes_to_rest_and_nobody_goes_and_returns_for_ever(cluster: Cluster, changes: int) -> None:
    for _ in range(changes):
        settle(cluster)
        change(cluster)
        cluster.moves.clear()
        allocation = settle(cluster)
        drains = [name for name, what in cluster.moves if what == "drain"]
        # Each drain lets an entitled claim run, repairs a node or a limit: no claim goes more than a few times.
        assert len(drains) <= 2 * len(cluster.claims), f"{drains}"
        for kind in KINDS:
            ledger = Ledger(kind, cluster.nodes, cluster.tenants)
            used = {one.name: cluster.used(one.name, kind, draining=False) for one in cluster.tenants}
            for tenant in cluster.tenants:
                assert used[tenant.name] <= ledger.quota(tenant.name).most, "above its limit at rest"
            assert ledger.left_to_borrow(used) >= 0, "more is lent than lendable at rest"
        assert not allocation.admitted


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.one_of(clusters(size=1), clusters(size=2), clusters(size=4), clusters(num_nodes=1, kinds=1)),
    st.integers(0, 4),
)
def test_where_gpus_are_not_in_pieces_every_tenant_reaches_its_nominal(
    cluster: Cluster, changes: int
) -> None:
    for _ in range(changes + 1):
        settle(cluster)
        waits = [one for one in cluster.claims.values() if one.holding is None]
        for kind in KINDS:
            gpus = sum(node.gpus for node in cluster.nodes if node.kind == kind)
            own = sum(tenant.quotas.get(kind, Quota()).nominal for tenant in cluster.tenants)
            right = cluster.entitled(kind)
            if own <= gpus:
                assert not [one.id for one in waits if one.id in right], "below its nominal"
        name = cluster.rng.choice(list(cluster.claims))
        rival = replace(cluster.claims[name], id=f"{name}+", holding=None, priority=cluster.rng.randrange(3))
        cluster.claims[rival.id] = rival
