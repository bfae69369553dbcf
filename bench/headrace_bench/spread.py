"""Median and spread of a few rounds, and ratios between gateways measured in the same round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of some samples."""

    median: float
    low: float
    high: float
    samples: int

    def text(self, digits: int) -> str:
        """`12.3 (11.9..13.0)`; the median alone when there is one sample."""
        if self.samples == 1:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}..{self.high:.{digits}f})"


def spread(samples: Sequence[float]) -> Spread | None:
    """None without samples."""
    if not samples:
        return None
    return Spread(median(samples), min(samples), max(samples), len(samples))


def ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    """Round by round, without those that either side missed. Pairing cancels the drift between rounds."""
    pairs = zip(ours, theirs, strict=False)
    return [mine / other for mine, other in pairs if mine is not None and other is not None and other > 0]
