"""The numbers of a run: distributions, rates, goodput, errors by kind. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from headrace_bench.outcome import Outcome
from headrace_bench.slo import Goodput, Slo, goodput


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of one quantity, seconds. Percentiles interpolate linearly between the two nearest samples."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """None of nothing."""
        samples = np.fromiter(values, dtype=np.float64)
        if not samples.size:
            return None
        p50, p90, p95, p99 = (float(value) for value in np.percentile(samples, (50, 90, 95, 99)))
        low, high = float(samples.min()), float(samples.max())
        # The sum of many equal samples rounds, so their mean may leave the range by a unit in the last place.
        mean = min(high, max(low, float(samples.mean())))
        return cls(int(samples.size), mean, p50, p90, p95, p99, low, high)


@dataclass(frozen=True, slots=True)
class TurnSummary:
    """All first turns, all second turns, ..."""

    turn: int  # 1 is the first
    requests: int
    ttft_s: Distribution | None
    prompt_tokens: float  # mean
    cached_share: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """A whole run, warm-up left out. Latencies are of requests that succeeded."""

    requests: int
    succeeded: int
    errors: dict[str, int]  # by kind, most frequent first
    error_details: dict[str, str]  # one example per kind
    window_s: float  # from the first sending to the last end
    requests_per_s: float  # succeeded
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    cached_share: float | None  # of the prompt tokens; None where the server does not say
    uncounted: int  # answers without usage; their chunks were counted as tokens
    prompt_error: float | None  # mean of |planned - actual| / actual prompt tokens
    ttft_s: Distribution | None
    itl_s: Distribution | None  # over all chunks of all requests
    tpot_s: Distribution | None  # over requests
    e2e_s: Distribution | None
    goodput: Goodput | None  # None where no objective was given
    turns: tuple[TurnSummary, ...]  # empty for conversations of one turn
    replicas: dict[str, int]  # requests by x-headrace-replica, where the server says it

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(outcomes: Sequence[Outcome], slo: Slo | None = None) -> Summary:
    """Sum up the measured ones among `outcomes`; their order does not matter."""
    measured = [outcome for outcome in outcomes if outcome.measured]
    good = [outcome for outcome in measured if outcome.error is None]
    window_s = _window_s(measured)
    per_s = 1 / window_s if window_s > 0 else 0.0
    prompt_tokens = sum(outcome.prompt_tokens or 0 for outcome in good)
    output_tokens = sum(outcome.output_tokens for outcome in good)
    errors = Counter(outcome.error for outcome in measured if outcome.error is not None)
    # From the smallest detail, so that the order of the outcomes does not show.
    details = {kind: min(o.detail for o in measured if o.error == kind) for kind in errors}
    return Summary(
        requests=len(measured),
        succeeded=len(good),
        errors=dict(sorted(errors.items(), key=lambda item: (-item[1], item[0]))),
        error_details=details,
        window_s=window_s,
        requests_per_s=len(good) * per_s,
        prompt_tokens_per_s=prompt_tokens * per_s,
        output_tokens_per_s=output_tokens * per_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        cached_tokens=sum(outcome.cached_tokens or 0 for outcome in good),
        cached_share=_cached_share(good),
        uncounted=sum(not outcome.counted for outcome in good),
        prompt_error=_prompt_error(good),
        ttft_s=Distribution.of(sorted(o.ttft_s for o in good if o.ttft_s is not None)),
        itl_s=Distribution.of(sorted(gap for outcome in good for gap in outcome.gaps_s)),
        tpot_s=Distribution.of(sorted(o.tpot_s for o in good if o.tpot_s is not None)),
        e2e_s=Distribution.of(sorted(outcome.e2e_s for outcome in good)),
        goodput=goodput(measured, slo, window_s) if slo is not None and slo.bounds() else None,
        turns=_by_turn(good),
        replicas=dict(sorted(Counter(o.replica for o in good if o.replica is not None).items())),
    )


def _window_s(outcomes: Sequence[Outcome]) -> float:
    if not outcomes:
        return 0.0
    return max(outcome.end_s for outcome in outcomes) - min(outcome.sent_s for outcome in outcomes)


def _cached_share(good: Sequence[Outcome]) -> float | None:
    told = [outcome for outcome in good if outcome.cached_tokens is not None and outcome.prompt_tokens]
    prompt = sum(outcome.prompt_tokens or 0 for outcome in told)
    return sum(outcome.cached_tokens or 0 for outcome in told) / prompt if prompt else None


def _prompt_error(good: Sequence[Outcome]) -> float | None:
    told = [(outcome.planned_tokens, outcome.prompt_tokens) for outcome in good if outcome.prompt_tokens]
    return float(np.mean([abs(planned - actual) / actual for planned, actual in told])) if told else None


def _by_turn(good: Sequence[Outcome]) -> tuple[TurnSummary, ...]:
    turns: defaultdict[int, list[Outcome]] = defaultdict(list)
    for outcome in good:
        turns[outcome.turn].append(outcome)
    if len(turns) < 2:
        return ()
    return tuple(
        TurnSummary(
            turn=turn + 1,
            requests=len(said),
            ttft_s=Distribution.of(sorted(o.ttft_s for o in said if o.ttft_s is not None)),
            prompt_tokens=float(
                np.mean([outcome.prompt_tokens or outcome.planned_tokens for outcome in said])
            ),
            cached_share=_cached_share(said),
        )
        for turn, said in sorted(turns.items())
    )
