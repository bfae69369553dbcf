"""vLLM's statistics as load reports.

vLLM tells two stories. The scheduler's, once per engine step: running, KV use, what the step computed. The
frontend's, at any moment: requests not yet answered, and the prompts among them still without a first token.
A step of a long prefill takes seconds, so what arrives meanwhile is known to the frontend only:

    waiting = unfinished (frontend) - running (scheduler)
    backlog = prompt tokens without a first token (frontend) - those that steps have computed or found cached

The second difference is exact while chunks are computed; a waiting prompt counts in full, because how much of
it is cached is not known before the scheduler looks.

How long a step took: vLLM times the model alone. Scheduling and sending the answers out come on top of it, and
whoever waits for a first token waits for them too. The engine's own time stamps tell: what lies between two tokens of
one sequence that was in both steps. Without such a sequence the model's time has to do.

What a step attended to nobody tells; it is what the sequences of the batch hold in the KV cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from headrace.backends.load_publisher import MAX_ITERATIONS
from headrace_router.types import BootId, Iteration, LoadReport, ReplicaId, Transfer

LONGEST_OVERHEAD = 2.0
"""A sequence that skipped steps has a longer gap than any overhead explains: beyond this the model's time counts."""


class LoadMeter:
    """Accumulates one engine's statistics. Belongs to one event loop; `record` and `report` never block."""

    def __init__(self, replica_id: ReplicaId, boot_id: BootId, *, holds_blocks: bool = False) -> None:
        """`holds_blocks`: blocks may stay in use after their request has ended, to be fetched by another replica."""
        self._holds_blocks = holds_blocks
        self._external_tokens = 0  # prompt tokens that came from other replicas
        self._external_bytes = 0
        self._transfers: deque[Transfer] = deque(maxlen=MAX_ITERATIONS)
        self._replica_id = replica_id
        self._boot_id = boot_id
        self.capacity_tokens = 0  # of the KV cache; 0 until the engine has told
        self._running = 0
        self._kv_use = 0.0
        self._progress_tokens = 0  # of prompts still without a first token: computed or found cached
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generation_tokens = 0
        self._preemptions = 0
        self._iterations: deque[Iteration] = deque(maxlen=MAX_ITERATIONS)

    def record(self, scheduler: Any | None, iteration: Any | None) -> None:
        """Take in one engine step: vLLM's SchedulerStats and IterationStats, either may be missing."""
        if scheduler is not None:
            self._record_step(scheduler, iteration)
        if iteration is not None:
            prompts = iteration.prompt_token_stats
            self._progress_tokens -= prompts.total  # their first token is out
            self._prompt_tokens += prompts.total
            self._cached_tokens += prompts.cached_tokens
            self._generation_tokens += iteration.num_generation_tokens
            self._preemptions += iteration.num_preempted_reqs

    def _record_step(self, scheduler: Any, iteration: Any | None) -> None:
        self._running = scheduler.num_running_reqs
        self._kv_use = scheduler.kv_cache_usage
        for cache in (scheduler.prefix_cache_stats, scheduler.connector_prefix_cache_stats):
            if cache is not None:
                self._progress_tokens += cache.hits
        if scheduler.connector_prefix_cache_stats is not None:
            self._external_tokens += scheduler.connector_prefix_cache_stats.hits
        if stats := getattr(scheduler, "kv_connector_stats", None):
            self._record_transfers(_of_nixl(stats))
        details = scheduler.iteration_details
        if details is None or details.is_dummy:
            return
        self._progress_tokens += details.num_ctx_tokens
        held_tokens = round(self._kv_use * self.capacity_tokens)
        self._iterations.append(
            Iteration(
                duration_s=_duration_s(details.elapsed_ms / 1000, iteration),
                prefill_tokens=details.num_ctx_tokens,
                decode_sequences=details.num_generation_requests,
                context_tokens=max(0, held_tokens - details.num_ctx_tokens),
            )
        )

    def _record_transfers(self, stats: Mapping[str, Any]) -> None:
        """vLLM tells bytes; their ratio to tokens is this model's, learned from all that came."""
        durations_s, sizes = stats.get("transfer_duration", ()), stats.get("bytes_transferred", ())
        self._external_bytes += sum(sizes)
        if not self._external_bytes or not self._external_tokens:
            return
        tokens_per_byte = self._external_tokens / self._external_bytes
        for duration_s, size in zip(durations_s, sizes, strict=False):
            self._transfers.append(Transfer(max(1, round(size * tokens_per_byte)), duration_s))

    def report(self, unfinished: int, prefilling_tokens: int) -> LoadReport:
        """The load now, with the iterations since the last call.

        `unfinished` requests and `prefilling_tokens` (of prompts without a first token) are the frontend's.
        """
        if prefilling_tokens == 0:
            # Aborted prompts leave their progress behind, preempted ones count twice: settled here.
            self._progress_tokens = 0
        running = min(self._running, unfinished)
        iterations = tuple(self._iterations)
        self._iterations.clear()
        transfers = tuple(self._transfers)
        self._transfers.clear()
        holds = unfinished or self._holds_blocks
        return LoadReport(
            replica_id=self._replica_id,
            boot_id=self._boot_id,
            sequence=0,
            running=running,
            waiting=unfinished - running,
            kv_use=min(1.0, max(0.0, self._kv_use if holds else 0.0)),
            backlog_tokens=max(0, prefilling_tokens - max(0, self._progress_tokens)),
            prompt_tokens_total=self._prompt_tokens,
            cached_tokens_total=self._cached_tokens,
            generation_tokens_total=self._generation_tokens,
            preemptions_total=self._preemptions,
            iterations=iterations,
            transfers=transfers,
        )


def _duration_s(model_s: float, iteration: Any | None) -> float:
    """From the end of the step before to the end of this one, where a sequence was in both; else the model's time."""
    gaps_s = () if iteration is None else iteration.inter_token_latencies_iter
    gap_s = min(gaps_s, default=0.0)
    return gap_s if model_s < gap_s <= LONGEST_OVERHEAD * model_s else model_s


def _of_nixl(stats: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transfer statistics themselves; a MultiConnector keeps those of each part under its name."""
    if "transfer_duration" in stats:
        return stats
    for part in stats.values():
        data = getattr(part, "data", part)
        if isinstance(data, Mapping) and (found := _of_nixl(data)):
            return found
    return {}
