"""How much to find out about a prompt before it is routed: its tokens, its text in chunks, or nothing.

Tokens are precise and cost more than everything else on the path: about 0.27 µs per character, where hashing text
takes 0.0005. So a prompt that fills no block is routed on load alone; tokens are taken when what they save, in seconds
of prefill, exceeds what they cost, in seconds of tokenising. What they save is the part of the prompt that the text
index misjudges: where both are right they save nothing. Every constant is learned; pure.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class How(StrEnum):
    """What a prompt is known by."""

    TOKENS = "tokens"
    TEXT = "text"
    LOAD = "load"  # not at all: load alone decides

    __hash__ = str.__hash__  # Enum's own is written in Python; each prompt looks a few counters up by this


class TokenChoice(NamedTuple):
    """How, and why; `reason` is short and constant (a metric's label), the rest is for `explain`."""

    how: How
    reason: str
    cost_s: float = 0.0  # expected, of tokenising
    saving_s: float = 0.0  # expected, of prefill


SHORT = TokenChoice(How.LOAD, "short")
NO_TOKENIZER = TokenChoice(How.TEXT, "no tokenizer")
NO_EVENTS = TokenChoice(How.TEXT, "no cache events")
CACHED = TokenChoice(How.TOKENS, "cached")

# A new measurement's weight. One outlier (a paused thread) moves a rate by a fifth of itself at most, being clipped.
_WEIGHT = 0.1
_CLIP = 3.0
_MIN_ERROR = 0.02  # some doubt in the text index always remains, or it would never be checked again


class TokenCosts:
    """What one model's prompts cost to tokenise and what knowing their tokens is worth, learned online."""

    def __init__(self) -> None:
        self.render_s_per_byte = 3e-9  # JSON and template, measured for SmolLM2's
        self.encode_s_per_char = 0.3e-6
        self.bytes_per_token = 4.5  # of the body, JSON included
        self.text_error = 0.25  # share of a prompt by which a hit predicted from text was wrong
        self.token_error = 0.0

    def estimated_tokens(self, body_bytes: int) -> float:
        """Of a prompt that nobody has counted."""
        return body_bytes / self.bytes_per_token

    def before(
        self, body_bytes: int, *, block_size: int | None, has_tokenizer: bool, prefill_tokens_per_s: float
    ) -> TokenChoice:
        """By the body's length alone, before anything is decoded.

        `block_size`: the smallest among the candidates, None where no engine tells of its cache.
        """
        tokens = self.estimated_tokens(body_bytes)
        if tokens < (block_size or 16):
            return SHORT
        if not has_tokenizer:
            return NO_TOKENIZER
        if block_size is None:
            return NO_EVENTS
        return self._weigh(self.render_s_per_byte * body_bytes, tokens, prefill_tokens_per_s)

    def after(
        self, missing_chars: int, backlog_s: float, body_bytes: int, prefill_tokens_per_s: float
    ) -> TokenChoice:
        """Once the text is rendered and cut: only what no cache holds is still to be paid for."""
        if missing_chars == 0:
            return CACHED
        cost_s = backlog_s + self.encode_s(missing_chars)
        return self._weigh(cost_s, self.estimated_tokens(body_bytes), prefill_tokens_per_s)

    def encode_s(self, num_chars: int) -> float:
        """Expected seconds of one core."""
        return self.encode_s_per_char * num_chars

    def _weigh(self, cost_s: float, tokens: float, prefill_tokens_per_s: float) -> TokenChoice:
        misjudged = max(self.text_error - self.token_error, _MIN_ERROR)
        saving_s = misjudged * tokens / max(prefill_tokens_per_s, 1.0)
        if cost_s <= saving_s:
            return TokenChoice(How.TOKENS, "worth it", cost_s, saving_s)
        return TokenChoice(How.TEXT, "costs more", cost_s, saving_s)

    # --- learning

    def rendered(self, body_bytes: int, elapsed_s: float) -> None:
        """A body of that length was decoded and rendered."""
        self.render_s_per_byte = _toward(self.render_s_per_byte, elapsed_s / max(body_bytes, 256))

    def encoded(self, num_chars: int, elapsed_s: float) -> None:
        """So many characters were encoded. Short texts, mostly overhead, teach nothing."""
        if num_chars >= 64:
            self.encode_s_per_char = _toward(self.encode_s_per_char, elapsed_s / num_chars)

    def counted(self, body_bytes: int, num_tokens: int) -> None:
        """A body turned out to hold so many tokens."""
        if num_tokens > 0:
            self.bytes_per_token = _toward(self.bytes_per_token, body_bytes / num_tokens)

    def settled(self, how: How, predicted_tokens: int, cached_tokens: int, prompt_tokens: int) -> None:
        """The engine reported how much of a prompt it really found in its cache."""
        error = min(abs(predicted_tokens - cached_tokens) / max(prompt_tokens, 1), 1.0)
        if how is How.TOKENS:
            self.token_error += _WEIGHT * (error - self.token_error)
        elif how is How.TEXT:
            self.text_error += _WEIGHT * (error - self.text_error)


def _toward(rate: float, measured: float) -> float:
    """A step towards a measurement, clipped to a factor of three: never zero, never led off by an outlier."""
    return rate + _WEIGHT * (min(max(measured, rate / _CLIP), rate * _CLIP) - rate)
