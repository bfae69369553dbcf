"""What all gateways together tell. No clock: time is an argument."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.fleet.demand_book import SILENT_S, DemandBook
from headrace.fleet.pools import PoolKey
from headrace_router.demand import Demand, PoolDemand
from headrace_router.types import Role

KEY = PoolKey("m", Role.UNIFIED)


def demand(
    gateway: str, sequence: int, arrived: int, held: int = 0, backlog_s: float | None = None
) -> Demand:
    return Demand(
        gateway, sequence, (PoolDemand("m", Role.UNIFIED, held, arrived, arrived * 0.5, backlog_s),)
    )


def test_without_a_gateway_nobody_knows() -> None:
    book = DemandBook()
    assert book.totals(KEY) is None
    book.tell(Demand("a", 1, ()), 0.0)
    totals = book.totals(KEY)
    assert totals is not None
    assert (totals.held, totals.arrived, totals.backlog_s) == (0, 0, None)


def test_gateways_add_up() -> None:
    book = DemandBook()
    book.tell(demand("a", 1, 10, held=2, backlog_s=1.0), 0.0)
    book.tell(demand("b", 1, 5, held=1, backlog_s=3.0), 0.0)
    totals = book.totals(KEY)
    assert totals is not None
    assert (totals.held, totals.arrived, totals.arrived_work_s, totals.backlog_s) == (3, 15, 7.5, 2.0)


def test_what_a_gateway_counted_stays_when_it_goes() -> None:
    book = DemandBook()
    book.tell(demand("a", 1, 10, held=2), 0.0)
    book.tell(demand("b", 1, 5), SILENT_S + 1)
    book.forget(SILENT_S + 1)
    totals = book.totals(KEY)
    assert totals is not None
    assert (totals.held, totals.arrived, book.num_gateways) == (0, 15, 1)


def test_a_gateway_that_counts_already_is_no_burst_of_arrivals() -> None:
    book = DemandBook()
    book.tell(demand("a", 500, 1_000_000), 0.0)
    book.tell(demand("a", 501, 1_000_003), 1.0)
    totals = book.totals(KEY)
    assert totals is not None
    assert totals.arrived == 3


def test_who_waits_for_a_model_waits_for_all_its_pools() -> None:
    """A gateway that has never seen a replica of it does not know that it has two."""
    book = DemandBook()
    book.tell(demand("a", 1, 3, held=3), 0.0)
    for role in (Role.PREFILL, Role.DECODE):
        totals = book.totals(PoolKey("m", role))
        assert totals is not None
        assert totals.held == 3
    other = book.totals(PoolKey("n", Role.UNIFIED))
    assert other is not None
    assert other.held == 0


def test_a_report_that_comes_late_changes_nothing() -> None:
    book = DemandBook()
    book.tell(demand("a", 2, 10), 0.0)
    book.tell(demand("a", 1, 9, held=9), 0.1)
    totals = book.totals(KEY)
    assert totals is not None
    assert totals.held == 0


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 30), st.integers(0, 100), st.floats(0, 4)),
        max_size=60,
    )
)
def test_no_counter_ever_falls(reports: list[tuple[str, int, int, float]]) -> None:
    book, now_s, last = DemandBook(), 0.0, (0, 0.0)
    for gateway, sequence, arrived, pause_s in reports:
        now_s += pause_s
        book.forget(now_s)
        book.tell(demand(gateway, sequence, arrived), now_s)
        totals = book.totals(KEY)
        assert totals is not None
        counters = (totals.arrived, totals.arrived_work_s)
        assert counters[0] >= last[0]
        assert counters[1] >= last[1]
        last = counters
