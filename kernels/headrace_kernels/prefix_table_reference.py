"""The prefix table as a dict of sets: what `PrefixTable` must equal, and nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class PrefixTableReference:
    """Same calls, same answers as `PrefixTable`; no bound on memory, time or blocks."""

    def __init__(self, num_replicas: int = 1024) -> None:
        self.num_replicas = num_replicas
        self._replicas_of: dict[int, set[int]] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._replicas_of)

    def store(self, replica: int, hashes: NDArray[np.uint64]) -> int:
        for block in hashes.tolist():
            self._replicas_of.setdefault(block, set()).add(replica)
        return int(hashes.size)

    def remove(self, replica: int, hashes: NDArray[np.uint64]) -> int:
        return sum(self._discard(replica, block) for block in hashes.tolist())

    def clear(self, replica: int) -> None:
        for block in list(self._replicas_of):
            self._discard(replica, block)

    def sweep(self, max_segments: int = 64) -> bool:
        return True

    def longest_prefix(self, hashes: NDArray[np.uint64], *, closed: bool = False) -> NDArray[np.int32]:
        return self.extend_prefix(hashes, np.zeros(self.num_replicas, np.int32))

    def extend_prefix(self, hashes: NDArray[np.uint64], counts: NDArray[np.int32]) -> NDArray[np.int32]:
        blocks = hashes.tolist()
        for replica in range(self.num_replicas):
            while counts[replica] < len(blocks) and replica in self._replicas_of.get(
                blocks[counts[replica]], ()
            ):
                counts[replica] += 1
        return counts

    def check_integrity(self) -> None:
        assert all(self._replicas_of.values()), "a block of no replica remained"

    def _discard(self, replica: int, block: int) -> bool:
        replicas = self._replicas_of.get(block)
        if replicas is None or replica not in replicas:
            return False
        replicas.remove(replica)
        if not replicas:
            del self._replicas_of[block]
        return True
