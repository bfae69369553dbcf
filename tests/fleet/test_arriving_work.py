"""How fast work comes to a pool."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.fleet.arriving_work import ArrivingWork
from headrace.fleet.scaling_spec import PoolSample


def coming(rate: Callable[[float], float], for_s: int = 300) -> ArrivingWork:
    samples, work = [], 0.0
    for second in range(for_s + 1):
        samples.append(PoolSample(float(second), 4, arrived_work_s=work))
        work += rate(second)
    return ArrivingWork(samples)


def test_a_rate_is_of_the_time_asked_for() -> None:
    work = coming(lambda second: 2.0 if second < 200 else 6.0)
    assert work.rate(100, 200) == pytest.approx(2.0)
    assert work.rate(200, 300) == pytest.approx(6.0)
    assert work.rate(150, 250) == pytest.approx(4.0)


def test_what_samples_do_not_cover_nobody_can_tell() -> None:
    work = coming(lambda second: 2.0, for_s=50)
    assert work.rate(-100, 50) is None
    assert work.rate(-100, 50, covered=0.3) == pytest.approx(2.0)
    assert ArrivingWork([]).rate(0, 10) is None
    assert ArrivingWork([]).trend(10, 5) == 0.0


def test_a_ramp_is_a_trend_and_a_burst_is_none() -> None:
    assert coming(lambda second: 1 + second / 60).trend(300, 60) == pytest.approx(1 / 60, rel=0.05)
    assert coming(lambda second: 8.0 if second > 260 else 2.0).trend(300, 60) == pytest.approx(0.0)
    assert coming(lambda second: 8.0 if 200 < second < 240 else 2.0).trend(300, 60) == pytest.approx(0.0)
    assert coming(lambda second: 10 - second / 60).trend(300, 60) == 0.0


@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.none() | st.floats(0, 1e9)), max_size=20), st.floats(1, 100)
)
def test_whatever_the_samples_rates_and_trends_are_not_negative(
    rows: list[tuple[float, float | None]], window_s: float
) -> None:
    work = ArrivingWork([PoolSample(at_s, 1, arrived_work_s=told) for at_s, told in rows])
    rate = work.rate(-window_s, window_s)
    assert rate is None or rate >= 0
    assert work.trend(0.0, window_s) >= 0
