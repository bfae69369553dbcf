"""Those who wait for one model: who is next, and how long each may still wait. Effects are the caller's (`admission`).

    newcomers ── fair queue (priority, share of the tenant, deadline) ──┐
    returned  ── in the order of coming ── first ───────────────────────┴─> next

A request that comes back because its replica failed has had its turn and its tenant has paid for it, so it goes before
those that have not, and is never refused or evicted: its body was held all along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from headrace.errors import HeadraceError
from headrace_router.fair_queue import FairQueue
from headrace_router.queue_ticket import Offer, QueueLimits, Ticket
from headrace_router.types import ReplicaId, Request

OTHERS = "others"
MOST_UNKNOWN = 256
"""Tenants that no configuration names and that wait at one time by their own names; the rest share one. So invented
names neither fill memory nor each get a share of their own for ever."""


class Waiter(Protocol):
    """The exchange, as those know it who let it wait."""

    def let_in(self, avoid: frozenset[ReplicaId]) -> None:
        """A replica has room: choose and send, if possible to none of `avoid`. Never raises."""
        ...

    def fail(self, error: HeadraceError) -> None:
        """It waits no longer, and in vain. Never raises."""
        ...


@dataclass(slots=True, eq=False)
class Held:
    """One request that waits. Its waiter reads it; only the line and `admission` write."""

    waiter: Waiter
    request: Request
    tenant: str
    size_bytes: int
    tokens: int  # prompt and expected answer
    since_s: float
    deadline_s: float
    ticket: Ticket[Held] | None = None  # None: it returned
    waiting: bool = True


class WaitingLine:
    """Of one model. Made when somebody must wait, thrown away when nobody does."""

    def __init__(self, limits: QueueLimits, weights: Mapping[str, float]) -> None:
        """`weights` of the configured tenants."""
        self.fair: FairQueue[Held] = FairQueue(limits, weights)
        self.returned: list[Held] = []
        self._configured: Collection[str] = weights
        self._unknown: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.fair) + len(self.returned)

    def __iter__(self) -> Iterator[Held]:
        yield from self.returned
        for ticket in self.fair:
            yield ticket.item

    def name(self, tenant: str) -> str:
        """The name under which this tenant waits here: its own as long as there are not too many."""
        if tenant in self._configured or tenant in self._unknown or len(self._unknown) < MOST_UNKNOWN:
            return tenant
        return OTHERS

    def join(self, held: Held, now_s: float, max_wait_s: float) -> Offer[Held]:
        """A newcomer, which may wait so long. Those in `evicted` no longer wait."""
        offer = self.fair.offer(
            held,
            tenant=held.tenant,
            tokens=held.tokens,
            now_s=now_s,
            size_bytes=held.size_bytes,
            priority=held.request.priority,
            deadline_s=held.deadline_s,
            max_wait_s=max_wait_s,
        )
        for victim in offer.evicted:
            self._gone(victim.item)
        if offer.ticket is None:
            held.waiting = False
        else:
            held.ticket, held.deadline_s = offer.ticket, offer.ticket.deadline_s
            self._came(held)
        return offer

    def rejoin(self, held: Held) -> None:
        """One that has had its turn."""
        self.returned.append(held)
        self._came(held)

    def take(self, held: Held, now_s: float) -> None:
        """It is let in: one of `returned`, or the item that `fair.peek` named."""
        if held.ticket is None:
            self.returned.remove(held)
        else:
            taken = self.fair.take(now_s)
            assert taken is held.ticket
        self._gone(held)

    def leave(self, held: Held) -> bool:
        """Its client left. Whether it still waited."""
        if not held.waiting:
            return False
        if held.ticket is None:
            self.returned.remove(held)
        else:
            self.fair.cancel(held.ticket)
        self._gone(held)
        return True

    def expire(self, now_s: float) -> list[Held]:
        """Those whose deadline has passed; they no longer wait."""
        late = [held for held in self.returned if held.deadline_s < now_s]
        for held in late:
            self.returned.remove(held)
        late += [ticket.item for ticket in self.fair.expire(now_s)]
        for held in late:
            self._gone(held)
        return late

    def forget(self, gone: Collection[ReplicaId]) -> None:
        """These replicas are no more as they were: whoever failed on one may try what is there now."""
        for held in self.returned:
            if not held.request.excluded.isdisjoint(gone):
                held.request = held.request._replace(excluded=held.request.excluded.difference(gone))

    def _came(self, held: Held) -> None:
        if held.tenant not in self._configured:
            self._unknown[held.tenant] += 1

    def _gone(self, held: Held) -> None:
        held.waiting = False
        if held.tenant not in self._configured:
            self._unknown[held.tenant] -= 1
            if not self._unknown[held.tenant]:
                del self._unknown[held.tenant]

    def check_integrity(self) -> None:
        """Raise AssertionError unless everybody who waits is counted once."""
        self.fair.check_integrity()
        everyone = list(self)
        assert all(held.waiting for held in everyone), "one who waits no longer is in line"
        assert len({id(held.waiter) for held in everyone}) == len(everyone), "one waits twice"
        unknown = Counter(held.tenant for held in everyone if held.tenant not in self._configured)
        assert unknown == self._unknown, f"{self._unknown} counted, {unknown} wait"
        assert len(unknown) <= MOST_UNKNOWN + 1
