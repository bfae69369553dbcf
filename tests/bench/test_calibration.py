"""Calibration finds the constants of an engine that has known ones."""

from __future__ import annotations

import asyncio
from array import array
from pathlib import Path
from random import Random

import pytest

from headrace.backends.simulated import SimulatedBackend
from headrace.backends.timing_model import TimingModel
from headrace.config import SimulatedEngine
from headrace_bench.answer_stream import Usage
from headrace_bench.calibration import CalibrationError, decode_steps, fit_steps, prefill_step
from headrace_bench.calibration_load import ProbeLoad, observe
from headrace_bench.exchange import Exchange
from headrace_bench.load_client import LoadClient, Target
from headrace_bench.load_probe import probe
from headrace_router.types import Iteration, ReplicaId

TRUE = TimingModel(step_s=0.012, prefill_token_s=0.0004, decode_sequence_s=0.0015)


def steps(rng: Random, noise: float) -> list[Iteration]:
    made = []
    for number in range(200):
        prefill = rng.choice([0, 0, 64, 512, 2048])
        decodes = rng.randrange(0, 9) if prefill else rng.randrange(1, 9)
        duration_s = TRUE.duration_s(prefill, decodes) * (1 + rng.uniform(-noise, noise))
        made.append(Iteration(duration_s * (30 if number % 25 == 0 else 1), prefill, decodes))
    return made


@pytest.mark.parametrize("seed", range(3))
def test_stalled_steps_do_not_bend_the_fit(seed: int) -> None:
    fit = fit_steps(steps(Random(seed), 0.05))
    assert fit.timing.step_s == pytest.approx(TRUE.step_s, rel=0.1)
    assert fit.timing.prefill_token_s == pytest.approx(TRUE.prefill_token_s, rel=0.05)
    assert fit.timing.decode_sequence_s == pytest.approx(TRUE.decode_sequence_s, rel=0.1)
    assert fit.left_out >= 8
    assert fit.median_error < 0.05


def test_too_few_steps_are_said_to_be_too_few() -> None:
    with pytest.raises(CalibrationError, match="too few"):
        fit_steps([Iteration(0.01, 0, 1)] * 100)


async def test_a_served_engine_is_found_by_its_reports_to_be_what_it_is() -> None:
    engine = SimulatedEngine(step_s=0.004, prefill_token_s=0.0002, decode_sequence_s=0.002, num_blocks=4096)
    backend = SimulatedBackend(engine, "sim", ReplicaId("sim-0"))
    started = await backend.start(lambda phase: None)
    client = LoadClient(Target.parse(started.endpoints.url))
    try:
        facts = await probe(client, None, "chat")
        assert started.endpoints.load is not None
        load = ProbeLoad(max_prompt_tokens=512, concurrencies=(1, 4), repeats=1)
        seen = await observe(client, facts, load, (started.endpoints.load,))
    finally:
        client.close()
        await backend.stop()
    assert len(seen.reported) > len(seen.timed) > 0
    timing = fit_steps(seen.steps).timing
    assert timing.prefill_token_s == pytest.approx(engine.prefill_token_s, rel=0.01)
    assert timing.duration_s(0, 4) == pytest.approx(0.012, rel=0.01)


async def test_streams_side_by_side_count_while_all_of_them_decode() -> None:
    def stream(first_s: float, gaps_s: list[float]) -> Exchange:
        exchange = Exchange(asyncio.get_running_loop().create_future(), True)
        exchange.first_s, exchange.gaps_s = first_s, array("f", gaps_s)
        exchange.last_s = first_s + sum(gaps_s)
        exchange.usage = Usage(prompt_tokens=100, completion_tokens=1 + len(gaps_s))
        exchange.finish()
        return exchange

    # The second begins at 1.0 s; until then the first decodes alone. Two contents came at once.
    alone_then_both = stream(0.0, [0.25] * 4 + [0.5] * 8)
    both_then_alone = stream(1.0, [0.5] * 4 + [1.0, 0.0] + [0.5] * 4 + [0.25] * 4)
    first, second = decode_steps([alone_then_both, both_then_alone])
    assert first.duration_s == pytest.approx(0.5)
    assert second.duration_s == pytest.approx(0.5, abs=0.08)
    assert first.decode_sequences == second.decode_sequences == 2
    assert first.context_tokens >= 200


async def test_answers_without_usage_tell_nothing() -> None:
    client = LoadClient(Target("127.0.0.1", 1))
    exchange = await client.exchange("GET", "/nothing", timeout_s=1.0)
    assert exchange.error == "connect"
    assert prefill_step(exchange) is None
    assert decode_steps([exchange]) == []


def test_the_default_profile_file_says_what_the_code_says() -> None:
    from headrace_bench.timing_profile import DEFAULT_PROFILE, read_profile

    assert read_profile(Path(__file__).parents[2] / "configs/profiles/study.json") == DEFAULT_PROFILE
