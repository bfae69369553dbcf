"""Whether a replica can take one more request without making it wait. Pure.

Not a count of requests alone: sixty short ones may leave a replica idle in a moment, two long ones may fill it for a
minute. What counts is when this prompt would begin, as the router predicts it, whether it would fit, and whether one of
the places of the engine's batch is free or soon will be (`ReplicaLoad.open_places`): long answers to short prompts take
those while the backlog is small.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from headrace_router.replica_load import ReplicaLoad


class SaturationBound(NamedTuple):
    """What still counts as free."""

    wait_s: float = 0.5
    """Longest predicted wait. An engine needs some queue to fill its batches; what waits beyond that is better kept
    where it can still go to another replica, or to one that is only starting."""

    free_kv: float = 0.05
    """Share of the KV cache that decoding requests need to grow in; a prompt that would take it causes preemptions."""


DEFAULT_BOUND = SaturationBound()

LARGEST_PART = 0.5
"""Of the KV cache that a prompt is asked to find free. A larger one would find it only on an idle replica, and until
there is one everybody would wait behind it; sent to where half is free, it waits there alone."""


def is_saturated(load: ReplicaLoad, prompt_tokens: int, bound: SaturationBound = DEFAULT_BOUND) -> bool:
    """Whether this prompt had better not be sent there now. Reads, never mutates.

    A replica with nothing to do is never saturated, however large the prompt: waiting would not make room. Nor is one
    that reports nothing (an external server): what it does can only be guessed, and requests held on a wrong guess
    leave it idle, while sent ones wait there as they would without us.
    """
    if load.requests == 0 or load.reported_at_s is None:
        return False
    return load.wait_s > bound.wait_s or is_full(load, prompt_tokens, bound)


def is_full(load: ReplicaLoad, prompt_tokens: int, bound: SaturationBound = DEFAULT_BOUND) -> bool:
    """Whether there is no place for the request, or the prompt would take memory that running answers need."""
    if load.open_places < 1:
        return True
    replica = load.replica
    if replica.num_blocks is None or replica.block_size is None:
        return False
    capacity = replica.num_blocks * replica.block_size
    needed = min(prompt_tokens, LARGEST_PART * capacity) + bound.free_kv * capacity
    return load.requests > 0 and needed > load.room_tokens


def all_saturated(
    loads: Iterable[ReplicaLoad], prompt_tokens: int, bound: SaturationBound = DEFAULT_BOUND
) -> bool:
    """Whether the request should wait in the gateway. Stops at the first free one. True without a replica."""
    for load in loads:  # noqa: SIM110  a generator would cost more than the first replica's check
        if not is_saturated(load, prompt_tokens, bound):
            return False
    return True
