"""The words of the router: replicas, their load, requests, decisions.

Values only. Everything here is frozen, carries its units in its name, and can be built in a test by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, NewType

import numpy as np
from numpy.typing import NDArray

ReplicaId = NewType("ReplicaId", str)
"""Name of one replica slot, stable across restarts: ``smollm2-unified-0``."""

BootId = NewType("BootId", str)
"""Random per replica start; tells a restarted replica from its predecessor."""


class Role(StrEnum):
    """Which half of a request a pool runs."""

    UNIFIED = "unified"
    PREFILL = "prefill"
    DECODE = "decode"


class ReplicaState(StrEnum):
    """Life of a replica, in order. Only READY replicas receive new requests."""

    PENDING = "pending"  # asked for, not yet placed
    STARTING = "starting"  # placed, loading
    READY = "ready"
    DRAINING = "draining"  # finishes what runs, receives nothing new
    SLEEPING = "sleeping"  # has given its device's memory back; serves nobody until it is woken
    FAILED = "failed"  # died or never started; a successor may be on its way
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where one started replica can be reached.

    ``url`` serves OpenAI's API over HTTP, without a trailing slash. The ZMQ endpoints (``tcp://host:port``)
    are None where the engine publishes nothing (an external server).
    """

    url: str
    load: str | None = None  # PUB of LoadReport, msgpack
    kv_events: str | None = None  # PUB, vLLM's wire format: topic, 8-byte big-endian sequence, batch
    kv_replay: str | None = None  # ROUTER, replays batches from a start sequence


@dataclass(frozen=True, slots=True)
class Replica:
    """One member of the fleet as the gateways see it."""

    id: ReplicaId
    boot_id: BootId
    model: str  # served name, what clients send as "model"
    role: Role
    endpoints: Endpoints
    state: ReplicaState = ReplicaState.READY
    block_size: int | None = None  # tokens per KV block, None where unknown
    num_blocks: int | None = None  # KV blocks in total, None where unknown
    max_model_len: int | None = None  # tokens, prompt and answer together
    max_running: int | None = None  # places of the engine's batch, None where unknown
    node: str = ""  # where it runs, for people
    api_key: str | None = None  # asked for by this replica alone (an external server); never shown
    kv_connector: str | None = None  # replicas of one model with the same one may hand KV over to each other


@dataclass(frozen=True, slots=True)
class Membership:
    """Every replica of the fleet at one version. Versions only grow within one ``epoch`` (a controller's life)."""

    version: int
    replicas: tuple[Replica, ...]
    epoch: str = ""
    models: tuple[str, ...] = ()  # every configured one, also without a replica; replicas' own count anyway
    coming: tuple[
        str, ...
    ] = ()  # models of which a replica starts, or would on demand: their requests may wait for it


@dataclass(frozen=True, slots=True)
class Iteration:
    """One engine step: what it computed and how long it took. The timing models are fitted from these."""

    duration_s: float
    prefill_tokens: int  # prompt tokens computed in this step
    decode_sequences: int  # sequences that each produced a token
    context_tokens: int = 0  # tokens already in the cache that this step attended to, 0 where unknown


class Transfer(NamedTuple):
    """One KV hand-over that a decoding engine received."""

    tokens: int  # whose keys and values came
    duration_s: float  # from asking for them to having them


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What an engine says of itself, sent on change and at least every 100 ms.

    Gauges are as of ``sequence``; counters only grow within one ``boot_id``.
    """

    replica_id: ReplicaId
    boot_id: BootId
    sequence: int  # grows by one per report
    running: int  # requests in the batch
    waiting: int  # requests queued in the engine
    kv_use: float  # 0..1, share of KV blocks in use
    backlog_tokens: int  # uncached prompt tokens waiting or being prefilled
    prompt_tokens_total: int = 0  # counter: prompt tokens of admitted requests, cached ones included
    cached_tokens_total: int = 0  # counter: of those, found in the prefix cache
    generation_tokens_total: int = 0  # counter
    preemptions_total: int = 0  # counter
    iterations: tuple[Iteration, ...] = ()  # steps since the last report, newest last, at most 64
    transfers: tuple[Transfer, ...] = ()  # received since the last report


class Request(NamedTuple):
    """What a policy may know of a request. A tuple: one is made per request, a frozen dataclass costs 1 µs more.

    Prompts are known by token blocks (precise), by text chunks (learned from our own routing), or not at all: then
    only load decides.
    """

    model: str
    prompt_bytes: int = 0  # length of the request body
    max_tokens: int | None = None
    session: str | None = None  # `x-session-id` header or the body's `user`, for affinity
    excluded: frozenset[ReplicaId] = frozenset()  # already tried
    prompt_tokens: int | None = None  # None where nobody counted; then `prompt_bytes` is the estimate
    block_hashes: Mapping[int, NDArray[np.uint64]] | None = None
    """Of the full blocks, by block size: one entry per size in `PrefixIndex.block_sizes(model)`."""
    chunk_hashes: NDArray[np.uint64] | None = None  # of the full text chunks, where tokens are not known
    priority: int = 0  # lower is served first, as in vLLM
    can_hand_over: bool = False  # the API call allows that another replica computes the prompt

    @property
    def size_tokens(self) -> int:
        """Tokens of the prompt, or an estimate of them: English text has about four bytes per token."""
        counted = self.prompt_tokens
        return counted if counted is not None else (self.prompt_bytes >> 2) + 1
