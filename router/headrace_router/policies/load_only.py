"""Policies that look at loads only, or at nothing."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from headrace_router.replica_load import ReplicaLoad
from headrace_router.types import Request
from headrace_router.view import Decision, View


def fewest_requests(loads: Sequence[ReplicaLoad], turn: int) -> ReplicaLoad:
    """The load with the fewest requests; ties are broken from `turn` on, so that idle replicas share."""
    count = len(loads)
    start = turn % count
    best = loads[start]
    fewest = best.requests
    for offset in range(1, count):
        if fewest == 0:
            break
        load = loads[(start + offset) % count]
        requests = load.requests
        if requests < fewest:
            best, fewest = load, requests
    return best


class RoundRobin:
    """Each in turn."""

    name = "round_robin"
    reads_prefixes = False

    def __init__(self, rng: Random) -> None:
        self._turn = 0

    def choose(self, request: Request, view: View) -> Decision:
        loads = view.loads
        chosen = loads[self._turn % len(loads)]
        self._turn += 1
        return Decision(chosen, "next in turn")


class RandomChoice:
    """Any, uniformly."""

    name = "random"
    reads_prefixes = False

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, request: Request, view: View) -> Decision:
        loads = view.loads
        return Decision(loads[int(self._rng.random() * len(loads))], "drawn")


class LeastLoaded:
    """The fewest requests; ties are broken in turn, so that idle replicas share."""

    name = "least_loaded"
    reads_prefixes = False

    def __init__(self, rng: Random) -> None:
        self._turn = 0

    def choose(self, request: Request, view: View) -> Decision:
        chosen = fewest_requests(view.loads, self._turn)
        self._turn += 1
        return Decision(chosen, "fewest requests")


class PowerOfTwo:
    """The less loaded of two drawn at random (Mitzenmacher, 2001)."""

    name = "power_of_two"
    reads_prefixes = False

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, request: Request, view: View) -> Decision:
        loads = view.loads
        count = len(loads)
        if count == 1:
            return Decision(loads[0], "the only one")
        first = int(self._rng.random() * count)
        second = int(self._rng.random() * (count - 1))
        if second >= first:
            second += 1
        one, other = loads[first], loads[second]
        return Decision(one if one.requests <= other.requests else other, "less loaded of two")
