"""KV cache events as vLLM puts them on the wire.

    message = [topic, sequence (8 bytes, big-endian), msgpack of KVEventBatch]
    replay  = REQ/ROUTER: 8-byte start sequence in; every buffered message from there out, then END_OF_REPLAY

Field names, order, defaults and struct options are those of vllm/distributed/kv_events.py; the tests
compare bytes with vLLM's own encoder. They are declared again because the gateway, which reads them, may
not import vLLM.
"""

from __future__ import annotations

from typing import Any

import msgspec

BlockHash = bytes | int
"""vLLM sends 64-bit integers unless VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0, then the full digest."""

SEQUENCE_BYTES = 8
END_OF_REPLAY = (-1).to_bytes(SEQUENCE_BYTES, "big", signed=True)


class KVCacheEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """Root of the events; on the wire a map whose `type` is the class name."""


class BlockStored(KVCacheEvent):
    """Consecutive blocks became resident. `token_ids` are those of all of them, in order."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None  # per block: LoRA name, images, cache salt
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class BlockRemoved(KVCacheEvent):
    """Blocks were evicted."""

    block_hashes: list[BlockHash]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(KVCacheEvent):
    """Nothing is resident any more."""


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What one engine step changed."""

    ts: float  # seconds since the epoch, the engine's clock
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(KVEventBatch)


def encode_batch(batch: KVEventBatch) -> bytes:
    """The third frame of a message."""
    return _encoder.encode(batch)


def decode_batch(payload: bytes) -> KVEventBatch:
    """The inverse of `encode_batch`; fields that a newer vLLM added are ignored. Raises ValueError."""
    try:
        return _decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a KV event batch ({len(payload)} bytes): {error}") from error
