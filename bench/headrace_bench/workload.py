"""What will be asked, planned before the first request is sent.

A workload is a list of conversations. A conversation has one or more turns; a turn's prompt is everything
said before, with the server's real answers, so turns of one conversation run one after another. A request of a
trace is a conversation of one turn.

    where the prompts come from    synthetic conversations (shared system prompts, turns) | a trace
    when conversations begin       open loop: Poisson, or the trace's own times | closed loop: a user is free

The plan of a seed is always the same, to the byte; nothing here reads a clock or draws unseeded lots.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from headrace.errors import CallerError
from headrace_bench.prompt_text import Calibration, Passage
from headrace_bench.trace import BLOCK_TOKENS, TraceRecord

MAX_REQUESTS = 100_000
"""Bound of one run: the results of that many requests are held in memory."""


class WorkloadError(CallerError):
    """A workload that cannot be. The message names the option, the value and the bound."""


@dataclass(frozen=True, slots=True)
class Span:
    """A number of tokens, drawn evenly from `low..high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """`128` or `64:256`. Raises `WorkloadError`."""
        low, _, high = text.partition(":")
        try:
            span = cls(int(low), int(high or low))
        except ValueError:
            raise WorkloadError(f"token count {text!r} is neither N nor LOW:HIGH") from None
        if not 1 <= span.low <= span.high <= 10_000_000:
            raise WorkloadError(f"token count {text!r} must be 1 <= LOW <= HIGH <= 10000000")
        return span

    def draw(self, lots: random.Random) -> int:
        return lots.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Turn:
    """One request, less what was said before it."""

    user: tuple[Passage, ...]
    output_tokens: int  # asked for: max_tokens
    new_tokens: int  # expected prompt tokens that this turn adds, less the answer before it
    think_s: float = 0.0  # pause after the answer before it


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that run in order. Frozen; `start_s` is None where a free user starts it (closed loop)."""

    id: int
    turns: tuple[Turn, ...]
    system: Passage | None = None
    start_s: float | None = None
    measured: bool = True  # False: warm-up, run and left out of every number


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Conversations of made-up text."""

    requests: int = 100  # rounded up to whole conversations
    prompt_tokens: Span = Span(256, 256)  # of each user turn
    output_tokens: Span = Span(64, 64)
    turns: int = 1
    system_prompts: int = 0  # how many different ones the conversations share
    system_tokens: int = 512
    think_s: float = 0.0  # mean pause between turns, exponential


@dataclass(frozen=True, slots=True)
class Replay:
    """The requests of a trace, scaled to what the server can hold."""

    token_scale: float = 1.0  # of inputs; blocks shrink alike, so sharing stays as it was
    output_scale: float = 1.0
    max_prompt_tokens: int | None = None  # longer prompts lose their tail
    max_output_tokens: int | None = None


def plan_synthetic(spec: Synthetic, calibration: Calibration, seed: int) -> tuple[Conversation, ...]:
    """Conversations without start times. Raises `WorkloadError`."""
    if not 1 <= spec.requests <= MAX_REQUESTS:
        raise WorkloadError(f"requests must be 1..{MAX_REQUESTS}, got {spec.requests}")
    lots = random.Random(f"{seed}/plan")
    return tuple(
        _synthetic_conversation(spec, calibration, index, lots)
        for index in range(-(-spec.requests // spec.turns))
    )


def _synthetic_conversation(
    spec: Synthetic, calibration: Calibration, index: int, lots: random.Random
) -> Conversation:
    system = None
    expected = 0.0
    if spec.system_prompts:
        words = calibration.words_for(spec.system_tokens, with_overhead=False)
        system = Passage(f"system/{lots.randrange(spec.system_prompts)}", words)
        expected = calibration.tokens_of(words, with_overhead=False) + calibration.system_tokens
    turns = []
    for number in range(spec.turns):
        first = number == 0
        words = calibration.words_for(spec.prompt_tokens.draw(lots), with_overhead=first)
        expected += calibration.tokens_of(words, with_overhead=first)
        pause_s = 0.0 if first or not spec.think_s else lots.expovariate(1 / spec.think_s)
        text = (Passage(f"conversation/{index}/{number}", words),)
        turns.append(Turn(text, spec.output_tokens.draw(lots), round(expected), pause_s))
        expected = calibration.turn_tokens  # of the next turn
    return Conversation(index, tuple(turns), system)


def plan_replay(
    records: Sequence[TraceRecord], spec: Replay, calibration: Calibration
) -> tuple[Conversation, ...]:
    """One conversation of one turn per record, starting when the record arrived. Raises `WorkloadError`.

    Equal leading hash ids give equal leading text; a record without ids shares nothing with any other.
    """
    if len(records) > MAX_REQUESTS:
        raise WorkloadError(
            f"{len(records)} requests are over the bound {MAX_REQUESTS}; cut the trace (--requests)"
        )
    return tuple(
        Conversation(index, (_replayed_turn(record, spec, calibration, index),), start_s=record.arrival_s)
        for index, record in enumerate(records)
    )


def _replayed_turn(record: TraceRecord, spec: Replay, calibration: Calibration, index: int) -> Turn:
    tokens = max(1, round(record.input_tokens * spec.token_scale))
    if spec.max_prompt_tokens is not None:
        tokens = min(tokens, spec.max_prompt_tokens)
    output_tokens = max(1, round(record.output_tokens * spec.output_scale))
    if spec.max_output_tokens is not None:
        output_tokens = min(output_tokens, spec.max_output_tokens)
    block_words = BLOCK_TOKENS * spec.token_scale / calibration.tokens_per_word
    hash_ids = record.hash_ids[: math.ceil(tokens / (BLOCK_TOKENS * spec.token_scale))]
    # The chat template's tokens come out of the last block, so that the leading blocks stay whole and shared; a
    # word of it is left, or prompts that differ in their last block only would be one prompt.
    words = max(calibration.words_for(tokens), round((len(hash_ids) - 1) * block_words) + 1)
    text = []
    begin = 0
    for number, hash_id in enumerate(hash_ids, 1):
        # Edges are rounded, not lengths: half a word per block would add up over a long prompt.
        end = words if number == len(hash_ids) else round(number * block_words)
        text.append(Passage(f"block/{hash_id}", end - begin))
        begin = end
    if not hash_ids:
        text.append(Passage(f"request/{index}", words))
    return Turn(tuple(text), output_tokens, calibration.tokens_of(words))


def start_poisson(conversations: Sequence[Conversation], rate: float, seed: int) -> tuple[Conversation, ...]:
    """Open loop: `rate` conversations per second with exponential gaps, whatever the server does."""
    if not 0 < rate <= 100_000:
        raise WorkloadError(f"rate must be above 0 and at most 100000 per second, got {rate}")
    lots = random.Random(f"{seed}/arrivals")
    started = []
    now_s = 0.0
    for conversation in conversations:
        started.append(replace(conversation, start_s=now_s))
        now_s += lots.expovariate(rate)
    return tuple(started)


def start_when_free(conversations: Sequence[Conversation]) -> tuple[Conversation, ...]:
    """Closed loop: a user starts the next conversation as it ends one."""
    return tuple(replace(conversation, start_s=None) for conversation in conversations)


def mark_warm_up(conversations: Sequence[Conversation], requests: int) -> tuple[Conversation, ...]:
    """Leave the leading conversations that hold the first `requests` requests out of the measurement."""
    marked = []
    left = requests
    for conversation in conversations:
        marked.append(replace(conversation, measured=left <= 0))
        left -= len(conversation.turns)
    if marked and not marked[-1].measured:
        raise WorkloadError(f"a warm-up of {requests} requests leaves none to measure; ask for more requests")
    return tuple(marked)
