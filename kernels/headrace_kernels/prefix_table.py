"""Which replicas hold which blocks, and how long a prefix of a prompt each of them holds.

Read path: `longest_prefix(hashes)`, every replica in one call, nothing allocated per block.
Write path: `store`, `remove`, `clear`, from KV events.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace_kernels import prefix_kernel as kernel
from headrace_kernels.address_space import WORD_BYTES, AddressSpace
from headrace_kernels.prefix_audit import audit

MAX_REPLICAS = 1024
SPARE_COLUMNS = 64  # clears that may wait for their sweep at the same time
SWEEP_PER_WRITE = 1  # segments swept by each store or remove while cleared entries remain
RELEASE_PER_WRITE = 32  # freed segments given back to the system per write
_SEGMENT_BYTES = kernel.SEGMENT_WORDS * WORD_BYTES
_ROW_SLACK_BYTES = 1 << 20
_ROW_RELEASE_BYTES = 4 << 20
_UINT64 = np.dtype(np.uint64)
_INT32 = np.dtype(np.int32)


class PrefixTable:
    """Block hash → set of replicas 0..num_replicas-1. Not thread-safe: one event loop owns it.

    A replica that stores a hash twice holds it once. Tiers are tables: keep one per medium, look up the GPU's,
    then let `extend_prefix` of the CPU's carry each replica's count on from there.

    No call but `check_integrity` works longer than its own hashes take, plus a bounded step (a segment swept,
    some memory given back): keep one call to a few thousand hashes and growth to millions of blocks never
    pauses the loop (`headrace_bench.kernel_bench` measures the worst). Memory is `max_blocks`-bounded.
    """

    def __init__(self, num_replicas: int = MAX_REPLICAS, max_blocks: int = 1 << 24) -> None:
        """Reserves address space for `max_blocks`, touches 128 KiB of it. Raises ValueError on sizes that cannot
        be, MemoryError when the address space is refused."""
        if not 1 <= num_replicas <= MAX_REPLICAS:
            raise ValueError(f"num_replicas is {num_replicas}; the table holds 1 to {MAX_REPLICAS}")
        if max_blocks < 1:
            raise ValueError(f"max_blocks is {max_blocks}; it must be at least 1")
        self.num_replicas = num_replicas
        self.max_blocks = max_blocks
        num_words = -(-(num_replicas + SPARE_COLUMNS) // 64)
        num_columns = num_words * 64
        # Right after all segments have split they are half of MAX_FILL full, and hashes scatter around that.
        num_segments = 4 + max_blocks * 5 // (2 * kernel.MAX_FILL)
        max_depth = min(24, num_segments.bit_length() + 4)
        self._row_bytes = (num_words + kernel.ROW_HEAD) * WORD_BYTES
        self._segments = AddressSpace(num_segments * kernel.SEGMENT_WORDS)
        self._rows = AddressSpace(max_blocks * self._row_bytes // WORD_BYTES)
        self._table = kernel.Table(
            pool=self._segments.words,
            rows=self._rows.words,
            directory=np.zeros(1 << max_depth, np.int32),
            segments=np.zeros((num_segments, 2), np.int32),
            free=np.zeros(num_segments, np.int32),
            counters=np.zeros(kernel.AT_DEPTH + 25, np.int64),
            scratch=np.zeros(kernel.SEGMENT_WORDS, np.uint64),
            alive=np.zeros(num_words, np.uint64),
        )
        self._counters = self._table.counters
        self._counters[kernel.MAX_BLOCKS] = max_blocks
        kernel.open_table(self._table)
        self._columns = np.full(num_replicas, -1, np.int32)  # by replica; -1: it holds nothing
        self._replicas = np.full(num_columns, -1, np.int32)  # by column
        self._live = np.zeros(num_words, np.uint64)  # mask of the columns in use
        self._cleared: list[int] = []  # columns that wait for the next round of sweeping
        self._swept: list[int] = []  # columns that this round takes out
        self._doomed = np.zeros(num_words, np.uint64)  # their mask
        self._cursor = 0  # hash up to which this round has come
        self._rows_touched_bytes = 0
        self._refused = 0
        self._first = np.zeros(0, np.int32)
        self._following = np.zeros(num_replicas, np.int32)

    # ---- write path --------------------------------------------------------------------------------------------

    def store(self, replica: int, hashes: NDArray[np.uint64]) -> int:
        """`replica` holds these blocks from now on; how many are recorded. Fewer than given: the table is full,
        the rest is counted in `refused` and nothing else changes."""
        column = int(self._columns[self._checked(replica)])
        if column < 0:
            column = self._assign_column(replica)
        blocks = _hashes(hashes)
        stored = kernel.store(self._table, column, blocks)
        self._refused += blocks.size - stored
        self._rows_touched_bytes = max(
            self._rows_touched_bytes, int(self._counters[kernel.NUM_ROWS]) * self._row_bytes
        )
        if self._swept or self._cleared:
            self.sweep(SWEEP_PER_WRITE)
        return stored

    def remove(self, replica: int, hashes: NDArray[np.uint64]) -> int:
        """`replica` no longer holds these blocks; how many of them it held."""
        column = int(self._columns[self._checked(replica)])
        removed = kernel.remove(self._table, column, _hashes(hashes)) if column >= 0 else 0
        if self._swept or self._cleared:
            self.sweep(SWEEP_PER_WRITE)
        self._release_memory()
        return removed

    def clear(self, replica: int) -> None:
        """`replica` holds nothing: lookups know at once, in constant time. Later writes sweep its entries away,
        and so does `sweep`."""
        column = int(self._columns[self._checked(replica)])
        if column < 0:
            return
        self._columns[replica] = -1
        self._replicas[column] = -1
        self._live[column >> 6] ^= np.uint64(1 << (column & 63))
        self._cleared.append(column)

    def sweep(self, max_segments: int = 64) -> bool:
        """Erase what cleared replicas left, at most `max_segments` segments of it (about 20 µs each); whether
        all is erased. For idle moments; writes do a little of it themselves."""
        if not self._swept and self._cleared:
            self._swept, self._cleared = self._cleared, []
            for column in self._swept:
                self._doomed[column >> 6] |= np.uint64(1 << (column & 63))
        if self._swept:
            self._cursor = int(kernel.sweep(self._table, self._doomed, np.uint64(self._cursor), max_segments))
            if self._cursor == 0:
                self._swept = []
                self._doomed[:] = 0
        self._release_memory()
        return not self._swept and not self._cleared

    # ---- read path ---------------------------------------------------------------------------------------------

    def longest_prefix(
        self, hashes: NDArray[np.uint64], out: NDArray[np.int32] | None = None, *, closed: bool = False
    ) -> NDArray[np.int32]:
        """For every replica, how many of the leading `hashes` it holds. Written to `out` when given (int32,
        C-contiguous, num_replicas long).

        `closed` says that whoever holds a block holds all before it, as vLLM's cache does (it evicts a request's
        last block first). The search then bisects and touches some 30 blocks instead of all, which a table
        beyond the processor's cache repays several times over. Where a hole breaks the promise, the count may
        come out too long: up to the depth of some later block that the replica holds.
        """
        counts = np.empty(self.num_replicas, np.int32) if out is None else self._checked_counts(out)
        search = kernel.closed_prefix if closed else kernel.longest_prefix
        search(self._table, self._live, self._replicas, _hashes(hashes), counts)
        return counts

    def extend_prefix(self, hashes: NDArray[np.uint64], counts: NDArray[np.int32]) -> NDArray[np.int32]:
        """Move every replica's entry of `counts` (in place; also returned) on over the hashes that it holds from
        there: a prefix found in the GPU's table is carried on in the CPU's, as vLLM's offloading connector does.
        Counts must lie within 0..len(hashes)."""
        blocks = _hashes(hashes)
        if self._first.size < blocks.size:
            self._first = np.zeros(2 * blocks.size, np.int32)
        within = kernel.extend_prefix(
            self._table,
            self._columns,
            self._replicas,
            blocks,
            self._checked_counts(counts),
            self._first,
            self._following,
        )
        if not within:
            raise ValueError(
                f"counts span {counts.min()}..{counts.max()}; the prompt has {blocks.size} blocks"
            )
        return counts

    # ---- sizes -------------------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """Distinct hashes in the table, those of cleared replicas included until they are swept."""
        return int(self._counters[kernel.NUM_BLOCKS])

    @property
    def refused(self) -> int:
        """Blocks that found the table full, since the start."""
        return self._refused

    @property
    def memory_bytes(self) -> int:
        """Memory that the table occupies, all included. Freed memory counts until it is given back."""
        counters = self._counters
        segments = int(counters[kernel.NUM_SEGMENTS] - counters[kernel.NUM_RELEASED])
        side = sum(
            part.nbytes
            for part in (*self._table[2:], self._columns, self._replicas, self._first, self._following)
        )
        return segments * _SEGMENT_BYTES + self._rows_touched_bytes + side

    @property
    def bytes_per_block(self) -> float:
        """18 to 37 bytes per block in a large table (16 per slot, a segment is between 44% and 87% full), plus a
        row of 8 * (words + 2) bytes for a block that more than 5 replicas hold in a fleet beyond 62."""
        return self.memory_bytes / max(1, self.num_blocks)

    def check_integrity(self) -> None:
        """Raise AssertionError on the first broken invariant (see `prefix_audit`). About 0.1 s per million
        blocks: for tests and idle moments."""
        audit(self._table)
        used = {int(column) for column in self._columns if column >= 0}
        live = {column for column in range(self._replicas.size) if self._replicas[column] >= 0}
        assert used == live, f"columns of replicas {used} differ from replicas of columns {live}"
        assert not used & {*self._cleared, *self._swept}, "a cleared column is in use"
        assert sum(1 << column for column in used) == sum(
            int(word) << (64 * index) for index, word in enumerate(self._live)
        ), "the mask of live columns differs from the columns in use"

    # ---- inside ------------------------------------------------------------------------------------------------

    def _checked(self, replica: int) -> int:
        if not 0 <= replica < self.num_replicas:
            raise ValueError(f"replica {replica} is outside 0..{self.num_replicas - 1}")
        return replica

    def _checked_counts(self, counts: NDArray[np.int32]) -> NDArray[np.int32]:
        if counts.dtype != _INT32 or counts.shape != (self.num_replicas,) or not counts.flags.carray:
            raise ValueError(
                f"counts must be a contiguous int32[{self.num_replicas}], not {counts.dtype}{list(counts.shape)}"
            )
        return counts

    def _assign_column(self, replica: int) -> int:
        """The lowest free column: low ones have the cheapest form of membership."""
        taken = {*self._cleared, *self._swept}
        column = next((c for c in range(self._replicas.size) if self._replicas[c] < 0 and c not in taken), -1)
        if column < 0:
            # More than SPARE_COLUMNS replicas cleared since the last sweep: the one unbounded pause, about
            # 10 ms per million blocks.
            while not self.sweep():
                pass
            return self._assign_column(replica)
        self._columns[replica] = column
        self._replicas[column] = replica
        self._live[column >> 6] |= np.uint64(1 << (column & 63))
        return column

    def _release_memory(self) -> None:
        """Give a bounded part of what is free back to the system, but keep some for the next growth."""
        counters = self._counters
        num_free, num_released = int(counters[kernel.NUM_FREE]), int(counters[kernel.NUM_RELEASED])
        keep = max(8, (int(counters[kernel.NUM_SEGMENTS]) - num_free) // 8)
        for index in range(num_released, min(num_free - keep, num_released + RELEASE_PER_WRITE)):
            first = int(self._table.free[index]) * kernel.SEGMENT_WORDS
            self._segments.release(first, first + kernel.SEGMENT_WORDS)
            counters[kernel.NUM_RELEASED] = index + 1
        used = int(counters[kernel.NUM_ROWS]) * self._row_bytes
        if self._rows_touched_bytes > used + used // 4 + _ROW_SLACK_BYTES:
            start = max(used, self._rows_touched_bytes - _ROW_RELEASE_BYTES)
            self._rows.release(start // WORD_BYTES, -(-self._rows_touched_bytes // WORD_BYTES))
            self._rows_touched_bytes = start


def _hashes(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The one layout that the kernels are compiled for."""
    if hashes.dtype is _UINT64 and hashes.flags.carray and hashes.ndim == 1:
        return hashes
    return np.require(hashes, np.uint64, ["C", "A", "W"]).reshape(-1)
