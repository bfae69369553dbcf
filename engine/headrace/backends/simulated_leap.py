"""Many decode steps in one: how many fit into a time in which nothing else happens. Pure."""

from __future__ import annotations

from typing import NamedTuple

from headrace.backends.timing_model import TimingModel


class Leap(NamedTuple):
    """So many rounds, in each of which every sequence gets a token."""

    rounds: int
    duration_s: float
    context_tokens: int  # of all rounds together


def leap(
    timing: TimingModel, sequences: int, context_tokens: int, horizon_s: float, most_rounds: int
) -> Leap:
    """The fewest rounds, 1 to `most_rounds`, that take at least `horizon_s`. `context_tokens` of the first round."""
    # Each round attends to one token more per sequence: k rounds take k·first + growth·k(k-1)/2.
    first_s = timing.duration_s(0, sequences, context_tokens)
    growth_s = timing.context_token_s * sequences
    rounds = _fewest_rounds(first_s, growth_s, horizon_s, most_rounds)
    triangle = rounds * (rounds - 1) // 2
    return Leap(
        rounds, rounds * first_s + growth_s * triangle, rounds * context_tokens + sequences * triangle
    )


def _fewest_rounds(first_s: float, growth_s: float, horizon_s: float, most: int) -> int:
    """The fewest rounds, 1 to `most`, that take at least `horizon_s` when each takes `growth_s` longer."""

    def duration_s(rounds: int) -> float:
        return rounds * first_s + growth_s * (rounds * (rounds - 1) // 2)

    if duration_s(most - 1) < horizon_s:
        return most
    low, high = 1, most - 1
    while low < high:
        middle = (low + high) // 2
        if duration_s(middle) >= horizon_s:
            high = middle
        else:
            low = middle + 1
    return low
