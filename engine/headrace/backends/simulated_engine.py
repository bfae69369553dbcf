"""A vLLM-like engine without a model: a pure step function over a paged cache.

    add(request) ──> waiting ──admit──> running ──step, step, ...──> finished
                        ^                  |
                        └──── preempted ───┘   (blocks ran out: recompute later)

    add(holds) ──> ... ──> finished, blocks held ──release──> free            (the prefilling half of a hand-over)
    add(is_external) ──> waiting ──room──> receiving ──received──> running    (the decoding half)

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

from headrace.backends.simulated_cache import CacheEvent, SimulatedCache
from headrace.backends.simulated_leap import Leap, leap
from headrace.backends.simulated_sequence import Sequence, Step
from headrace.backends.timing_model import TimingModel
from headrace.config import SimulatedEngine as Settings


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
        self._receiving: dict[str, Sequence] = {}
        self._begun: list[str] = []  # transfers, since the last step told of them
        self._held: dict[str, Sequence] = {}
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
        """Requests in the queue, preempted ones and those whose prompt is being transferred included."""
        return len(self._waiting) + len(self._receiving)

    @property
    def kv_use(self) -> float:
        """Share of blocks held by sequences, 0 to 1."""
        return 1.0 - self.cache.num_free / self.cache.num_blocks

    def add(
        self,
        request_id: str,
        prompt_tokens: int,
        answer_tokens: int,
        block_hashes: Items[int] = (),
        *,
        holds: bool = False,
        is_external: bool = False,
    ) -> None:
        """Queue a request that will produce exactly `answer_tokens`.

        Of a hand-over, the prefilling half `holds` its blocks after its end until `release`; the decoding half
        `is_external`: admitted, it waits for `received`, then computes its prompt's last token alone (as vLLM does).

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
        sequence.holds, sequence.is_external = holds, is_external
        self._sequences[request_id] = self._waiting[request_id] = sequence
        if not is_external:
            self._book(sequence, prompt_tokens - self._count_hits(sequence) * self._block_size)

    def received(self, request_id: str) -> bool:
        """The prompt's keys and values are here: the request runs from the next step on. False when it is not here."""
        sequence = self._receiving.pop(request_id, None)
        if sequence is None:
            return False
        sequence.is_external = False
        sequence.computed = sequence.known_tokens - 1
        self._store(sequence)
        self._book(sequence, 1)  # a step of its own: a leap would tell of its first token with its last
        self._running.append(sequence)
        return True

    def local_tokens(self, request_id: str) -> int:
        """Tokens of a request that receives its prompt which need no transfer: its prefix hit."""
        return self._receiving[request_id].computed

    def not_received(self, request_id: str) -> bool:
        """They will not come: the request computes its prompt itself. False when it does not wait for them."""
        sequence = self._receiving.pop(request_id, None) or self._waiting.get(request_id)
        if sequence is None or not sequence.is_external:
            return False
        sequence.is_external = False
        self._release(sequence)
        sequence.computed = sequence.full_blocks = 0
        self._waiting[request_id] = sequence
        self._book(sequence, sequence.known_tokens - self._count_hits(sequence) * self._block_size)
        return True

    def release(self, request_id: str) -> bool:
        """Free what a finished request held. False when it holds nothing. Always safe."""
        if self._held.pop(request_id, None) is None:
            return False
        self._release(self._sequences.pop(request_id))
        return True

    def abort(self, request_id: str) -> bool:
        """Drop a request wherever it is and free its blocks. False when it is not here. Always safe."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        for place in (self._waiting, self._receiving, self._held):
            if place.pop(request_id, None) is not None:
                break
        else:
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
        """Run one iteration. None when there is nothing to do, or nothing before blocks are released or received.

        A simulator that knows that nothing will arrive for `horizon_s` passes it: while all sequences only
        decode, the step then stands for all the iterations that begin within it (`rounds`), at the cost of
        one. `leap_s` tells how far that can go.
        """
        if not self._running and not self._waiting:
            return None
        if horizon_s > 0 and (planned := self._plan_leap(horizon_s)) is not None:
            return self._leap(planned)
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
        most = self.settings.max_running
        while self._waiting and not preempted and budget > 0 and len(running) + len(self._receiving) < most:
            sequence = next(iter(self._waiting.values()))
            if not self._admit(sequence):
                break
            if sequence.is_external:
                continue
            admitted[sequence.request_id] = sequence.cached_tokens
            tokens = min(sequence.known_tokens - sequence.computed, budget)
            self._make_room(sequence, tokens, preempted)
            context_tokens += sequence.computed
            if computed := self._compute(sequence, tokens):
                prefill_tokens += computed
                prefills += 1
            scheduled.append(sequence)
            budget -= tokens
        receiving, self._begun = self._begun, []
        if not (scheduled or receiving or preempted):
            return None  # blocks are held for others: only `release` or `received` helps
        emitted, finished = self._emit(scheduled)
        decodes = len(scheduled) - prefills
        duration_s = self.timing.duration_s(prefill_tokens, decodes, context_tokens)
        if not (scheduled or preempted):
            duration_s = 0.0  # it only starts transfers
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
            receiving,
        )

    def _emit(self, scheduled: Items[Sequence]) -> tuple[list[str], list[str]]:
        """A token for each sequence that is computed up to its end. Those that emitted, and those that finished."""
        emitted: list[str] = []
        finished: list[str] = []
        for sequence in scheduled:
            if sequence.computed == sequence.known_tokens:
                sequence.known_tokens += 1
                emitted.append(sequence.request_id)
                if sequence.known_tokens == sequence.end_tokens:
                    finished.append(sequence.request_id)
        self._finish(finished)
        self.generation_tokens_total += len(emitted)
        return emitted, finished

    def leap_s(self) -> float:
        """How long nothing but decoding will happen: until a sequence ends or needs a block. 0: not at all now.

        Does not mutate, so a simulator can wait for that moment, or for an arrival before it, and then `step`
        with a horizon of the time that has passed.
        """
        planned = self._plan_leap(inf)
        return 0.0 if planned is None else planned.duration_s

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, queues and booked tokens all add up."""
        self.cache.check_integrity(sequence.blocks for sequence in self._sequences.values())
        running = {sequence.request_id for sequence in self._running}
        assert len(running) == len(self._running) <= self.settings.max_running
        places = (running, set(self._waiting), set(self._receiving), set(self._held))
        assert set().union(*places) == set(self._sequences)
        assert sum(map(len, places)) == len(self._sequences), "a request is in two places"
        assert len(running) + len(self._receiving) <= self.settings.max_running
        assert self.backlog_tokens == sum(sequence.backlog for sequence in self._sequences.values())
        for name, sequence in self._sequences.items():
            assert 0 <= sequence.computed <= sequence.known_tokens <= sequence.end_tokens
            assert (sequence.known_tokens == sequence.end_tokens) == (name in self._held)
            assert sequence.backlog >= 0
            cached = sequence.known_tokens - 1 if name in self._receiving else sequence.computed
            assert len(sequence.blocks) == -(-cached // self._block_size)
            assert sequence.is_external or name not in self._receiving
        assert not any(sequence.blocks for sequence in self._waiting.values())

    def _plan_leap(self, horizon_s: float) -> Leap | None:
        """Several iterations in one, while every sequence decodes. None when one prefills or needs a block, or
        when the queue's head may be admitted."""
        running = self._running
        num_running = len(running)
        if not 0 < num_running <= self.settings.max_batched_tokens:
            return None
        if self._waiting and num_running + len(self._receiving) < self.settings.max_running:
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
        return leap(self.timing, num_running, context_tokens, horizon_s, most)

    def _leap(self, planned: Leap) -> Step:
        running, rounds = self._running, planned.rounds
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
            planned.duration_s,
            0,
            len(emitted),
            planned.context_tokens,
            emitted,
            finished,
            {},
            [],
            events,
            (),
            rounds,
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
        sequence.blocks = self.cache.hold(hit_hashes)
        sequence.computed = hits * self._block_size
        sequence.full_blocks = hits
        if sequence.is_external:
            self._receiving[sequence.request_id] = sequence
            self._begun.append(sequence.request_id)
            sequence.blocks += self.cache.take(-(-(sequence.known_tokens - 1) // self._block_size) - hits)
            return True
        self._running.append(sequence)
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
        self._store(sequence)
        if not sequence.backlog:
            return 0
        self._book(sequence, sequence.backlog - tokens)
        return tokens

    def _store(self, sequence: Sequence) -> None:
        full_blocks = sequence.computed // self._block_size
        if full_blocks > sequence.full_blocks:
            self.cache.store(
                sequence.request_id, sequence.blocks, sequence.block_hashes, sequence.full_blocks, full_blocks
            )
            sequence.full_blocks = full_blocks

    def _finish(self, finished: list[str]) -> None:
        if not finished:
            return
        done = set(finished)
        self._running = [sequence for sequence in self._running if sequence.request_id not in done]
        for request_id in finished:
            sequence = self._sequences[request_id]
            if sequence.holds:
                self._held[request_id] = sequence
            else:
                self._release(self._sequences.pop(request_id))

    def _release(self, sequence: Sequence) -> None:
        self.cache.release(sequence.blocks)
        sequence.blocks = []
        self._releases += 1
        self._book(sequence, 0)

    def _book(self, sequence: Sequence, backlog: int) -> None:
        self.backlog_tokens += backlog - sequence.backlog
        sequence.backlog = backlog
