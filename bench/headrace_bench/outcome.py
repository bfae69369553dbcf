"""What became of one request."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request, ended. Times are seconds; `sent_s` counts from the start of the run.

    `error` is None for an answer that came whole, else its kind: connect, timeout, cut (the connection or the
    stream ended early), bad_response, stream_error (an error event within a stream), http_NNN.
    """

    conversation: int
    turn: int
    measured: bool  # False: warm-up
    sent_s: float
    late_s: float  # sent this much after its planned moment
    e2e_s: float
    ttft_s: float | None = None  # None: not streamed, or nothing came
    gaps_s: array[float] = field(default_factory=lambda: array("f"))  # between chunks
    planned_tokens: int = 0  # prompt tokens expected
    prompt_tokens: int | None = None  # as the server counted; None where it does not say
    cached_tokens: int | None = None
    output_tokens: int = 0
    counted: bool = True  # False: the server sent no usage, `output_tokens` are chunks
    replica: str | None = None  # from the answer's x-headrace-replica header
    error: str | None = None
    detail: str = ""

    @property
    def end_s(self) -> float:
        return self.sent_s + self.e2e_s

    @property
    def itl_mean_s(self) -> float | None:
        """Mean time between chunks of this request."""
        return sum(self.gaps_s) / len(self.gaps_s) if self.gaps_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (end of the last chunk - TTFT) / (tokens - 1)."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return sum(self.gaps_s) / (self.output_tokens - 1)

    def row(self) -> dict[str, Any]:
        """For a table of requests: the numbers without the gaps."""
        return {
            "conversation": self.conversation,
            "turn": self.turn,
            "measured": self.measured,
            "sent_s": round(self.sent_s, 6),
            "late_s": round(self.late_s, 6),
            "e2e_s": round(self.e2e_s, 6),
            "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 6),
            "itl_mean_s": None if self.itl_mean_s is None else round(self.itl_mean_s, 6),
            "tpot_s": None if self.tpot_s is None else round(self.tpot_s, 6),
            "planned_tokens": self.planned_tokens,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "replica": self.replica,
            "error": self.error,
            "detail": self.detail,
        }
