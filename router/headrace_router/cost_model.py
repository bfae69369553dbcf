"""How long a replica's steps take, learned from the steps themselves.

    duration = step + prefill_token · p + decode_sequence · d + context_token · c

Recursive least squares of the relative error, one observation at a time, in units of the prior (so that every
constant starts at 1). Four departures from the textbook, each for a failure it otherwise has:

- The innovation is clipped at `CLIP` times the running error (Huber, 1964) and the clipped observation counts for
  less: one step that stalled for ten seconds moves nothing for long.
- Forgetting happens only in the direction of the observation (after Kulhavý, 1987): an hour of decoding does not make
  the filter forget what a prompt costs, which plain forgetting would (covariance wind-up).
- The first steps, and any that are all off to the same side, first settle the scale: the constants are multiplied by
  the median of how far the predictions were off, and learning starts anew from there. So a prior that is off by twenty
  times, or a machine that has been throttled, costs `RUN` steps.
- What is read is bounded: no rate is ever zero or infinite, whatever was observed.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from statistics import median
from typing import NamedTuple

from headrace_router.types import Iteration

CLIP = 2.5
FORGETTING = 0.02  # memory of about 50 steps of one kind
ERROR_MEMORY = 0.1
SMALLEST_ERROR = 0.01  # relative
PRIOR_VARIANCE = 100.0  # in squares of the prior: one constant may be off by far more than another
CONTEXT_UNIT_S = 1e-8  # unit of the context constant where the prior has none
RUN = 5  # steps that settle the scale; two of them may be stalls
FASTEST_TOKEN_S = 1e-7
SLOWEST_TOKEN_S = 1.0
LONGEST_STEP_S = 600.0


class TimingPrior(NamedTuple):
    """What is believed of an engine before it has run. The defaults: 16,000 tokens/s, as a mid-size GPU."""

    step_s: float = 0.005
    prefill_token_s: float = 0.0000625
    decode_sequence_s: float = 0.0002
    context_token_s: float = 0.0
    batch_tokens: int = 2048  # most prompt tokens of one step


DEFAULT_PRIOR = TimingPrior()


class CostModel:
    """One replica's constants. Mutable: `observe` learns; reading never fails and never mutates."""

    __slots__ = (
        "_covariance",
        "_error",
        "_is_scaled",
        "_pace",
        "_run",
        "_run_sign",
        "_theta",
        "_units",
        "batch_tokens",
        "observed",
    )

    def __init__(self, prior: TimingPrior = DEFAULT_PRIOR) -> None:
        self._units = (
            max(prior.step_s, 1e-6),
            max(prior.prefill_token_s, FASTEST_TOKEN_S),
            max(prior.decode_sequence_s, 1e-8),
            prior.context_token_s or CONTEXT_UNIT_S,
        )
        self._theta = [
            prior.step_s / self._units[0],
            prior.prefill_token_s / self._units[1],
            prior.decode_sequence_s / self._units[2],
            prior.context_token_s / self._units[3],
        ]
        self._restart()
        self._run: list[tuple[float, int, int, int]] = []  # steps off to the same side, one after the other
        self._run_sign = 0
        self._is_scaled = False
        self.batch_tokens = max(1, prior.batch_tokens)
        self.observed = 0
        self._pace = self._paced()

    def observe(self, iterations: Iterable[Iteration]) -> None:
        """Learn from steps, oldest first. Impossible ones (no duration, nothing done) are passed over."""
        for step in iterations:
            duration_s = step.duration_s
            if (
                not (isfinite(duration_s) and 0 < duration_s < LONGEST_STEP_S)
                or min(step.prefill_tokens, step.decode_sequences, step.context_tokens) < 0
                or step.prefill_tokens + step.decode_sequences == 0
            ):
                continue
            self._take(duration_s, step.prefill_tokens, step.decode_sequences, step.context_tokens)

    def _restart(self) -> None:
        self._covariance = [
            [PRIOR_VARIANCE if row == column else 0.0 for column in range(4)] for row in range(4)
        ]
        self._error = 1.0  # running relative error: at first, nothing is believed

    def _take(self, duration_s: float, prefill_tokens: int, sequences: int, context_tokens: int) -> None:
        self.observed += 1
        self.batch_tokens = max(self.batch_tokens, prefill_tokens)
        step = (duration_s, prefill_tokens, sequences, context_tokens)
        if self._is_scaled:
            sign = self._learn(*step)
            if sign == 0 or sign != self._run_sign:
                self._run.clear()
                self._run_sign = sign
            if sign == 0:
                return
        self._run.append(step)
        if len(self._run) == RUN or not self._is_scaled:
            self._rescale()

    def _rescale(self) -> None:
        """Multiply all constants by how far the predictions for the run were off, then learn from it. Before the first
        run is complete it is only the scale that is set, provisionally."""
        scale = median(step[0] / self.duration_s(*step[1:]) for step in self._run)
        if not all(1e-13 < unit * scale < 1e3 for unit in self._units):
            scale = 1.0  # no engine is like that
        u0, u1, u2, u3 = self._units
        self._units = (u0 * scale, u1 * scale, u2 * scale, u3 * scale)
        if len(self._run) == RUN:
            self._is_scaled = True
            self._restart()
            run, self._run, self._run_sign = self._run, [], 0
            for step in run:
                self._learn(*step)
        self._pace = self._paced()

    def _learn(self, duration_s: float, prefill_tokens: int, sequences: int, context_tokens: int) -> int:
        """One step of the filter. 1 or -1 when the step took far more or far less than predicted, else 0."""
        u0, u1, u2, u3 = self._units
        t0, t1, t2, t3 = self._theta
        x0, x1, x2, x3 = u0, u1 * prefill_tokens, u2 * sequences, u3 * context_tokens
        # The constants may pass below zero on the way; a prediction may not, for the error is relative to it.
        scale = 1.0 / max(t0 * x0 + t1 * x1 + t2 * x2 + t3 * x3, 0.02 * duration_s, 1e-6)
        x0, x1, x2, x3 = x0 * scale, x1 * scale, x2 * scale, x3 * scale
        error = duration_s * scale - (t0 * x0 + t1 * x1 + t2 * x2 + t3 * x3)
        row0, row1, row2, row3 = self._covariance
        p0 = row0[0] * x0 + row0[1] * x1 + row0[2] * x2 + row0[3] * x3
        p1 = row1[0] * x0 + row1[1] * x1 + row1[2] * x2 + row1[3] * x3
        p2 = row2[0] * x0 + row2[1] * x1 + row2[2] * x2 + row2[3] * x3
        p3 = row3[0] * x0 + row3[1] * x1 + row3[2] * x2 + row3[3] * x3
        spread = p0 * x0 + p1 * x1 + p2 * x2 + p3 * x3
        size, bound = abs(error), CLIP * self._error
        noise = self._error * self._error
        clipped = error
        if size > bound:
            clipped = bound if error > 0 else -bound
            noise *= size / bound
        self._error = max(
            SMALLEST_ERROR, self._error + ERROR_MEMORY * (1.25 * min(size, 1.2 * bound) - self._error)
        )
        gain = clipped / (spread + noise)
        self._theta = [t0 + gain * p0, t1 + gain * p1, t2 + gain * p2, t3 + gain * p3]
        self._pace = self._paced()
        sign = 0 if clipped == error else 1 if error > 0 else -1
        if spread <= 0.0:
            return sign
        shrink = 1.0 / (spread + noise) - (FORGETTING / spread if spread < PRIOR_VARIANCE else 0.0)
        self._covariance = [
            [row[0] - s * p0, row[1] - s * p1, row[2] - s * p2, row[3] - s * p3]
            for row, s in (
                (row0, shrink * p0),
                (row1, shrink * p1),
                (row2, shrink * p2),
                (row3, shrink * p3),
            )
        ]
        return sign

    def _paced(self) -> tuple[float, float, float]:
        """Seconds per prefill token: alone, more per decoding sequence, more per context token."""
        u0, u1, u2, u3 = self._units
        t0, t1, t2, t3 = (max(0.0, constant) for constant in self._theta)
        batch = self.batch_tokens
        return max(t1 * u1 + t0 * u0 / batch, FASTEST_TOKEN_S), t2 * u2 / batch, t3 * u3 / batch

    # --- read path

    def seconds_per_token(self, running: int = 0, context_tokens: float = 0.0) -> float:
        """Of prefill, while `running` sequences with `context_tokens` in the cache decode in the same steps."""
        fixed, per_sequence, per_context = self._pace
        seconds = fixed + per_sequence * running + per_context * context_tokens
        return seconds if seconds < SLOWEST_TOKEN_S else SLOWEST_TOKEN_S

    def duration_s(self, prefill_tokens: int, decode_sequences: int, context_tokens: int = 0) -> float:
        """Of one step."""
        t, u = self._theta, self._units
        seconds = (
            max(0.0, t[0]) * u[0]
            + max(0.0, t[1]) * u[1] * prefill_tokens
            + max(0.0, t[2]) * u[2] * decode_sequences
            + max(0.0, t[3]) * u[3] * context_tokens
        )
        return min(max(seconds, FASTEST_TOKEN_S), LONGEST_STEP_S)

    @property
    def prefill_rate(self) -> float:
        """Tokens per second of an otherwise idle replica."""
        return 1.0 / self.seconds_per_token()
