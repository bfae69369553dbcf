"""Which replicas there should be. Pure.

    FleetPlan ── pool by pool ──> members: number -> ReplicaSpec ──> desired: ReplicaId -> ReplicaSpec

A pool has a `template` (what a new member is), a `target` (what the autoscaler or the configuration asks for), a `pin`
(what a person asks for, stronger), and a `surge` (members beyond that while others are replaced). `settled` brings the
members in line with these and is the only thing that adds or removes any: it recalls what drains before it starts
anew, gives new members the lowest free numbers, and chooses who goes by `victims`, those of an older template first.

So a rolling replacement is a new template, then a surge of 1 until no member is of the old one; a new configuration is
new templates and targets; and what may not run now, though it is wanted, is left out of `desired` by the caller and
stays a member.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from headrace.config import Config
from headrace.config_autoscale import Autoscale
from headrace.fleet.pools import PoolKey
from headrace.fleet.reconcile import Observed, has_given_up
from headrace.fleet.specs import ReplicaSpec, initial_count, number_of, numbered, template
from headrace.fleet.victims import Seen, is_of, victims
from headrace_router.types import ReplicaId, ReplicaState


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One pool as it should be."""

    template: ReplicaSpec  # its id stands for no replica
    target: int
    pin: int | None = None
    surge: int = 0
    autoscale: Autoscale | None = None
    members: Mapping[int, ReplicaSpec] = field(default_factory=dict)  # by number
    marked: frozenset[int] = frozenset()
    """Members that are to be replaced although nothing about them is outdated."""
    asleep: Mapping[int, ReplicaSpec] = field(default_factory=dict)  # no members; woken before any is started

    @property
    def key(self) -> PoolKey:
        return PoolKey(self.template.model, self.template.role)

    @property
    def wanted(self) -> int:
        """Replicas that there should be, but for a surge."""
        return self.target if self.pin is None else self.pin

    @property
    def outdated(self) -> tuple[int, ...]:
        """Members that are to be replaced, by number."""
        return tuple(
            sorted(
                n for n, spec in self.members.items() if n in self.marked or not is_of(self.template, spec)
            )
        )

    def successor(self, number: int) -> ReplicaSpec:
        """What is to run in this member's place: as the template says, and never what runs there already."""
        generation = max(self.template.generation, self.members[number].generation + 1)
        return numbered(replace(self.template, generation=generation), number)

    @property
    def may_start_on_demand(self) -> bool:
        """Whether work alone brings replicas."""
        return self.autoscale is not None and not self.autoscale.dry_run and self.pin is None

    def pinned(self, count: int | None) -> PoolPlan:
        """The same with what a person asks for; None: nothing any more."""
        return replace(self, pin=count)

    def without(self, numbers: Collection[int]) -> PoolPlan:
        """The same without these members."""
        members = {number: spec for number, spec in self.members.items() if number not in numbers}
        return replace(self, members=members, marked=self.marked & members.keys())

    def settled(self, seen: Mapping[int, Seen]) -> PoolPlan:
        """The same with as many members as wanted. `seen`: its replicas that there are, members or not, by number."""
        asleep = {n: spec for n, spec in self.asleep.items() if n in seen and self._may_sleep(seen[n])}
        count = self.wanted + self.surge
        missing = count - len(self.members)
        if missing < 0:
            present = {number: seen.get(number) for number in self.members}
            gone = victims(present, self.template, -missing)
            able = [n for n in gone if n in seen and self._may_sleep(seen[n])]
            asleep |= {n: self.members[n] for n in able[: max(0, self.warm - len(asleep))]}
            return replace(self.without(gone), asleep=asleep)
        back = [n for n in sorted(seen) if n not in self.members and self._may_come_back(n, seen[n], asleep)]
        returned = {number: seen[number].spec for number in back[:missing]}
        asleep = {n: spec for n, spec in asleep.items() if n not in returned}
        taken = {*self.members, *seen}
        free = (number for number in itertools.count() if number not in taken)
        fresh = {n: numbered(self.template, n) for n in itertools.islice(free, missing - len(returned))}
        return replace(self, members={**self.members, **returned, **fresh}, asleep=asleep)

    @property
    def warm(self) -> int:
        """Most replicas that sleep."""
        return 0 if self.autoscale is None or self.template.sleep_level is None else self.autoscale.warm

    def _may_sleep(self, one: Seen) -> bool:
        is_serving = one.state in (ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.SLEEPING)
        return is_serving and is_of(self.template, one.spec)

    def _may_come_back(self, number: int, one: Seen, asleep: Collection[int]) -> bool:
        """Whether it is there already: it drains, or sleeps."""
        is_asleep = number in asleep and one.state is ReplicaState.SLEEPING
        return (one.can_be_recalled or is_asleep) and is_of(self.template, one.spec)


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """Every pool of the fleet as it should be."""

    pools: Mapping[PoolKey, PoolPlan]

    def desired(self) -> dict[ReplicaId, ReplicaSpec]:
        """Every member of every pool."""
        return {spec.id: spec for pool in self.pools.values() for _, spec in sorted(pool.members.items())}

    def asleep(self) -> dict[ReplicaId, ReplicaSpec]:
        """Replicas that are to sleep; no members."""
        return {spec.id: spec for pool in self.pools.values() for _, spec in sorted(pool.asleep.items())}

    def having(self, *pools: PoolPlan) -> FleetPlan:
        """The same with these pools as they are given."""
        return FleetPlan({**self.pools, **{pool.key: pool for pool in pools}})

    def settled(self, seen: Iterable[tuple[int, Seen]]) -> FleetPlan:
        """Every pool settled. `seen`: the replicas that there are, with their numbers."""
        by_pool: dict[PoolKey, dict[int, Seen]] = {}
        for number, one in seen:
            by_pool.setdefault(PoolKey(one.spec.model, one.spec.role), {})[number] = one
        return FleetPlan({key: pool.settled(by_pool.get(key, {})) for key, pool in self.pools.items()})


def initial_plan(config: Config, num_cores: int, num_gpus: int) -> FleetPlan:
    """What `config` asks for at first on a cluster of that size. Its members are not there before it is settled."""
    pools = [
        PoolPlan(
            template(model, pool, num_gpus, config.fleet),
            initial_count(pool, num_cores),
            autoscale=pool.autoscale,
        )
        for model in config.models
        if model.backend != "external"
        for pool in model.pools
    ]
    return FleetPlan({pool.key: pool for pool in pools})


def coming(
    plan: FleetPlan, observed: Mapping[ReplicaId, Observed], hopeless: Collection[ReplicaId] = ()
) -> tuple[str, ...]:
    """Models of which a replica is on its way, or would be as soon as there is work. `hopeless`: members that may not
    start, for no one knows how long."""
    models = dict.fromkeys(
        key.model
        for key, pool in plan.pools.items()
        if (pool.may_start_on_demand and not any(spec.id in hopeless for spec in pool.members.values()))
        or any(_is_coming(observed.get(spec.id)) for spec in pool.members.values() if spec.id not in hopeless)
    )
    return tuple(models)


def _is_coming(replica: Observed | None) -> bool:
    if replica is None:
        return True
    # A member that drains is recalled, or another runs in its place.
    return replica.state is not ReplicaState.READY and not has_given_up(replica)


def remembered(plan: FleetPlan) -> list[dict[str, Any]]:
    """What of a plan the configuration does not say, as JSON can hold it."""
    return [
        {
            "model": key.model,
            "role": key.role.value,
            "target": pool.target,
            "pin": pool.pin,
            "members": sorted(pool.members),
            "generation": pool.template.generation,
            "marked": sorted(pool.marked),
            "surge": pool.surge,
            "asleep": sorted(pool.asleep),
        }
        for key, pool in plan.pools.items()
    ]


def restored(
    plan: FleetPlan, memory: Iterable[Mapping[str, Any]], found: Mapping[ReplicaId, ReplicaSpec]
) -> FleetPlan:
    """`plan` with what was remembered, and members as those that were found run; it is not settled.

    A member that is remembered and not found is forgotten: what it was started as, nobody knows, so settling starts
    one of the present template. Of a pool that nobody remembers, every replica that was found is a member.
    """
    pools = {key: replace(pool, members=_of_pool(key, found)) for key, pool in plan.pools.items()}
    for one in memory:
        key = next((key for key in pools if (key.model, key.role.value) == (one["model"], one["role"])), None)
        if key is None:
            continue
        specs = {number: found.get(numbered(pools[key].template, number).id) for number in one["members"]}
        pools[key] = replace(
            pools[key],
            target=one["target"],
            pin=one["pin"],
            members={number: spec for number, spec in specs.items() if spec is not None},
            template=replace(pools[key].template, generation=one["generation"]),
            marked=frozenset(one["marked"]) & {number for number, spec in specs.items() if spec is not None},
            surge=one["surge"],
            asleep={number: spec for number, spec in _of_pool(key, found).items() if number in one["asleep"]},
        )
    return FleetPlan(pools)


def _of_pool(key: PoolKey, found: Mapping[ReplicaId, ReplicaSpec]) -> dict[int, ReplicaSpec]:
    return {number_of(id): spec for id, spec in found.items() if (spec.model, spec.role) == key}
