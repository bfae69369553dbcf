"""Requests that wait in the gateway because every replica is saturated: who may wait, and for how long. Pure.

    offer ──> waiting ──take──> sent
      │          ├──expire──> its deadline passed
      │          └──cancel──> its client left
      └──> refused, or somebody else is evicted: queue full

Who is next: `queue_order`. Bounds: requests, bytes, and time. A request whose turn would come after its deadline is
refused at once, with the time after which it is worth trying again. When the queue is full, the tenant that holds the
largest weighted part of it loses its last request (longest-queue drop: Suter, Lakshman, Stiliadis, Choudhury, INFOCOM
1998), so that one tenant's flood cannot keep another out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from typing import Generic

from headrace_router.queue_order import FairOrder
from headrace_router.queue_pace import Pace
from headrace_router.queue_ticket import DEFAULT_LIMITS, Item, Offer, QueueLimits, Ticket

SHORTEST_RETRY_S, LONGEST_RETRY_S = 1.0, 600.0


class FairQueue(Generic[Item]):
    """Mutable; one event loop owns it. Times are seconds on one clock that never goes back.

    `take` and `offer` cost O(tenants + log requests), an `offer` to a full queue O(requests of one tenant). An empty
    queue is never touched by a request that finds a free replica, so light load pays nothing.
    """

    def __init__(
        self, limits: QueueLimits = DEFAULT_LIMITS, weights: Mapping[str, float] | None = None
    ) -> None:
        """`weights` of tenants, 1 for those not named. Raises ValueError where one is not above 0."""
        self.limits = limits
        for tenant, weight in (weights or {}).items():
            if not 0 < weight < inf:
                raise ValueError(f"the weight of tenant {tenant!r} must be above 0 and finite, got {weight}")
        self._order: FairOrder[Item] = FairOrder(dict(weights or {}))
        self._pace = Pace()
        self._number = 0
        self._bytes = 0
        self._tokens = 0
        self._late: list[Ticket[Item]] = []  # found too late by `take`, not yet told by `expire`

    def __len__(self) -> int:
        return len(self._order)

    @property
    def size_bytes(self) -> int:
        """Of everything that waits."""
        return self._bytes

    @property
    def tokens(self) -> int:
        """Of everything that waits."""
        return self._tokens

    def __iter__(self) -> Iterator[Ticket[Item]]:
        """Those that wait, in no particular order."""
        return iter(self._order)

    def waiting(self, tenant: str) -> int:
        """Requests of one tenant that wait."""
        return sum(1 for _ in self._order.backwards(tenant))

    def offer(
        self,
        item: Item,
        *,
        tenant: str = "",
        tokens: int,
        now_s: float,
        size_bytes: int = 0,
        priority: int = 0,
        deadline_s: float | None = None,
        max_wait_s: float | None = None,
    ) -> Offer[Item]:
        """Let a request wait, if it may. Whoever is `evicted` for it no longer waits.

        `max_wait_s`: how long this one may wait, where that is not what the limits say (a replica only starts). Its
        turn comes no later for it.
        """
        self._drop_late(now_s)
        limits = self.limits
        if size_bytes > limits.max_bytes:
            return Offer(None, f"a body of {size_bytes} bytes exceeds the queue's {limits.max_bytes}")
        latest_s = now_s + (limits.max_wait_s if max_wait_s is None else max_wait_s)
        deadline_s = latest_s if deadline_s is None else min(deadline_s, latest_s)
        due_s = min(deadline_s, now_s + limits.max_wait_s)
        wait_s = self.predicted_wait_s(tenant, priority, due_s, now_s)
        if now_s + wait_s > deadline_s:
            return Offer(
                None,
                f"its turn would come in {wait_s:.1f} s, its deadline is in {deadline_s - now_s:.1f} s",
                _bounded(now_s + wait_s - deadline_s),
                is_late=True,
            )
        self._number += 1
        ticket = Ticket(
            item,
            tenant,
            priority,
            max(1, tokens),
            size_bytes,
            now_s,
            deadline_s,
            due_s,
            self._number,
            waiting=False,
        )
        evicted = self._victims(ticket)
        if evicted is None:
            return Offer(
                None,
                f"the queue is full ({len(self)} of {limits.max_requests} requests, {self._bytes} of "
                f"{limits.max_bytes} bytes) and nobody holds more of it than tenant {tenant!r}",
                self.room_after_s(size_bytes, now_s),
            )
        for victim in evicted:
            self._leave(victim)
        if not len(self):
            self._pace.begin(now_s)
        ticket.waiting = True
        self._order.add(ticket)
        self._bytes += ticket.size_bytes
        self._tokens += ticket.tokens
        return Offer(ticket, evicted=tuple(evicted))

    def peek(self, now_s: float) -> Ticket[Item] | None:
        """The next whose deadline has not passed, without taking it. Those passed over are for `expire`."""
        self._drop_late(now_s)
        return self._order.next()

    def take(self, now_s: float) -> Ticket[Item] | None:
        """The next whose deadline has not passed, None where nobody waits. Those passed over are for `expire`."""
        ticket = self.peek(now_s)
        if ticket is not None:
            self._order.serve(ticket)
            self._gone(ticket)
            self._pace.taken(ticket.tokens, now_s)
        return ticket

    def cancel(self, ticket: Ticket[Item]) -> bool:
        """Its client left. Whether it still waited. Always safe."""
        if not ticket.waiting:
            return False
        self._leave(ticket)
        return True

    def expire(self, now_s: float) -> list[Ticket[Item]]:
        """Those whose deadline has passed, each told once; they no longer wait."""
        self._drop_late(now_s)
        late, self._late = self._late, []
        return late

    def predicted_wait_s(self, tenant: str, priority: int, due_s: float, now_s: float) -> float:
        """Until a request of this tenant, due then, would be taken, by the present pace and its fair share of it.

        0 while nothing has been taken yet: what is not known refuses nobody. How large it is itself does not matter:
        requests are ordered by where they start.
        """
        pace = self._pace.tokens_per_s(now_s)
        if pace <= 0 or not len(self):
            return 0.0
        ahead = self._order.ahead(tenant, priority, due_s)
        mine = self._order.weight(tenant)
        # Nobody waits for more than everything, nor longer than its own share of the pace needs for its own.
        return min(ahead.tokens, ahead.own_tokens * (1 + ahead.other_weight / mine)) / pace

    def room_after_s(self, size_bytes: int, now_s: float) -> float:
        """When the full queue will have room again, by the pace of the last seconds and as many tokens as its requests
        have on average; the bound on waiting where nothing has moved."""
        pace = self._pace.tokens_per_s(now_s)
        if not pace:
            return _bounded(self.limits.max_wait_s)
        over_bytes = self._bytes + size_bytes - self.limits.max_bytes
        part = max(1 / max(1, len(self)), over_bytes / max(1, self._bytes))
        return _bounded(min(self.limits.max_wait_s, part * self._tokens / pace))

    def check_integrity(self) -> None:
        """Raise AssertionError unless counts, bytes and tokens add up and are within bounds."""
        self._order.check_integrity()
        tickets = list(self._order)
        assert len(self) == len(tickets) <= self.limits.max_requests, (
            f"{len(self)} counted, {len(tickets)} wait"
        )
        assert self._bytes == sum(ticket.size_bytes for ticket in tickets) <= self.limits.max_bytes
        assert self._tokens == sum(ticket.tokens for ticket in tickets)
        assert not any(ticket.waiting for ticket in self._late)

    # --- inside

    def _leave(self, ticket: Ticket[Item]) -> None:
        self._order.remove(ticket)
        self._gone(ticket)

    def _gone(self, ticket: Ticket[Item]) -> None:
        ticket.waiting = False
        self._bytes -= ticket.size_bytes
        self._tokens -= ticket.tokens

    def _drop_late(self, now_s: float) -> None:
        for ticket in self._order.late(now_s):
            self._leave(ticket)
            self._late.append(ticket)

    def _victims(self, newcomer: Ticket[Item]) -> list[Ticket[Item]] | None:
        """Who has to go so that there is room: each the last of whoever then holds the most for its weight, of the
        newcomer's own tenant only what is less urgent. None where there is nobody."""
        count, held_bytes = len(self) + 1, self._bytes + newcomer.size_bytes
        victims: list[Ticket[Item]] = []
        if count <= self.limits.max_requests and held_bytes <= self.limits.max_bytes:
            return victims
        order = self._order
        share = {tenant: tokens / order.weight(tenant) for tenant, tokens in order.held().items()}
        share[newcomer.tenant] = share.get(newcomer.tenant, 0.0) + newcomer.tokens / order.weight(
            newcomer.tenant
        )
        last = {tenant: order.backwards(tenant) for tenant in share}
        while count > self.limits.max_requests or held_bytes > self.limits.max_bytes:
            # Among equals the newcomer gives way: a queue that changes for nothing serves nobody.
            largest = max(share, key=lambda name: (share[name], name == newcomer.tenant, name))
            victim = next(last[largest], None)
            if victim is None or (largest == newcomer.tenant and victim.priority <= newcomer.priority):
                return None
            share[largest] -= victim.tokens / order.weight(largest)
            victims.append(victim)
            count -= 1
            held_bytes -= victim.size_bytes
        return victims


def _bounded(seconds: float) -> float:
    return min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, seconds))
