"""Who of those that wait is next: two levels of start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996). Pure.

1. Between priorities. A lower number is served first as long as it asks for less than `PRIORITY_SHARE` times what the
   next one gets; beyond that the lower priority gets one part in so many. Strict priorities would let whoever may set
   them starve the rest.
2. Between the tenants of one priority, in tokens, by weight. A tenant that has been away comes in at the present
   virtual time: it gets no credit for its absence, and waits for nobody's past.
3. Within a tenant the first due, then the first that came.

While two tenants both wait, what they get in tokens per weight differs by no more than the largest request of each
(Theorem 1 there). When nobody waits all is forgotten.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Generic, NamedTuple

from headrace_router.queue_ticket import Item, Ticket

PRIORITY_SHARE = 8.0
MOST_RANKS = 6  # beyond that many priorities that all wait, the last ones share alike
MOST_AWAY = 1024
"""Tenants remembered that are served ahead of their share and do not wait: names are cheap, memory is not."""


@dataclass(slots=True)
class _Flow(Generic[Item]):
    """One tenant's requests of one priority, by turn. A sorted list: at a thousand entries moving them costs less than
    a heap that must be searched for the last and for those whose client left."""

    weight: float
    start: float = 0.0  # virtual time at which its next request begins
    finish: float = 0.0  # and at which its last one ended
    tickets: list[Ticket[Item]] = field(default_factory=list)
    tokens: int = 0


@dataclass(slots=True)
class _Class(Generic[Item]):
    """One priority."""

    start: float = 0.0
    finish: float = 0.0
    virtual: float = 0.0
    count: int = 0
    flows: dict[str, _Flow[Item]] = field(default_factory=dict)


class Ahead(NamedTuple):
    """What a newcomer would have before it."""

    tokens: int  # of its own and of more urgent priorities, all tenants
    own_tokens: int  # of its own tenant, due earlier
    other_weight: float  # of the other tenants that wait there


class FairOrder(Generic[Item]):
    """Mutable. Each call costs O(tenants) and O(log requests), and moving the pointers of one tenant's requests."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """`weights` of tenants, 1 for those not named."""
        self._weights = weights
        self._classes: dict[int, _Class[Item]] = {}
        self._virtual = 0.0
        self._count = 0
        self._soonest_s = inf  # no deadline is before

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Ticket[Item]]:
        for one in self._classes.values():
            for flow in one.flows.values():
                yield from flow.tickets

    def weight(self, tenant: str) -> float:
        """Its part of what is served, relative to others."""
        return self._weights.get(tenant, 1.0)

    def add(self, ticket: Ticket[Item]) -> None:
        """Let it wait."""
        one = self._classes.setdefault(ticket.priority, _Class())
        flow = one.flows.get(ticket.tenant)
        if flow is None:
            flow = one.flows[ticket.tenant] = _Flow(self.weight(ticket.tenant))
        if not one.count:
            one.start = max(self._virtual, one.finish)
        if not flow.tickets:
            flow.start = max(one.virtual, flow.finish)
        insort(flow.tickets, ticket, key=_turn)
        flow.tokens += ticket.tokens
        one.count += 1
        self._count += 1
        self._soonest_s = min(self._soonest_s, ticket.deadline_s)

    def remove(self, ticket: Ticket[Item]) -> None:
        """It waits no longer, and was not served: nobody is charged."""
        one = self._classes[ticket.priority]
        flow = one.flows[ticket.tenant]
        del flow.tickets[bisect_left(flow.tickets, ticket.turn, key=_turn)]
        flow.tokens -= ticket.tokens
        one.count -= 1
        self._count -= 1
        if not self._count:
            self._classes.clear()
            self._virtual = 0.0
            self._soonest_s = inf

    def next(self) -> Ticket[Item] | None:
        """Whose turn it is. Reads only."""
        waiting = [(one.start, priority) for priority, one in self._classes.items() if one.count]
        if not waiting:
            return None
        flows = self._classes[min(waiting)[1]].flows.values()
        heads = [(flow.start, flow.tickets[0].number, flow.tickets[0]) for flow in flows if flow.tickets]
        return min(heads)[2]

    def serve(self, ticket: Ticket[Item]) -> None:
        """`ticket`, which `next` named, is served and charged to its tenant and priority."""
        one = self._classes[ticket.priority]
        flow = one.flows[ticket.tenant]
        self._virtual, one.virtual = one.start, flow.start
        before = sum(1 for other, rival in self._classes.items() if other < ticket.priority and rival.count)
        one.start = one.finish = one.start + ticket.tokens * PRIORITY_SHARE ** min(before, MOST_RANKS)
        flow.start = flow.finish = flow.start + ticket.tokens / flow.weight
        self._forget_idle(one)
        self.remove(ticket)

    def late(self, now_s: float) -> list[Ticket[Item]]:
        """Those whose deadline has passed. Looks at each only when the soonest deadline may have."""
        if now_s <= self._soonest_s:
            return []
        late = [ticket for ticket in self if ticket.deadline_s < now_s]
        self._soonest_s = min((one.deadline_s for one in self if one.deadline_s >= now_s), default=inf)
        return late

    def held(self) -> dict[str, int]:
        """Tokens that wait, of each tenant that waits."""
        held: dict[str, int] = {}
        for one in self._classes.values():
            for tenant, flow in one.flows.items():
                if flow.tickets:
                    held[tenant] = held.get(tenant, 0) + flow.tokens
        return held

    def backwards(self, tenant: str) -> Iterator[Ticket[Item]]:
        """Those of one tenant, the least urgent first."""
        for priority in sorted(self._classes, reverse=True):
            if flow := self._classes[priority].flows.get(tenant):
                yield from reversed(flow.tickets)

    def ahead(self, tenant: str, priority: int, due_s: float) -> Ahead:
        """What would be before a newcomer."""
        tokens, own, others = 0, 0, 0.0
        for rank, one in self._classes.items():
            if rank > priority:
                continue
            for name, flow in one.flows.items():
                tokens += flow.tokens
                if name != tenant:
                    others += flow.weight if flow.tickets else 0.0
                elif rank < priority:
                    own += flow.tokens
                else:
                    own += sum(one.tokens for one in flow.tickets if one.due_s <= due_s)
        return Ahead(tokens, own, others)

    def _forget_idle(self, served: _Class[Item]) -> None:
        """Who is away and owes nothing would come in at the present anyway."""
        away = [name for name, flow in served.flows.items() if not flow.tickets]
        for name in away:
            if len(away) > MOST_AWAY or served.flows[name].finish <= served.virtual:
                del served.flows[name]
        for priority, one in list(self._classes.items()):
            if not one.count and one.finish <= self._virtual:
                del self._classes[priority]

    def check_integrity(self) -> None:
        """Raise AssertionError unless counts and tokens add up, turns are in order and nobody is in the past."""
        assert all(ticket.deadline_s >= self._soonest_s for ticket in self), "a deadline was overlooked"
        assert self._count == sum(one.count for one in self._classes.values())
        for priority, one in self._classes.items():
            assert one.count == sum(len(flow.tickets) for flow in one.flows.values()), f"priority {priority}"
            assert not one.count or one.start >= self._virtual, f"priority {priority} is in the past"
            for tenant, flow in one.flows.items():
                tickets = flow.tickets
                assert flow.tokens == sum(ticket.tokens for ticket in tickets), f"{tenant}: tokens"
                assert tickets == sorted(tickets, key=_turn), f"{tenant}: out of turn"
                assert all(ticket.waiting for ticket in tickets), f"{tenant}: one waits no longer"
                assert all((ticket.tenant, ticket.priority) == (tenant, priority) for ticket in tickets)
                assert not tickets or flow.start >= one.virtual, f"{tenant} is in the past"


def _turn(ticket: Ticket[Item]) -> tuple[float, int]:
    return ticket.turn
