"""vLLM's KV events as the plain values that the prefix index takes. Pure.

What cannot be looked up by token ids alone is left out: blocks that hold images or embeddings, blocks of another
node's cache, and of a model with several kinds of attention all but the first kind's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from headrace.backends.kv_event_wire import (
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    decode_batch,
)
from headrace_router.events import (
    GPU,
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    CacheEvent,
    EngineHash,
    EventBatch,
)
from headrace_router.types import BootId, ReplicaId

_WORD = (1 << 64) - 1
# Blocks of these are forgotten while a sequence grows, so holding them says little about a prefix.
_PASSING_KINDS = frozenset({"sliding_window", "sliding_window_mla", "chunked_local_attention", "mamba"})


class KvEventReader:
    """Of one replica's stream. Keeps which group of cache layers it follows; otherwise without state."""

    def __init__(self, replica_id: ReplicaId, boot_id: BootId) -> None:
        self._replica_id = replica_id
        self._boot_id = boot_id
        self._group: int | None = None
        self.skipped = 0  # events left out

    def read(self, sequence: int, payload: bytes) -> tuple[EventBatch, float]:
        """A message's batch, and when the engine made it (seconds since the epoch). Raises ValueError."""
        batch = decode_batch(payload)
        events = []
        for event in batch.events:
            converted = self._convert(event)
            if converted is None:
                self.skipped += 1
            else:
                events.append(converted)
        return EventBatch(self._replica_id, self._boot_id, sequence, events), batch.ts

    def _convert(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> CacheEvent | None:
        if isinstance(event, AllBlocksCleared):
            return AllCleared()
        if event.locality == "REMOTE" or not self._follows(event):
            return None
        if isinstance(event, BlockRemoved):
            return BlocksRemoved(_words(event.block_hashes), event.medium or GPU)
        extras = _extras(event)
        if extras is None:
            return None
        return BlocksStored(
            _words(event.block_hashes),
            None if event.parent_block_hash is None else _word(event.parent_block_hash),
            array("I", event.token_ids),
            event.block_size,
            event.medium or GPU,
            event.lora_name,
            extras[0] if extras else None,
        )

    def _follows(self, event: BlockStored | BlockRemoved) -> bool:
        """Removals do not tell a group's kind, hence the group is remembered from the first block stored."""
        if event.group_idx is None:
            return True
        if self._group is None and isinstance(event, BlockStored):
            if event.kv_cache_spec_kind in _PASSING_KINDS:
                return False
            self._group = event.group_idx
        return event.group_idx == self._group


def _extras(event: BlockStored) -> list[str] | None:
    """The cache salt (at most one string, of a prompt's first block); None where blocks hold more than text."""
    found: list[str] = []
    for at, keys in enumerate(event.extra_keys or ()):
        rest: Sequence[Any] = keys or ()
        if rest and event.lora_name is not None and rest[0] == event.lora_name:
            rest = rest[1:]
        if not rest:
            continue
        if at > 0 or len(rest) > 1 or not isinstance(rest[0], str) or event.parent_block_hash is not None:
            return None
        found.append(rest[0])
    return found


def _word(block_hash: BlockHash) -> EngineHash:
    """64 bits of an engine's hash: the last 8 bytes of a digest, as vLLM itself shortens it."""
    if isinstance(block_hash, bytes):
        return int.from_bytes(block_hash[-8:], "big")
    return block_hash & _WORD


def _words(hashes: list[BlockHash]) -> list[EngineHash]:
    return [_word(block_hash) for block_hash in hashes]
