"""How long it takes to hand a prompt's keys and values over to one replica, learned from the hand-overs it reports.

    duration = latency + token · tokens

Both constants move in proportion, each by its share of the predicted duration, towards what was observed (normalised
least mean squares of the logarithm). So neither can reach zero or infinity, a small transfer teaches the latency and a
large one the bandwidth. An observation counts for no more than `CLIP` times the running error (Huber, 1964): one
transfer that stalled for ten seconds moves little, a lasting change is followed within some ten transfers.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import exp, isfinite, log
from typing import NamedTuple

from headrace_router.types import Transfer

CLIP = 2.5
GAIN = 0.2  # memory of about five transfers
ERROR_MEMORY = 0.1
FIRST_ERROR = 1.0  # of the logarithm: at first, nothing is believed
SMALLEST_ERROR = 0.05
FASTEST_TOKEN_S, SLOWEST_TOKEN_S = 1e-9, 1e-2
SHORTEST_S, LONGEST_S = 1e-5, 60.0


class TransferPrior(NamedTuple):
    """What is believed before anything was handed over. The defaults: 16 GB/s of 160 KB per token (70 billion
    parameters in FP8), and a few milliseconds for the second request."""

    latency_s: float = 0.005
    token_s: float = 1e-5


DEFAULT_TRANSFER = TransferPrior()


class TransferModel:
    """One decoding replica's constants. Mutable: `observe` learns; reading never fails and never mutates."""

    __slots__ = ("_error", "latency_s", "observed", "token_s")

    def __init__(self, prior: TransferPrior = DEFAULT_TRANSFER) -> None:
        self.latency_s = _within(prior.latency_s, SHORTEST_S, LONGEST_S)
        self.token_s = _within(prior.token_s, FASTEST_TOKEN_S, SLOWEST_TOKEN_S)
        self.observed = 0
        self._error = FIRST_ERROR

    def observe(self, transfers: Iterable[Transfer]) -> None:
        """Learn from hand-overs, oldest first. Impossible ones (no tokens, no duration) are passed over."""
        for tokens, duration_s in transfers:
            if tokens > 0 and isfinite(duration_s) and duration_s > 0:
                self._learn(tokens, _within(duration_s, SHORTEST_S, LONGEST_S))

    def _learn(self, tokens: int, duration_s: float) -> None:
        predicted_s = self.latency_s + self.token_s * tokens
        error = log(duration_s / predicted_s)
        size, bound = abs(error), CLIP * self._error
        error = max(-bound, min(bound, error))
        self._error = max(
            SMALLEST_ERROR, self._error + ERROR_MEMORY * (1.25 * min(size, 1.2 * bound) - self._error)
        )
        self.observed += 1
        share = self.latency_s / predicted_s
        # Normalised: the step closes `gain` of the error whatever the shares are.
        step = max(GAIN, 1.0 / (1 + self.observed)) * error / (share * share + (1 - share) * (1 - share))
        self.latency_s = _within(self.latency_s * exp(step * share), SHORTEST_S, LONGEST_S)
        self.token_s = _within(self.token_s * exp(step * (1 - share)), FASTEST_TOKEN_S, SLOWEST_TOKEN_S)

    def duration_s(self, tokens: int) -> float:
        """Of handing over that many tokens' keys and values; 0 where nothing is to be moved."""
        return min(self.latency_s + self.token_s * tokens, LONGEST_S) if tokens > 0 else 0.0


def _within(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))
