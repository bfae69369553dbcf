"""Prefixes that replicas are expected to hold because a request was sent there: bounded in time and in bytes.

Two tables take turns. Entries go into the young one; when its time is over or it is half of what may be, it becomes
the old one and the old one is dropped whole. So an entry is known for one to two lives, whatever is used again moves
into the young table, and forgetting costs nothing per entry.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace_kernels.prefix_table import PrefixTable


class ExpectedPrefixes:
    """Hashes by slot. Mutable; times are the caller's and never go back."""

    def __init__(self, num_slots: int, max_blocks: int, life_s: float) -> None:
        """At most `max_blocks` hashes, for `life_s` to twice that."""
        self._num_slots = num_slots
        self._half = max(1, max_blocks // 2)
        self._life_s = life_s
        self._young = self._new_table()
        self._old = self._new_table()
        self._turned_at_s: float | None = None
        self.refused = 0  # hashes that found no room

    def _new_table(self) -> PrefixTable:
        return PrefixTable(self._num_slots, self._half)

    def store(self, slot: int, hashes: NDArray[np.uint64], now_s: float) -> None:
        """The replica in `slot` will hold these. More than there is room for is cut and counted."""
        self.turn(now_s)
        if self._young.num_blocks + hashes.size > self._half and self._young.num_blocks:
            self._turn_tables(now_s)
        stored = self._young.store(slot, hashes[: self._half])
        self.refused += hashes.size - stored

    def extend(self, hashes: NDArray[np.uint64], counts: NDArray[np.int32], now_s: float) -> None:
        """Move `counts` (leading hashes known of each slot) on over what is expected, in place."""
        self.turn(now_s)
        # What is in the young table starts where the precise entries ended, so the order does not matter much; old
        # first finds the more.
        for table in (self._old, self._young):
            if table.num_blocks:
                table.extend_prefix(hashes, counts)

    def longest(self, hashes: NDArray[np.uint64], now_s: float) -> NDArray[np.int32]:
        """Leading hashes that each slot is expected to hold, where all entries were stored from the first hash on."""
        self.turn(now_s)
        counts = self._young.longest_prefix(hashes, closed=True)
        if self._old.num_blocks:
            np.maximum(counts, self._old.longest_prefix(hashes, closed=True), out=counts)
        return counts

    def clear(self, slot: int) -> None:
        """Nothing is expected there any more."""
        self._young.clear(slot)
        self._old.clear(slot)

    def turn(self, now_s: float) -> None:
        """Drop what is too old."""
        if self._turned_at_s is None:
            self._turned_at_s = now_s
            return
        age_s = now_s - self._turned_at_s
        if age_s >= self._life_s:
            if age_s >= 2 * self._life_s and self._young.num_blocks:
                self._young = self._new_table()
            self._turn_tables(now_s)

    def _turn_tables(self, now_s: float) -> None:
        self._turned_at_s = now_s
        if self._young.num_blocks or self._old.num_blocks:
            self._old, self._young = self._young, self._new_table()

    @property
    def num_blocks(self) -> int:
        return self._young.num_blocks + self._old.num_blocks

    @property
    def memory_bytes(self) -> int:
        return self._young.memory_bytes + self._old.memory_bytes

    def sweep(self) -> None:
        """Erase a bounded part of what cleared slots left."""
        self._young.sweep()
        self._old.sweep()

    def check_integrity(self) -> None:
        """Raise AssertionError unless both tables are sound and within their bound."""
        for table in (self._young, self._old):
            table.check_integrity()
            assert table.num_blocks <= self._half, f"{table.num_blocks} of {self._half} blocks"
