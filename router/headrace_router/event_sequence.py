"""The order of one replica's event batches: each is applied once and in turn, gaps are named, waiting ones bounded."""

from __future__ import annotations

from headrace_router.events import BlocksStored, EventBatch

MOST_WAITING = 4096  # batches
MOST_WAITING_TOKENS = 4 << 20


class EventSequence:
    """Sequence numbers from 0 within one boot. Mutable."""

    __slots__ = ("_tokens", "_waiting", "next")

    def __init__(self) -> None:
        self.next = 0  # number of the batch to be applied next
        self._waiting: dict[int, EventBatch] = {}  # behind a gap
        self._tokens = 0

    @property
    def gap(self) -> tuple[int, int] | None:
        """Numbers missing, first and end (not included), before the earliest batch that waits. None without a gap."""
        return (self.next, min(self._waiting)) if self._waiting else None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_overfull(self) -> bool:
        """More waits than may: whoever owns this gives the gap up."""
        return len(self._waiting) > MOST_WAITING or self._tokens > MOST_WAITING_TOKENS

    def take(self, batch: EventBatch) -> list[EventBatch]:
        """The batches that are now due, in order. Empty for one already applied or one that waits behind a gap."""
        number = batch.sequence
        if number < self.next or number in self._waiting:
            return []
        if number > self.next:
            self._waiting[number] = batch
            self._tokens += _num_tokens(batch)
            return []
        due = [batch]
        self.next += 1
        while self._waiting and (following := self._waiting.pop(self.next, None)) is not None:
            self._tokens -= _num_tokens(following)
            due.append(following)
            self.next += 1
        return due

    def skip_gap(self) -> list[EventBatch]:
        """Give up what is missing before the earliest waiting batch; the batches up to the next gap."""
        if not self._waiting:
            return []
        self.next = min(self._waiting)
        earliest = self._waiting.pop(self.next)
        self._tokens -= _num_tokens(earliest)
        return self.take(earliest)


def _num_tokens(batch: EventBatch) -> int:
    return sum(len(event.tokens) for event in batch.events if isinstance(event, BlocksStored))
