"""What one replica, in one boot, calls its blocks: the engine's hashes, mapped to ours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headrace_kernels.block_hash import hash_blocks, salt
from headrace_kernels.counted_map import CountedMap
from headrace_router.event_sequence import EventSequence
from headrace_router.events import GPU, BlocksKnown, BlocksStored, EngineHash
from headrace_router.types import Replica

MOST_SALTS = 1024  # remembered; a client may send a different one with every request
_WORD = (1 << 64) - 1


class ReplicaBlocks:
    """Maps by medium. Mutable; `PrefixIndex` keeps the tables in step."""

    def __init__(self, replica: Replica, slot: int) -> None:
        self.boot_id = replica.boot_id
        self.model = replica.model
        self.slot = slot
        self.sequence = EventSequence()
        self.block_size = replica.block_size  # as told, until an event tells
        self.sizes: dict[str, int] = {}  # block size by medium, from events
        self._maps: dict[str, CountedMap] = {}
        self._salts: dict[tuple[str | None, str | None], int] = {}

    def stored(self, event: BlocksStored | BlocksKnown) -> NDArray[np.uint64] | None:
        """Take in an announcement; our hashes of its blocks. None when they cannot be known: the block before them is
        not (its event was lost), or hashes and tokens do not belong together."""
        if isinstance(event, BlocksKnown):
            ours = event.ours
        else:
            parent = self._parent_of(event)
            if parent is None or event.block_size < 1:
                return None
            ours = hash_blocks(event.tokens, event.block_size, parent)
        if ours.size != len(event.hashes):
            return None
        held = self._maps.get(event.medium)
        if held is None:
            held = self._maps[event.medium] = CountedMap()
        held.add(_words(event.hashes), ours)
        self.sizes[event.medium] = event.block_size
        if event.medium == GPU:
            self.block_size = event.block_size
        return ours

    def removed(self, hashes: Sequence[EngineHash], medium: str) -> NDArray[np.uint64] | None:
        """Take in a removal; our hashes of the blocks of which no copy is left."""
        held = self._maps.get(medium)
        return None if held is None else held.drop(_words(hashes))

    def clear(self) -> None:
        """Nothing is held."""
        self._maps.clear()

    def _parent_of(self, event: BlocksStored) -> int | None:
        """Our hash of the block before the event's; a salt at a prompt's start; None where nobody knows it."""
        if event.parent is None:
            key = (event.lora, event.cache_salt)
            known = self._salts.get(key)
            if known is None:
                if len(self._salts) >= MOST_SALTS:
                    self._salts.clear()
                known = self._salts[key] = salt(self.model, lora=event.lora, cache_salt=event.cache_salt)
            return known
        for held in self._maps.values():
            ours = held.get(event.parent & _WORD)
            if ours is not None:
                return ours
        return None

    @property
    def media(self) -> list[str]:
        return list(self._maps)

    def held(self, medium: str) -> NDArray[np.uint64]:
        """Our hashes of what lies there, for audits."""
        return self._maps[medium].values()

    @property
    def num_blocks(self) -> int:
        return sum(len(held) for held in self._maps.values())

    @property
    def memory_bytes(self) -> int:
        return sum(held.memory_bytes for held in self._maps.values())

    def check_integrity(self) -> None:
        for held in self._maps.values():
            held.check_integrity()


def _words(hashes: Sequence[EngineHash]) -> NDArray[np.uint64]:
    """As the map wants them. Engines may send them signed."""
    if isinstance(hashes, np.ndarray):
        return hashes.astype(np.uint64, copy=False)
    try:
        return np.array(hashes, np.uint64)
    except OverflowError:
        return np.array([engine_hash & _WORD for engine_hash in hashes], np.uint64)
