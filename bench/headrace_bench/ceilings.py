"""What no routing can beat: hit rates of caches without replicas, and the load that follows from them.

Both ceilings go through the requests in order of arrival and let each find what all before it left, finished or not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.config import SimulatedEngine
from headrace_bench.simulated_workload import SimulatedRequest


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Shares of all prompt tokens, 0..1."""

    infinite: float  # one shared cache that never evicts
    pooled: float  # one shared LRU cache of the fleet's total size


def ceilings(requests: Sequence[SimulatedRequest], engine: SimulatedEngine, num_replicas: int) -> Ceilings:
    """Of a fleet of equal replicas."""
    size = engine.block_size
    return Ceilings(
        infinite=_hit_rate(requests, size, None),
        pooled=_hit_rate(requests, size, num_replicas * engine.num_blocks),
    )


def _hit_rate(requests: Sequence[SimulatedRequest], block_size: int, num_blocks: int | None) -> float:
    cache: OrderedDict[int, None] = OrderedDict()
    hit_tokens = prompt_tokens = 0
    for request in requests:
        # As in the engine: at least one token is computed, so a prompt that is resident whole loses its last block.
        most = (request.prompt_tokens - 1) // block_size
        hits = 0
        for block_hash in request.hashes[:most]:
            if block_hash not in cache:
                break
            hits += 1
        hit_tokens += hits * block_size
        prompt_tokens += request.prompt_tokens
        for block_hash in reversed(request.hashes):  # the tail is evicted first, as the engine does
            cache[block_hash] = None
            cache.move_to_end(block_hash)
        if num_blocks is not None:
            while len(cache) > num_blocks:
                cache.popitem(last=False)
    return hit_tokens / prompt_tokens if prompt_tokens else 0.0


def work_s(requests: Sequence[SimulatedRequest], engine: SimulatedEngine, hit_rate: float) -> float:
    """Replica-seconds that the requests ask for when `hit_rate` of their prompt tokens are cached.

    Prefill and decode by the timing model, without `step_s`: a busier replica shares it among more sequences.
    """
    prompt = sum(request.prompt_tokens for request in requests)
    decode_s = sum(
        request.answer_tokens
        * (
            engine.decode_sequence_s
            + engine.context_token_s * (request.prompt_tokens + request.answer_tokens / 2)
        )
        for request in requests
    )
    return prompt * (1 - hit_rate) * engine.prefill_token_s + decode_s


def speed_at(
    requests: Sequence[SimulatedRequest], engine: SimulatedEngine, num_replicas: int, utilisation: float
) -> float:
    """How many times faster the requests must arrive for a pooled cache and perfect balance to be busy this much.

    The definition of a load level: it needs no simulation and no policy, only the trace and the fleet.
    """
    window_s = requests[-1].arrival_s - requests[0].arrival_s if requests else 0.0
    pooled = ceilings(requests, engine, num_replicas).pooled
    return utilisation * num_replicas * window_s / work_s(requests, engine, pooled)
