"""Chained 64-bit hashes of token blocks and of text chunks.

The hash of a block names the block and everything before it: equal hashes mean equal prefixes, but for
collisions, of which a million blocks have one chance in 37 million. The hash is not cryptographic: whoever
crafts a collision gets a badly placed request, never another's text.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrace_kernels.compilation import compiled

TokenIds: TypeAlias = "NDArray[np.integer] | array[int] | memoryview | Sequence[int]"

_UINT32 = np.dtype(np.uint32)
_MASK = (1 << 64) - 1
# Odd multipliers with balanced bits: the golden ratio's fraction, and two of MurmurHash3's fmix64 family as
# improved by Stafford (variant 13).
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FINISH_1 = np.uint64(0xBF58476D1CE4E5B9)
_FINISH_2 = np.uint64(0x94D049BB133111EB)
_S27, _S29, _S30, _S31, _S32 = (np.uint64(bits) for bits in (27, 29, 30, 31, 32))


def salt(model: str, *, lora: str | None = None, cache_salt: str | None = None, seed: int = 0) -> int:
    """The parent of a prompt's first block: prompts share blocks only under the same model, adapter and salt.

    `seed` sets processes apart that must not share hashes; any integer of at most 64 bits.
    """
    digest = hashlib.blake2b(digest_size=8, key=(seed & _MASK).to_bytes(8, "little"))
    for field in (model, lora, cache_salt):
        encoded = b"" if field is None else field.encode()
        # None and the empty string differ; the length keeps ("ab", "c") and ("a", "bc") apart.
        digest.update((0 if field is None else len(encoded) + 1).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little")


def hash_blocks(token_ids: TokenIds, block_size: int, parent: int) -> NDArray[np.uint64]:
    """Hashes of the full blocks of `token_ids`, each over its own `block_size` tokens and all before it.

    `parent` is `salt(...)` at a prompt's start, or the hash of the block before `token_ids`. 32-bit buffers
    (numpy, `array('I')`) are read in place, taken modulo 2**32; other arrays and sequences of int are copied first.
    Raises ValueError when block_size < 1, OverflowError when a sequence holds an id outside 32 bits.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; a block holds at least 1 token")
    tokens = _as_tokens(token_ids)
    hashes = np.empty(tokens.size // block_size, np.uint64)
    chain_blocks(tokens, block_size, np.uint64(parent & _MASK), hashes)
    return hashes


def hash_chunks(text: bytes | bytearray | memoryview, chunk_bytes: int, parent: int) -> NDArray[np.uint64]:
    """Hashes of the full chunks of `text`, chained like blocks: a chunk is a block of 4-byte words.

    Raises ValueError unless `chunk_bytes` is a positive multiple of 4.
    """
    if chunk_bytes < 4 or chunk_bytes % 4:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; it must be a positive multiple of 4")
    words = np.frombuffer(text, _UINT32, count=len(text) // 4)
    return hash_blocks(words, chunk_bytes // 4, parent)


def _as_tokens(token_ids: TokenIds) -> NDArray[np.uint32]:
    """A read-only uint32 array, so that one machine code serves every caller."""
    tokens: Any
    if isinstance(token_ids, np.ndarray):
        tokens = token_ids
    elif isinstance(token_ids, array | memoryview):
        tokens = np.asarray(token_ids)
    else:
        # array() converts a list in about a third of the time that numpy takes.
        tokens = np.frombuffer(array("I", token_ids), _UINT32) if len(token_ids) else np.empty(0, _UINT32)
    if tokens.dtype is not _UINT32:
        tokens = tokens.view(_UINT32) if tokens.dtype == np.int32 else tokens.astype(_UINT32)
    flags = tokens.flags
    if not (flags.c_contiguous and flags.aligned):
        tokens = tokens.copy()
    elif tokens.ndim == 1 and not flags.writeable:
        words: NDArray[np.uint32] = tokens  # the usual case: a buffer of bytes
        return words
    view: NDArray[np.uint32] = tokens.reshape(-1)
    view.flags.writeable = False
    return view


@compiled
def chain_blocks(
    tokens: NDArray[np.uint32], block_size: int, parent: np.uint64, hashes: NDArray[np.uint64]
) -> None:
    """Fill `hashes`. Two tokens enter per step, and a block's own hash does not wait for its parent's:
    the processor then works on several blocks at once and only the last mixing is serial."""
    for block in range(hashes.size):
        first = block * block_size
        content = _STEP
        for at in range(first, first + block_size - 1, 2):
            pair = np.uint64(tokens[at]) | (np.uint64(tokens[at + 1]) << _S32)
            content = (content ^ pair) * _STEP
            content ^= content >> _S29
        if block_size & 1:
            content = (content ^ np.uint64(tokens[first + block_size - 1])) * _STEP
            content ^= content >> _S29
        parent = (parent ^ content) * _FINISH_1
        parent = (parent ^ (parent >> _S27)) * _FINISH_2
        parent ^= parent >> _S31
        hashes[block] = parent


def hash_blocks_reference(token_ids: Iterable[int], block_size: int, parent: int) -> list[int]:
    """`hash_blocks` in plain Python: the definition that the kernel must equal."""
    tokens = [token & 0xFFFFFFFF for token in token_ids]
    hashes = []
    for first in range(0, len(tokens) - block_size + 1, block_size):
        block = tokens[first : first + block_size]
        content = int(_STEP)
        for at in range(0, block_size, 2):
            pair = block[at] | (block[at + 1] << 32 if at + 1 < block_size else 0)
            content = (content ^ pair) * int(_STEP) & _MASK
            content ^= content >> 29
        parent = (parent ^ content) * int(_FINISH_1) & _MASK
        parent = (parent ^ (parent >> 27)) * int(_FINISH_2) & _MASK
        parent ^= parent >> 31
        hashes.append(parent)
    return hashes


if sys.byteorder != "little":
    raise ImportError("headrace_kernels reads text as little-endian words; this machine is big-endian")
