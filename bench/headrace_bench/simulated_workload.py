"""The requests of a simulation: a trace's records with arrival times and block hashes.

Mooncake: an id names 512 tokens of prompt. It becomes the hash of one engine block of 512, or of 512/b blocks of
b tokens; the last, partial block of a prompt is shared with nobody, as in an engine. What an answer fills is its
own: the trace does not say which later prompt repeats it (where one does, it has ids of its own for it).
Azure: lengths only; every block is the request's own.

A session, for policies with affinity, is a chain of prompts each of which begins with the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from headrace.errors import CallerError
from headrace_bench.trace import BLOCK_TOKENS, TraceRecord

_MASK = (1 << 64) - 1
_OWN = 1 << 62  # ids of blocks that no other request has begin here


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """One request as the fleet will see it."""

    number: int  # in order of arrival
    arrival_s: float
    prompt_tokens: int
    answer_tokens: int
    hashes: list[int]  # of the full blocks of prompt and answer; for the engine
    prompt_hashes: NDArray[np.uint64]  # of the full blocks of the prompt; for the router
    session: str  # the conversation that it continues, or its own


def clock_step_s(records: Sequence[TraceRecord]) -> float:
    """The grain of the trace's clock, 0 where arrivals are fine-grained.

    Mooncake's traces tell time in steps of 3 s: ten requests at the same instant, then none for 3 s. Nothing on
    the wire looks like that, so a simulation spreads a step's requests over the step.
    """
    moments = sorted({record.arrival_s for record in records})
    if len(moments) < 2 or len(moments) * 2 > len(records):
        return 0.0
    return float(np.median(np.diff(moments)))


def plan_requests(
    records: Sequence[TraceRecord], block_size: int, seed: int, jitter_s: float | None = None
) -> list[SimulatedRequest]:
    """Requests in order of arrival. Each arrives up to `jitter_s` later than its record says, drawn by `seed`;
    by default within one step of the trace's clock.

    Raises `CallerError` when the trace names shared blocks and `block_size` does not divide them.
    """
    if BLOCK_TOKENS % block_size and any(record.hash_ids for record in records):
        raise CallerError(
            f"blocks of {block_size} tokens do not tile the trace's {BLOCK_TOKENS}; choose a divisor"
        )
    if jitter_s is None:
        jitter_s = clock_step_s(records)
    rng = Random(f"arrivals {seed}")
    arrivals = [(record.arrival_s + rng.random() * jitter_s, i) for i, record in enumerate(records)]
    arrivals.sort()
    own = _OWN
    requests = []
    sessions: dict[int, str] = {}  # by the hash of the last full block of a prompt
    for number, (arrival_s, index) in enumerate(arrivals):
        record = records[index]
        shared = _shared_blocks(record, block_size)
        num_blocks = (record.input_tokens + record.output_tokens) // block_size
        ids = [*shared, *range(own, own + num_blocks - len(shared))]
        own += num_blocks - len(shared)
        hashes = chain(ids)
        prompt = hashes[: record.input_tokens // block_size]
        session = _session(prompt, sessions) or str(number)
        if prompt:
            sessions[prompt[-1]] = session
        requests.append(
            SimulatedRequest(
                number=number,
                arrival_s=arrival_s,
                prompt_tokens=record.input_tokens,
                answer_tokens=record.output_tokens,
                hashes=hashes,
                prompt_hashes=np.array(prompt, dtype=np.uint64),
                session=session,
            )
        )
    return requests


def _session(prompt: Sequence[int], sessions: dict[int, str]) -> str | None:
    """The session of the longest earlier prompt that this one begins with. Traces name no sessions.

    A prompt is continued once: a system prompt that stands alone would otherwise make one session of everything.
    """
    for block_hash in reversed(prompt):
        if (session := sessions.pop(block_hash, None)) is not None:
            return session
    return None


def _shared_blocks(record: TraceRecord, block_size: int) -> list[int]:
    per_id = BLOCK_TOKENS // block_size
    full = record.input_tokens // block_size
    if not record.hash_ids:
        return []
    if per_id == 1:
        return list(record.hash_ids[:full])
    return [block * per_id + part for block in record.hash_ids for part in range(per_id)][:full]


def chain(ids: Sequence[int]) -> list[int]:
    """Each block's hash is over its parent's and its own id, as in an engine: equal hash, equal prefix."""
    parent = 0
    hashes = []
    for block in ids:
        parent = _mix(parent ^ block)
        hashes.append(parent)
    return hashes


def _mix(value: int) -> int:
    """splitmix64's finaliser: ids in sequence become hashes spread over 64 bits, one to one."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
