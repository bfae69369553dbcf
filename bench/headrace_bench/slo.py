"""Service level objectives and goodput: how many requests per second were answered as promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.errors import CallerError
from headrace_bench.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds that one request must keep, all of them. None is no bound. Seconds."""

    ttft_s: float | None = None
    itl_s: float | None = None  # of the request's mean time between chunks
    tpot_s: float | None = None  # of the request's time per output token
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        for name, bound in self.bounds():
            if not bound > 0:
                raise CallerError(f"the objective for {name} must be above 0 s, got {bound}")

    def bounds(self) -> tuple[tuple[str, float], ...]:
        """The bounds that are set, by name."""
        pairs = (("ttft", self.ttft_s), ("itl", self.itl_s), ("tpot", self.tpot_s), ("e2e", self.e2e_s))
        return tuple((name, bound) for name, bound in pairs if bound is not None)

    def kept_by(self, outcome: Outcome) -> bool:
        """A failed request keeps none. A bound on what an answer does not have (gaps, where it is one chunk) is
        kept; a bound on a TTFT that could not be seen is not."""
        if outcome.error is not None:
            return False
        if self.ttft_s is not None and (outcome.ttft_s is None or outcome.ttft_s > self.ttft_s):
            return False
        pairs = ((self.itl_s, outcome.itl_mean_s), (self.tpot_s, outcome.tpot_s), (self.e2e_s, outcome.e2e_s))
        return all(bound is None or value is None or value <= bound for bound, value in pairs)


@dataclass(frozen=True, slots=True)
class Goodput:
    """Of all measured requests, failed ones included (as in DistServe, OSDI 2024, section 2)."""

    requests_per_s: float
    share: float  # of the requests sent, 0..1


def goodput(outcomes: Sequence[Outcome], slo: Slo, window_s: float) -> Goodput:
    """Requests that kept `slo`, per second of `window_s` and as a share of those sent."""
    good = sum(slo.kept_by(outcome) for outcome in outcomes)
    return Goodput(good / window_s if window_s > 0 else 0.0, good / len(outcomes) if outcomes else 0.0)
