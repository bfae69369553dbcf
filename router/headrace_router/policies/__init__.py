"""Policies: given a request and a view of the replicas that could take it, which one, and why.

`delay` is ours; the others are what the field uses, behind the same protocol, for comparison and as fallback.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from headrace_router.policies.affinity import PrefixAffinity, SessionAffinity, StickyUntilSaturated
from headrace_router.policies.blends import BlockCost, KvBlend
from headrace_router.policies.delay import Delay
from headrace_router.policies.load_only import LeastLoaded, PowerOfTwo, RandomChoice, RoundRobin
from headrace_router.view import Policy

__all__ = ["POLICIES", "Policy", "make_policy"]

POLICIES: dict[str, Callable[[Random], Policy]] = {
    "delay": Delay,
    "round_robin": RoundRobin,
    "random": RandomChoice,
    "least_loaded": LeastLoaded,
    "power_of_two": PowerOfTwo,
    "session_affinity": SessionAffinity,
    "prefix_affinity": PrefixAffinity,
    "sticky_until_saturated": StickyUntilSaturated,
    "kv_blend": KvBlend,
    "block_cost": BlockCost,
}


def make_policy(name: str, seed: int) -> Policy:
    """Build a policy by name. Raises KeyError on an unknown one (the configuration has checked it)."""
    return POLICIES[name](Random(seed))
