"""A timing model from real steps: a fit that a few odd steps do not bend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from headrace.backends.timing_model import FEWEST_ITERATIONS, TimingModel, fit_timing
from headrace.errors import CallerError
from headrace_bench.exchange import Exchange
from headrace_router.types import Iteration

ROUNDS = 4
FURTHEST = 4.0
"""A step this many median errors off the fit is left out of the next: a pause of the machine, a compilation."""


class CalibrationError(CallerError):
    """Too little was seen to fit. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A timing model and how well it tells the steps it was fitted to."""

    timing: TimingModel
    steps: int
    left_out: int
    median_error: float  # relative, of the steps kept


def fit_steps(steps: Sequence[Iteration]) -> Fit:
    """The timing model of these steps, by relative error. Raises `CalibrationError` on too few."""
    kept = [step for step in steps if step.duration_s > 0 and step.prefill_tokens + step.decode_sequences > 0]
    total = len(kept)
    prefills = sum(step.prefill_tokens > 0 for step in kept)
    if total < FEWEST_ITERATIONS or not prefills:
        raise CalibrationError(
            f"{total} steps, {prefills} of them with prefill, are too few to fit; "
            "is the server answering, and are its load reports reachable?"
        )
    timing = fit_timing(kept, relative=True)
    for _ in range(ROUNDS):
        errors = [_error(timing, step) for step in kept]
        bound = max(FURTHEST * median(errors), 0.02)
        near = [step for step, error in zip(kept, errors, strict=True) if error <= bound]
        if len(near) == len(kept) or len(near) < max(FEWEST_ITERATIONS, total // 2):
            break
        kept = near
        timing = fit_timing(kept, relative=True)
    return Fit(timing, len(kept), total - len(kept), median(_error(timing, step) for step in kept))


def prefill_step(exchange: Exchange) -> Iteration | None:
    """A prompt alone on the engine, as a step: its TTFT. None where the answer does not tell."""
    usage = exchange.usage
    if exchange.error is not None or exchange.first_s is None or usage is None:
        return None
    computed = usage.prompt_tokens - (usage.cached_tokens or 0)
    return Iteration(exchange.first_s - exchange.sent_s, computed, 0) if computed > 0 else None


def decode_steps(exchanges: Sequence[Exchange]) -> list[Iteration]:
    """Streams that ran side by side, as steps: of each, the mean gap while all of them were decoding.

    The mean, not the median: contents that arrive together leave gaps of nothing, and a long one before them.
    """
    told = [
        one for one in exchanges if one.error is None and one.first_s is not None and one.usage is not None
    ]
    if not told or len(told) < len(exchanges):
        return []
    begin_s = max(one.first_s or 0.0 for one in told)
    end_s = min(one.last_s for one in told)
    steps = []
    for one in told:
        now_s, gaps = one.first_s or 0.0, []
        for gap_s in one.gaps_s:
            if begin_s < now_s and now_s + gap_s <= end_s:
                gaps.append(gap_s)
            now_s += gap_s
        if len(gaps) >= 3:
            context = sum(
                (other.usage.prompt_tokens if other.usage else 0) + len(other.gaps_s) // 2 for other in told
            )
            steps.append(Iteration(fmean(gaps), 0, len(told), context))
    return steps


def _error(timing: TimingModel, step: Iteration) -> float:
    expected_s = timing.duration_s(step.prefill_tokens, step.decode_sequences, step.context_tokens)
    return abs(expected_s - step.duration_s) / step.duration_s
