"""One round of allocation for one accelerator kind: the four steps that `gpu_quota` names. Mutable, used once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from headrace.fleet.gpu_quota_ledger import Ledger, fit
from headrace.fleet.gpu_quota_spec import Admission, Claim, GpuNode, Preemption, Spot, Tenant, TenantUse
from headrace.fleet.gpu_quota_victims import Judge, Plan, Value, last_replicas, plan


def entitled(claims: Iterable[Claim], ledger: Ledger) -> set[str]:
    """Claims within their tenants' nominal quotas: by importance, then those that run, the longest first, then who
    asked first. One that does not run is entitled only if with all before it, borrowed or not, it is within nominal: a
    tenant may displace others to reach its nominal, never to exceed it. What drains or can never run has no part."""
    found: set[str] = set()
    by_tenant = sorted(claims, key=lambda one: (one.tenant, one.priority, *_seniority(one)))
    for tenant, own in groupby(by_tenant, key=lambda one: one.tenant):
        nominal = ledger.quota(tenant).nominal
        within = ahead = 0
        for claim in own:
            if claim.holding is None and ledger.cannot_ever(claim) is not None:
                continue
            if (within if claim.holding else ahead) + claim.gpus <= nominal:
                found.add(claim.id)
                within += claim.gpus
                ahead += claim.gpus
            elif claim.holding:
                ahead += claim.gpus
    return found


class Round:
    """`run` it, then read what was decided."""

    def __init__(
        self,
        kind: str,
        tenants: Sequence[Tenant],
        nodes: Sequence[GpuNode],
        claims: Iterable[Claim],
        *,
        judge: Judge,
        alive: Iterable[Claim],
    ) -> None:
        """`alive`: replicas of all kinds that do not drain."""
        self.admitted: list[Admission] = []
        self.preempted: list[Preemption] = []
        self.pending: dict[str, str] = {}
        self.promised: set[str] = set()
        self._owed: dict[str, str] = {}  # tenant → the first of its claims for which others leave
        ledger = self._ledger = Ledger(kind, nodes, tenants)
        self._claims = [claim for claim in claims if claim.kind == kind]
        self._running: dict[str, Claim] = {}  # and nobody has decided that they go
        self._waiting: list[Claim] = []
        for claim in self._claims:
            if claim.holding is None:
                self._waiting.append(claim)
                continue
            ledger.hold(claim)
            if claim.holding.is_draining:
                ledger.leave(claim)
                self.pending[claim.id] = "it drains"
            else:
                self._running[claim.id] = claim
        self._judge = judge._replace(last=last_replicas(alive, judge, ledger))
        self._entitled = entitled([*self._running.values(), *self._waiting], ledger)

    def run(self) -> None:
        """All four steps."""
        self._fit_nodes()
        for claim in self._in_turn([one for one in self._waiting if one.id in self._entitled]):
            self._admit_entitled(claim)
        self._fit_limits()
        for claim in self._in_turn([one for one in self._waiting if one.id not in self._entitled]):
            self._admit_rest(claim)

    def uses(self) -> list[TenantUse]:
        """Of every tenant that has, holds or wants something of this kind."""
        ledger = self._ledger
        held, waiting = dict.fromkeys(ledger.used, 0), dict.fromkeys(ledger.used, 0)
        going = {victim.claim_id for victim in self.preempted}
        for claim in self._claims:
            of = waiting if claim.id in self.pending else held
            if claim.id not in going and not (claim.holding and claim.holding.is_draining):
                of[claim.tenant] = of.get(claim.tenant, 0) + claim.gpus
        return [
            TenantUse(name, ledger.kind, nominal, has, max(0, has - nominal), waiting.get(name, 0))
            for name in sorted({*held, *waiting})
            if (nominal := ledger.quota(name).nominal) + (has := held.get(name, 0)) + waiting.get(name, 0)
        ]

    # --- the steps

    def _fit_nodes(self) -> None:
        for node, gpus in self._ledger.nodes.items():
            while self._ledger.later[node] < 0:
                here = [one for one in self._running.values() if _is_on(one, node)]
                # Whoever is entitled goes last; that one is young cannot count.
                victim = min(here, key=lambda one: (one.id in self._entitled, self._value(one)))
                self._drain(victim, f"node {node} has {gpus} {self._ledger.kind} left and more are held")

    def _admit_entitled(self, claim: Claim) -> None:
        ledger, free = self._ledger, self._ledger.free_now()
        nominal = ledger.quota(claim.tenant).nominal
        right = f"within the nominal {nominal} {ledger.kind} of tenant {claim.tenant!r}"
        # Where its own tenant borrows, its less important ones would have to go first; not if there is room for all.
        is_over = ledger.used[claim.tenant] + claim.gpus > nominal
        spots = fit(claim, free) if not is_over or ledger.cannot_borrow(claim) is None else None
        if spots is not None:
            self._start(claim, spots, right)
            return
        borrowers = [one for one in self._running.values() if one.id not in self._entitled]
        found = plan(claim, ledger, borrowers, self._judge)
        if found is None:
            self.pending[claim.id] = (
                f"{right}, but no room for {_size(claim)}: {sum(free.values())} are free, in pieces, and "
                "borrowers that may go do not make room"
            )
            return
        self._displace(claim, found, right)
        ledger.reserve(claim, found.spots)

    def _displace(self, claim: Claim, found: Plan, right: str) -> None:
        self.promised.add(claim.id)
        self._owed.setdefault(claim.tenant, claim.id)
        if not found.victims:
            self.pending[claim.id] = f"{right}: it waits for those that drain to be gone"
            return
        names = ", ".join(sorted(one.id for one in found.victims))
        wait_s = max(self._judge.min_run_s - self._judge.runs_s(one) for one in found.victims)
        self.pending[claim.id] = f"{right}: it waits for {names} to drain"
        for victim in found.victims:
            if wait_s > 0:
                # None goes before all can: GPUs that stand empty until then serve nobody.
                self._promise(victim)
            else:
                self._drain(victim, f"for {claim.id}, {right}", claim.id)
        if wait_s > 0:
            self.pending[claim.id] += f", in {wait_s:.0f} s, after the minimum run time"

    def _fit_limits(self) -> None:
        ledger = self._ledger
        while True:
            over = {name for name, held in ledger.used.items() if held > ledger.quota(name).most}
            if not over and ledger.left_to_borrow(ledger.used) < 0:
                over = {name for name, held in ledger.used.items() if held > ledger.quota(name).nominal}
            borrowers = [
                one
                for one in self._running.values()
                if one.tenant in over and one.id not in self._entitled and not self._judge.is_young(one)
            ]
            if not borrowers:
                return
            victim = min(borrowers, key=self._value)
            self._drain(victim, f"tenant {victim.tenant!r} holds more than it may borrow or others lend")

    def _admit_rest(self, claim: Claim) -> None:
        ledger = self._ledger
        refusal = ledger.cannot_ever(claim) or ledger.cannot_borrow(claim)
        if refusal is not None:
            self.pending[claim.id] = refusal
            return
        is_over = ledger.used[claim.tenant] + claim.gpus > ledger.quota(claim.tenant).nominal
        if is_over and claim.tenant in self._owed:
            # Else others would go and the tenant would end above its nominal.
            self.pending[claim.id] = (
                f"it would borrow while others leave for {self._owed[claim.tenant]} of its tenant"
            )
            return
        free = ledger.free_now()
        spots = fit(claim, free)
        if spots is None:
            self.pending[claim.id] = (
                f"it would borrow, and there is no room for {_size(claim)} {ledger.kind}: "
                f"{sum(free.values())} are free and not promised"
            )
            return
        self._start(claim, spots, "it borrows" if is_over else "its tenant's nominal is not used up")

    # --- inside

    def _in_turn(self, claims: Sequence[Claim]) -> Iterator[Claim]:
        """The lowest share first, as it is after those before."""
        left = list(claims)
        while left:
            claim = min(left, key=self._turn)
            left.remove(claim)
            yield claim

    def _turn(self, claim: Claim) -> tuple[bool, float, float, int, float, str]:
        used, nominal = self._ledger.used.get(claim.tenant, 0), self._ledger.quota(claim.tenant).nominal
        return (
            used + claim.gpus > nominal, self._ledger.share(claim.tenant), used / nominal if nominal else 0.0,
            claim.priority, claim.asked_at_s, claim.id,
        )  # fmt: skip

    def _value(self, claim: Claim) -> Value:
        return self._judge.value(claim, self._ledger.share(claim.tenant))

    def _start(self, claim: Claim, spots: tuple[Spot, ...], reason: str) -> None:
        self._ledger.start(claim, spots)
        self.admitted.append(Admission(claim.id, spots, reason))

    def _drain(self, victim: Claim, reason: str, for_id: str = "") -> None:
        self._promise(victim)
        self.preempted.append(Preemption(victim.id, reason, for_id))

    def _promise(self, victim: Claim) -> None:
        self._ledger.leave(victim)
        del self._running[victim.id]


def _is_on(claim: Claim, node: str) -> bool:
    return claim.holding is not None and any(spot.node_id == node for spot in claim.holding.spots)


def _size(claim: Claim) -> str:
    if claim.groups > 1:
        return f"{claim.groups} groups of {claim.group_gpus}"
    return f"{claim.group_gpus} in one node"


def _seniority(claim: Claim) -> tuple[bool, float, float, str]:
    holding = claim.holding
    return holding is None, holding.since_s if holding else 0.0, claim.asked_at_s, claim.id
