"""The words of waiting in the gateway: how much may wait, one that waits, what became of an offer. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")


class QueueLimits(NamedTuple):
    """Bounds of one queue."""

    max_requests: int = 1024
    max_bytes: int = 256 * 1024 * 1024  # of request bodies held
    max_wait_s: float = 60.0  # where the request brings no shorter deadline


DEFAULT_LIMITS = QueueLimits()


@dataclass(slots=True, eq=False)
class Ticket(Generic[Item]):
    """One waiting request. The caller reads it; only the queue writes."""

    item: Item
    tenant: str
    priority: int  # a lower number comes first
    tokens: int  # prompt and expected answer: what it will cost
    size_bytes: int
    offered_at_s: float
    deadline_s: float  # it is not served after that
    due_s: float  # by which it is ordered: its own deadline, or the longest usual wait from its coming
    number: int  # in the order of coming
    waiting: bool = True

    @property
    def turn(self) -> tuple[float, int]:
        """Its place among the requests of one tenant and priority: the first due, then the first that came."""
        return self.due_s, self.number


class Offer(NamedTuple, Generic[Item]):
    """What became of an offer. Of `ticket` and `refusal` exactly one is set."""

    ticket: Ticket[Item] | None
    refusal: str = ""
    retry_after_s: float | None = None  # None with a refusal: the same request can never wait here
    is_late: bool = (
        False  # refused because its turn would come after its deadline, not because the queue is full
    )
    evicted: tuple[Ticket[Item], ...] = ()  # had to go for it: to be refused too
