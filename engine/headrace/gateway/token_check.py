"""Whether our tokens are the engine's: its reported prompt length against ours, request by request.

A model whose lengths keep differing is routed on text from then on: a wrong token routes badly, it never harms the
answer. What the engine found in its cache, against what was predicted, is counted along the way.
"""

from __future__ import annotations

from collections import deque

from headrace.gateway.token_choice import How

WINDOW = 64
"""Checks that count. A few odd requests among many do not condemn a tokenizer."""
MAX_MISMATCHES = 3
"""Within the window. The third may be the third request of all."""


class TokenCheck:
    """Of one model."""

    def __init__(self) -> None:
        self.checked = 0
        self.mismatched = 0
        self.predicted_tokens = {
            How.TOKENS: 0,
            How.TEXT: 0,
        }  # hits promised at routing time, by how they were known
        self.cached_tokens = {
            How.TOKENS: 0,
            How.TEXT: 0,
        }  # hits that the engines reported for the same requests
        self.last_mismatch: tuple[int, int] | None = None  # our length, the engine's
        self._mismatches: deque[int] = deque(maxlen=MAX_MISMATCHES)  # the latest, as numbers of checks

    @property
    def trusted(self) -> bool:
        """False once MAX_MISMATCHES of the last WINDOW lengths differed; stays so until `reset`."""
        latest = self._mismatches
        return len(latest) < MAX_MISMATCHES or latest[0] <= self.checked - WINDOW

    def compare(self, ours: int, engines: int) -> bool:
        """A request has ended and the engine said how long its prompt was. Returns whether they agree."""
        agree = ours == engines
        self.checked += 1
        if not agree:
            self._mismatches.append(self.checked)
            self.mismatched += 1
            self.last_mismatch = (ours, engines)
        return agree

    def found(self, how: How, predicted: int, cached: int) -> None:
        """Count a predicted prefix hit beside the reported one, both in tokens."""
        if how is not How.LOAD:
            self.predicted_tokens[how] += predicted
            self.cached_tokens[how] += cached

    def reset(self) -> None:
        """The engines or the tokenizer changed: judge anew."""
        self._mismatches.clear()
