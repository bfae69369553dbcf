"""The default: the replica on which the request costs the least time, its own and everybody else's.

    cost = wait + uncached · s · (1 + running / (1 + running / 12) + queued)
    wait = the longest of: backlog · s, the time until the KV cache has room, and until the batch has a place

`s` is the replica's seconds per prefill token, learned from its own steps. The bracket is whom this prefill costs
time. Itself. Requests that run there, which decode more slowly meanwhile: in full while they are few, at most as
twelve, or a long prompt would wait for half a minute rather than slow sixty streams down. Requests in the queue: it
is served in order, so those in it lose nothing, but as many as now wait will come while this one waits (Little's law),
and each of them waits for all of it. Under overload, where waits are long everywhere, this is what keeps long prompts
out of the queues of many short ones, and prefixes together.

There is nothing to tune: 8 and 16 instead of 12 stay best of all policies in mean TTFT and within 4% in end-to-end
time in every cell of the study that was tried with them (`headrace_bench.policy_study`, Mooncake's conversations). A
constant 0.3 for each that runs has nearly twice the mean TTFT where 64 replicas are overloaded. A queue counted like
what runs loses a quarter of mean TTFT under overload. A hot prefix spreads by itself: when waiting behind it costs
more than prefilling elsewhere, it is prefilled elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from headrace_router.types import Request
from headrace_router.view import Decision, Hits, View

MOST_RUNNING = 12.0  # as so many those that run count at most, however many they are
TIE = 1.02
TIE_S = 1e-4
"""Costs this close are equal: the longest prefix among them wins."""
ALIKE = 1.1
"""Costs this close are equal between replicas that hold as much of the prompt: they take turns. Equal replicas learn
paces that differ by 6% (`headrace_bench.real_policies`, two cores of one machine); were the quicker always taken, every
conversation would begin there, and stay."""

ONLY = "the only one"
HIT = "longest prefix"
BUSY = "longest prefix is busy"
LOAD = "least delay"


class Delay:
    """Least predicted delay; among equals the longest prefix, then those alike in turn."""

    name = "delay"
    reads_prefixes = True

    def __init__(self, rng: Random) -> None:
        self._turn = 0

    def choose(self, request: Request, view: View) -> Decision:
        counted = request.prompt_tokens  # `size_tokens`, without the call
        tokens = counted if counted is not None else (request.prompt_bytes >> 2) + 1
        if view.columns is not None:
            return self._choose_wide(tokens, view)
        loads = view.loads
        hits = view.hit_tokens() if view.hits is not None else None
        work: Sequence[float] = [tokens] * len(loads) if hits is None else _work(tokens, hits, view)
        costs = []
        for load, uncached in zip(loads, work, strict=True):
            wait_s = load.turn_s
            room = load.room_tokens
            if tokens > room and (room_s := (tokens - room) * load.memory_token_s) > wait_s:
                wait_s = room_s
            queued = load.queued
            running = load.requests - queued
            others = queued + running * MOST_RUNNING / (running + MOST_RUNNING)
            costs.append(wait_s + uncached * (load.token_s * (1 + others)))
        return self._decide(view, costs, hits)

    def _decide(self, view: View, costs: list[float], hits: list[int] | None) -> Decision:
        loads = view.loads
        least = min(costs)
        alike = least * ALIKE + TIE_S
        near = [index for index, cost in enumerate(costs) if cost <= alike]
        if hits is not None and len(near) > 1:
            bound = least * TIE + TIE_S
            longest = max([hits[index] for index in near if costs[index] <= bound])
            near = [index for index in near if hits[index] == longest]
        if len(near) > 1:
            self._turn += 1
            at = near[self._turn % len(near)]
        else:
            at = near[0]
        if hits is None:
            return Decision(loads[at], LOAD if len(costs) > 1 else ONLY, 0, costs[at], loads, costs, None)
        hit = hits[at]
        reason = ONLY if len(costs) == 1 else HIT if hit == max(hits) else BUSY
        return Decision(loads[at], reason, hit, costs[at], loads, costs, hits)

    def _choose_wide(self, tokens: int, view: View) -> Decision:
        """The same over arrays, for fleets where the loop would take longer than the rest of the decision."""
        columns, loads = view.columns, view.loads
        assert columns is not None
        wait_s = columns.turn_s
        room = columns.room_tokens
        if tokens > room.min():
            wait_s = np.maximum(wait_s, (tokens - room) * columns.memory_token_s)
        running = columns.requests - columns.queued
        others = columns.queued + running * MOST_RUNNING / (running + MOST_RUNNING)
        price_s = columns.token_s * (1 + others)
        if view.hits is None:
            hits, longest = None, 0
            costs = wait_s + price_s * tokens
        else:
            slots = view.candidate_slots()
            hits = view.hits.tokens[slots]
            longest = int(hits.max())
            uncached = tokens - hits
            if view.hits.slow_tokens is not None:
                uncached = uncached + SLOW_TIER * view.hits.slow_tokens[slots]
            costs = wait_s + price_s * uncached
        least = float(costs.min())
        near = np.flatnonzero(costs <= least * ALIKE + TIE_S)
        if near.size > 1:
            if hits is not None and longest:
                held = hits[near]
                near = near[held == held[costs[near] <= least * TIE + TIE_S].max()]
            self._turn += 1
            at = int(near[self._turn % near.size])
        else:
            at = int(near[0])
        hit = 0 if hits is None else int(hits[at])
        reason = ONLY if len(loads) == 1 else LOAD if not longest else HIT if hit == longest else BUSY
        return Decision(loads[at], reason, hit, float(costs[at]), loads, costs, hits)


SLOW_TIER = 0.1
"""Of computing a token, what loading it from the CPU tier costs: PCIe moves tens of times more tokens per second than
prefill computes, and the copy overlaps with other requests' steps."""


def _work(tokens: int, hits: Sequence[int], view: View) -> list[float]:
    """Tokens to compute on each candidate; those of a CPU tier count for what loading them costs."""
    found: Hits | None = view.hits
    if found is None or found.slow_tokens is None:
        return [tokens - hit for hit in hits]
    slow = found.slow_tokens[view.candidate_slots()].tolist()
    return [tokens - hit + SLOW_TIER * late for hit, late in zip(hits, slow, strict=True)]
