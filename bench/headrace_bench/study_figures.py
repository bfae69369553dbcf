"""What the policy study keeps of a run."""

from __future__ import annotations

from dataclasses import dataclass

from headrace_bench.simulate_summary import SimulationSummary
from headrace_bench.study_cells import Cell
from headrace_bench.study_results import FlatRun


@dataclass(frozen=True, slots=True)
class Figures(FlatRun):
    """One run: a cell, a policy, a seed. Seconds and shares."""

    cell: str
    policy: str
    seed: int
    speed: float
    pooled: float  # hit rate ceilings
    infinite: float
    ttft_s: float
    ttft_p99_s: float
    itl_s: float
    itl_p99_s: float
    e2e_s: float
    e2e_p99_s: float
    hit_rate: float
    goodput: float
    imbalance: float

    @classmethod
    def of(
        cls, cell: Cell, summary: SimulationSummary, speed: float, pooled: float, infinite: float
    ) -> Figures:
        """Rounded: a file of a thousand runs is read by people too."""
        ttft, itl, e2e = summary.ttft_s, summary.itl_s, summary.e2e_s
        assert ttft is not None and itl is not None and e2e is not None
        numbers = (
            speed, pooled, infinite, ttft.mean, ttft.p99, itl.mean, itl.p99, e2e.mean, e2e.p99,
            summary.hit_rate, summary.goodput_share, summary.imbalance.prefill_tokens,
        )  # fmt: skip
        return cls(cell.name, summary.policy, summary.seed, *(round(number, 5) for number in numbers))

    @property
    def key(self) -> tuple[str, str, int]:
        return self.cell, self.policy, self.seed
