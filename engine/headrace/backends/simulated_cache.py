"""The paged prefix cache of a simulated engine: blocks, who holds them, what they hold.

    every block is   held by n >= 1 sequences,
                or   free and blank              (taken first)
                or   free and resident           (can be hit again; the least recently freed is evicted)

The semantics are those of vLLM's BlockPool (vllm/v1/core/block_pool.py) with one difference: a hash is
resident in one block only. vLLM keeps the copies of two sequences that compute the same prefix at once and
announces each; here the second copy stays blank, so every `Stored` is answered by at most one `Removed`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Stored(NamedTuple):
    """Consecutive blocks of one request became resident."""

    request_id: str
    first_block: int  # index of the first of them within the request
    hashes: Sequence[int]
    parent: int | None  # hash of the block before, None at the start of a request


class Removed(NamedTuple):
    """Blocks that were evicted."""

    hashes: Sequence[int]


class Cleared(NamedTuple):
    """Nothing is resident any more."""


CacheEvent = Stored | Removed | Cleared


class SimulatedCache:
    """Blocks by number, 0 to `num_blocks` - 1. Mutable; every method is O(blocks it is given)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._hashes: list[int | None] = [None] * num_blocks
        self._resident: dict[int, int] = {}
        self._blank = list(range(num_blocks))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._events: list[CacheEvent] = []

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds; resident ones count, they can be evicted."""
        return len(self._blank) + len(self._evictable)

    @property
    def num_resident(self) -> int:
        """Blocks that can be hit, held or free."""
        return len(self._resident)

    def resident_hashes(self) -> list[int]:
        """Of every block that can be found, in no order."""
        return list(self._resident)

    def count_hits(self, hashes: Sequence[int], most: int) -> int:
        """Leading hashes that are resident, at most `most`. Does not mutate."""
        resident = self._resident
        hits = 0
        for block_hash in hashes[:most] if most < len(hashes) else hashes:
            if block_hash not in resident:
                break
            hits += 1
        return hits

    def count_evictable(self, hashes: Iterable[int]) -> int:
        """How many of these resident hashes are in free blocks, so that holding them lowers `num_free`."""
        return sum(not self._holders[self._resident[block_hash]] for block_hash in hashes)

    def hold(self, hashes: Iterable[int]) -> list[int]:
        """One more holder for the block of each hash; all must be resident. Returns the blocks."""
        blocks = [self._resident[block_hash] for block_hash in hashes]
        for block in blocks:
            if not self._holders[block]:
                del self._evictable[block]
            self._holders[block] += 1
        return blocks

    def take(self, count: int) -> list[int]:
        """`count` blank blocks with one holder each; evicts the least recently freed when too few.

        The caller must have checked `num_free`.
        """
        assert count <= self.num_free, f"{count} blocks asked, {self.num_free} free"
        taken = [self._blank.pop() for _ in range(min(count, len(self._blank)))]
        if len(taken) < count:
            evicted: list[int] = []
            for _ in range(count - len(taken)):
                block, _none = self._evictable.popitem(last=False)
                evicted.append(self._forget(block))
                taken.append(block)
            self._events.append(Removed(evicted))
        for block in taken:
            self._holders[block] = 1
        return taken

    def store(
        self, request_id: str, blocks: Sequence[int], hashes: Sequence[int], first: int, end: int
    ) -> None:
        """Make the full blocks `first` to `end` - 1 of a request resident, those with a known hash.

        `blocks` and `hashes` are the whole request's, from its first block on.
        """
        end = min(end, len(hashes))
        run: list[int] = []
        for index in range(first, end):
            block, block_hash = blocks[index], hashes[index]
            if block_hash in self._resident:
                self._announce(request_id, index - len(run), run, hashes)
                run = []
                continue
            self._resident[block_hash] = block
            self._hashes[block] = block_hash
            run.append(block_hash)
        self._announce(request_id, end - len(run), run, hashes)

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each block of a sequence, given in order; its tail will be evicted first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                if self._hashes[block] is None:
                    self._blank.append(block)
                else:
                    self._evictable[block] = None

    def clear(self) -> bool:
        """Forget every resident block. False, and nothing happens, while any block is held (as vLLM does)."""
        if self.num_free < self.num_blocks:
            return False
        self._blank.extend(self._evictable)
        self._evictable.clear()
        self._resident.clear()
        self._hashes = [None] * self.num_blocks
        self._events.append(Cleared())
        return True

    def take_events(self) -> list[CacheEvent]:
        """What changed since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless free + held == total and every table agrees.

        `held` are the blocks of each living sequence.
        """
        holders = [0] * self.num_blocks
        for blocks in held:
            for block in blocks:
                holders[block] += 1
        assert holders == self._holders, "holder counts differ from what the sequences hold"
        free = self._blank + list(self._evictable)
        assert len(free) == len(set(free)), "a block is free twice"
        assert set(free) == {block for block in range(self.num_blocks) if not holders[block]}
        assert all(self._hashes[block] is None for block in self._blank), "a blank block has a hash"
        assert all(self._hashes[block] is not None for block in self._evictable)
        by_hash = {h: block for block, h in enumerate(self._hashes) if h is not None}
        assert by_hash == self._resident, "hash table and blocks disagree"

    def _forget(self, block: int) -> int:
        block_hash = self._hashes[block]
        assert block_hash is not None
        self._hashes[block] = None
        del self._resident[block_hash]
        return block_hash

    def _announce(self, request_id: str, first: int, run: list[int], hashes: Sequence[int]) -> None:
        if run:
            self._events.append(Stored(request_id, first, run, hashes[first - 1] if first else None))
