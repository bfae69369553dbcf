"""A plan for another configuration, for a restart: what becomes of the plan that there is. Pure."""

from __future__ import annotations

from dataclasses import replace

from headrace.config import Config, Pool
from headrace.errors import NotFound
from headrace.fleet.config_diff import pools
from headrace.fleet.fleet_plan import FleetPlan, PoolPlan, initial_plan
from headrace.fleet.pools import PoolKey, named
from headrace.fleet.specs import initial_count
from headrace_router.types import ReplicaId


def replanned(plan: FleetPlan, old: Config, new: Config, num_cores: int, num_gpus: int) -> FleetPlan:
    """The plan for `new`, in which everything stays that `new` does not say otherwise.

    What a load or a person has made of a pool's count stays unless its count or its autoscaling are configured anew.
    Members stay what they run as, so that those of pools that are made otherwise are outdated now.
    """
    fresh, before, after = initial_plan(new, num_cores, num_gpus), pools(old), pools(new)
    planned = {}
    for key, pool in fresh.pools.items():
        present = plan.pools.get(key)
        if present is None:
            planned[key] = pool
            continue
        template = replace(pool.template, generation=present.template.generation)
        planned[key] = replace(present, template=template, autoscale=pool.autoscale)
        if key not in before or _count(before[key][1]) != _count(after[key][1]):
            target = _target(present, after[key][1], num_cores)
            planned[key] = replace(planned[key], target=target, pin=None)
    return FleetPlan(planned)


def restarting_one(plan: FleetPlan, name: str) -> tuple[FleetPlan, tuple[PoolKey, ...]]:
    """The plan in which one replica is outdated although nothing about it has changed, and its pool.

    Raises NotFound where there is no such replica.
    """
    for key, pool in plan.pools.items():
        for number, spec in pool.members.items():
            if spec.id == name:
                return plan.having(replace(pool, marked=pool.marked | {number})), (key,)
    if any(name in (key.model, str(key)) for key in plan.pools):
        raise NotFound(f"{name!r} is a pool; to replace its replicas one after another, say --rolling")
    known = ", ".join(sorted(plan.desired())) or "none"
    raise NotFound(f"no replica {name!r}; the replicas of this fleet: {known}")


def restarting(plan: FleetPlan, name: str | None) -> tuple[FleetPlan, tuple[PoolKey, ...]]:
    """The plan in which the replicas of a pool, or by None of all, are outdated although nothing about them has
    changed, and the pools that it concerns. Raises NotFound where there is no such pool."""
    keys = tuple(plan.pools) if name is None else (named(name, plan.pools),)
    return plan.having(*(_next_generation(plan.pools[key]) for key in keys)), keys


def _next_generation(pool: PoolPlan) -> PoolPlan:
    generations = (pool.template.generation, *(spec.generation for spec in pool.members.values()))
    return replace(pool, template=replace(pool.template, generation=max(generations) + 1))


def outdated_ids(plan: FleetPlan) -> tuple[ReplicaId, ...]:
    """Replicas that are to be replaced."""
    return tuple(pool.members[number].id for pool in plan.pools.values() for number in pool.outdated)


def _count(pool: Pool) -> tuple[object, object]:
    return pool.replicas, pool.autoscale


def _target(present: PoolPlan, pool: Pool, num_cores: int) -> int:
    if pool.autoscale is None:
        return initial_count(pool, num_cores)
    return min(max(present.target, pool.autoscale.min_replicas), pool.autoscale.max_replicas)
