"""Load is the last report and what was booked since; every booking comes back exactly once."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from headrace_router.load_table import SETTLE_S, Booking, LoadTable, ReplicaLoad
from headrace_router.types import BootId, Endpoints, Iteration, LoadReport, Replica, ReplicaId, Role


def replica(name: str = "a", boot: str = "1", *, reports: bool = True) -> Replica:
    endpoints = Endpoints("http://127.0.0.1:1", load="tcp://127.0.0.1:2" if reports else None)
    return Replica(
        ReplicaId(name),
        BootId(boot),
        "m",
        Role.UNIFIED,
        endpoints,
        block_size=16,
        num_blocks=1000,
        max_running=8,
    )


def report(
    sequence: int,
    *,
    name: str = "a",
    boot: str = "1",
    running: int = 0,
    waiting: int = 0,
    backlog: int = 0,
    kv_use: float = 0.0,
) -> LoadReport:
    return LoadReport(ReplicaId(name), BootId(boot), sequence, running, waiting, kv_use, backlog)


def table_of(*replicas: Replica) -> tuple[LoadTable, ReplicaLoad]:
    table = LoadTable()
    table.replace(replicas, 0.0)
    return table, table.all()[0]


def test_booked_tokens_count_until_a_report_can_show_them() -> None:
    table, load = table_of(replica())
    table.book(load, 1000, 800, now_s=1.0)
    assert load.backlog_tokens == 800
    table.report(report(1, backlog=100), 1.0 + SETTLE_S / 2)
    assert load.backlog_tokens == 900
    table.report(report(2, running=1, backlog=700), 1.0 + 2 * SETTLE_S)
    assert load.backlog_tokens == 700
    assert load.requests == 1
    table.check_integrity()


def test_reports_count_other_gateways_requests_and_bookings_ours() -> None:
    table, load = table_of(replica())
    table.report(report(1, running=5, waiting=2), 0.0)
    assert load.requests == 7
    table.book(load, now_s=1.0)
    assert load.requests == 8


def test_answered_request_runs_and_waits_no_longer() -> None:
    table, load = table_of(replica(reports=False))
    booking = table.book(load, 1000, 800, now_s=1.0)
    assert load.wait_s > 0
    table.answered(booking, 1.5)
    assert (load.backlog_tokens, load.wait_s, load.requests) == (0, 0.0, 1)
    table.answered(booking, 1.6)
    table.release(booking, 2.0)
    table.release(booking, 2.0)
    assert load.requests == table.open_bookings == 0
    table.check_integrity()


def test_expected_hits_are_no_backlog_where_the_engine_counts_whole_prompts() -> None:
    table, load = table_of(replica())
    first, second = (table.book(load, 1000, uncached, now_s=1.0) for uncached in (200, 1000))
    later = 1.0 + 2 * SETTLE_S
    table.report(report(1, waiting=2, backlog=2000), later)
    assert load.backlog_tokens == 1200
    table.report(report(2, waiting=3, backlog=2500), later)
    assert load.backlog_tokens == 1700, "500 are another gateway's"
    table.report(report(3, running=2, backlog=1150), later)
    assert load.backlog_tokens == 1150, "an engine that leaves hits out is believed"
    table.report(report(4, running=2, backlog=900), later)
    assert load.backlog_tokens == 900
    table.answered(first, later)
    table.report(report(5, running=2, backlog=1000), later)
    assert load.backlog_tokens == 1000
    table.release(second, later)
    assert load.backlog_tokens == 1000, "as reported: what we know of has ended"
    table.release(first, later)
    table.check_integrity()


def test_pace_of_a_silent_server_is_learned_from_its_answers() -> None:
    table, load = table_of(replica(reports=False))
    for number in range(20):
        booking = table.book(load, 1000, 1000, now_s=float(number))
        table.answered(booking, number + 0.5)
        table.release(booking, number + 0.9)
    assert 0.0003 < load.token_s < 0.0007


def test_pace_is_learned_from_reports() -> None:
    table, load = table_of(replica())
    before = load.token_s
    steps = tuple(Iteration(0.01 + 0.001 * n, n, 0) for n in (100, 500, 900, 1500, 2000, 300))
    for number in range(10):
        table.report(
            LoadReport(ReplicaId("a"), BootId("1"), number + 1, 0, 0, 0.0, 0, iterations=steps), float(number)
        )
    assert load.token_s > 5 * before


def test_prompt_that_does_not_fit_waits_for_memory() -> None:
    table, load = table_of(replica())
    table.report(report(1, running=4, kv_use=0.9), 0.0)
    assert load.free_tokens == 1600
    assert load.memory_wait_s(1000) == 0
    assert load.memory_wait_s(3000) > 0.1
    assert load.memory_wait_s(6000) > load.memory_wait_s(3000)


def test_slots_are_dense_and_given_again() -> None:
    table, _ = table_of(replica("a"), replica("b"), replica("c"))
    table.replace((replica("a"), replica("c")), 0.0)
    table.replace((replica("a"), replica("c"), replica("d"), replica("e")), 0.0)
    assert {load.replica.id: load.slot for load in table.all()} == {"a": 0, "c": 2, "d": 1, "e": 3}
    table.check_integrity()


class LoadTableMachine(RuleBasedStateMachine):
    """Bookings, answers, releases, reports and restarts in any order, some of them twice."""

    names = st.sampled_from(["a", "b", "c"])
    boots = st.sampled_from(["1", "2"])

    def __init__(self) -> None:
        super().__init__()
        self.table = LoadTable()
        self.now_s = 0.0
        self.open: list[Booking] = []
        self.done: list[Booking] = []
        self.sequence = 0

    @rule(members=st.dictionaries(names, st.tuples(boots, st.booleans()), max_size=3))
    def replace(self, members: dict[str, tuple[str, bool]]) -> None:
        replicas = tuple(replica(name, boot, reports=reports) for name, (boot, reports) in members.items())
        self.table.replace(replicas, self.now_s)

    @rule(name=names, prompt=st.integers(0, 5000), cached=st.integers(0, 5000))
    def book(self, name: str, prompt: int, cached: int) -> None:
        load = self.table.get(name)
        if load is not None:
            self.open.append(self.table.book(load, prompt, max(1, prompt - cached), 10, self.now_s))

    @rule(data=st.data(), done=st.booleans())
    def answered(self, data: st.DataObject, done: bool) -> None:
        bookings = self.done if done else self.open
        if bookings:
            self.table.answered(data.draw(st.sampled_from(bookings)), self.now_s)

    @rule(data=st.data(), times=st.integers(1, 2))
    def release(self, data: st.DataObject, times: int) -> None:
        if self.open:
            booking = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
            self.done.append(booking)
            for _ in range(times):
                self.table.release(booking, self.now_s)

    @rule(name=names, boot=boots, step=st.integers(-1, 2), running=st.integers(0, 9), kv=st.floats(-1, 2))
    def report(self, name: str, boot: str, step: int, running: int, kv: float) -> None:
        self.sequence += step
        self.table.report(
            report(self.sequence, name=name, boot=boot, running=running, backlog=running * 100, kv_use=kv),
            self.now_s,
        )

    @rule(seconds=st.floats(0, 1))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def books_balance(self) -> None:
        self.table.check_integrity()
        assert self.table.open_bookings == len(self.open)
        for load in self.table.all():
            ours = [booking for booking in self.open if booking.load is load]
            assert load.booked == len(ours)
            assert load.requests >= load.booked
            reported = load.last_report.backlog_tokens if load.last_report is not None else 0
            assert reported <= load.backlog_tokens <= reported + sum(b.uncached_tokens for b in ours)
            assert load.wait_s == load.backlog_tokens * load.token_s
            assert load.turn_s >= load.wait_s
            assert load.open_places + load.requests >= 8, "never more taken than requests are known"


TestLoadTableMachine = LoadTableMachine.TestCase
TestLoadTableMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
