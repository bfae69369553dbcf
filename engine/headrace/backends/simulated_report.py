"""What a simulated engine says of itself, in real time and in virtual time alike."""

from __future__ import annotations

from headrace.backends.simulated_engine import SimulatedEngine
from headrace.backends.simulated_sequence import Step
from headrace_router.types import BootId, Iteration, LoadReport, ReplicaId, Transfer


def engine_report(
    engine: SimulatedEngine,
    in_flight: Step | None,
    replica_id: ReplicaId,
    boot_id: BootId,
    *,
    sequence: int = 0,
    iterations: tuple[Iteration, ...] = (),
    transfers: tuple[Transfer, ...] = (),
) -> LoadReport:
    """The engine's load while the step `in_flight` takes its time (None between steps).

    That step's prompt tokens are still in the backlog: the engine has booked them as done, but whoever arrives
    waits for them, and vLLM's statistics count them until the step has ended.
    """
    return LoadReport(
        replica_id=replica_id,
        boot_id=boot_id,
        sequence=sequence,
        running=engine.running,
        waiting=engine.waiting,
        kv_use=engine.kv_use,
        backlog_tokens=engine.backlog_tokens + (in_flight.prefill_tokens if in_flight else 0),
        prompt_tokens_total=engine.prompt_tokens_total,
        cached_tokens_total=engine.cached_tokens_total,
        generation_tokens_total=engine.generation_tokens_total,
        preemptions_total=engine.preemptions_total,
        iterations=iterations,
        transfers=transfers,
    )
