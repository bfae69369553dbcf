"""The arms of the disaggregation study and what each of their runs came to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headrace_bench.handing_over import HandingOver
from headrace_bench.scenario import Scenario
from headrace_bench.study_results import FlatRun
from headrace_router.disaggregation import ALWAYS_REMOTE, PER_REQUEST, THRESHOLD

NUM_REPLICAS = 8
RATIOS = ("2P+6D", "3P+5D", "4P+4D", "5P+3D")
SPEEDS = (0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
"""Of the trace. On eight engines of the study 0.75 is calm, 3 nearly fills them, 3.5 is more than they can take."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run eight replicas."""

    name: str
    policy: str
    handing_over: HandingOver | None  # None: nobody hands over

    def scenario(self, base: Scenario, speed: float) -> Scenario:
        return replace(base, speed=speed, handing_over=self.handing_over)


def _arm(pools: str, policy: str, disaggregation: str) -> Arm:
    name = f"{pools or 'flexible'}, {disaggregation.replace('_', ' ')}, {policy}"
    return Arm(name, policy, HandingOver(pools, disaggregation))


def study_arms() -> list[Arm]:
    """The cube (pools apart or flexible, aware of caches or not, per request or above a threshold), its corner without
    hand-overs, and the other ratios. The default comes first."""
    cube = [
        _arm(pools, policy, disaggregation)
        for pools in ("", "4P+4D")
        for policy in ("delay", "round_robin")
        for disaggregation in (PER_REQUEST, THRESHOLD)
    ]
    plain = [Arm(f"unified, no hand-over, {policy}", policy, None) for policy in ("delay", "round_robin")]
    ratios = [
        _arm(pools, "delay", disaggregation)
        for pools in RATIOS
        if pools != "4P+4D"
        for disaggregation in (PER_REQUEST, THRESHOLD)
    ]
    return [*cube, *plain, *ratios, _arm("4P+4D", "delay", ALWAYS_REMOTE)]


@dataclass(frozen=True, slots=True)
class Outcome(FlatRun):
    """One run. Seconds and shares."""

    arm: str
    speed: float
    seed: int
    goodput: float
    ttft_s: float
    ttft_p99_s: float
    itl_p99_s: float
    e2e_s: float
    hit_rate: float
    handed_over: float

    @property
    def key(self) -> tuple[str, float, int]:
        return self.arm, self.speed, self.seed


def run_arm(arm: Arm, base: Scenario, speed: float, seed: int) -> Outcome:
    """Simulate it once."""
    summary, _ = arm.scenario(base, speed).simulate(arm.policy, seed)
    ttft, itl, e2e = summary.ttft_s, summary.itl_s, summary.e2e_s
    assert ttft is not None and itl is not None and e2e is not None
    figures = (
        summary.goodput_share, ttft.mean, ttft.p99, itl.p99, e2e.mean, summary.hit_rate, summary.handed_over,
    )  # fmt: skip
    return Outcome(arm.name, speed, seed, *(round(figure, 5) for figure in figures))
