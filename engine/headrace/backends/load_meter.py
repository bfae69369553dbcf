"""vLLM's statistics as load reports.

vLLM tells two stories. The scheduler's, once per engine step: running, KV use, what the step computed. The
frontend's, at any moment: requests not yet answered, and the prompts among them still without a first token.
A step of a long prefill takes seconds, so what arrives meanwhile is known to the frontend only:

    waiting = unfinished (frontend) - running (scheduler)
    backlog = prompt tokens without a first token (frontend) - those that steps have computed or found cached

The second difference is exact while chunks are computed; a waiting prompt counts in full, because how much of
it is cached is not known before the scheduler looks.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from headrace.backends.load_publisher import MAX_ITERATIONS
from headrace_router.types import BootId, Iteration, LoadReport, ReplicaId


class LoadMeter:
    """Accumulates one engine's statistics. Belongs to one event loop; `record` and `report` never block."""

    def __init__(self, replica_id: ReplicaId, boot_id: BootId) -> None:
        self._replica_id = replica_id
        self._boot_id = boot_id
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
            self._record_step(scheduler)
        if iteration is not None:
            prompts = iteration.prompt_token_stats
            self._progress_tokens -= prompts.total  # their first token is out
            self._prompt_tokens += prompts.total
            self._cached_tokens += prompts.cached_tokens
            self._generation_tokens += iteration.num_generation_tokens
            self._preemptions += iteration.num_preempted_reqs

    def _record_step(self, scheduler: Any) -> None:
        self._running = scheduler.num_running_reqs
        self._kv_use = scheduler.kv_cache_usage
        for cache in (scheduler.prefix_cache_stats, scheduler.connector_prefix_cache_stats):
            if cache is not None:
                self._progress_tokens += cache.hits
        details = scheduler.iteration_details
        if details is None or details.is_dummy:
            return
        self._progress_tokens += details.num_ctx_tokens
        self._iterations.append(
            Iteration(
                duration_s=details.elapsed_ms / 1000,
                prefill_tokens=details.num_ctx_tokens,
                decode_sequences=details.num_generation_requests,
            )
        )

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
        return LoadReport(
            replica_id=self._replica_id,
            boot_id=self._boot_id,
            sequence=0,
            running=running,
            waiting=unfinished - running,
            kv_use=min(1.0, max(0.0, self._kv_use if unfinished else 0.0)),
            backlog_tokens=max(0, prefilling_tokens - max(0, self._progress_tokens)),
            prompt_tokens_total=self._prompt_tokens,
            cached_tokens_total=self._cached_tokens,
            generation_tokens_total=self._generation_tokens,
            preemptions_total=self._preemptions,
            iterations=iterations,
        )
