"""Which replica holds which token blocks, as the engines themselves announce it.

Write path: `apply` (batches of KV events, in any order, any number of times), `give_up_gap`, `follow`, `routed`.
Read path: `look_up`, every replica in one call.

    events ── hashed again ──> ReplicaBlocks (engine's hash → ours, copies counted) ──> BlockTables, by block size
    routing decisions ──> the same tables' expected part, for 5 to 10 s: siblings of a burst land together before the
                          first event arrives
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace_router.block_tables import BlockTables
from headrace_router.events import (
    AllCleared,
    BlocksKnown,
    BlocksRemoved,
    BlocksStored,
    EngineHash,
    EventBatch,
)
from headrace_router.replica_blocks import ReplicaBlocks
from headrace_router.types import BootId, Replica, ReplicaId, Request
from headrace_router.view import Hits

EXPECTED_S = 5.0
MOST_SIZES = 8  # different block sizes in one fleet
MOST_BLOCKS = 8 << 20  # about 700 MB at worst: 37 bytes in the table, 45 in the map of engine hashes
MOST_EXPECTED_BLOCKS = 1 << 20
AUDITED_BLOCKS = 1000  # per replica and medium, looked up by `check_integrity`


@dataclass(slots=True)
class IndexCounts:
    """Since the start; for metrics."""

    batches: int = 0  # applied
    duplicates: int = 0  # batches that had been applied before
    foreign: int = 0  # batches of an absent replica or another boot
    gaps_given_up: int = 0
    stored: int = 0  # blocks announced
    removed: int = 0  # blocks whose last copy went
    orphans: int = 0  # blocks announced that could not be placed: the one before is unknown
    refused: int = 0  # blocks beyond `max_blocks`


class PrefixIndex:
    """Precise and expected prefixes. Mutable; one event loop owns it. See `PrefixSource` for the router's side."""

    def __init__(
        self,
        *,
        num_slots: int = 1024,
        max_blocks: int = MOST_BLOCKS,
        max_expected_blocks: int = MOST_EXPECTED_BLOCKS,
    ) -> None:
        """At most `max_blocks` blocks, a block on n replicas counting n times; beyond that, announcements are refused
        and counted. Replicas in slots from `num_slots` on are not indexed. Raises ValueError above 1,024 slots."""
        self.num_slots = num_slots
        self.max_blocks = max_blocks
        self.max_expected_blocks = max_expected_blocks
        self.counts = IndexCounts()
        self._replicas: dict[ReplicaId, ReplicaBlocks] = {}
        self._tables: dict[int, BlockTables] = {}
        self._sizes: dict[str, tuple[int, ...]] = {}  # block sizes by model, as last asked for
        self._held = 0
        self._width = num_slots  # of hits: every slot of the fleet has its place
        # Of the lookup before a routing decision: what needs not be written as expected.
        self._looked_up: object = None
        self._confirmed: dict[int, NDArray[np.int32]] = {}

    # --- read path

    def block_sizes(self, model: str) -> tuple[int, ...]:
        """Block sizes in which a prompt of this model has to be hashed, empty while no replica told one."""
        sizes = self._sizes.get(model)
        if sizes is None:
            sizes = self._sizes[model] = tuple(
                sorted(
                    {
                        replica.block_size
                        for replica in self._replicas.values()
                        if replica.model == model and replica.block_size
                    }
                )
            )
        return sizes

    def look_up(self, request: Request, now_s: float) -> Hits | None:
        """See `PrefixSource`. At most the full blocks before the last token: engines compute that one in any case."""
        hashes = request.block_hashes
        if hashes is None:
            return None
        self._looked_up = hashes
        self._confirmed.clear()
        tokens: NDArray[np.int32] | None = None
        slow: NDArray[np.int32] | None = None
        for size, blocks in hashes.items():
            tables = self._tables.get(size)
            if tables is None:
                continue
            usable = blocks.size
            if request.prompt_tokens is not None:
                usable = max(0, request.prompt_tokens - 1) // size
            counts, slow_counts, confirmed = tables.look_up(blocks[:usable], now_s)
            self._confirmed[size] = confirmed
            counts *= size
            tokens = counts if tokens is None else np.maximum(tokens, counts, out=tokens)
            if slow_counts is not None:
                slow_counts *= size
                slow = slow_counts if slow is None else np.maximum(slow, slow_counts, out=slow)
        if tokens is None:
            return None
        if self._width > self.num_slots:
            tokens = np.concatenate([tokens, np.zeros(self._width - self.num_slots, np.int32)])
            if slow is not None:
                slow = np.concatenate([slow, np.zeros(self._width - self.num_slots, np.int32)])
        return Hits(tokens, slow)

    # --- write path: routing

    def routed(self, request: Request, slot: int, now_s: float) -> None:
        """See `PrefixSource`. The blocks that are not confirmed there are expected there for a while."""
        hashes = request.block_hashes
        if hashes is None or slot >= self.num_slots:
            return
        fresh = self._looked_up is hashes
        for size, blocks in hashes.items():
            tables = self._tables.get(size)
            if tables is not None:
                confirmed = self._confirmed.get(size) if fresh else None
                start = int(confirmed[slot]) if confirmed is not None else 0
                if start < blocks.size:
                    tables.expected.store(slot, blocks[start:], now_s)
        self._looked_up = None

    def follow(self, members: Sequence[tuple[Replica, int]]) -> None:
        """See `PrefixSource`."""
        present = {replica.id: (replica, slot) for replica, slot in members if slot < self.num_slots}
        self._width = max([self.num_slots, *(slot + 1 for _, slot in members)])
        for name, known in list(self._replicas.items()):
            now = present.get(name)
            if now is None or (now[0].boot_id, now[1], now[0].model) != (
                known.boot_id,
                known.slot,
                known.model,
            ):
                self._clear(known)
                del self._replicas[name]
        for name, (replica, slot) in present.items():
            if name not in self._replicas:
                self._replicas[name] = ReplicaBlocks(replica, slot)
                if replica.block_size:
                    self._tables_of(replica.block_size)
        self._sizes.clear()

    # --- write path: events

    def apply(self, batch: EventBatch) -> int | None:
        """Take in a batch. Returns the sequence number from which batches are missing, to be fetched again and applied
        like any other, or None when nothing is missing."""
        replica = self._replicas.get(batch.replica_id)
        if replica is None or replica.boot_id != batch.boot_id:
            self.counts.foreign += 1
            return None
        sequence = replica.sequence
        waiting = sequence.num_waiting
        due = sequence.take(batch)
        if not due and sequence.num_waiting == waiting:
            self.counts.duplicates += 1
        for each in due:
            self._apply(replica, each)
        while sequence.is_overfull:
            self._skip_gap(replica)
        gap = sequence.gap
        return None if gap is None else gap[0]

    def gap(self, replica_id: ReplicaId) -> tuple[int, int] | None:
        """Sequence numbers missing of a replica: first and end, not included."""
        replica = self._replicas.get(replica_id)
        return None if replica is None else replica.sequence.gap

    def give_up_gap(self, replica_id: ReplicaId, boot_id: BootId) -> None:
        """What is missing cannot be fetched any more: forget what was known of the replica (a lost removal would never
        be noticed) and go on from the batches that wait."""
        replica = self._replicas.get(replica_id)
        if replica is not None and replica.boot_id == boot_id:
            while replica.sequence.gap is not None:
                self._skip_gap(replica)

    def tick(self, now_s: float) -> None:
        """See `PrefixSource`."""
        for tables in self._tables.values():
            tables.expected.turn(now_s)
            tables.sweep()

    def _skip_gap(self, replica: ReplicaBlocks) -> None:
        self.counts.gaps_given_up += 1
        self._clear(replica)
        for batch in replica.sequence.skip_gap():
            self._apply(replica, batch)

    def _apply(self, replica: ReplicaBlocks, batch: EventBatch) -> None:
        self.counts.batches += 1
        removed: list[EngineHash] = []  # vLLM announces one removal at a time; together they cost a tenth
        medium = ""
        for event in batch.events:
            if isinstance(event, BlocksRemoved):
                if removed and event.medium != medium:
                    self._remove(replica, removed, medium)
                    removed = []
                medium = event.medium
                removed.extend(event.hashes)
                continue
            if removed:
                self._remove(replica, removed, medium)
                removed = []
            if isinstance(event, AllCleared):
                self._clear(replica)
            else:
                self._store(replica, event)
        if removed:
            self._remove(replica, removed, medium)

    def _store(self, replica: ReplicaBlocks, event: BlocksStored | BlocksKnown) -> None:
        count, before = len(event.hashes), replica.num_blocks
        size = replica.sizes.get(event.medium)
        tables = self._tables_of(event.block_size) if size in (None, event.block_size) else None
        if tables is None or self._held + count > self.max_blocks:
            self.counts.refused += count
            return
        told = replica.block_size
        ours = replica.stored(event)
        if ours is None:
            self.counts.orphans += count
            return
        self.counts.stored += count
        self._held += replica.num_blocks - before
        tables.of(event.medium).store(replica.slot, ours)
        if replica.block_size != told:
            self._sizes.clear()

    def _remove(self, replica: ReplicaBlocks, hashes: list[EngineHash], medium: str) -> None:
        ours = replica.removed(hashes, medium)
        if ours is not None and ours.size:
            self.counts.removed += ours.size
            self._held -= ours.size
            self._tables[replica.sizes[medium]].of(medium).remove(replica.slot, ours)

    def _clear(self, replica: ReplicaBlocks) -> None:
        self._held -= replica.num_blocks
        replica.clear()
        for tables in self._tables.values():
            tables.clear(replica.slot)

    def _tables_of(self, block_size: int) -> BlockTables | None:
        """The tables of a block size; None when there are too many sizes already, or it is none."""
        tables = self._tables.get(block_size)
        if tables is None and len(self._tables) < MOST_SIZES and block_size > 0:
            tables = self._tables[block_size] = BlockTables(
                self.num_slots, self.max_blocks, self.max_expected_blocks, EXPECTED_S
            )
        return tables

    # --- sizes

    @property
    def num_blocks(self) -> int:
        """Blocks held, a block on n replicas counted n times."""
        return self._held

    @property
    def memory_bytes(self) -> int:
        """All tables and maps."""
        return sum(tables.memory_bytes for tables in self._tables.values()) + sum(
            replica.memory_bytes for replica in self._replicas.values()
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless tables hold exactly what the replicas' maps say, and counts add up. For tests
        and idle moments: it looks at every block."""
        for tables in self._tables.values():
            tables.check_integrity()
        held = 0
        in_table: dict[int, list[NDArray[np.uint64]]] = {}
        for name, replica in self._replicas.items():
            replica.check_integrity()
            held += replica.num_blocks
            for medium in replica.media:
                table = self._tables[replica.sizes[medium]].of(medium)
                blocks = replica.held(medium)
                in_table.setdefault(id(table), []).append(blocks)
                for at in range(0, blocks.size, 1 + blocks.size // AUDITED_BLOCKS):
                    count = table.longest_prefix(blocks[at : at + 1])[replica.slot]
                    assert count == 1, f"{name}: block {int(blocks[at])} on {medium} is not in the table"
        for tables in self._tables.values():
            for tier in (tables.gpu, tables.slow):
                if tier is not None:
                    while not tier.sweep():
                        pass
                    known = in_table.get(id(tier), [])
                    distinct = np.unique(np.concatenate(known)).size if known else 0
                    assert tier.num_blocks == distinct, f"{tier.num_blocks} in a table, {distinct} held"
        assert held == self._held <= self.max_blocks, f"{held} blocks held, {self._held} counted"
        slots = [replica.slot for replica in self._replicas.values()]
        assert len(slots) == len(set(slots)), f"slots {slots}"
