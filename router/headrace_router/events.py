"""What an engine says of its prefix cache, as plain values.

The wire's forms live with the engine; whoever reads the wire turns them into these. Hashes are the engine's own: the
index maps them to ours by hashing the token ids again, so that no hash setting of an engine has to match.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace_router.types import BootId, ReplicaId

EngineHash = int
"""64 bits; a longer digest is cut to its last 8 bytes by whoever reads the wire."""

GPU = "GPU"
CPU = "CPU"
"""Media: where a block lies. Anything that is not GPU memory is priced as CPU memory."""


class BlocksStored(NamedTuple):
    """Consecutive blocks became resident.

    `tokens` are those of all of them, in order. `parent` is the engine's hash of the block before, None at a prompt's
    start; `lora` and `cache_salt` count only there, later blocks inherit them through the parent.
    An engine may announce a hash that it already holds (two requests computed the same block): it then holds two
    copies and announces the removal of each.
    """

    hashes: Sequence[EngineHash]
    parent: EngineHash | None
    tokens: NDArray[np.uint32] | array[int] | Sequence[int]
    block_size: int
    medium: str = GPU
    lora: str | None = None
    cache_salt: str | None = None


class BlocksKnown(NamedTuple):
    """`BlocksStored` where the sender already has our hashes (a simulator, which has no tokens)."""

    hashes: Sequence[EngineHash]
    ours: NDArray[np.uint64]
    block_size: int
    medium: str = GPU


class BlocksRemoved(NamedTuple):
    """Blocks were evicted."""

    hashes: Sequence[EngineHash]
    medium: str = GPU


class AllCleared(NamedTuple):
    """Nothing is resident any more, on any medium."""


CacheEvent = BlocksStored | BlocksKnown | BlocksRemoved | AllCleared


class EventBatch(NamedTuple):
    """One message of one replica's event stream. Sequence numbers grow by one from 0 within one boot."""

    replica_id: ReplicaId
    boot_id: BootId
    sequence: int
    events: Sequence[CacheEvent]
