"""What is simulated, apart from the policy: a trace, its speed, a fleet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from headrace.config import SimulatedEngine
from headrace.errors import CallerError
from headrace_bench.ceilings import Ceilings, ceilings, speed_at
from headrace_bench.handing_over import HandingOver
from headrace_bench.simulate_summary import SimulationSummary, summarise_run
from headrace_bench.simulated_workload import SimulatedRequest, clock_step_s, plan_requests
from headrace_bench.simulator import Run, Simulation
from headrace_bench.slo import Slo
from headrace_bench.trace import TraceRecord, rescale

STUDY_SLO = Slo(ttft_s=2.0, itl_s=0.04)
"""The objectives of goodput unless others are given: first token within 2 s, then 25 tokens/s."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Equal scenarios, policies and seeds give equal results."""

    records: tuple[TraceRecord, ...]
    engine: SimulatedEngine
    num_replicas: int
    speed: float = 1.0
    jitter_s: float | None = None  # of the trace's time; None: one step of its clock
    slo: Slo = STUDY_SLO
    handing_over: HandingOver | None = None  # None: no replica can hand over

    def __post_init__(self) -> None:
        if not self.records:
            raise CallerError("there is no request to simulate")
        if not 1 <= self.num_replicas <= 1024:
            raise CallerError(f"replicas must be 1..1024, got {self.num_replicas}")
        if self.handing_over is not None:
            self.handing_over.roles(self.num_replicas)

    def at_utilisation(self, utilisation: float) -> Scenario:
        """The same at the speed where a pooled cache and perfect balance would be busy this much."""
        requests = replace(self, speed=1.0).requests(seed=0)
        return replace(self, speed=speed_at(requests, self.engine, self.num_replicas, utilisation))

    def requests(self, seed: int) -> list[SimulatedRequest]:
        """What arrives. A seed moves each arrival within the jitter, and so changes the order of neighbours."""
        jitter_s = clock_step_s(self.records) if self.jitter_s is None else self.jitter_s
        return plan_requests(
            rescale(self.records, self.speed), self.engine.block_size, seed, jitter_s / self.speed
        )

    def ceilings(self, requests: Sequence[SimulatedRequest]) -> Ceilings:
        """Of this fleet."""
        return ceilings(requests, self.engine, self.num_replicas)

    def simulate(
        self, policy: str, seed: int, progress: Callable[[int], None] | None = None
    ) -> tuple[SimulationSummary, Run]:
        """Run it once. The seed also is the policy's."""
        requests = self.requests(seed)
        run = Simulation(
            requests,
            self.engine,
            self.num_replicas,
            policy=policy,
            seed=seed,
            progress=progress,
            handing_over=self.handing_over,
        ).run()
        return summarise_run(run, requests, self.engine, policy=policy, seed=seed, slo=self.slo), run

    def as_dict(self) -> dict[str, Any]:
        """Everything but the records themselves."""
        said: dict[str, Any] = {
            "requests": len(self.records),
            "replicas": self.num_replicas,
            "speed": self.speed,
            "jitter_s": clock_step_s(self.records) if self.jitter_s is None else self.jitter_s,
            "cache_tokens": self.engine.num_blocks * self.engine.block_size,
            "engine": self.engine.model_dump(mode="json"),
            "slo": dict(self.slo.bounds()),
        }
        if self.handing_over is not None:
            said["handing_over"] = asdict(self.handing_over)
        return said
