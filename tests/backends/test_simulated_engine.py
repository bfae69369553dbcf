"""The pure engine: what it caches, batches, evicts and preempts, and that nothing ever leaks."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.backends.simulated_cache import Cleared, Removed, Stored
from headrace.backends.simulated_engine import SimulatedEngine
from headrace.backends.simulated_sequence import Step
from headrace.config import SimulatedEngine as Settings


def engine(**changes: float) -> SimulatedEngine:
    """Blocks of 4 tokens, 16 of them, at most 16 tokens and 4 sequences a step, 1 s per step."""
    small = {
        "block_size": 4,
        "num_blocks": 16,
        "max_batched_tokens": 16,
        "max_running": 4,
        "max_model_len": 64,
    }
    zero = {"step_s": 1.0, "prefill_token_s": 0.0, "decode_sequence_s": 0.0, "context_token_s": 0.0}
    return SimulatedEngine(Settings.model_validate(small | zero | changes))


def run(simulated: SimulatedEngine) -> list[Step]:
    steps: list[Step] = []
    while (step := simulated.step()) is not None:
        simulated.check_integrity()
        steps.append(step)
    return steps


def test_a_request_emits_its_answer_and_leaves_nothing_held() -> None:
    simulated = engine()
    simulated.add("a", 10, 3, [1, 2])
    steps = run(simulated)
    assert [step.emitted for step in steps] == [["a"], ["a"], ["a"]]
    assert steps[-1].finished == ["a"]
    assert (simulated.running, simulated.waiting, simulated.kv_use, simulated.backlog_tokens) == (
        0,
        0,
        0.0,
        0,
    )


def test_duration_follows_the_formula() -> None:
    simulated = engine(step_s=1.0, prefill_token_s=0.1, decode_sequence_s=0.01, context_token_s=0.001)
    simulated.add("a", 10, 2)
    first, second = run(simulated)
    assert first.duration_s == pytest.approx(1.0 + 0.1 * 10)
    assert second.duration_s == pytest.approx(1.0 + 0.01 + 0.001 * 10)


def test_long_prompts_are_prefilled_in_chunks_beside_decodes() -> None:
    simulated = engine()
    simulated.add("a", 4, 4)
    simulated.add("b", 40, 1)
    prefill = [step.iteration.prefill_tokens for step in run(simulated)]
    assert prefill == [16, 15, 13, 0]


def test_leading_resident_blocks_are_hit_and_later_ones_are_not() -> None:
    simulated = engine()
    simulated.add("a", 13, 1, [1, 2, 3])
    run(simulated)
    simulated.add("b", 13, 1, [1, 2, 9])
    simulated.step()
    assert simulated.cached_tokens_total == 8
    simulated.add("c", 13, 1, [7, 2, 3])
    simulated.step()
    assert simulated.cached_tokens_total == 8


def test_a_fully_resident_prompt_still_computes_its_last_block() -> None:
    simulated = engine()
    simulated.add("a", 8, 1, [1, 2])
    run(simulated)
    simulated.add("b", 8, 1, [1, 2])
    assert simulated.backlog_tokens == 4
    (step,) = run(simulated)
    assert step.iteration.prefill_tokens == 4
    assert simulated.cached_tokens_total == 4


def test_blocks_filled_by_decoding_are_cached_too() -> None:
    simulated = engine()
    simulated.add("a", 6, 7, [1, 2, 3])
    events = [event for step in run(simulated) for event in step.events]
    assert events == [Stored("a", 0, [1], None), Stored("a", 1, [2], 1), Stored("a", 2, [3], 2)]


def test_the_least_recently_freed_tail_is_evicted_first() -> None:
    simulated = engine()
    simulated.add("a", 32, 1, list(range(8)))
    run(simulated)
    simulated.add("b", 32, 1, list(range(10, 18)))
    run(simulated)
    simulated.add("c", 12, 1, [20, 21, 22])
    removed = [event for step in run(simulated) for event in step.events if isinstance(event, Removed)]
    assert removed == [Removed([7, 6, 5])]


def test_admission_waits_until_the_whole_prompt_fits() -> None:
    simulated = engine()
    simulated.add("a", 40, 2)
    simulated.add("b", 40, 2)
    steps = run(simulated)
    admitted_at = {name: index for index, step in enumerate(steps) for name in step.admitted}
    finished_at = {name: index for index, step in enumerate(steps) for name in step.finished}
    assert admitted_at["b"] == finished_at["a"] + 1
    assert simulated.preemptions_total == 0


def test_running_out_of_blocks_preempts_the_last_admitted_and_it_still_answers_in_full() -> None:
    simulated = engine()
    simulated.add("a", 28, 20)
    simulated.add("b", 28, 20)
    steps = run(simulated)
    assert simulated.preemptions_total >= 1
    assert {name for step in steps for name in step.preempted} == {"b"}
    emitted = [name for step in steps for name in step.emitted]
    assert (emitted.count("a"), emitted.count("b")) == (20, 20)
    assert simulated.prompt_tokens_total == 56


def test_a_preempted_request_returns_before_those_that_never_ran() -> None:
    simulated = engine()
    simulated.add("a", 28, 20)
    simulated.add("b", 28, 20)
    simulated.add("c", 28, 1)
    admitted = [name for step in run(simulated) for name in step.admitted]
    assert admitted == ["a", "b", "b", "c"]


def test_shared_blocks_outlive_the_abort_of_one_holder() -> None:
    simulated = engine()
    simulated.add("a", 12, 20, [1, 2])
    simulated.step()
    simulated.add("b", 12, 20, [1, 2])
    simulated.step()
    used = simulated.kv_use
    assert simulated.abort("a")
    assert not simulated.abort("a")
    simulated.check_integrity()
    assert 0 < simulated.kv_use < used
    simulated.abort("b")
    assert simulated.kv_use == 0


def test_clearing_waits_for_idle_and_is_announced() -> None:
    simulated = engine()
    simulated.add("a", 12, 2, [1, 2])
    simulated.step()
    assert not simulated.clear_cache()
    run(simulated)
    assert simulated.clear_cache()
    assert simulated.take_events() == [Cleared()]
    assert simulated.cache.num_resident == 0
    simulated.check_integrity()


def test_requests_that_can_never_run_are_refused_with_the_bound() -> None:
    simulated = engine()
    with pytest.raises(ValueError, match="64 tokens of context"):
        simulated.add("a", 60, 5)
    with pytest.raises(ValueError, match="at least 1"):
        simulated.add("a", 0, 5)
    simulated.add("a", 1, 1)
    with pytest.raises(ValueError, match="already"):
        simulated.add("a", 1, 1)


def test_a_held_prompt_keeps_its_blocks_until_it_is_released() -> None:
    simulated = engine()
    simulated.add("a", 10, 1, [1, 2], holds=True)
    (step,) = run(simulated)
    assert step.finished == ["a"]
    assert (simulated.running, simulated.waiting) == (0, 0)
    assert simulated.kv_use == 3 / 16
    assert simulated.release("a")
    assert not simulated.release("a")
    assert simulated.kv_use == 0
    simulated.check_integrity()


def test_a_prompt_from_elsewhere_takes_room_waits_and_then_computes_its_last_token_alone() -> None:
    simulated = engine(prefill_token_s=0.5)
    simulated.add("a", 10, 3, [1, 2], is_external=True)
    assert simulated.backlog_tokens == 0
    step = simulated.step()
    assert step is not None
    assert (step.receiving, step.emitted, step.duration_s) == (["a"], [], 0.0)
    assert simulated.step() is None
    assert (simulated.running, simulated.waiting, simulated.kv_use) == (0, 1, 3 / 16)
    assert simulated.received("a")
    assert not simulated.received("a")
    steps = run(simulated)
    assert [step.emitted for step in steps] == [["a"], ["a"], ["a"]]
    assert [step.prefill_tokens for step in steps] == [1, 0, 0]
    assert steps[0].events == [Stored("a", 0, [1, 2], None)]
    assert simulated.kv_use == 0


def test_a_prompt_from_elsewhere_moves_only_what_is_not_cached() -> None:
    simulated = engine()
    simulated.add("a", 10, 1, [1, 2])
    run(simulated)
    simulated.add("b", 14, 1, [1, 2, 3], is_external=True)
    simulated.step()
    assert simulated.local_tokens("b") == 8


def test_a_prompt_from_elsewhere_waits_for_room_behind_nobody_who_could_give_it() -> None:
    simulated = engine()
    simulated.add("a", 60, 1, holds=True)
    run(simulated)
    simulated.add("b", 20, 2, is_external=True)
    assert simulated.step() is None
    simulated.release("a")
    step = simulated.step()
    assert step is not None
    assert step.receiving == ["b"]


@pytest.mark.parametrize("admitted", [False, True])
def test_a_prompt_that_never_comes_is_computed_here(admitted: bool) -> None:
    simulated = engine()
    simulated.add("a", 10, 2, [1, 2], is_external=True)
    if admitted:
        simulated.step()
    assert simulated.not_received("a")
    assert not simulated.not_received("a")
    simulated.check_integrity()
    assert simulated.backlog_tokens == 10
    assert [step.emitted for step in run(simulated)] == [["a"], ["a"]]


@pytest.mark.parametrize("horizon_s", [0.5, 3.0, 100.0])
def test_leaping_over_decodes_changes_no_time_and_no_token(horizon_s: float) -> None:
    def story(horizon_s: float) -> tuple[dict[str, float], list[object], int]:
        simulated = engine(decode_sequence_s=0.25, context_token_s=0.125)
        simulated.add("a", 10, 9, [1, 2, 3, 4])
        simulated.add("b", 7, 17, [5, 6, 7, 8])
        now_s, done, events = 0.0, {}, []
        while (step := simulated.step(horizon_s)) is not None:
            simulated.check_integrity()
            now_s += step.duration_s
            done |= dict.fromkeys(step.finished, now_s)
            events += step.events
        return done, events, simulated.generation_tokens_total

    assert story(horizon_s) == story(0.0)


class EngineMachine(RuleBasedStateMachine):
    """Any mixture of arrivals, aborts and steps keeps every count, and events replay to the true cache."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = engine(num_blocks=12, max_model_len=48)
        self.owed: dict[str, int] = {}
        self.mirror: set[int] = set()
        self.receiving: set[str] = set()
        self.held: set[str] = set()
        self.holding: set[str] = set()  # will be held when they finish
        self.count = 0

    @rule(
        prompt=st.integers(1, 40),
        answer=st.integers(1, 8),
        family=st.integers(0, 2),
        shared=st.integers(0, 12),
        known=st.integers(0, 12),
        half=st.sampled_from(["whole", "whole", "prefill", "decode"]),
    )
    def arrive(self, prompt: int, answer: int, family: int, shared: int, known: int, half: str) -> None:
        name = f"r{self.count}"
        self.count += 1
        private = 1000 * self.count
        hashes = [100 * family + index if index < shared else private + index for index in range(known)]
        hashes = hashes[: (prompt + answer) // 4]
        self.engine.add(name, prompt, answer, hashes, holds=half == "prefill", is_external=half == "decode")
        self.owed[name] = answer
        if half == "prefill":
            self.holding.add(name)

    @precondition(lambda self: self.receiving)
    @rule(data=st.data(), comes=st.booleans())
    def transfer_ends(self, data: st.DataObject, comes: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.receiving)))
        assert self.engine.received(name) if comes else self.engine.not_received(name)
        self.receiving.remove(name)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def taken(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        assert self.engine.release(name)
        self.held.remove(name)

    @precondition(lambda self: self.owed)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.owed)))
        assert self.engine.abort(name)
        del self.owed[name]
        self.receiving.discard(name)

    @rule(steps=st.integers(1, 12), horizon_s=st.sampled_from([0.0, 2.5, 100.0]))
    def progress(self, steps: int, horizon_s: float) -> None:
        for _ in range(steps):
            step = self.engine.step(horizon_s)
            if step is None:
                assert not self.owed or self.held or self.receiving
                return
            done = step.prefill_tokens + len(step.emitted) + len(step.receiving)
            assert done > 0 or (step.preempted and (self.held or self.receiving)), "a step did nothing"
            self.receiving.update(step.receiving)
            for name in step.emitted:
                self.owed[name] -= step.rounds
            for name in step.finished:
                assert self.owed.pop(name) == 0
                if name in self.holding:
                    self.held.add(name)
            self.replay(step)

    @rule()
    def clear(self) -> None:
        if self.engine.clear_cache():
            assert self.engine.running == 0

    def replay(self, step: Step) -> None:
        for event in step.events:
            if isinstance(event, Stored):
                assert self.mirror.isdisjoint(event.hashes)
                self.mirror.update(event.hashes)
            elif isinstance(event, Removed):
                assert self.mirror.issuperset(event.hashes)
                self.mirror.difference_update(event.hashes)
            else:
                self.mirror.clear()
        assert len(self.mirror) == self.engine.cache.num_resident

    @invariant()
    def counts_hold(self) -> None:
        self.engine.check_integrity()
        assert self.engine.running + self.engine.waiting == len(self.owed)

    def teardown(self) -> None:
        for name in [*self.owed, *self.held]:
            assert self.engine.abort(name)
        self.engine.check_integrity()
        assert (self.engine.kv_use, self.engine.backlog_tokens) == (0.0, 0)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
