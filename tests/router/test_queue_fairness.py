"""What a small tenant gets beside one that sends ten times more. Virtual time: replicas are numbers in a heap."""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf
from random import Random
from typing import NamedTuple

import pytest

from headrace_router.fair_queue import FairQueue
from headrace_router.queue_ticket import QueueLimits

REPLICA_TOKENS_PER_S = 2000.0
SECONDS = 400.0
LIMITS = QueueLimits(max_requests=256, max_wait_s=30.0)


class Sent(NamedTuple):
    """One request of a trace."""

    at_s: float
    tenant: str
    tokens: int


class Fate(NamedTuple):
    """What became of one tenant's requests."""

    ttft_s: list[float]
    tokens: int  # served
    refused: int

    @property
    def p90_s(self) -> float:
        return sorted(self.ttft_s)[int(0.9 * len(self.ttft_s))]


def trace(rng: Random, tenant: str, tokens_per_s: float) -> list[Sent]:
    """Poisson arrivals of prompts between 100 and 4,000 tokens."""
    sent, at_s = [], 0.0
    while True:
        at_s += rng.expovariate(tokens_per_s / 1000.0)
        if at_s > SECONDS:
            return sent
        sent.append(Sent(at_s, tenant, min(4000, max(100, int(rng.lognormvariate(6.6, 0.8))))))


def run(sent: list[Sent], replicas: int, weights: dict[str, float] | None = None) -> dict[str, Fate]:
    """Each replica computes one prompt after the other; whoever finds none free waits in the queue."""
    queue: FairQueue[Sent] = FairQueue(LIMITS, weights)
    fates = {one.tenant: [] for one in sent}
    tokens, refused = dict.fromkeys(fates, 0), dict.fromkeys(fates, 0)
    busy: list[float] = []  # when each replica that computes comes free
    arrivals = iter(sorted(sent))
    coming = next(arrivals, None)

    def begin(one: Sent, now_s: float) -> None:
        tokens[one.tenant] += one.tokens
        heappush(busy, now_s + one.tokens / REPLICA_TOKENS_PER_S)
        fates[one.tenant].append(now_s + one.tokens / REPLICA_TOKENS_PER_S - one.at_s)

    while coming is not None or len(queue):
        free_s = busy[0] if busy else inf
        if coming is not None and coming.at_s < free_s:
            now_s = coming.at_s
            if len(busy) < replicas:
                begin(coming, now_s)
            else:
                offer = queue.offer(coming, tenant=coming.tenant, tokens=coming.tokens, now_s=now_s)
                refused[coming.tenant] += offer.ticket is None
                for victim in offer.evicted:
                    refused[victim.tenant] += 1
            coming = next(arrivals, None)
        else:
            now_s = heappop(busy)
        for ticket in queue.expire(now_s):
            refused[ticket.tenant] += 1
        while len(busy) < replicas and (ticket := queue.take(now_s)) is not None:
            begin(ticket.item, now_s)
    return {tenant: Fate(ttft_s, tokens[tenant], refused[tenant]) for tenant, ttft_s in fates.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("load", [0.3, 0.6, 0.85, 1.0, 1.3])
def test_a_tenant_that_sends_ten_times_more_does_not_slow_the_smaller_one(load: float, seed: int) -> None:
    """`load`: what the smaller one sends, in parts of its fair share: half of eight replicas. From 1.0 on both saturate
    whatever they are given."""
    rng = Random(seed)
    share = 4 * REPLICA_TOKENS_PER_S
    small = trace(rng, "small", load * share)
    big = trace(rng, "big", 10 * max(load, 0.3) * share)
    alone = run(small, replicas=4)["small"]
    both = run(small + big, replicas=8)
    print(
        f"load {load} seed {seed}: p90 {both['small'].p90_s:.2f} s, alone {alone.p90_s:.2f} s; "
        f"refused {both['small'].refused}, alone {alone.refused}, the big one {both['big'].refused}"
    )
    assert both["small"].p90_s <= 1.5 * alone.p90_s
    assert both["small"].refused <= alone.refused + 0.01 * len(small)
    assert both["big"].refused > 0.3 * len(big), "the flood is held out"


def test_the_flood_still_gets_its_own_half() -> None:
    rng = Random(5)
    share = 4 * REPLICA_TOKENS_PER_S
    both = run(trace(rng, "small", 1.3 * share) + trace(rng, "big", 13 * share), replicas=8)
    assert both["big"].tokens == pytest.approx(both["small"].tokens, rel=0.1)


def test_a_flood_of_a_tenant_of_little_weight_gets_little() -> None:
    rng = Random(6)
    share = 4 * REPLICA_TOKENS_PER_S
    sent = trace(rng, "small", 3 * share) + trace(rng, "big", 13 * share)
    both = run(sent, replicas=8, weights={"small": 3.0})
    assert both["small"].tokens == pytest.approx(3 * both["big"].tokens, rel=0.1)
