"""Percentiles, goodput and errors of made-up outcomes."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import CallerError
from headrace_bench.load_summary import Distribution, summarise
from headrace_bench.outcome import Outcome
from headrace_bench.slo import Slo, goodput

seconds = st.floats(0, 1e4, allow_nan=False)


def answered(sent_s: float = 0.0, ttft_s: float = 0.1, gaps_s: tuple[float, ...] = (0.01, 0.03)) -> Outcome:
    return Outcome(
        conversation=0,
        turn=0,
        measured=True,
        sent_s=sent_s,
        late_s=0.0,
        e2e_s=ttft_s + sum(gaps_s),
        ttft_s=ttft_s,
        gaps_s=array("f", gaps_s),
        planned_tokens=100,
        prompt_tokens=100,
        cached_tokens=40,
        output_tokens=len(gaps_s) + 1,
    )


def failed(kind: str, sent_s: float = 0.0, detail: str = "") -> Outcome:
    return Outcome(0, 0, True, sent_s, 0.0, 0.5, error=kind, detail=detail)


outcomes = st.lists(
    st.one_of(
        st.builds(
            answered, st.floats(0, 100), st.floats(0, 10), st.lists(st.floats(0, 2), max_size=5).map(tuple)
        ),
        st.builds(failed, st.sampled_from(["connect", "timeout", "http_503"]), st.floats(0, 100)),
    ),
    max_size=30,
)
objectives = st.builds(Slo, *[st.none() | st.floats(0.001, 20)] * 4)


@settings(deadline=None)
@given(st.lists(seconds, min_size=1, max_size=200))
def test_percentiles_grow_and_stay_between_the_extremes(values: list[float]) -> None:
    seen = Distribution.of(values)
    assert seen is not None
    assert seen.min <= seen.p50 <= seen.p90 <= seen.p95 <= seen.p99 <= seen.max
    assert seen.min <= seen.mean <= seen.max
    assert (seen.count, seen.min, seen.max) == (len(values), min(values), max(values))
    assert sum(value <= seen.p90 * (1 + 1e-12) for value in values) >= 0.9 * (len(values) - 1)


def test_percentiles_interpolate_between_neighbours() -> None:
    seen = Distribution.of([0.0, 1.0, 2.0, 3.0])
    assert seen is not None
    assert (seen.p50, seen.p90, seen.mean) == (pytest.approx(1.5), pytest.approx(2.7), 1.5)
    assert Distribution.of([]) is None


@settings(deadline=None)
@given(outcomes, objectives, st.randoms(use_true_random=False))
def test_the_order_of_outcomes_does_not_matter(some: list[Outcome], slo: Slo, lots: object) -> None:
    shuffled = list(some)
    lots.shuffle(shuffled)  # type: ignore[attr-defined]
    assert summarise(shuffled, slo) == summarise(some, slo)


@settings(deadline=None)
@given(outcomes, objectives)
def test_goodput_is_at_most_what_succeeded_and_falls_with_the_bounds(some: list[Outcome], slo: Slo) -> None:
    loose, strict = goodput(some, Slo(), 10.0), goodput(some, slo, 10.0)
    succeeded = sum(outcome.error is None for outcome in some)
    assert loose.requests_per_s == succeeded / 10.0
    assert 0 <= strict.requests_per_s <= loose.requests_per_s
    assert 0 <= strict.share <= loose.share <= 1
    halved = Slo(
        *(None if bound is None else bound / 2 for bound in (slo.ttft_s, slo.itl_s, slo.tpot_s, slo.e2e_s))
    )
    assert goodput(some, halved, 10.0).share <= strict.share


@settings(deadline=None)
@given(outcomes)
def test_every_request_succeeded_or_has_an_error(some: list[Outcome]) -> None:
    summary = summarise(some)
    assert summary.requests == len(some) == summary.succeeded + sum(summary.errors.values())
    assert set(summary.errors) == set(summary.error_details)


def test_a_summary_of_two_answers_and_a_failure() -> None:
    some = [answered(0.0, 0.1), answered(1.0, 0.3), failed("http_503", 0.0, "busy")]
    summary = summarise(some, Slo(ttft_s=0.2))
    assert summary.window_s == pytest.approx(1.34)
    assert summary.requests_per_s == pytest.approx(2 / 1.34)
    assert summary.output_tokens_per_s == pytest.approx(6 / 1.34)
    assert summary.cached_share == pytest.approx(0.4)
    assert summary.itl_s is not None
    assert (summary.itl_s.count, summary.itl_s.mean) == (4, pytest.approx(0.02))
    assert summary.tpot_s is not None
    assert summary.tpot_s.mean == pytest.approx(0.02)
    assert (summary.errors, summary.error_details) == ({"http_503": 1}, {"http_503": "busy"})
    assert summary.goodput is not None
    assert summary.goodput.share == pytest.approx(1 / 3)


def test_the_warm_up_is_in_no_number() -> None:
    cold = Outcome(0, 0, False, 0.0, 0.0, 99.0, ttft_s=90.0)
    assert summarise([cold, answered(100.0)]) == summarise([answered(100.0)])


def test_nothing_sums_up_to_nothing() -> None:
    summary = summarise([], Slo(ttft_s=1.0))
    assert (summary.requests, summary.requests_per_s, summary.ttft_s, summary.cached_share) == (
        0,
        0.0,
        None,
        None,
    )


def test_an_objective_must_be_positive() -> None:
    with pytest.raises(CallerError, match="ttft"):
        Slo(ttft_s=0)
