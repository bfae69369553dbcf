"""The router's view of the fleet and its books, whatever happens in whatever order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from headrace_router.clock import VirtualClock
from headrace_router.load_table import Booking
from headrace_router.policies import make_policy
from headrace_router.router import Router
from headrace_router.types import (
    BootId,
    Endpoints,
    LoadReport,
    Membership,
    Replica,
    ReplicaId,
    ReplicaState,
    Request,
    Role,
)

SILENCE_S = 0.8


def replica(
    name: str, boot: str = "1", state: ReplicaState = ReplicaState.READY, model: str = "m"
) -> Replica:
    endpoints = Endpoints("http://127.0.0.1:1", load="tcp://127.0.0.1:2")
    return Replica(ReplicaId(name), BootId(boot), model, Role.UNIFIED, endpoints, state)


def report(name: str, boot: str = "1", sequence: int = 1, running: int = 0) -> LoadReport:
    return LoadReport(ReplicaId(name), BootId(boot), sequence, running, 0, 0.0, 0)


def router_of(*replicas: Replica, now_s: float = 0.0, policy: str = "least_loaded") -> Router:
    router = Router(make_policy(policy, 0))
    router.set_membership(Membership(1, replicas), now_s)
    return router


def test_draining_replica_gets_nothing_new_but_its_model_stays_known() -> None:
    router = router_of(replica("a", state=ReplicaState.DRAINING))
    assert router.knows("m")
    assert router.choose(Request("m")) is None


def test_excluded_replicas_are_not_chosen() -> None:
    router = router_of(replica("a"), replica("b"))
    choice = router.choose(Request("m", excluded=frozenset({ReplicaId("a")})))
    assert choice is not None
    assert choice.booking.replica.id == "b"
    assert router.choose(Request("m", excluded=frozenset({ReplicaId("a"), ReplicaId("b")}))) is None


def test_silent_replica_leaves_the_view_and_returns_with_its_next_report() -> None:
    clock = VirtualClock()
    router = router_of(replica("a"), now_s=clock())
    clock.advance(0.7)
    assert router.tick(clock(), SILENCE_S) == []
    clock.advance(0.2)
    assert [r.id for r in router.tick(clock(), SILENCE_S)] == ["a"]
    assert router.choose(Request("m")) is None
    assert router.report(report("a"), clock())
    assert router.choose(Request("m")) is not None


def test_refused_connection_keeps_a_replica_out_for_its_time_although_it_reports() -> None:
    router = router_of(replica("a"))
    router.suspend(replica("a"), "refused", until_s=1.0)
    router.report(report("a"), 0.5)
    assert router.choose(Request("m")) is None
    router.tick(1.0, SILENCE_S)
    assert router.choose(Request("m")) is not None


def test_one_that_refused_and_fell_silent_meanwhile_does_not_return_when_its_time_is_over() -> None:
    router = router_of(replica("a"))
    router.suspend(replica("a"), "refused", until_s=1.0)
    assert [r.id for r in router.tick(1.0, SILENCE_S)] == ["a"]
    assert router.choose(Request("m")) is None
    assert router.report(report("a"), 1.1)
    assert router.choose(Request("m")) is not None


def test_report_of_another_boot_or_an_older_one_changes_nothing() -> None:
    router = router_of(replica("a", boot="2"))
    assert not router.report(report("a", boot="1", running=9), 0.0)
    assert router.report(report("a", boot="2", sequence=5, running=3), 0.0)
    assert not router.report(report("a", boot="2", sequence=4, running=7), 0.0)
    load = router.loads.get("a")
    assert load is not None
    assert load.requests == 3


def test_restarted_replica_starts_from_zero_and_old_bookings_end_on_its_predecessor() -> None:
    router = router_of(replica("a"))
    choice = router.choose(Request("m"))
    assert choice is not None
    gone = router.set_membership(Membership(2, (replica("a", boot="2"),)), 0.0)
    assert [(r.id, r.boot_id) for r in gone] == [("a", "1")]
    load = router.loads.get("a")
    assert load is not None
    assert load.booked == 0
    router.release(choice.booking)
    assert load.booked == 0
    assert router.loads.open_bookings == 0


class RouterMachine(RuleBasedStateMachine):
    """Requests, reports, deaths, restarts, suspensions and time in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.router = router_of(policy="power_of_two")
        self.clock = VirtualClock()
        self.open: list[Booking] = []
        self.version = 1
        self.sequence = 0

    names = st.sampled_from(["a", "b", "c", "d"])
    boots = st.sampled_from(["1", "2"])

    @rule(
        members=st.dictionaries(
            names, st.tuples(boots, st.sampled_from(ReplicaState), st.sampled_from(["m", "n"])), max_size=4
        )
    )
    def membership(self, members: dict[str, tuple[str, ReplicaState, str]]) -> None:
        self.version += 1
        replicas = tuple(replica(name, boot, state, model) for name, (boot, state, model) in members.items())
        self.router.set_membership(Membership(self.version, replicas), self.clock())

    @rule(model=st.sampled_from(["m", "n"]), excluded=st.frozensets(names.map(ReplicaId), max_size=3))
    def choose(self, model: str, excluded: frozenset[ReplicaId]) -> None:
        choice = self.router.choose(Request(model, excluded=excluded))
        if choice is not None:
            chosen = choice.booking.replica
            assert chosen.model == model
            assert chosen.id not in excluded
            assert chosen.state is ReplicaState.READY
            self.open.append(choice.booking)

    @rule(data=st.data(), times=st.integers(1, 2))
    def release(self, data: st.DataObject, times: int) -> None:
        if self.open:
            booking = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
            for _ in range(times):
                self.router.release(booking)

    @rule(name=names, boot=boots, running=st.integers(0, 50), step=st.integers(-1, 2))
    def report(self, name: str, boot: str, running: int, step: int) -> None:
        self.sequence += step
        self.router.report(report(name, boot, self.sequence, running), self.clock())

    @rule(name=names, boot=boots, seconds=st.sampled_from([0.5, float("inf")]))
    def suspend(self, name: str, boot: str, seconds: float) -> None:
        self.router.suspend(replica(name, boot), "test", self.clock() + seconds)

    @rule(seconds=st.floats(0, 2))
    def tick(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.router.tick(self.clock(), SILENCE_S)

    @invariant()
    def books_balance(self) -> None:
        self.router.check_integrity()
        assert self.router.loads.open_bookings == len(self.open)


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
