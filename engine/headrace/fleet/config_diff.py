"""What differs between two configurations, and the least that the difference needs. Pure.

    counts, autoscaling        the controller's target; nobody restarts
    models[], pools[], engine  the replicas of the pools that are made otherwise now, one after another
    gateway, limits, policy    taken over while it serves
    fleet.name, gateway.host   refused: they are fixed for as long as a fleet serves

Which pools are replaced is asked of `specs`, which says how a replica is made, not of a list of keys: a key that is
added there counts at once. Keys are read for the words only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.config import Config, Model, Pool
from headrace.fleet.pools import PoolKey
from headrace.fleet.specs import ReplicaSpec, template

FIXED = {
    "fleet.name": "end this fleet and start one of that name with `headrace serve`",
    "gateway.host": "end the fleet and `headrace serve` it anew to listen elsewhere",
    "gateway.port": "end the fleet and `headrace serve` it anew to listen elsewhere",
    "gateway.processes": "end the fleet and `headrace serve` it anew with so many",
}
"""Keys that cannot change while a fleet serves, and what to do instead."""

OF_EVERY_REPLICA = frozenset({"fleet.report_interval_s", "fleet.ports"})
"""Keys outside `models` that replicas are made with."""

SECRET = frozenset({"api_key"})
"""Keys whose values are not printed."""


@dataclass(frozen=True, slots=True)
class Change:
    """One key and its two values, as people read them. A key that is missing on one side has `-` there."""

    path: tuple[str, ...]  # models go by their name and pools by their role
    old: str
    new: str

    @property
    def key(self) -> str:
        return ".".join(self.path)

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


@dataclass(frozen=True, slots=True)
class ConfigDiff:
    """All differences, by what they need."""

    refused: tuple[Change, ...] = ()
    live: tuple[Change, ...] = ()  # of the gateway, and how the fleet is run
    resized: tuple[tuple[PoolKey, tuple[Change, ...]], ...] = ()  # how many replicas, not which
    replaced: tuple[tuple[PoolKey, tuple[Change, ...]], ...] = ()  # replicas are made otherwise
    added: tuple[PoolKey, ...] = ()
    removed: tuple[PoolKey, ...] = ()
    external: tuple[Change, ...] = ()  # servers that somebody else runs

    @property
    def is_empty(self) -> bool:
        return self == ConfigDiff()

    @property
    def rolls(self) -> frozenset[PoolKey]:
        """Pools of which replicas end, start or are replaced, whatever their number."""
        return frozenset((*(key for key, _ in self.replaced), *self.added, *self.removed))


def diff(old: Config, new: Config, *, num_gpus: int) -> ConfigDiff:
    """From one configuration to another, on a cluster with so many GPUs (`device: auto` asks)."""
    changes = tuple(_changes(_tree(old), _tree(new)))
    before, after = pools(old), pools(new)
    of_all = tuple(change for change in changes if change.key in OF_EVERY_REPLICA)
    is_elsewhere = bool(before.keys() & after.keys())
    own = [
        change for change in changes if change.path[0] != "models" and not (is_elsewhere and change in of_all)
    ]
    external = {model.name for config in (old, new) for model in config.models if model.backend == "external"}
    resized, replaced = [], []
    for key in [key for key in before if key in after]:
        of_pool = tuple(change for change in changes if _concerns(change, key))
        if made_as(old, key, num_gpus) != made_as(new, key, num_gpus):
            replaced.append((key, (*of_pool, *of_all)))
        elif of_pool:
            resized.append((key, of_pool))
    return ConfigDiff(
        refused=tuple(change for change in own if change.key in FIXED),
        live=tuple(change for change in own if change.key not in FIXED),
        resized=tuple(resized),
        replaced=tuple(replaced),
        added=tuple(key for key in after if key not in before),
        removed=tuple(key for key in before if key not in after),
        external=tuple(
            change for change in changes if change.path[0] == "models" and change.path[1] in external
        ),
    )


def lines(found: ConfigDiff) -> list[str]:
    """What is going to be done, for people. Empty where nothing is."""
    told = [f"live      {change}" for change in (*found.live, *found.external)]
    told += [f"end       {key}: its replicas drain and go" for key in found.removed]
    told += [f"start     {key}: a new pool" for key in found.added]
    for verb, changed in (("resize", found.resized), ("replace", found.replaced)):
        told += [f"{verb:<9} {key}: {change}" for key, changes in changed for change in changes]
    return told


def pools(config: Config) -> dict[PoolKey, tuple[Model, Pool]]:
    """Every pool whose replicas this fleet starts, in the order of the configuration."""
    return {
        PoolKey(model.name, pool.role): (model, pool)
        for model in config.models
        if model.backend != "external"
        for pool in model.pools
    }


def made_as(config: Config, key: PoolKey, num_gpus: int) -> ReplicaSpec:
    """How the replicas of a pool are made: a spec without an id. Raises KeyError where there is no such pool."""
    model, pool = pools(config)[key]
    return template(model, pool, num_gpus, config.fleet)


def _concerns(change: Change, key: PoolKey) -> bool:
    """A key of the pool itself, or of its model and none of its pools'."""
    match change.path:
        case ("models", model, "pools", role, *_):
            return (model, role) == (key.model, key.role.value)
        case ("models", model, _, *_):
            return model == key.model
    return False


def _tree(config: Config) -> dict[str, Any]:
    """As nested mappings in which models go by their name and pools by their role: their order means nothing."""
    tree = config.model_dump(mode="json")
    tree["models"] = {
        model["name"]: {
            **{name: value for name, value in model.items() if name != "name"},
            "pools": {pool["role"]: pool for pool in model["pools"]},
        }
        for model in tree["models"]
    }
    return tree


def _changes(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[Change]:
    """Leaves that differ, by dotted key, in the order of the old tree and then of what is new."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in (*old, *(name for name in new if name not in old)):
            yield from _changes(old.get(name, MISSING), new.get(name, MISSING), (*path, str(name)))
    elif old != new or type(old) is not type(new):
        if old is MISSING and isinstance(new, Mapping):
            yield Change(path, "-", "added")
        elif new is MISSING and isinstance(old, Mapping):
            yield Change(path, "removed", "-")
        else:
            yield Change(path, _shown(old, path), _shown(new, path))


class _Missing:
    """A key that one side has not got; no value of YAML equals it."""


MISSING = _Missing()


def _shown(value: Any, path: tuple[str, ...]) -> str:
    if value is MISSING:
        return "-"
    if path[-1] in SECRET and value is not None:
        return "(secret)"
    return str(value) if len(str(value)) <= 60 else str(value)[:57] + "..."
