"""Planned workloads: the same for a seed, sharing what their trace shares, about as long as asked."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_bench.prompt_text import WORDS, Calibration, Passage, render
from headrace_bench.trace import BLOCK_TOKENS, TraceRecord
from headrace_bench.workload import (
    Conversation,
    Replay,
    Span,
    Synthetic,
    WorkloadError,
    mark_warm_up,
    plan_replay,
    plan_synthetic,
    start_poisson,
    start_when_free,
)

SPEC = Synthetic(
    requests=12, prompt_tokens=Span(10, 40), output_tokens=Span(5, 9), turns=3, system_prompts=2, think_s=1.5
)


def spoken(seed: int, conversations: tuple[Conversation, ...]) -> str:
    """Everything that a plan makes its users say."""
    return "\n".join(render(seed, turn.user) for one in conversations for turn in one.turns)


def first_text(seed: int, conversation: Conversation) -> str:
    return render(seed, conversation.turns[0].user)


def test_equal_seeds_plan_equal_workloads_and_other_seeds_other_ones() -> None:
    plans = [start_poisson(plan_synthetic(SPEC, Calibration(), seed), 2.0, seed) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    assert spoken(1, plans[0]) == spoken(1, plans[1]) != spoken(2, plans[2])


def test_a_seed_says_the_same_on_every_machine() -> None:
    plan = start_poisson(plan_synthetic(SPEC, Calibration(1.25, 10.0), 42), 2.0, 42)
    shape = [
        (
            round(c.start_s or 0.0, 9),
            c.system,
            [(t.output_tokens, t.new_tokens, round(t.think_s, 9)) for t in c.turns],
        )
        for c in plan
    ]
    digest = hashlib.sha256((repr(shape) + spoken(42, plan)).encode()).hexdigest()
    assert digest[:16] == "53298a8e13e26d65"


def test_requests_round_up_to_whole_conversations() -> None:
    plan = plan_synthetic(Synthetic(requests=10, turns=4), Calibration(), 0)
    assert [len(conversation.turns) for conversation in plan] == [4, 4, 4]


def test_conversations_share_the_system_prompts_and_nothing_else() -> None:
    plan = plan_synthetic(SPEC, Calibration(), 0)
    assert {c.system.key for c in plan if c.system} == {"system/0", "system/1"}
    said = [render(0, turn.user) for conversation in plan for turn in conversation.turns]
    assert len(set(said)) == len(said)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6), st.lists(st.integers(0, 5), min_size=1, max_size=6)
)
def test_equal_leading_hash_ids_give_equal_leading_text(left: list[int], right: list[int]) -> None:
    records = [TraceRecord(0.0, BLOCK_TOKENS * len(ids), 1, tuple(ids)) for ids in (left, right)]
    texts = [
        first_text(3, one).split() for one in plan_replay(records, Replay(token_scale=0.1), Calibration())
    ]
    shared = 0
    while shared < min(len(left), len(right)) and left[shared] == right[shared]:
        shared += 1
    words = [len(text) // len(ids) for text, ids in zip(texts, (left, right), strict=True)]
    common = 0
    while common < min(map(len, texts)) and texts[0][common] == texts[1][common]:
        common += 1
    assert common >= shared * min(words)
    if shared < min(len(left), len(right)):  # other ids part within a few words
        assert common <= shared * max(words) + 8


def test_the_chat_template_shortens_the_last_block_only() -> None:
    record = TraceRecord(0.0, 3 * BLOCK_TOKENS, 1, (1, 2, 3))
    (conversation,) = plan_replay([record], Replay(), Calibration(1.0, 30.0))
    assert [passage.words for passage in conversation.turns[0].user] == [512, 512, 482]
    assert conversation.turns[0].new_tokens == 3 * BLOCK_TOKENS


def test_a_record_without_hash_ids_shares_nothing() -> None:
    plan = plan_replay([TraceRecord(0.0, 50, 1), TraceRecord(1.0, 50, 1)], Replay(), Calibration())
    assert first_text(0, plan[0]) != first_text(0, plan[1])
    assert [conversation.start_s for conversation in plan] == [0.0, 1.0]


@settings(deadline=None)
@given(st.integers(1, 20_000), st.floats(0.02, 1), st.floats(0.5, 3), st.floats(0, 50))
def test_a_replayed_prompt_is_as_long_as_its_record(
    tokens: int, scale: float, slope: float, base: float
) -> None:
    ids = tuple(range(-(-tokens // BLOCK_TOKENS)))
    (one,) = plan_replay(
        [TraceRecord(0.0, tokens, 1, ids)], Replay(token_scale=scale), Calibration(slope, base)
    )
    words = sum(passage.words for passage in one.turns[0].user)
    assert len(first_text(0, one).split()) == words
    wanted = tokens * scale
    assert -slope - 1 <= words * slope + base - wanted <= slope + 1 + base


def test_long_prompts_and_outputs_of_a_trace_are_cut() -> None:
    (one,) = plan_replay(
        [TraceRecord(0.0, 5000, 900, tuple(range(10)))],
        Replay(max_prompt_tokens=700, max_output_tokens=30),
        Calibration(),
    )
    assert one.turns[0].new_tokens == 700
    assert one.turns[0].output_tokens == 30


def test_poisson_starts_at_once_and_keeps_its_rate() -> None:
    plan = start_poisson(plan_synthetic(Synthetic(requests=4000), Calibration(), 0), 50.0, 0)
    starts = [conversation.start_s or 0.0 for conversation in plan]
    assert starts[0] == 0.0
    assert all(a <= b for a, b in pairwise(starts))
    assert starts[-1] == pytest.approx(4000 / 50, rel=0.1)
    assert all(conversation.start_s is None for conversation in start_when_free(plan))


def test_the_warm_up_is_whole_conversations() -> None:
    plan = mark_warm_up(plan_synthetic(Synthetic(requests=12, turns=3), Calibration(), 0), 4)
    assert [conversation.measured for conversation in plan] == [False, False, True, True]
    with pytest.raises(WorkloadError, match="none to measure"):
        mark_warm_up(plan, 12)


@pytest.mark.parametrize("text", ["", "x", "0", "5:4", "1:2:3", "-1", "1.5"])
def test_token_counts_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(WorkloadError, match="token count"):
        Span.parse(text)


@settings(deadline=None)
@given(st.integers(0, 10), st.text(max_size=20), st.integers(1, 300), st.integers(1, 300))
def test_texts_of_one_key_begin_alike(seed: int, key: str, short: int, long: int) -> None:
    short, long = sorted((short, long))
    text = render(seed, (Passage(key, short),))
    assert render(seed, (Passage(key, long),)).startswith(text)
    assert len(text.split()) == short
    assert set(text.split()) <= {word.strip() for word in WORDS}


@settings(deadline=None)
@given(st.floats(0.5, 5), st.floats(0, 100), st.integers(1, 5000))
def test_a_calibration_finds_the_line_it_was_measured_on(slope: float, base: float, words: int) -> None:
    fitted = Calibration.fit(32, round(32 * slope + base), 160, round(160 * slope + base), "usage")
    assert fitted.tokens_of(words) == pytest.approx(words * slope + base, abs=2 + words / 64)
    assert abs(fitted.words_for(fitted.tokens_of(words)) - words) <= 1 / fitted.tokens_per_word + 1


def test_a_server_whose_counts_make_no_sense_is_not_believed() -> None:
    assert Calibration.fit(32, 256, 160, 256, "usage") == Calibration()
