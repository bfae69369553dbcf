"""How long an engine step takes, as four constants, and how to find them from real steps.

duration = step_s + prefill_token_s * prefill_tokens
                  + decode_sequence_s * decode_sequences + context_token_s * context_tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from headrace_router.types import Iteration

FEWEST_ITERATIONS = 8
"""Below twice the number of constants a fit says more about noise than about the engine."""


@dataclass(frozen=True, slots=True)
class TimingModel:
    """Constants of one engine on one machine, in seconds."""

    step_s: float
    prefill_token_s: float
    decode_sequence_s: float
    context_token_s: float = 0.0

    def duration_s(self, prefill_tokens: int, decode_sequences: int, context_tokens: int = 0) -> float:
        """Predicted duration of one step."""
        return (
            self.step_s
            + self.prefill_token_s * prefill_tokens
            + self.decode_sequence_s * decode_sequences
            + self.context_token_s * context_tokens
        )


def fit_timing(iterations: Sequence[Iteration], *, relative: bool = False) -> TimingModel:
    """The non-negative constants that explain `iterations` best, by least squares.

    Of the errors in seconds, or `relative` to each step's duration: then a decode step of 10 ms counts as much
    as a prefill of 1 s, whose noise would drown it. Steps without a duration are left out of a relative fit.

    With four unknowns the exact non-negative solution is the best of the plain solutions over the 16
    subsets of them that come out non-negative, so no solver is needed. A constant that the steps do not
    vary is 0.

    Raises ValueError for fewer than 8 iterations.
    """
    if relative:
        iterations = [it for it in iterations if it.duration_s > 0]
    if len(iterations) < FEWEST_ITERATIONS:
        raise ValueError(
            f"{len(iterations)} iterations are too few to fit, at least {FEWEST_ITERATIONS} needed"
        )
    rows = np.array(
        [(1.0, it.prefill_tokens, it.decode_sequences, it.context_tokens) for it in iterations],
        dtype=np.float64,
    )
    durations_s = np.array([it.duration_s for it in iterations], dtype=np.float64)
    if relative:
        rows /= durations_s[:, np.newaxis]
        durations_s = np.ones_like(durations_s)
    # Columns of 1, 1e3 and 1e6 side by side cost digits; equal scales keep the subsets comparable.
    scale = np.abs(rows).max(axis=0)
    rows /= np.where(scale > 0, scale, 1.0)
    used = [column for column in range(4) if scale[column] > 0]
    best, best_error = np.zeros(4), float(durations_s @ durations_s)
    for size in range(1, len(used) + 1):
        for columns in map(list, combinations(used, size)):
            solution = np.linalg.lstsq(rows[:, columns], durations_s, rcond=None)[0]
            if (solution < 0).any():
                continue
            residual = durations_s - rows[:, columns] @ solution
            # Only a real gain justifies one more constant: collinear columns otherwise split at random.
            if (error := float(residual @ residual)) < best_error * (1 - 1e-9):
                best, best_error = np.zeros(4), error
                best[columns] = solution
    best /= np.where(scale > 0, scale, 1.0)
    return TimingModel(*(float(constant) for constant in best))
