"""Which replica has probably cached which text, learned from our own routing: for prompts that nobody tokenised.

Text is known by the chained hashes of its chunks (`headrace_kernels.block_hash.hash_chunks`). Nothing confirms an
entry, so entries expire; nothing announces an eviction, so hits are guesses, and counted as tokens by the prompt's
own ratio of tokens to bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace_router.expected_prefixes import ExpectedPrefixes
from headrace_router.types import Replica, Request
from headrace_router.view import Hits

LIFE_S = 600.0
BYTES_PER_CHUNK = 40  # of the table, at its least full


class TextIndex:
    """Chunk-hash chain → replicas. Mutable; one event loop owns it."""

    def __init__(
        self,
        chunk_bytes: int = 256,
        *,
        num_slots: int = 1024,
        max_bytes: int = 64 << 20,
        life_s: float = LIFE_S,
    ) -> None:
        """`max_bytes` bounds the memory; what was not used for longest goes first, half of everything at a time."""
        self.chunk_bytes = chunk_bytes
        self.num_slots = num_slots
        self._expected = ExpectedPrefixes(num_slots, max(2, max_bytes // BYTES_PER_CHUNK), life_s)
        self._members: dict[str, tuple[str, int]] = {}  # replica id → boot id, slot
        self._width = num_slots  # of hits: up to the highest slot of the fleet

    def look_up(self, request: Request, now_s: float) -> Hits | None:
        """See `PrefixSource`. Every replica's guess, at most the prompt less one token."""
        hashes = request.chunk_hashes
        if hashes is None or not hashes.size:
            return None
        counts = self._expected.longest(hashes, now_s)[: self._width]
        tokens = request.size_tokens
        per_chunk = tokens * self.chunk_bytes / max(request.prompt_bytes, hashes.size * self.chunk_bytes)
        per_chunk = min(per_chunk, (tokens - 1) / hashes.size)  # the last token is computed in any case
        hits = (counts * per_chunk).astype(np.int32)
        if self._width > self.num_slots:
            hits = np.concatenate([hits, np.zeros(self._width - self.num_slots, np.int32)])
        return Hits(hits, source="text")

    def routed(self, request: Request, slot: int, now_s: float) -> None:
        """See `PrefixSource`."""
        if request.chunk_hashes is not None and slot < self.num_slots:
            self._expected.store(slot, request.chunk_hashes, now_s)

    def follow(self, members: Sequence[tuple[Replica, int]]) -> None:
        """See `PrefixSource`."""
        present: dict[str, tuple[str, int]] = {
            replica.id: (replica.boot_id, slot) for replica, slot in members if slot < self.num_slots
        }
        for name, was in self._members.items():
            if present.get(name) != was:
                self._expected.clear(was[1])
        self._members = present
        self._width = max((slot + 1 for _, slot in members), default=0)

    def tick(self, now_s: float) -> None:
        """See `PrefixSource`."""
        self._expected.turn(now_s)
        self._expected.sweep()

    @property
    def memory_bytes(self) -> int:
        return self._expected.memory_bytes

    @property
    def num_chunks(self) -> int:
        return self._expected.num_blocks

    def check_integrity(self) -> None:
        """Raise AssertionError unless the tables are sound, within their bound, and slots are nobody's twice."""
        self._expected.check_integrity()
        slots = [slot for _, slot in self._members.values()]
        assert len(slots) == len(set(slots)), f"slots {slots}"
