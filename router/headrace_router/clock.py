"""Time as an argument: the router never reads a clock, whoever calls it passes `now`.

Production passes `time.monotonic`; tests and the simulator pass a `VirtualClock` and jump.
"""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Seconds on a clock that never goes back. Only differences mean something."""

    def __call__(self) -> float: ...


class VirtualClock:
    """A clock that moves only when told: `clock.advance(60)` makes a minute pass at once."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def __call__(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward. Raises ValueError on a negative step."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back: advance({seconds})")
        self._now_s += seconds
