"""What came of a run under a scaler, and its figures. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Answered(NamedTuple):
    """One request that was answered. Seconds of virtual time."""

    number: int
    arrival_s: float
    ttft_s: float
    e2e_s: float
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class ScaledRun:
    """One simulation, ended."""

    answered: tuple[Answered, ...]  # in order of arrival
    refused: int  # their deadline in the queue passed, it was full, or they are longer than the context
    end_s: float  # the last arrival: GPU time is counted until then
    lives: tuple[tuple[float, float | None], ...]  # of each replica: asked for, gone
    targets: tuple[tuple[float, int], ...]  # whenever what the scaler wants changed
    busy_s: float  # of all replicas

    @property
    def gpu_s(self) -> float:
        """GPU seconds, one GPU per replica, starting and draining included."""
        return sum(
            max(0.0, min(self.end_s, self.end_s if gone_s is None else gone_s) - min(asked_s, self.end_s))
            for asked_s, gone_s in self.lives
        )

    def replicas_at(self, moment_s: float) -> int:
        """Replicas that cost GPU time then."""
        return sum(
            asked_s <= moment_s and (gone_s is None or moment_s < gone_s) for asked_s, gone_s in self.lives
        )


@dataclass(frozen=True, slots=True)
class ScalingFigures:
    """What is compared."""

    requests: int
    attained: (
        float  # share of all requests whose first token came within the objective, refused ones included
    )
    gpu_h: float
    idle_gpu_h: float  # of those, without a step under way
    gpu_s_per_request: float  # answered
    ttft_mean_s: float
    ttft_p99_s: float
    tpot_p90_s: float
    refused: int
    reversals: int  # changes of direction of what was wanted
    most_replicas: int


def figures_of(run: ScaledRun, ttft_slo_s: float) -> ScalingFigures:
    """Of a run of at least one request."""
    ttft_s = np.array([one.ttft_s for one in run.answered] or [np.inf])
    tpot_s = [
        (one.e2e_s - one.ttft_s) / (one.answer_tokens - 1) for one in run.answered if one.answer_tokens > 1
    ]
    requests = len(run.answered) + run.refused
    gpu_s = run.gpu_s
    return ScalingFigures(
        requests=requests,
        attained=float((ttft_s <= ttft_slo_s).sum()) / requests,
        gpu_h=gpu_s / 3600,
        idle_gpu_h=max(0.0, gpu_s - run.busy_s) / 3600,
        gpu_s_per_request=gpu_s / max(1, len(run.answered)),
        ttft_mean_s=float(ttft_s.mean()),
        ttft_p99_s=float(np.quantile(ttft_s, 0.99)),
        tpot_p90_s=float(np.quantile(tpot_s, 0.9)) if tpot_s else 0.0,
        refused=run.refused,
        reversals=reversals(run.targets),
        most_replicas=max(run.replicas_at(asked_s) for asked_s, _ in run.lives),
    )


def reversals(targets: tuple[tuple[float, int], ...]) -> int:
    """How often what was wanted went down after it had gone up, or up after down."""
    signs = [after > before for (_, before), (_, after) in pairwise(targets) if after != before]
    return sum(before != after for before, after in pairwise(signs))
