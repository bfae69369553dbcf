"""The cells of the scaling study: load, cold start, and the one engine that all replicas are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

from headrace.config import SimulatedEngine
from headrace_bench.scaling_arms import OURS, Arm
from headrace_bench.scaling_fleet import ScalingSimulation
from headrace_bench.scaling_run import ScalingFigures, figures_of
from headrace_bench.scaling_sample import Bounds
from headrace_bench.scaling_workload import bursty, plan, widen
from headrace_bench.simulated_workload import SimulatedRequest
from headrace_bench.study_results import fingerprint
from headrace_bench.trace import read_trace

COLD_STARTS_S = (30.0, 60.0, 180.0)
AZURE, BURSTY = "azure", "bursty"
BOUNDS = Bounds(2, 60)
NUM_REQUESTS = 12_000
POWER = 2.5
DURATION_S = 3_600.0
TTFT_SLO_S = 3.0

ENGINE = SimulatedEngine(
    block_size=512,
    num_blocks=96,
    max_batched_tokens=2048,
    max_running=256,
    max_model_len=32_768,
    step_s=0.02,
    prefill_token_s=1 / 2_400,
    decode_sequence_s=0.016,
)
"""Slow, so that an hour needs 4 to 40 of them at a tolerable number of requests: 2,400 prompt tokens/s, 20 ms and 16 ms
per sequence for a decode step, room for 49,152 tokens. A prompt of 4,100 tokens, of which Azure's trace has many, takes
1.7 s alone: hence the objective of 3 s."""

COMMON = (
    "headrace.backends.simulated_cache",
    "headrace.backends.simulated_engine",
    "headrace.backends.simulated_leap",
    "headrace.backends.simulated_report",
    "headrace.backends.simulated_sequence",
    "headrace.backends.timing_model",
    "headrace.fleet.scaling_sample",
    "headrace.gateway.demand",
    "headrace.gateway.metrics",
    "headrace_bench.scaled_replicas",
    "headrace_bench.scalers.one_by_one",
    "headrace_bench.scaling_fleet",
    "headrace_bench.scaling_run",
    "headrace_bench.scaling_sample",
    "headrace_bench.scaling_workload",
    "headrace_bench.simulated_replica",
    "headrace_bench.trace",
    "headrace_router.cost_model",
    "headrace_router.fair_queue",
    "headrace_router.load_table",
    "headrace_router.policies",
    "headrace_router.queue_order",
    "headrace_router.queue_pace",
    "headrace_router.replica_load",
    "headrace_router.router",
    "headrace_router.saturation",
)
"""Whatever can change a figure of any scaler."""

OWN = (
    "headrace.fleet.arriving_work",
    "headrace.fleet.autoscaler",
    "headrace.fleet.scaling_spec",
    "headrace.fleet.scaling_trust",
)
"""And of ours alone."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One picture of the study."""

    workload: str
    cold_start_s: float

    @property
    def name(self) -> str:
        return f"{self.workload}, cold start {self.cold_start_s:g} s"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run."""

    workload: str
    cold_start_s: float
    arm: str
    seed: int
    code: str  # fingerprint of what made it
    figures: ScalingFigures

    @property
    def key(self) -> tuple[str, float, str, int]:
        return self.workload, self.cold_start_s, self.arm, self.seed

    def row(self) -> list[Any]:
        """For the file: rounded, people read it too."""
        values = asdict(self.figures).values()
        rounded = [round(value, 5) if isinstance(value, float) else value for value in values]
        return [self.workload, self.cold_start_s, self.arm, self.seed, self.code, *rounded]

    @classmethod
    def columns(cls) -> list[str]:
        figures = [field.name for field in fields(ScalingFigures)]
        return ["workload", "cold_start_s", "arm", "seed", "code", *figures]

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> Outcome:
        return cls(*row[:5], ScalingFigures(*row[5:]))  # type: ignore[call-arg]


def study_cells() -> list[Cell]:
    """Both loads, three cold starts."""
    return [Cell(workload, cold_s) for workload in (AZURE, BURSTY) for cold_s in COLD_STARTS_S]


def code_of(arm: Arm) -> str:
    """Fingerprint of what can change this arm's figures."""
    return _fingerprint((*COMMON, arm.source, *(OWN if arm.family == OURS else ())))


@lru_cache(maxsize=32)
def _fingerprint(sources: tuple[str, ...]) -> str:
    setting = (ENGINE.model_dump_json(), BOUNDS, NUM_REQUESTS, POWER, DURATION_S, TTFT_SLO_S)
    return hashlib.blake2b(f"{fingerprint(sources)} {setting}".encode(), digest_size=8).hexdigest()


def run_arm(cell: Cell, arm: Arm, seed: int, trace: Path) -> Outcome:
    """Simulate it once, in whatever process. Raises `TraceError` where the trace is missing."""
    requests = cell_requests(cell.workload, seed, trace)
    run = ScalingSimulation(
        requests,
        ENGINE,
        arm.make(BOUNDS),
        bounds=BOUNDS,
        cold_start_s=cell.cold_start_s,
        initial=arm.initial or initial_replicas(requests),
        seed=seed,
    ).run()
    figures = figures_of(run, TTFT_SLO_S)
    return Outcome(cell.workload, cell.cold_start_s, arm.name, seed, code_of(arm), figures)


@lru_cache(maxsize=4)
def cell_requests(workload: str, seed: int, trace: Path) -> list[SimulatedRequest]:
    """What arrives."""
    if workload == BURSTY:
        return plan(bursty(NUM_REQUESTS, DURATION_S, seed))
    return plan(widen(read_trace(trace), POWER, NUM_REQUESTS, seed))


def initial_replicas(requests: Sequence[SimulatedRequest], engine: SimulatedEngine = ENGINE) -> int:
    """For all alike: what the first five minutes' work takes at 80% of an engine's pace."""
    first = [request for request in requests if request.arrival_s < requests[0].arrival_s + 300.0]
    work_s = sum(
        request.prompt_tokens * engine.prefill_token_s + request.answer_tokens * engine.decode_sequence_s
        for request in first
    )
    return max(1, ceil(work_s / max(1.0, first[-1].arrival_s - first[0].arrival_s) / 0.8))
