"""A vLLM-like engine without a model: a pure step function over a paged cache.

    add(request) ──> waiting ──admit──> running ──step, step, ...──> finished
                        ^                  |
                        └──── preempted ───┘   (blocks ran out: recompute later)

No clock, no sockets, no tokens: the caller gives a prompt's length, an answer's length and block hashes,
and is told how long each step takes. The real-time backend sleeps that long; a discrete-event simulator
just adds it up.

A step follows vLLM v1 (vllm/v1/core/sched/scheduler.py): running sequences first in order of admission,
then the queue first come first served, chunked prefill within `max_batched_tokens`; a sequence is admitted
when its whole prompt fits the free blocks; when a running one finds no block, the last admitted is
preempted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Items
from math import inf
from typing import NamedTuple

from headrace.backends.simulated_cache import CacheEvent, SimulatedCache
from headrace.backends.simulated_sequence import Sequence, Step
from headrace.backends.timing_model import TimingModel
from headrace.config import SimulatedEngine as Settings


class _Leap(NamedTuple):
    rounds: int
    duration_s: float
    context_tokens: int


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


class SimulatedEngine:
    """Mutable. `add` and `abort` at any time between steps, then `step` until it returns None."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.timing = TimingModel(
            settings.step_s, settings.prefill_token_s, settings.decode_sequence_s, settings.context_token_s
        )
        self.cache = SimulatedCache(settings.num_blocks)
        self.backlog_tokens = 0  # uncached prompt tokens waiting or being prefilled
        self.prompt_tokens_total = 0
        self.cached_tokens_total = 0
        self.generation_tokens_total = 0
        self.preemptions_total = 0
        self._block_size = settings.block_size
        self._sequences: dict[str, Sequence] = {}
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()
        self._running: list[Sequence] = []
        self._releases = 0
        self._blocked: tuple[Sequence, int] | None = None

    @property
    def max_context(self) -> int:
        """Most tokens of one request, prompt and answer together."""
        return min(self.settings.max_model_len, self.settings.num_blocks * self._block_size)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def kv_use(self) -> float:
        """Share of blocks held by sequences, 0 to 1."""
        return 1.0 - self.cache.num_free / self.cache.num_blocks

    def add(
        self, request_id: str, prompt_tokens: int, answer_tokens: int, block_hashes: Items[int] = ()
    ) -> None:
        """Queue a request that will produce exactly `answer_tokens`.

        `block_hashes` are of as many leading full blocks of prompt + answer as the caller knows; later
        blocks are computed but never cached. Raises ValueError when the request can never run or the id is
        in use.
        """
        if request_id in self._sequences:
            raise ValueError(f"request {request_id!r} is already in the engine")
        if prompt_tokens < 1 or answer_tokens < 1:
            raise ValueError(
                f"prompt {prompt_tokens} and answer {answer_tokens} must be at least 1 token each"
            )
        if prompt_tokens + answer_tokens > self.max_context:
            raise ValueError(
                f"prompt {prompt_tokens} + answer {answer_tokens} exceed {self.max_context} tokens of context"
            )
        sequence = Sequence(request_id, prompt_tokens, answer_tokens, block_hashes)
        self._sequences[request_id] = self._waiting[request_id] = sequence
        self._book(sequence, prompt_tokens - self._count_hits(sequence) * self._block_size)

    def abort(self, request_id: str) -> bool:
        """Drop a request wherever it is and free its blocks. False when it is not here. Always safe."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        if self._waiting.pop(request_id, None) is None:
            self._running.remove(sequence)
        self._release(sequence)
        return True

    def clear_cache(self) -> bool:
        """Forget every resident block; its event comes with the next step. False while requests run."""
        return self.cache.clear()

    def take_events(self) -> list[CacheEvent]:
        """Cache events that no step has carried yet."""
        return self.cache.take_events()

    def step(self, horizon_s: float = 0.0) -> Step | None:
        """Run one iteration. None when there is nothing to do.

        A simulator that knows that nothing will arrive for `horizon_s` passes it: while all sequences only
        decode, the step then stands for all the iterations that begin within it (`rounds`), at the cost of
        one. `leap_s` tells how far that can go.
        """
        if not self._sequences:
            return None
        if horizon_s > 0 and (leap := self._plan_leap(horizon_s)) is not None:
            return self._leap(leap)
        emitted: list[str] = []
        finished: list[str] = []
        admitted: dict[str, int] = {}
        preempted: list[str] = []
        scheduled: list[Sequence] = []
        budget = self.settings.max_batched_tokens
        prefill_tokens = prefills = context_tokens = index = 0
        running = self._running
        while index < len(running) and budget > 0:
            sequence = running[index]
            tokens = min(sequence.known_tokens - sequence.computed, budget)
            if not self._make_room(sequence, tokens, preempted):
                break
            context_tokens += sequence.computed
            if computed := self._compute(sequence, tokens):
                prefill_tokens += computed
                prefills += 1
            scheduled.append(sequence)
            budget -= tokens
            index += 1
        while self._waiting and not preempted and budget > 0 and len(running) < self.settings.max_running:
            sequence = next(iter(self._waiting.values()))
            if not self._admit(sequence):
                break
            admitted[sequence.request_id] = sequence.cached_tokens
            tokens = min(sequence.known_tokens - sequence.computed, budget)
            self._make_room(sequence, tokens, preempted)
            context_tokens += sequence.computed
            if computed := self._compute(sequence, tokens):
                prefill_tokens += computed
                prefills += 1
            scheduled.append(sequence)
            budget -= tokens
        for sequence in scheduled:
            if sequence.computed == sequence.known_tokens:
                sequence.known_tokens += 1
                emitted.append(sequence.request_id)
                if sequence.known_tokens == sequence.end_tokens:
                    finished.append(sequence.request_id)
        self._finish(finished)
        self.generation_tokens_total += len(emitted)
        decodes = len(scheduled) - prefills
        duration_s = self.timing.duration_s(prefill_tokens, decodes, context_tokens)
        events = self.cache.take_events()
        return Step(
            duration_s,
            prefill_tokens,
            decodes,
            context_tokens,
            emitted,
            finished,
            admitted,
            preempted,
            events,
        )

    def leap_s(self) -> float:
        """How long nothing but decoding will happen: until a sequence ends or needs a block. 0: not at all now.

        Does not mutate, so a simulator can wait for that moment, or for an arrival before it, and then `step`
        with a horizon of the time that has passed.
        """
        leap = self._plan_leap(inf)
        return 0.0 if leap is None else leap.duration_s

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, queues and booked tokens all add up."""
        self.cache.check_integrity(sequence.blocks for sequence in self._sequences.values())
        running = {sequence.request_id for sequence in self._running}
        assert len(running) == len(self._running) <= self.settings.max_running
        assert running.isdisjoint(self._waiting)
        assert running | set(self._waiting) == set(self._sequences)
        assert self.backlog_tokens == sum(sequence.backlog for sequence in self._sequences.values())
        for sequence in self._sequences.values():
            assert 0 <= sequence.computed <= sequence.known_tokens < sequence.end_tokens
            assert sequence.backlog >= 0
            assert len(sequence.blocks) == -(-sequence.computed // self._block_size)
        assert not any(sequence.blocks for sequence in self._waiting.values())

    def _plan_leap(self, horizon_s: float) -> _Leap | None:
        """Several iterations in one, while every sequence decodes. None when one prefills or needs a block, or
        when the queue's head may be admitted."""
        running = self._running
        num_running = len(running)
        if not 0 < num_running <= self.settings.max_batched_tokens:
            return None
        if self._waiting and num_running < self.settings.max_running:
            head = next(iter(self._waiting.values()))
            if self._blocked != (head, self._releases):
                return None
        most, context_tokens = self._block_size, 0
        for sequence in running:
            if sequence.backlog:
                return None
            room = len(sequence.blocks) * self._block_size - sequence.computed
            most = min(most, room, sequence.end_tokens - sequence.known_tokens)
            context_tokens += sequence.computed
        if most < 1:
            return None
        # Each round attends to one token more per sequence: k rounds take k·first + growth·k(k-1)/2.
        first_s = self.timing.duration_s(0, num_running, context_tokens)
        growth_s = self.timing.context_token_s * num_running
        rounds = _fewest_rounds(first_s, growth_s, horizon_s, most)
        duration_s = rounds * first_s + growth_s * (rounds * (rounds - 1) // 2)
        total_context = rounds * context_tokens + num_running * (rounds * (rounds - 1) // 2)
        return _Leap(rounds, duration_s, total_context)

    def _leap(self, leap: _Leap) -> Step:
        running, rounds = self._running, leap.rounds
        finished = []
        for sequence in running:
            self._compute(sequence, rounds)
            sequence.known_tokens += rounds
            if sequence.known_tokens == sequence.end_tokens:
                finished.append(sequence.request_id)
        emitted = [sequence.request_id for sequence in running]
        self._finish(finished)
        self.generation_tokens_total += len(emitted) * rounds
        events = self.cache.take_events()
        return Step(
            leap.duration_s, 0, len(emitted), leap.context_tokens, emitted, finished, {}, [], events, rounds
        )

    def _count_hits(self, sequence: Sequence) -> int:
        # At least one token must be computed to produce the next, so a fully resident prompt loses its last
        # block.
        most = (sequence.known_tokens - 1) // self._block_size
        return self.cache.count_hits(sequence.block_hashes, most)

    def _admit(self, sequence: Sequence) -> bool:
        """Move the queue's head into the batch, its prefix hit held. False when its prompt does not fit."""
        # A head that did not fit is looked at again when blocks came free, not at every step: with long
        # prompts the lookup would cost more than the rest of the step.
        if self._blocked == (sequence, self._releases):
            return False
        hits = self._count_hits(sequence)
        hit_hashes = sequence.block_hashes[:hits]
        needed = -(-sequence.known_tokens // self._block_size) - hits + self.cache.count_evictable(hit_hashes)
        if needed > self.cache.num_free:
            self._blocked = (sequence, self._releases)
            return False
        del self._waiting[sequence.request_id]
        self._running.append(sequence)
        sequence.blocks = self.cache.hold(hit_hashes)
        sequence.computed = hits * self._block_size
        sequence.full_blocks = hits
        self._book(sequence, sequence.known_tokens - sequence.computed)
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = sequence.computed
            self.prompt_tokens_total += sequence.prompt_tokens
            self.cached_tokens_total += sequence.computed
        return True

    def _make_room(self, sequence: Sequence, tokens: int, preempted: list[str]) -> bool:
        """Blocks for `tokens` more; preempts from the end. False when `sequence` itself had to go."""
        missing = -(-(sequence.computed + tokens) // self._block_size) - len(sequence.blocks)
        if missing <= 0:
            return True
        while missing > self.cache.num_free:
            victim = self._running.pop()
            self._preempt(victim)
            preempted.append(victim.request_id)
            if victim is sequence:
                return False
        sequence.blocks += self.cache.take(missing)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._release(victim)
        victim.computed = victim.full_blocks = 0
        self._waiting[victim.request_id] = victim
        self._waiting.move_to_end(victim.request_id, last=False)
        self._book(victim, victim.known_tokens - self._count_hits(victim) * self._block_size)
        self.preemptions_total += 1

    def _compute(self, sequence: Sequence, tokens: int) -> int:
        """Fill the cache with the next `tokens`. Returns how many of them were prefill."""
        sequence.computed += tokens
        full_blocks = sequence.computed // self._block_size
        if full_blocks > sequence.full_blocks:
            self.cache.store(
                sequence.request_id, sequence.blocks, sequence.block_hashes, sequence.full_blocks, full_blocks
            )
            sequence.full_blocks = full_blocks
        if not sequence.backlog:
            return 0
        self._book(sequence, sequence.backlog - tokens)
        return tokens

    def _finish(self, finished: list[str]) -> None:
        if not finished:
            return
        for request_id in finished:
            self._release(self._sequences.pop(request_id))
        self._running = [sequence for sequence in self._running if sequence.request_id in self._sequences]

    def _release(self, sequence: Sequence) -> None:
        self.cache.release(sequence.blocks)
        sequence.blocks = []
        self._releases += 1
        self._book(sequence, 0)

    def _book(self, sequence: Sequence, backlog: int) -> None:
        self.backlog_tokens += backlog - sequence.backlog
        sequence.backlog = backlog
