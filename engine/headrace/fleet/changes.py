"""Changes to a running fleet: what is configured now, what was asked for last, and how far that has come.

    apply(config) ── diff ──> refused | plan for it ──┐
    restart(name) ─────────── plan in which it is outdated ──┴─> a Rollout ── advance, each round ──> done | stopped

No Ray and no clock: the controller acts on the plan, and remembers what stands here for its successor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from headrace.config import Config
from headrace.errors import ConfigError
from headrace.fleet import preflight
from headrace.fleet.config_diff import FIXED, ConfigDiff, diff
from headrace.fleet.fleet_plan import FleetPlan
from headrace.fleet.pools import PoolKey
from headrace.fleet.replan import outdated_ids, replanned, restarting, restarting_one
from headrace.fleet.rollout import Fleet, Pace, Rollout, RolloutState, advance
from headrace.fleet.specs import expand
from headrace_router.types import ReplicaId, Role


class FleetChanges:
    """Of one fleet. Mutable; the controller's own."""

    def __init__(self, config: Config) -> None:
        self.config = as_remembered(config)
        self.revision = 0  # of the configuration; grows with each that is applied
        self.rollout: Rollout | None = None  # the last one
        self.num_cores = 0
        self.num_gpus = 0

    def on(self, num_cores: int, num_gpus: int) -> None:
        """The cluster has so many, which `per_core` and `device: auto` ask."""
        self.num_cores, self.num_gpus = num_cores, num_gpus

    def difference(self, new: Config) -> ConfigDiff:
        """From what is configured now. Raises ConfigError where it cannot be while the fleet runs, FatalStartError
        where the cluster has too few devices for it."""
        new = as_remembered(new)
        found = diff(self.config, new, num_gpus=self.num_gpus)
        if found.refused:
            raise ConfigError(
                "\n".join(
                    f"{change.key} is {change.old} and cannot become {change.new} while the fleet runs: "
                    f"{FIXED[change.key]}"
                    for change in found.refused
                )
            )
        specs = expand(new, self.num_cores, self.num_gpus)
        preflight.check_devices(specs, self.num_cores, self.num_gpus, has_gpu_quotas=new.has_gpu_quotas)
        return found

    def apply(self, plan: FleetPlan, new: Config, id: str, pace: Pace) -> FleetPlan:
        """The plan for another configuration, which is the fleet's from now on. `id` names the rollout.

        The same plan where nothing differs and nothing is left of what was begun. Raises what `difference` raises.
        """
        new = as_remembered(new)
        found = self.difference(new)
        if found.is_empty and not self._is_unfinished(plan):
            return plan
        planned = replanned(plan, self.config, new, self.num_cores, self.num_gpus)
        before = self.rollout
        self.config = new
        self.revision += not found.is_empty
        concerned = {key for key, _ in (*found.resized, *found.replaced)} | {*found.added, *found.removed}
        if before is not None and self._is_unfinished(plan):
            concerned |= {*before.pools}
        self._begin(planned, id, "apply", tuple(sorted(concerned)), pace)
        return planned

    def restart(self, plan: FleetPlan, name: str | None, is_rolling: bool, id: str, pace: Pace) -> FleetPlan:
        """The plan in which a replica or, rolling, a pool or, by None, every replica is replaced. Raises NotFound.

        Safe to be asked again with the same `id`: a call under way when a controller dies is asked of its successor.
        """
        if self.rollout is not None and self.rollout.id == id:
            return plan
        planned, keys = restarting(plan, name) if is_rolling else restarting_one(plan, name or "")
        self._begin(planned, id, "restart" if name is None else f"restart of {name}", keys, pace)
        return planned

    def advance(self, plan: FleetPlan, fleet: Fleet, now_s: float) -> FleetPlan:
        """The plan after one round."""
        if self.rollout is None:
            return plan
        plan, self.rollout = advance(plan, self.rollout, fleet, now_s)
        return plan

    def _begin(self, plan: FleetPlan, id: str, what: str, pools: tuple[PoolKey, ...], pace: Pace) -> None:
        # What an earlier rollout had left to do is part of this one.
        keys = dict.fromkeys((*plan.pools, *pools))
        concerned = tuple(
            key for key in keys if key in pools or (key in plan.pools and plan.pools[key].outdated)
        )
        self.rollout = Rollout(id, what, concerned, len(outdated_ids(plan)), pace=pace)

    def _is_unfinished(self, plan: FleetPlan) -> bool:
        """Whether the last rollout has stopped before its end."""
        return self.rollout is not None and self.rollout.state is RolloutState.STOPPED

    def remembered(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "config": self.config.model_dump(mode="json", by_alias=True, exclude_unset=True),
            "revision": self.revision,
            "num_gpus": self.num_gpus,
            "rollout": None if self.rollout is None else asdict(self.rollout),
        }

    def restore(self, memory: Mapping[str, Any]) -> None:
        """Take on what an earlier controller remembered."""
        self.config = Config.model_validate(memory["config"])
        self.revision = memory["revision"]
        self.num_gpus = memory["num_gpus"]
        if (told := memory["rollout"]) is not None:
            self.rollout = Rollout(
                **{
                    **told,
                    "state": RolloutState(told["state"]),
                    "pools": tuple(PoolKey(model, Role(role)) for model, role in told["pools"]),
                    "without_room": (),  # there may be some now
                    "pace": Pace(**told["pace"]),
                }
            )


def as_remembered(config: Config) -> Config:
    """The configuration as it comes back from memory: YAML has values, such as dates, that JSON has not, and replicas
    must not be taken for outdated by a controller that is restarted."""
    dumped = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return Config.model_validate(dumped)


def num_replaced(rollout: Rollout, plan: FleetPlan, ready: Collection[ReplicaId]) -> int:
    """How many of those that were outdated have a successor that is ready."""
    coming = 0
    for key in rollout.pools:
        if (pool := plan.pools.get(key)) is not None:
            # Successors beyond the count have predecessors that are outdated still, and counted as such.
            not_ready = sum(spec.id not in ready for spec in pool.members.values())
            coming += max(0, not_ready - pool.surge)
    return max(0, rollout.total - len(outdated_ids(plan)) - coming)
