"""Who has which GPUs, from round to round: what of the fleet may run now, and where. The controller's; no effects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from headrace.fleet.gpu_quota_spec import GpuNode, Spot
from headrace.fleet.gpu_share import Grant, QuotaRules, Sharer, Shares, shape_of, share
from headrace.fleet.quota_status import QuotaStatus, quota_status
from headrace.fleet.reconcile import has_given_up
from headrace.fleet.slot import Slot
from headrace.fleet.specs import ReplicaSpec
from headrace.fleet.status import ReplicaStatus
from headrace_router.types import ReplicaId, ReplicaState


class GpuBook:
    """Without rules nobody shares, and everything may run."""

    def __init__(self, rules: QuotaRules | None) -> None:
        self.rules = rules
        self.nodes: Sequence[GpuNode] = () if rules is None else rules.simulated_nodes
        self._shares = Shares()
        self._sharers: tuple[Sharer, ...] = ()
        self._specs: Mapping[ReplicaId, ReplicaSpec] = {}
        self._asked_at_s: dict[ReplicaId, float] = {}

    def go_by(self, rules: QuotaRules | None) -> None:
        """Share by other rules from the next round on. What is held is held until then."""
        self.rules = rules
        if rules is not None and rules.simulated_nodes:
            self.nodes = rules.simulated_nodes

    def adopt(self, slots: Mapping[ReplicaId, Slot], now_s: float) -> None:
        """Replicas that an earlier controller started have the GPUs that it gave them."""
        grants = dict(self._shares.grants)
        for replica_id, slot in slots.items():
            claim = None if self.rules is None else self.rules.claim(slot.spec)
            if claim is not None and slot.spots:
                grants[replica_id] = Grant(
                    slot.spots, shape_of(claim), now_s - _age_s(slot), "it was there already"
                )
        self._shares = Shares(grants)

    def round(
        self, desired: Mapping[ReplicaId, ReplicaSpec], slots: Mapping[ReplicaId, Slot], now_s: float
    ) -> dict[ReplicaId, ReplicaSpec]:
        """What of `desired` may run now. What is missing waits for GPUs, or has to give them back."""
        rules = self.rules
        if rules is None:
            return dict(desired)
        self._asked_at_s = {name: self._asked_at_s.get(name, now_s) for name in desired}
        specs = {**{name: slot.spec for name, slot in slots.items()}, **desired}
        self._specs = specs
        self._sharers = tuple(
            Sharer(
                claim,
                is_wanted=name in desired and not _has_given_up(slots.get(name)),
                is_present=name in slots and slots[name].state not in _GONE,
                is_idle=_is_idle(slots.get(name)),
            )
            for name, spec in specs.items()
            if (claim := rules.claim(spec, self._asked_at_s.get(name, now_s))) is not None
        )
        self._shares = share(rules, self.nodes, self._sharers, self._shares, now_s)
        sharing = {sharer.id for sharer in self._sharers if sharer.is_wanted}
        return {
            name: spec
            for name, spec in desired.items()
            if name not in sharing or self._shares.spots(name) is not None
        }

    @property
    def lost(self) -> tuple[ReplicaId, ...]:
        """Replicas whose node is gone, as the last round found."""
        return self._shares.lost

    @property
    def hopeless(self) -> frozenset[ReplicaId]:
        """Replicas that wait and for which nobody makes room."""
        return frozenset(self._shares.waiting) - self._shares.promised

    @property
    def waiting(self) -> list[tuple[ReplicaSpec, float]]:
        """Replicas that wait for GPUs, and since when."""
        return [
            (self._specs[name], self._asked_at_s[name])
            for name in sorted(self._shares.waiting)
            if name in self._asked_at_s
        ]

    @property
    def short(self) -> list[ReplicaSpec]:
        """Replicas that wait although their tenants have a right to GPUs: the cluster has too few."""
        return [self._specs[name] for name in sorted(self._shares.short)]

    def spots(self, replica_id: ReplicaId) -> tuple[Spot, ...]:
        """GPUs that a replica may start on; none where it takes none that are shared."""
        return self._shares.spots(replica_id) or ()

    def told(self, rows: Iterable[ReplicaStatus], now_s: float) -> list[ReplicaStatus]:
        """These rows, those that give GPUs back with the reason, and one for each replica that waits for some."""
        found = {row.id: row for row in rows}
        for name, grant in self._shares.grants.items():
            if grant.taken is not None and name in found:
                found[name] = replace(found[name], reason=f"gives its GPUs back: {grant.taken.reason}")
        for name, reason in self._shares.waiting.items():
            found[name] = ReplicaStatus(
                id=name,
                model=self._specs[name].model,
                role=self._specs[name].role,
                state=ReplicaState.PENDING,
                state_s=now_s - self._asked_at_s.get(name, now_s),
                reason=f"waits for GPUs: {reason}",
                waits_for_gpus=True,
            )
        return list(found.values())

    def status(self, fleet: str, now_s: float) -> QuotaStatus | None:
        """None where nobody shares."""
        if self.rules is None:
            return None
        return quota_status(
            fleet, rules=self.rules, nodes=self.nodes, sharers=self._sharers, shares=self._shares, now_s=now_s
        )


_GONE = (ReplicaState.STOPPED, ReplicaState.FAILED)


def _has_given_up(slot: Slot | None) -> bool:
    return slot is not None and has_given_up(slot.observed)


def _age_s(slot: Slot) -> float:
    pulse = slot.pulse
    if pulse is None:
        return 0.0
    return pulse.start_s + (pulse.phase_s if pulse.phase == "ready" else 0.0)


def _is_idle(slot: Slot | None) -> bool:
    """Whether it certainly serves nobody."""
    if slot is None or slot.state is ReplicaState.FAILED:
        return True
    pulse = slot.pulse
    is_told = slot.state is ReplicaState.READY and pulse is not None
    return is_told and pulse is not None and pulse.running == 0 and pulse.waiting == 0
