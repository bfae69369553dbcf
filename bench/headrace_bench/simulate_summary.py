"""The numbers of a simulation. Pure, and free of wall-clock time: equal runs give equal summaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from headrace.config import SimulatedEngine
from headrace_bench.ceilings import Ceilings, work_s
from headrace_bench.load_summary import Distribution
from headrace_bench.simulated_workload import SimulatedRequest
from headrace_bench.simulator import Run
from headrace_bench.slo import Slo


@dataclass(frozen=True, slots=True)
class Imbalance:
    """The busiest replica over the mean one; 1 is even."""

    requests: float
    prefill_tokens: float
    busy_s: float


@dataclass(frozen=True, slots=True)
class SimulationSummary:
    """One policy, one seed. Latencies are of all requests, none left out as warm-up."""

    policy: str
    seed: int
    requests: int
    rejected: int
    window_s: float
    requests_per_s: float
    output_tokens_per_s: float
    hit_rate: float  # share of prompt tokens found cached when a request was first admitted
    predicted_hit_rate: float  # the same share as the router believed when it decided; 0 where it did not ask
    utilisation: float  # of the replicas' time, by prefill and decode work alone
    preemptions: int
    ttft_s: Distribution | None
    itl_s: Distribution | None  # over all tokens after the first of each answer
    tpot_s: Distribution | None  # over requests: mean time per token after the first
    e2e_s: Distribution | None
    goodput_per_s: float
    goodput_share: float
    imbalance: Imbalance
    handed_over: float = 0.0  # share of requests whose prompt another replica computed

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise_run(
    run: Run,
    requests: Sequence[SimulatedRequest],
    engine: SimulatedEngine,
    *,
    policy: str,
    seed: int,
    slo: Slo,
) -> SimulationSummary:
    """`slo` may bound TTFT, a request's mean ITL and end-to-end time; a rejected request keeps none."""
    served = run.served
    prompt_tokens = sum(one.prompt_tokens for one in served)
    hit_rate = sum(one.cached_tokens for one in served) / prompt_tokens if prompt_tokens else 0.0
    good = sum(_keeps(slo, one.ttft_s, one.itl_s, one.e2e_s) for one in served)
    per_s = 1 / run.window_s if run.window_s > 0 else 0.0
    capacity_s = len(run.replicas) * run.window_s
    return SimulationSummary(
        policy=policy,
        seed=seed,
        requests=len(served) + run.rejected,
        rejected=run.rejected,
        window_s=run.window_s,
        requests_per_s=len(served) * per_s,
        output_tokens_per_s=sum(one.answer_tokens for one in served) * per_s,
        hit_rate=hit_rate,
        predicted_hit_rate=(
            sum(one.expected_tokens for one in served) / prompt_tokens if prompt_tokens else 0.0
        ),
        utilisation=work_s(requests, engine, hit_rate) / capacity_s if capacity_s else 0.0,
        preemptions=run.preemptions,
        ttft_s=Distribution.of(one.ttft_s for one in served),
        itl_s=_of_counted(run.gaps_us),
        tpot_s=Distribution.of(itl_s for one in served if (itl_s := one.itl_s) is not None),
        e2e_s=Distribution.of(one.e2e_s for one in served),
        goodput_per_s=good * per_s,
        goodput_share=good / max(1, len(served) + run.rejected),
        imbalance=Imbalance(
            _peak_over_mean([use.requests for use in run.replicas]),
            _peak_over_mean([use.prefill_tokens for use in run.replicas]),
            _peak_over_mean([use.busy_s for use in run.replicas]),
        ),
        handed_over=sum(one.moved_tokens > 0 for one in served) / len(served) if served else 0.0,
    )


def ceilings_dict(ceiling: Ceilings) -> dict[str, float]:
    """For JSON."""
    return asdict(ceiling)


def _keeps(slo: Slo, ttft_s: float, itl_s: float | None, e2e_s: float) -> bool:
    pairs = ((slo.ttft_s, ttft_s), (slo.itl_s, itl_s), (slo.tpot_s, itl_s), (slo.e2e_s, e2e_s))
    return all(bound is None or value is None or value <= bound for bound, value in pairs)


def _peak_over_mean(values: Sequence[float]) -> float:
    mean = sum(values) / len(values) if values else 0.0
    return max(values) / mean if mean else 1.0


def _of_counted(gaps_us: Sequence[tuple[int, int]]) -> Distribution | None:
    """Of (value, how often) pairs in ascending order. Percentiles are the nearest sample above."""
    if not gaps_us:
        return None
    pairs = np.array(gaps_us, dtype=np.int64)
    values_s, counts = pairs[:, 0] / 1e6, pairs[:, 1]
    below = np.cumsum(counts)
    total = int(below[-1])
    at = np.searchsorted(below, np.array([0.5, 0.9, 0.95, 0.99]) * total)
    p50, p90, p95, p99 = (float(value) for value in values_s[at])
    mean = float((values_s * counts).sum() / total)
    return Distribution(total, mean, p50, p90, p95, p99, float(values_s[0]), float(values_s[-1]))
