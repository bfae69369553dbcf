"""A fleet that is scaled, in virtual time: what it conserves, that it repeats itself, and that ours does not flap."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.backends.simulated_engine import SimulatedEngine
from headrace.errors import CallerError
from headrace.fleet.scaling_spec import ScalingSpec
from headrace_bench.scalers.fixed import Fixed
from headrace_bench.scalers.ours import Ours
from headrace_bench.scaling_arms import study_arms
from headrace_bench.scaling_cells import ENGINE, initial_replicas
from headrace_bench.scaling_fleet import ScalingSimulation
from headrace_bench.scaling_run import ScaledRun, figures_of, reversals
from headrace_bench.scaling_sample import Bounds, FleetSample, Scaler
from headrace_bench.scaling_workload import bursty, plan, widen
from headrace_bench.simulated_workload import SimulatedRequest, plan_requests
from headrace_bench.trace import TraceRecord

BOUNDS = Bounds(1, 12)


class Wandering:
    """Wants something else every few seconds."""

    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)
        self._wanted = 4

    def target(self, sample: FleetSample) -> int:
        if self._rng.random() < 0.2:
            self._wanted = self._rng.randint(0, 14)
        return self._wanted


def simulate(scaler: Scaler, seed: int = 1, num: int = 300, cold_start_s: float = 20.0) -> ScaledRun:
    requests = plan(bursty(num, 120.0, seed))
    return ScalingSimulation(
        requests, ENGINE, scaler, bounds=BOUNDS, cold_start_s=cold_start_s, initial=4, seed=seed
    ).run()


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10_000))
def test_however_it_is_scaled_every_request_ends_once_and_gpu_time_is_the_integral_of_replicas(
    seed: int,
) -> None:
    requests = plan(bursty(200, 120.0, seed))
    run = ScalingSimulation(
        requests, ENGINE, Wandering(seed), bounds=BOUNDS, cold_start_s=15.0, initial=3, seed=seed
    ).run()
    numbers = [one.number for one in run.answered]
    assert len(set(numbers)) == len(numbers)
    assert len(numbers) + run.refused == len(requests)
    moments = sorted(
        {0.0, run.end_s, *(min(at_s, run.end_s) for life in run.lives for at_s in life if at_s is not None)}
    )
    integral = sum((after - before) * run.replicas_at(before) for before, after in pairwise(moments))
    assert run.gpu_s == pytest.approx(integral)
    assert all(0 < one.ttft_s <= one.e2e_s for one in run.answered)


@pytest.mark.parametrize(
    "arm", {arm.family: arm for arm in reversed(study_arms())}.values(), ids=lambda arm: arm.name
)
def test_every_scaler_repeats_itself_and_keeps_within_bounds(arm: object) -> None:
    first, second = (simulate(arm.make(BOUNDS)) for _ in range(2))  # type: ignore[attr-defined]
    assert first == second
    assert all(BOUNDS.min_replicas <= target <= BOUNDS.max_replicas for _, target in first.targets)


def test_another_seed_is_another_run() -> None:
    assert simulate(Fixed(4), seed=1) != simulate(Fixed(4), seed=2)


def test_a_fixed_fleet_costs_its_replicas_for_as_long_as_requests_come() -> None:
    run = simulate(Fixed(4))
    assert run.gpu_s == pytest.approx(4 * run.end_s)
    assert run.targets == ((0.0, 4),)


def test_a_replica_costs_from_when_it_is_asked_for_and_serves_after_its_cold_start() -> None:
    class Step:
        def target(self, sample: FleetSample) -> int:
            seen.append((sample.at_s, sample.ready, sample.starting))
            return 2 if sample.at_s < 30.0 else 5

    seen: list[tuple[float, int, int]] = []
    run = simulate(Step())
    assert (31.0, 2, 3) in seen
    assert (49.0, 2, 3) in seen
    assert (51.0, 5, 0) in seen
    assert [asked_s for asked_s, _ in run.lives if asked_s > 0] == [30.0] * 3


def test_what_is_given_up_drains_before_it_goes_and_loses_nothing() -> None:
    class Drop:
        def target(self, sample: FleetSample) -> int:
            return 4 if sample.at_s < 60.0 else 1

    run = simulate(Drop())
    gone = sorted(gone_s for _, gone_s in run.lives if gone_s is not None)
    assert gone[-1] > 60.0, "the last one had something to finish"
    assert len(run.answered) + run.refused == len(plan(bursty(300, 120.0, 1)))


def test_requests_wait_in_the_queue_while_all_are_full_and_are_refused_after_a_minute() -> None:
    run = simulate(Fixed(1), num=600)
    assert run.refused > 0
    assert max(one.ttft_s for one in run.answered) < 75.0


def test_no_place_idles_while_requests_wait_in_the_queue() -> None:
    engine = ENGINE.model_copy(update={"max_running": 8, "decode_sequence_s": 0.0005})
    nothing = np.array([], np.uint64)
    requests = [
        SimulatedRequest(number, 0.0, 50, 60 + 37 * number % 60, [], nothing, str(number))
        for number in range(64)
    ]
    run = ScalingSimulation(
        requests, engine, Fixed(1), bounds=Bounds(1, 1), cold_start_s=20.0, initial=1, seed=1
    ).run()
    waited = sum(one.ttft_s > 1.0 for one in run.answered)
    all_at_once = SimulatedEngine(engine)
    for request in requests:
        all_at_once.add(str(request.number), request.prompt_tokens, request.answer_tokens, [])
    steps_s = 0.0
    while step := all_at_once.step():
        steps_s += step.duration_s
    assert waited > 40
    assert max(one.e2e_s for one in run.answered) < 1.02 * steps_s


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cold_start_s", [10.0, 60.0])
def test_ours_never_turns_twice_within_a_window(seed: int, cold_start_s: float) -> None:
    spec = ScalingSpec(1, 12, stabilisation_s=40.0)
    requests = plan(bursty(900, 400.0, seed))
    run = ScalingSimulation(
        requests, ENGINE, Ours(spec), bounds=BOUNDS, cold_start_s=cold_start_s, initial=4, seed=seed
    ).run()
    moves = [(at_s, target - before) for (_, before), (at_s, target) in pairwise(run.targets)]
    downs = [at_s for (_, before), (at_s, after) in pairwise(moves) if before > 0 > after]
    window_s = max(spec.stabilisation_s, cold_start_s)
    assert all(later - earlier >= window_s for earlier, later in pairwise(downs))


def test_prefixes_that_a_trace_names_are_found_by_a_fleet_that_changes() -> None:
    records = [TraceRecord(number * 0.5, 4000, 20, (0, 1, 2, 3, 4, 5, 6, 7)) for number in range(80)]
    requests = plan_requests(records, ENGINE.block_size, 0, 0.0)
    simulation = ScalingSimulation(
        requests, ENGINE, Wandering(3), bounds=BOUNDS, cold_start_s=15.0, initial=3, seed=0
    )
    run = simulation.run()
    alone = plan([TraceRecord(one.arrival_s, one.input_tokens, one.output_tokens) for one in records])
    blind = ScalingSimulation(
        alone, ENGINE, Wandering(3), bounds=BOUNDS, cold_start_s=15.0, initial=3, seed=0
    ).run()
    assert sum(one.ttft_s for one in run.answered) < 0.5 * sum(one.ttft_s for one in blind.answered)


def test_bounds_that_cannot_be_are_refused() -> None:
    with pytest.raises(CallerError, match="1 <= min <= max"):
        ScalingSimulation(
            plan(bursty(10, 10.0, 1)),
            ENGINE,
            Fixed(1),
            bounds=Bounds(3, 2),
            cold_start_s=1,
            initial=1,
            seed=0,
        )


def test_figures_count_refused_requests_as_missed() -> None:
    run = simulate(Fixed(1), num=600)
    figures = figures_of(run, 2.0)
    kept = sum(one.ttft_s <= 2.0 for one in run.answered)
    assert figures.attained == pytest.approx(kept / (len(run.answered) + run.refused))
    assert figures.gpu_h == pytest.approx(run.gpu_s / 3600)
    assert 0 <= figures.idle_gpu_h <= figures.gpu_h


def test_reversals_count_changes_of_direction() -> None:
    assert reversals(((0, 4), (1, 6), (2, 8), (3, 5), (4, 4), (5, 7))) == 2
    assert reversals(((0, 4),)) == 0


def test_widening_keeps_the_clock_and_widens_the_swing() -> None:
    calm = [TraceRecord(at * 1.0, 10, 5) for at in range(600)]
    busy = [TraceRecord(600 + at / 2, 20, 5) for at in range(1200)]
    widened = widen([*calm, *busy], 2.0, 3000, seed=0)
    assert abs(len(widened) - 3000) < 150
    assert widened[-1].arrival_s <= 1200
    share = sum(one.arrival_s < 540 for one in widened) / sum(one.arrival_s > 660 for one in widened)
    assert share == pytest.approx(0.25, rel=0.15)  # 1:2, squared
    assert widened == widen([*calm, *busy], 2.0, 3000, seed=0)


def test_the_fleet_starts_with_what_its_first_minutes_take() -> None:
    # 2.003 requests/s of 1.0 + 1.8 s of work each, at 80% of an engine's pace: 7.01.
    requests = plan([TraceRecord(number * 0.5, 4000, 100) for number in range(600)])
    engine = ENGINE.model_copy(update={"prefill_token_s": 0.00025, "decode_sequence_s": 0.018})
    assert initial_replicas(requests, engine) == 8
