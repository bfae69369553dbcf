"""Pools by name: the replicas of one model in one role."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from headrace.errors import NotFound
from headrace_router.types import Role


class PoolKey(NamedTuple):
    """Which pool."""

    model: str
    role: Role

    def __str__(self) -> str:
        """`smollm2`, or `smollm2/prefill` where the role is not the usual one. `named` reads it back."""
        return self.model if self.role is Role.UNIFIED else f"{self.model}/{self.role.value}"


def named(name: str, pools: Collection[PoolKey]) -> PoolKey:
    """The pool that a person means by `model` or `model/role`. Raises NotFound, naming those that there are."""
    per_model = Counter(pool.model for pool in pools)
    for pool in pools:
        if name in (str(pool), f"{pool.model}/{pool.role.value}"):
            return pool
    for pool in pools:
        if name == pool.model and per_model[pool.model] == 1:
            return pool
    known = ", ".join(sorted(map(str, pools))) or "none"
    raise NotFound(f"no pool {name!r}; the pools of this fleet: {known}")
