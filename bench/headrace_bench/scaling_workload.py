"""Load to scale by: a trace whose swing is widened, and bursts from a seed.

Azure's conversation trace of an hour swings 2.7 times between its quietest and its busiest minute; a service over a day
swings ten times. So its clock, its lengths and the shape of its hour are kept, and the local rate is raised to a power:
requests of quiet minutes are left out, those of busy ones are repeated, each repetition within a few seconds of its
original.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, pi, sin
from random import Random

import numpy as np

from headrace_bench.simulated_workload import SimulatedRequest
from headrace_bench.trace import TraceRecord

RATE_WINDOW_S = 60.0
REPEATED_WITHIN_S = 3.0

_NO_HASHES = np.array([], dtype=np.uint64)


def widen(
    records: Sequence[TraceRecord], power: float, num_requests: int, seed: int
) -> tuple[TraceRecord, ...]:
    """The trace with its local rate raised to `power`, of about `num_requests` in all."""
    rng = Random(f"widen {seed}")
    arrivals = np.array([record.arrival_s for record in records])
    near = np.searchsorted(arrivals, arrivals + RATE_WINDOW_S / 2) - np.searchsorted(
        arrivals, arrivals - RATE_WINDOW_S / 2
    )
    # A window over the trace's edge sees only its part inside.
    seen_s = np.minimum(arrivals + RATE_WINDOW_S / 2, arrivals[-1]) - np.maximum(
        arrivals - RATE_WINDOW_S / 2, 0.0
    )
    share = (near / seen_s) ** (power - 1.0)
    share *= num_requests / share.sum()
    widened = []
    for record, copies in zip(records, share.tolist(), strict=True):
        for copy in range(int(copies) + (rng.random() < copies % 1.0)):
            shift_s = rng.uniform(-REPEATED_WITHIN_S, REPEATED_WITHIN_S) if copy else 0.0
            arrival_s = min(max(0.0, record.arrival_s + shift_s), float(arrivals[-1]))
            widened.append(TraceRecord(arrival_s, record.input_tokens, record.output_tokens))
    widened.sort(key=lambda record: record.arrival_s)
    return tuple(widened)


def bursty(num_requests: int, duration_s: float, seed: int) -> tuple[TraceRecord, ...]:
    """One wave an hour between 1 and 10, and bursts on it: every 4 minutes on average one that multiplies it by 1.5 to
    3 for 20 to 90 s, rising within 5. Lengths are log-normal: prompts 1,000 tokens on average, answers 200."""
    rng = Random(f"bursty {seed}")
    bursts = []
    at_s = rng.expovariate(1 / 240.0)
    while at_s < duration_s:
        for_s = rng.uniform(20.0, 90.0)
        bursts.append((at_s, at_s + for_s, rng.uniform(1.5, 3.0)))
        at_s += for_s + rng.expovariate(1 / 240.0)
    phase = rng.uniform(0, 2 * pi)

    def rate(moment_s: float) -> float:
        level = exp(log(10) / 2 * (1 + sin(2 * pi * moment_s / 3600.0 + phase)))
        for begin_s, end_s, times in bursts:
            if begin_s <= moment_s < end_s:
                level *= 1 + (times - 1) * min(1.0, (moment_s - begin_s) / 5.0)
        return level

    levels = [rate(0.5 + second) for second in range(int(duration_s))]
    per_level = num_requests / sum(levels)
    records = []
    for second, level in enumerate(levels):
        records += [
            TraceRecord(second + rng.random(), _length(rng, 1000, 0.8), _length(rng, 200, 0.7))
            for _ in range(_poisson(rng, level * per_level))
        ]
    records.sort(key=lambda record: record.arrival_s)
    return tuple(records)


def plan(records: Sequence[TraceRecord]) -> list[SimulatedRequest]:
    """Requests whose prompts share nothing."""
    return [
        SimulatedRequest(
            number, record.arrival_s, record.input_tokens, record.output_tokens, [], _NO_HASHES, str(number)
        )
        for number, record in enumerate(records)
    ]


def _length(rng: Random, mean: float, sigma: float) -> int:
    median = mean * exp(-sigma * sigma / 2)
    return max(1, min(8000, round(rng.lognormvariate(log(median), sigma))))


def _poisson(rng: Random, mean: float) -> int:
    """Knuth's way: means here are about 10."""
    limit, product, number = exp(-mean), rng.random(), 0
    while product > limit:
        product *= rng.random()
        number += 1
    return number
