"""Whom a replica that has a right to GPUs displaces. Pure.

Idle ones first, then those of the tenant that borrows most for its weight, the least important, the newest. A model
keeps its last replica, and a replica its minimum run time, as long as others can go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from headrace.fleet.gpu_quota_ledger import Ledger, fit
from headrace.fleet.gpu_quota_spec import Claim, Spot

Value = tuple[bool, bool, bool, float, int, float, str]


class Judge(NamedTuple):
    """What makes a replica worth keeping, now."""

    now_s: float
    min_run_s: float
    last: frozenset[str] = frozenset()
    """Claims that are their model's last replica, or would be when its others went."""

    def is_young(self, claim: Claim) -> bool:
        """It has not run its minimum time."""
        return self.runs_s(claim) < self.min_run_s

    def runs_s(self, claim: Claim) -> float:
        """For how long it has had its GPUs."""
        assert claim.holding is not None
        return self.now_s - claim.holding.since_s

    def value(self, claim: Claim, share: float) -> Value:
        """The smallest goes first."""
        assert claim.holding is not None
        return (
            self.is_young(claim), claim.id in self.last, not claim.holding.is_idle, -share, -claim.priority,
            -claim.holding.since_s, claim.id,
        )  # fmt: skip


def last_replicas(claims: Iterable[Claim], judge: Judge, ledger: Ledger) -> frozenset[str]:
    """Of each model the replica that would go last."""
    best: dict[str, tuple[Value, str]] = {}
    for claim in claims:
        value = judge.value(claim, ledger.share(claim.tenant))
        if claim.model not in best or value > best[claim.model][0]:
            best[claim.model] = (value, claim.id)
    return frozenset(name for _, name in best.values())


class Plan(NamedTuple):
    """Who goes, and where the claim is placed when they have gone."""

    victims: tuple[Claim, ...]
    spots: tuple[Spot, ...]


def plan(claim: Claim, ledger: Ledger, borrowers: Sequence[Claim], judge: Judge) -> Plan | None:
    """Room for a claim that has a right to it, at the least cost: that whose most valuable victim is worth least, then
    the fewest GPUs. None where the replicas that may go do not make room.

    `borrowers`: replicas of this kind without a right to their GPUs. Of those, another tenant's may go while that
    tenant holds more than its nominal. Those of its own all matter less, or the claim would have no right.
    """
    nodes = [node for node, gpus in ledger.nodes.items() if gpus >= claim.group_gpus]
    scopes = [[node] for node in nodes] if claim.groups == 1 else [nodes]
    found = [option for scope in scopes if (option := _in_scope(claim, ledger, borrowers, judge, scope))]
    return min(found, key=lambda option: _cost(option, ledger, judge), default=None)


def _cost(option: Plan, ledger: Ledger, judge: Judge) -> tuple[list[Value], int, int, str]:
    values = sorted((judge.value(one, ledger.share(one.tenant)) for one in option.victims), reverse=True)
    # Where nobody has to go: the fullest node, so that large holes stay.
    node = option.spots[0].node_id
    return values[:1], sum(one.gpus for one in option.victims), ledger.later[node], node


def _in_scope(
    claim: Claim, ledger: Ledger, candidates: Sequence[Claim], judge: Judge, scope: Sequence[str]
) -> Plan | None:
    free = {node: ledger.later[node] for node in scope}
    used = dict(ledger.used)
    nominal = ledger.quota(claim.tenant).nominal
    left, victims = list(candidates), list[Claim]()
    while True:
        is_over = used[claim.tenant] + claim.gpus > nominal
        if not is_over and fit(claim, free) is not None:
            break
        # To reach its nominal a tenant may displace others; to stay within it, only its own.
        options = [
            one
            for one in left
            if (one.tenant == claim.tenant or used[one.tenant] > ledger.quota(one.tenant).nominal)
            and (one.tenant == claim.tenant if is_over else _within(one, free))
        ]
        if not options:
            return None
        victim = min(options, key=lambda one: judge.value(one, ledger.share(one.tenant, used)))
        left.remove(victim)
        victims.append(victim)
        used[victim.tenant] -= victim.gpus
        _give(free, victim, 1)
    # Kueue's last step: who turns out not to be in the way stays, the most valuable first.
    for victim in reversed(list(victims)):
        _give(free, victim, -1)
        too_much = victim.tenant == claim.tenant and used[victim.tenant] + victim.gpus + claim.gpus > nominal
        if too_much or fit(claim, free) is None:
            _give(free, victim, 1)
        else:
            victims.remove(victim)
            used[victim.tenant] += victim.gpus
    spots = fit(claim, free)
    assert spots is not None
    return Plan(tuple(victims), spots)


def _within(claim: Claim, free: Mapping[str, int]) -> bool:
    return claim.holding is not None and any(spot.node_id in free for spot in claim.holding.spots)


def _give(free: dict[str, int], claim: Claim, sign: int) -> None:
    assert claim.holding is not None
    for spot in claim.holding.spots:
        if spot.node_id in free:
            free[spot.node_id] += sign * spot.gpus
