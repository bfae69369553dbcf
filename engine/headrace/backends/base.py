"""The contract of a backend: one engine, served over HTTP, that reports its load.

    vllm       vLLM's AsyncLLM and vLLM's own OpenAI server, in this process
    simulated  a paged cache, a batching scheduler and a timing model; same API, no model
    external   a server that somebody else runs; nothing is started, only watched

Whoever hosts a backend (the Ray actor, a test) calls `start` once, `check` as often as it likes, `sleep` and `wake` in
turns, `stop` at the end; `stop` is safe at any time and twice. `tests/contracts/test_backend_contract.py` is what every
one must pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from headrace_router.types import BootId, Endpoints, LoadReport

Progress = Callable[[str], None]
"""Called with a short phase name each time a start enters a new phase: "imports", "weights", "warm-up"."""


@dataclass(frozen=True, slots=True)
class Started:
    """What a started backend tells its host."""

    endpoints: Endpoints
    boot_id: BootId
    block_size: int | None = None  # tokens per KV block
    num_blocks: int | None = None
    max_model_len: int | None = None
    max_running: int | None = None  # places of the batch: requests that may run at one time
    kv_connector: str | None = None  # through which it hands prompts over, None where it does not
    phases_s: tuple[tuple[str, float], ...] = ()  # start-up time by phase


class Backend(Protocol):
    """One engine behind HTTP. All methods run on the host's event loop."""

    async def start(self, progress: Progress) -> Started:
        """Bring the engine up and return once it answers requests.

        Raises `headrace.errors.StartError` with a one-line reason and what to do.
        """
        ...

    async def check(self) -> None:
        """Return when the engine is healthy; raise `headrace.errors.ReplicaUnhealthy` when it is not."""
        ...

    def load(self) -> LoadReport | None:
        """The newest load report, None before the first or where the engine reports none. Never blocks."""
        ...

    def unfinished(self) -> int:
        """Requests that have arrived and are not answered to their end, those included that the engine does not know
        yet: being read, rendered, tokenised."""
        ...

    async def sleep(self) -> None:
        """Give the device's memory back and keep what makes waking quick; the prefix cache is forgotten. Every request
        gets 503 until `wake`. No effect when asleep.

        Raises `headrace.errors.SleepFailed`. Where requests run, or it cannot sleep, it serves on as if nobody had
        asked; where it tried and memory stayed taken, only `stop` is safe afterwards.
        """
        ...

    async def wake(self) -> None:
        """Be as before `sleep`, under the same boot id: it answers a probe as it did then. No effect when awake.

        Raises `headrace.errors.SleepFailed` where it does not; only `stop` is safe afterwards.
        """
        ...

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for at most `drain_s`, release everything. Idempotent."""
        ...
