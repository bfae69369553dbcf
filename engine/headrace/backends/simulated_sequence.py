"""The values of the simulated engine: a request inside it, and what one step of it did."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

from headrace.backends.simulated_cache import CacheEvent
from headrace_router.types import Iteration


class Step(NamedTuple):
    """What one step did. All of it becomes visible `duration_s` after the step began."""

    duration_s: float
    prefill_tokens: int
    decode_sequences: int  # those that prefilled their last token also emit, but are not counted here
    context_tokens: int
    emitted: list[str]  # requests that produced `rounds` tokens each
    finished: list[str]  # of those, the ones that produced their last
    admitted: dict[str, int]  # requests that left the queue, with the prompt tokens found cached at first
    preempted: list[str]
    events: list[CacheEvent]
    receiving: Items[str] = ()  # requests that took room for a prompt computed elsewhere: its transfer begins
    rounds: int = 1  # iterations that this step stands for; more than 1 only after a leap

    @property
    def iteration(self) -> Iteration:
        """The work in the words of a load report; of a leap, its mean iteration."""
        return Iteration(
            self.duration_s / self.rounds,
            self.prefill_tokens,
            self.decode_sequences,
            self.context_tokens // self.rounds,
        )


class Sequence:
    """One request inside the engine."""

    __slots__ = (
        "backlog", "block_hashes", "blocks", "cached_tokens", "computed", "end_tokens", "full_blocks",
        "holds", "is_external", "known_tokens", "prompt_tokens", "request_id",
    )  # fmt: skip

    def __init__(self, request_id: str, prompt_tokens: int, answer_tokens: int, hashes: Items[int]) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.end_tokens = prompt_tokens + answer_tokens
        self.block_hashes = hashes
        self.known_tokens = prompt_tokens  # prompt and produced tokens
        self.computed = 0  # of those, with keys and values in the cache
        self.blocks: list[int] = []
        self.full_blocks = 0  # leading blocks already offered to the prefix cache
        self.cached_tokens = -1  # prefix hit at the first admission, -1 before it
        self.is_external = False  # its prompt was computed elsewhere and is yet to be transferred
        self.holds = False  # its blocks stay held when it has finished, to be transferred
        self.backlog = 0  # tokens still to prefill, less the expected prefix hit while waiting
