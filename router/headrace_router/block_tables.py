"""Everything known about blocks of one size: what lies in GPU memory, what in slower tiers, what is expected soon."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace_kernels.prefix_table import PrefixTable
from headrace_router.events import GPU
from headrace_router.expected_prefixes import ExpectedPrefixes


class BlockTables:
    """Tables by medium for one block size. Mutable."""

    def __init__(self, num_slots: int, max_blocks: int, expected_blocks: int, expected_s: float) -> None:
        self._num_slots = num_slots
        self._max_blocks = max_blocks
        self.gpu = PrefixTable(num_slots, max_blocks)
        self.slow: PrefixTable | None = None  # made with the first block outside the GPU
        self.expected = ExpectedPrefixes(num_slots, expected_blocks, expected_s)

    def of(self, medium: str) -> PrefixTable:
        """The table of a medium; all that is not the GPU is one tier."""
        if medium == GPU:
            return self.gpu
        if self.slow is None:
            self.slow = PrefixTable(self._num_slots, self._max_blocks)
        return self.slow

    def look_up(
        self, hashes: NDArray[np.uint64], now_s: float
    ) -> tuple[NDArray[np.int32], NDArray[np.int32] | None, NDArray[np.int32]]:
        """Leading blocks by slot: all that can be used, of those the slow ones (None where there are none), and those
        confirmed in GPU memory, from which on predictions are worth writing.

        vLLM evicts a request's last block first, so whoever holds a block holds all before it: the search bisects.
        """
        confirmed = self.gpu.longest_prefix(hashes, closed=True)
        counts = confirmed.copy()
        self.expected.extend(hashes, counts, now_s)
        if self.slow is None or not self.slow.num_blocks:
            return counts, None, confirmed
        fast = counts.copy()
        self.slow.extend_prefix(hashes, counts)
        return counts, counts - fast, confirmed

    def clear(self, slot: int) -> None:
        """The replica in `slot` holds nothing, and nothing is expected of it."""
        self.gpu.clear(slot)
        if self.slow is not None:
            self.slow.clear(slot)
        self.expected.clear(slot)

    def sweep(self) -> None:
        """A bounded part of what is left to erase."""
        self.gpu.sweep()
        if self.slow is not None:
            self.slow.sweep()
        self.expected.sweep()

    @property
    def num_blocks(self) -> int:
        return self.gpu.num_blocks + (self.slow.num_blocks if self.slow is not None else 0)

    @property
    def refused(self) -> int:
        return self.gpu.refused + (self.slow.refused if self.slow is not None else 0)

    @property
    def memory_bytes(self) -> int:
        slow = self.slow.memory_bytes if self.slow is not None else 0
        return self.gpu.memory_bytes + slow + self.expected.memory_bytes

    def check_integrity(self) -> None:
        """Raise AssertionError unless every table is sound."""
        self.gpu.check_integrity()
        if self.slow is not None:
            self.slow.check_integrity()
        self.expected.check_integrity()
