"""Policies that add up scores with fixed weights."""

from __future__ import annotations

from random import Random

from headrace_router.types import Request
from headrace_router.view import Decision, View

BLOCK_TOKENS = 16  # where a replica does not tell its block size


class KvBlend:
    """llm-d's weighted sum: 3 · share of the prompt held + 2 · free share of the KV cache + 2 · short queue.

    The queue counts from 1 (the shortest among the candidates) down to 0 (the longest). Ties are drawn.
    """

    name = "kv_blend"
    reads_prefixes = True
    of_prefix, of_memory, of_queue = 3.0, 2.0, 2.0

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, request: Request, view: View) -> Decision:
        loads = view.loads
        tokens = request.size_tokens
        hits = view.hit_tokens()
        queues = [load.waiting + load.unreported for load in loads]
        longest, shortest = max(queues), min(queues)
        spread = longest - shortest
        scores = []
        for index, load in enumerate(loads):
            held = 0.0 if hits is None else hits[index] / tokens
            queue = 1.0 if spread == 0 else (longest - queues[index]) / spread
            scores.append(
                self.of_prefix * held + self.of_memory * (1.0 - load.kv_use) + self.of_queue * queue
            )
        at = _draw(self._rng, scores, max(scores))
        return Decision(
            loads[at], "highest score", 0 if hits is None else hits[at], None, loads, scores, hits
        )


class BlockCost:
    """Dynamo's: blocks to prefill there plus blocks in use there, this request's included; the fewest win.

    `overlap_score_weight · potential_prefill_blocks + potential_decode_blocks`, weight 1, temperature 0
    (lib/llm/src/kv_router/scheduler.rs). Ties are drawn.
    """

    name = "block_cost"
    reads_prefixes = True
    weight = 1.0

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, request: Request, view: View) -> Decision:
        loads = view.loads
        tokens = request.size_tokens
        hits = view.hit_tokens()
        costs = []
        for index, load in enumerate(loads):
            block_size = load.replica.block_size or BLOCK_TOKENS
            hit = 0 if hits is None else hits[index]
            prefill = load.backlog_tokens + tokens - hit
            in_use = load.held_tokens + load.unreported_tokens + tokens
            costs.append((self.weight * prefill + in_use) / block_size)
        at = _draw(self._rng, costs, min(costs))
        return Decision(loads[at], "fewest blocks", 0 if hits is None else hits[at], None, loads, costs, hits)


def _draw(rng: Random, values: list[float], wanted: float) -> int:
    """One of the indices whose value is `wanted`."""
    tied = [index for index, value in enumerate(values) if value == wanted]
    return tied[0] if len(tied) == 1 else tied[int(rng.random() * len(tied))]
