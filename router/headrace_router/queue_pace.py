"""How fast waiting requests are taken: what a promise of "your turn in 3 s" and an honest `Retry-After` rest on."""

from __future__ import annotations

from collections import deque

PACE_WINDOW_S = 10.0
KNOWN_AFTER_S = 1.0
"""A pace seen for less is not known: the first request taken after a millisecond is not a thousand per second."""


class Pace:
    """Tokens taken per second while somebody waits, over the last seconds. Mutable."""

    def __init__(self) -> None:
        self._taken: deque[tuple[float, int]] = deque()  # (when, tokens), within the window
        self._tokens = 0
        self._since_s = 0.0

    def begin(self, now_s: float) -> None:
        """Somebody waits after nobody did. The pace of earlier times tells nothing: whoever came then did not wait."""
        self._taken.clear()
        self._tokens, self._since_s = 0, now_s

    def taken(self, tokens: int, now_s: float) -> None:
        """One request left the queue to be served."""
        self._taken.append((now_s, tokens))
        self._tokens += tokens

    def tokens_per_s(self, now_s: float) -> float:
        """0 where nothing was taken, or nobody has waited long enough to tell."""
        taken = self._taken
        while taken and taken[0][0] < now_s - PACE_WINDOW_S:
            self._tokens -= taken.popleft()[1]
        seen_s = min(now_s - self._since_s, PACE_WINDOW_S)
        return self._tokens / seen_s if seen_s >= KNOWN_AFTER_S else 0.0
