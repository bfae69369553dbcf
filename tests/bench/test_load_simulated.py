"""The load generator against a simulated engine: what it says is what the engine counted."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest

from headrace.backends.simulated import SimulatedBackend
from headrace.config import SimulatedEngine
from headrace_bench.load_client import LoadClient, Target
from headrace_bench.load_driver import LoadDriver, LoadJob
from headrace_bench.load_probe import probe
from headrace_bench.load_summary import summarise
from headrace_bench.trace import TraceRecord
from headrace_bench.workload import Replay, Span, Synthetic, plan_replay, plan_synthetic
from headrace_router.types import ReplicaId

FAST = SimulatedEngine(step_s=0.0005, prefill_token_s=0.0, decode_sequence_s=0.0)


@pytest.fixture
async def backend() -> AsyncIterator[tuple[SimulatedBackend, str]]:
    simulated = SimulatedBackend(FAST, "sim", ReplicaId("sim-0"))
    started = await simulated.start(lambda phase: None)
    try:
        yield simulated, started.endpoints.url
    finally:
        await simulated.stop()


async def test_conversations_find_their_past_in_the_cache(backend: tuple[SimulatedBackend, str]) -> None:
    simulated, url = backend
    client = LoadClient(Target.parse(url))
    facts = await probe(client, None, "chat")
    client.close()
    spec = Synthetic(20, Span(40, 60), Span(8, 8), turns=5, system_prompts=2, system_tokens=200)
    plan = plan_synthetic(spec, facts.calibration, 0)
    job = LoadJob(Target.parse(url), facts.model, plan, users=2, ignore_eos=facts.ignore_eos)
    result = await LoadDriver(job).run(time.monotonic())
    summary = summarise(result.outcomes)
    assert (summary.requests, summary.succeeded, summary.output_tokens) == (20, 20, 160)
    assert summary.prompt_error is not None
    assert summary.prompt_error < 0.1
    shares = [turn.cached_share or 0.0 for turn in summary.turns]
    assert min(shares[1:]) > 0.6  # all but the newest message
    report = simulated.load()
    assert report is not None
    assert (report.running, report.waiting, report.generation_tokens_total) == (0, 0, 160)
    assert report.prompt_tokens_total == summary.prompt_tokens
    assert report.cached_tokens_total == summary.cached_tokens


async def test_a_replayed_trace_hits_the_cache_where_its_hash_ids_repeat(
    backend: tuple[SimulatedBackend, str],
) -> None:
    _, url = backend
    client = LoadClient(Target.parse(url))
    facts = await probe(client, None, "completions")
    client.close()
    records = [
        TraceRecord(0.0, 1024, 2, (0, 1)),
        TraceRecord(0.0, 1536, 2, (0, 1, 2)),
        TraceRecord(0.0, 512, 2, (9,)),
    ]
    plan = plan_replay(records, Replay(), facts.calibration)
    job = LoadJob(Target.parse(url), facts.model, plan, users=1, endpoint="completions")
    result = await LoadDriver(job).run(time.monotonic())
    cached = {outcome.conversation: outcome.cached_tokens or 0 for outcome in result.outcomes}
    prompts = {outcome.conversation: outcome.prompt_tokens for outcome in result.outcomes}
    assert prompts == {
        0: pytest.approx(1024, rel=0.05),
        1: pytest.approx(1536, rel=0.05),
        2: pytest.approx(512, rel=0.05),
    }
    # Blocks of the engine end where they end: up to one of the shared ones, and its neighbour, is computed again.
    assert cached[0] == cached[2] == 0
    assert cached[1] == pytest.approx(1024, abs=2 * FAST.block_size + 32)
