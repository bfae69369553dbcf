"""Policies that keep together what belongs together, and let go when a replica has too much."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from random import Random

from headrace_router.policies.load_only import fewest_requests
from headrace_router.replica_load import ReplicaLoad
from headrace_router.types import Request
from headrace_router.view import Decision, View

POINTS = 64  # per replica on the ring


class SessionAffinity:
    """Consistent hashing of the session (Karger et al., 1997); a request without one goes where least runs.

    A replica that leaves gives its sessions to its neighbours on the ring, a replica that returns gets them back.
    """

    name = "session_affinity"
    reads_prefixes = False

    def __init__(self, rng: Random) -> None:
        self._turn = 0
        self._ring: list[tuple[int, str]] = []
        self._on_ring: set[str] = set()
        self._loads: Sequence[ReplicaLoad] = ()
        self._by_id: dict[str, ReplicaLoad] = {}

    def choose(self, request: Request, view: View) -> Decision:
        if request.session is None:
            self._turn += 1
            return Decision(fewest_requests(view.loads, self._turn), "no session, fewest requests")
        if view.loads is not self._loads:
            self._take(view.loads)
        ring, by_id = self._ring, self._by_id
        at = bisect_right(ring, (_point(request.session), ""))
        for step in range(len(ring)):
            load = by_id.get(ring[(at + step) % len(ring)][1])
            if load is not None:
                return Decision(load, "session's place")
        raise AssertionError("every candidate is on the ring")

    def _take(self, loads: Sequence[ReplicaLoad]) -> None:
        """Point the ring at these candidates. Replicas that are only away stay on it, which moves nobody else."""
        self._loads = loads
        self._by_id = {load.replica.id: load for load in loads}
        if not self._by_id.keys() <= self._on_ring:
            self._on_ring = self._on_ring | self._by_id.keys()
        elif len(self._on_ring) > 2 * len(loads) + 16:
            self._on_ring = set(self._by_id)
        elif self._ring:
            return
        self._ring = sorted((_point(f"{name}/{i}"), name) for name in self._on_ring for i in range(POINTS))


def _point(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


class PrefixAffinity:
    """sglang-router's cache_aware: the longest prefix if it is long enough and loads are balanced.

    More than 64 requests and 1.5 times apart, loads are out of balance and decide alone; otherwise a prefix that
    covers more than 0.3 of the prompt does. Constants and rule: sgl-model-gateway, `policies/cache_aware.rs`.
    """

    name = "prefix_affinity"
    reads_prefixes = True
    threshold = 0.3
    apart = 64
    times_apart = 1.5

    def __init__(self, rng: Random) -> None:
        self._turn = 0

    def choose(self, request: Request, view: View) -> Decision:
        loads = view.loads
        self._turn += 1
        counts = [load.requests for load in loads]
        most, fewest = max(counts), min(counts)
        hits = view.hit_tokens()
        if most - fewest > self.apart and most > self.times_apart * fewest:
            return _with_hit(fewest_requests(loads, self._turn), "loads out of balance", view, hits)
        if hits is not None and (longest := max(hits)) > self.threshold * request.size_tokens:
            return Decision(
                loads[hits.index(longest)], "longest prefix", longest, candidates=loads, hits=hits
            )
        return _with_hit(fewest_requests(loads, self._turn), "no long prefix, fewest requests", view, hits)


class StickyUntilSaturated:
    """llm-d's: the longest prefix among the replicas that are not saturated, and least load where nobody has any.

    Saturated: more than 5 requests wait or more than 0.8 of the KV cache is in use (the defaults of
    gateway-api-inference-extension's saturation detector).
    """

    name = "sticky_until_saturated"
    reads_prefixes = True
    most_waiting = 5
    most_kv_use = 0.8

    def __init__(self, rng: Random) -> None:
        self._turn = 0

    def choose(self, request: Request, view: View) -> Decision:
        loads = view.loads
        self._turn += 1
        hits = view.hit_tokens()
        open_ = [
            index
            for index, load in enumerate(loads)
            if load.waiting + load.unreported <= self.most_waiting and load.kv_use <= self.most_kv_use
        ]
        if not open_:
            return _with_hit(fewest_requests(loads, self._turn), "all saturated, fewest requests", view, hits)
        if hits is not None and (longest := max([hits[index] for index in open_])) > 0:
            held = [loads[index] for index in open_ if hits[index] == longest]
            chosen = fewest_requests(held, self._turn)
            return Decision(chosen, "longest prefix not saturated", longest, candidates=loads, hits=hits)
        chosen = fewest_requests([loads[index] for index in open_], self._turn)
        return Decision(chosen, "no prefix, fewest requests", 0, candidates=loads, hits=hits)


def _with_hit(load: ReplicaLoad, reason: str, view: View, hits: list[int] | None) -> Decision:
    """The decision for `load`, whatever it happens to hold of the prompt."""
    hit = 0 if hits is None or view.hits is None else int(view.hits.tokens[load.slot])
    return Decision(load, reason, hit, candidates=view.loads, hits=hits)
