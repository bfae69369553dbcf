"""Policies: given a request and the replicas that could take it, which one, and why.

A policy reads candidates and returns one of them with its reason; it books nothing. What it carries from call to
call (a counter, a random stream) is its own and seeded, so a run replays exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from headrace_router.load_table import ReplicaLoad
from headrace_router.types import Request


class Policy(Protocol):
    """`choose` never mutates a candidate, and is only called with at least one."""

    name: str

    def choose(self, request: Request, candidates: Sequence[ReplicaLoad]) -> tuple[ReplicaLoad, str]:
        """Return the candidate and a short constant reason (it labels a metric)."""
        ...


class RoundRobin:
    """Each in turn."""

    name = "round_robin"

    def __init__(self, rng: Random) -> None:
        self._turn = 0

    def choose(self, request: Request, candidates: Sequence[ReplicaLoad]) -> tuple[ReplicaLoad, str]:
        chosen = candidates[self._turn % len(candidates)]
        self._turn += 1
        return chosen, "next in turn"


class RandomChoice:
    """Any, uniformly."""

    name = "random"

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, request: Request, candidates: Sequence[ReplicaLoad]) -> tuple[ReplicaLoad, str]:
        return candidates[int(self._rng.random() * len(candidates))], "drawn"


class LeastLoaded:
    """The fewest requests; ties are broken in turn, so that idle replicas share."""

    name = "least_loaded"

    def __init__(self, rng: Random) -> None:
        self._turn = 0

    def choose(self, request: Request, candidates: Sequence[ReplicaLoad]) -> tuple[ReplicaLoad, str]:
        count = len(candidates)
        start = self._turn % count
        self._turn += 1
        best = candidates[start]
        fewest = best.requests
        for offset in range(1, count):
            if fewest == 0:
                break
            candidate = candidates[(start + offset) % count]
            requests = candidate.requests
            if requests < fewest:
                best, fewest = candidate, requests
        return best, "fewest requests"


class PowerOfTwo:
    """The less loaded of two drawn at random (Mitzenmacher, 2001)."""

    name = "power_of_two"

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, request: Request, candidates: Sequence[ReplicaLoad]) -> tuple[ReplicaLoad, str]:
        count = len(candidates)
        if count == 1:
            return candidates[0], "the only one"
        first = int(self._rng.random() * count)
        second = int(self._rng.random() * (count - 1))
        if second >= first:
            second += 1
        one, other = candidates[first], candidates[second]
        return (one if one.requests <= other.requests else other), "less loaded of two"


POLICIES: dict[str, Callable[[Random], Policy]] = {
    policy.name: policy for policy in (RoundRobin, RandomChoice, LeastLoaded, PowerOfTwo)
}


def make_policy(name: str, seed: int) -> Policy:
    """Build a policy by name. Raises KeyError on an unknown one (the configuration has checked it)."""
    return POLICIES[name](Random(seed))
