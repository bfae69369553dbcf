"""Who computes a prompt and who answers: roles, costs, and books that balance for both halves."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from headrace_router.clock import VirtualClock
from headrace_router.disaggregation import (
    ALWAYS_REMOTE,
    DISAGGREGATIONS,
    NEVER_REMOTE,
    PER_REQUEST,
    THRESHOLD,
    PerRequest,
    fleet_hardness,
    make_disaggregation,
)
from headrace_router.halves import Halves
from headrace_router.load_table import Booking, ReplicaLoad
from headrace_router.policies import POLICIES, make_policy
from headrace_router.router import Choice, Router
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
    Transfer,
)
from headrace_router.view import Hits

LONG = Request("m", prompt_tokens=20_000, can_hand_over=True)
SHORT = Request("m", prompt_tokens=50, can_hand_over=True)


def replica(
    name: str,
    role: Role = Role.UNIFIED,
    connector: str | None = "nixl",
    boot: str = "1",
    state: ReplicaState = ReplicaState.READY,
) -> Replica:
    endpoints = Endpoints("http://127.0.0.1:1", load="tcp://127.0.0.1:2")
    return Replica(
        ReplicaId(name), BootId(boot), "m", role, endpoints, state, 16, 10_000, kv_connector=connector
    )


def pools(prefill: int, decode: int) -> list[Replica]:
    return [
        *(replica(f"p{number}", Role.PREFILL) for number in range(prefill)),
        *(replica(f"d{number}", Role.DECODE) for number in range(decode)),
    ]


def router_of(*replicas: Replica, policy: str = "delay", mode: str = PER_REQUEST) -> Router:
    router = Router(make_policy(policy, 0), disaggregation=make_disaggregation(mode, policy, 0))
    router.set_membership(Membership(1, replicas), 0.0)
    return router


def report(
    name: str, running: int = 0, backlog: int = 0, kv_use: float = 0.0, sequence: int = 1, boot: str = "1",
    transfers: tuple[Transfer, ...] = (),
) -> LoadReport:  # fmt: skip
    return LoadReport(
        ReplicaId(name), BootId(boot), sequence, running, 0, kv_use, backlog, transfers=transfers
    )


def choose(router: Router, request: Request = LONG, now_s: float = 0.0) -> Choice:
    choice = router.choose(request, now_s)
    assert choice is not None
    return choice


def load_of(router: Router, name: str) -> ReplicaLoad:
    load = router.loads.get(name)
    assert load is not None
    return load


def test_a_busy_decode_replica_leaves_a_long_prompt_to_the_prefill_pool() -> None:
    router = router_of(*pools(1, 1))
    router.report(report("d0", running=10), 0.0)
    choice = choose(router)
    assert choice.booking.replica.id == "d0"
    assert choice.handover is not None
    assert choice.handover.booking.replica.id == "p0"
    assert choice.handover.tokens == 20_000
    assert choice.handover.transfer_s == pytest.approx(
        load_of(router, "d0").transfer_model.duration_s(20_000)
    )
    assert choice.decision.costs is not None
    assert choice.handover.decision.costs is not None
    assert choice.reason


def test_a_short_prompt_stays_where_it_is_answered() -> None:
    router = router_of(*pools(1, 1))
    router.report(report("d0", running=1), 0.0)
    assert choose(router, SHORT).handover is None


def test_a_full_prefill_queue_stops_attracting_work() -> None:
    router = router_of(*pools(1, 1))
    router.report(report("d0", running=3), 0.0)
    router.report(report("p0", running=1, backlog=400_000), 0.0)
    assert choose(router).handover is None


def test_a_slow_link_keeps_prompts_at_home() -> None:
    router = router_of(*pools(1, 1))
    slow = tuple(Transfer(10_000, 20.0) for _ in range(60))
    router.report(report("d0", running=3, transfers=slow), 0.0)
    assert choose(router).handover is None


def test_the_decode_half_takes_room_but_no_place_in_the_queue() -> None:
    router = router_of(*pools(1, 1), mode=ALWAYS_REMOTE)
    decode = load_of(router, "d0")
    room = decode.room_tokens
    choice = choose(router)
    assert choice.handover is not None
    assert decode.room_tokens == room - 20_000
    assert (decode.backlog_tokens, decode.queued, decode.requests) == (0, 0, 1)
    # While the prompt is computed elsewhere no report can show the request, however late it comes.
    router.report(report("d0"), 5.0)
    assert decode.room_tokens == room - 20_000
    router.answered(choice.handover.booking, 6.0)
    router.report(report("d0", sequence=2), 6.01)
    assert decode.room_tokens == room - 20_000
    router.report(report("d0", running=1, kv_use=0.125, sequence=3), 6.1)
    assert decode.room_tokens == room - 20_000
    assert decode.requests == 1
    router.release(choice.handover.booking, 6.2)
    router.release(choice.booking, 9.0)
    router.check_integrity()
    assert router.loads.open_bookings == 0


@pytest.mark.parametrize("mode", DISAGGREGATIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_roles_are_respected_by_every_policy(policy: str, mode: str) -> None:
    router = router_of(*pools(2, 3), policy=policy, mode=mode)
    for number in range(30):
        choice = choose(router, LONG if number % 2 else SHORT)
        assert choice.booking.replica.role is Role.DECODE
        if choice.handover is not None:
            assert choice.handover.booking.replica.role is Role.PREFILL
            assert mode != NEVER_REMOTE
        else:
            assert mode != ALWAYS_REMOTE
    router.check_integrity()


def test_both_halves_of_round_robin_reach_every_replica() -> None:
    router = router_of(*pools(4, 4), policy="round_robin", mode=ALWAYS_REMOTE)
    choices = [choose(router) for _ in range(8)]
    assert {choice.booking.replica.id for choice in choices} == {"d0", "d1", "d2", "d3"}
    assert {choice.handover.booking.replica.id for choice in choices if choice.handover} == {
        "p0", "p1", "p2", "p3"
    }  # fmt: skip


def test_the_threshold_parts_long_prompts_from_short_ones() -> None:
    router = router_of(*pools(1, 1), mode=THRESHOLD)
    assert choose(router, LONG._replace(prompt_tokens=2048)).handover is None
    assert choose(router, LONG._replace(prompt_tokens=2049)).handover is not None


def test_unified_replicas_hand_over_to_each_other_but_never_to_themselves() -> None:
    router = router_of(replica("a"), replica("b"), mode=ALWAYS_REMOTE)
    for _ in range(10):
        choice = choose(router)
        if choice.handover is not None:
            assert choice.handover.booking.replica is not choice.booking.replica
    alone = router_of(replica("a"), mode=ALWAYS_REMOTE)
    assert choose(alone).handover is None


def test_idle_flexible_replicas_share_the_work_and_keep_their_prompts() -> None:
    router = router_of(*(replica(name) for name in "abcd"))
    counts: Counter[str] = Counter()
    for number in range(400):
        choice = choose(router, LONG, float(number))
        assert choice.handover is None
        counts[choice.booking.replica.id] += 1
        router.release(choice.booking, number + 0.5)
    assert all(count == 100 for count in counts.values())


def test_roles_harden_as_the_fleet_fills_up() -> None:
    """What decodes gets a prompt while the one that computes prompts is a little busier; not when all decode much."""

    def prompt_goes_to(running: int) -> str:
        router = router_of(replica("full"), replica("other"), *(replica(f"r{n}") for n in range(4)))
        router.report(report("full", running=running), 0.0)
        router.report(report("other", running=1, backlog=15_000), 0.0)
        for number in range(4):
            router.report(report(f"r{number}", running=running + 4, backlog=60_000), 0.0)
        choice = choose(router)
        booking = choice.booking if choice.handover is None else choice.handover.booking
        return booking.replica.id

    assert prompt_goes_to(3) == "full"
    assert prompt_goes_to(30) == "other"


def test_hardness_is_one_in_an_empty_fleet_and_grows_with_what_runs() -> None:
    router = router_of(replica("a"), replica("b"))
    assert fleet_hardness(router.eligible("m")) == 1.0
    router.report(report("a", running=32), 0.0)
    assert fleet_hardness(router.eligible("m")) == pytest.approx(2.0)


def test_every_candidate_has_a_cost_for_explain() -> None:
    router = router_of(*pools(3, 2))
    for name in ("d0", "d1"):
        router.report(report(name, running=12), 0.0)
    choice = choose(router)
    assert choice.handover is not None
    for decision, count in ((choice.decision, 2), (choice.handover.decision, 3)):
        assert decision.costs is not None
        assert len(decision.costs) == len(decision.candidates) == count
        assert decision.cost_s == min(decision.costs)


def test_replicas_with_other_connectors_do_not_pair() -> None:
    router = router_of(
        replica("p", Role.PREFILL, "one"), replica("d", Role.DECODE, "other"), mode=ALWAYS_REMOTE
    )
    assert choose(router).handover is None
    router = router_of(replica("p", Role.PREFILL, None), replica("d", Role.DECODE, None), mode=ALWAYS_REMOTE)
    assert choose(router).handover is None


def test_only_a_request_that_can_be_handed_over_is() -> None:
    router = router_of(*pools(1, 1), mode=ALWAYS_REMOTE)
    assert choose(router, LONG._replace(can_hand_over=False)).handover is None


def test_excluded_replicas_take_neither_half_and_prefill_replicas_answer_when_nobody_else_can() -> None:
    router = router_of(*pools(2, 1), mode=ALWAYS_REMOTE)
    choice = choose(router, LONG._replace(excluded=frozenset({ReplicaId("p0")})))
    assert choice.handover is not None
    assert choice.handover.booking.replica.id == "p1"
    last = choose(router, LONG._replace(excluded=frozenset({ReplicaId("p0"), ReplicaId("d0")})))
    assert (last.booking.replica.id, last.handover) == ("p1", None)
    everyone = frozenset(ReplicaId(name) for name in ("p0", "p1", "d0"))
    assert router.choose(LONG._replace(excluded=everyone)) is None


class HandoverMachine(RuleBasedStateMachine):
    """Requests of both kinds, answers, ends, reports, deaths and restarts in any order."""

    names = st.sampled_from(["a", "b", "c", "d", "e"])
    boots = st.sampled_from(["1", "2"])

    def __init__(self) -> None:
        super().__init__()
        self.clock = VirtualClock()
        self.router = router_of()
        self.open: list[Booking] = []
        self.done: list[Booking] = []
        self.sequence = 0

    @rule(mode=st.sampled_from(DISAGGREGATIONS), policy=st.sampled_from(["delay", "round_robin", "kv_blend"]))
    def other_settings(self, mode: str, policy: str) -> None:
        self.router.policy = make_policy(policy, 0)
        self.router.disaggregation = make_disaggregation(mode, policy, 0)

    @rule(
        members=st.dictionaries(
            names,
            st.tuples(
                boots,
                st.sampled_from(Role),
                st.sampled_from(["x", "x", "y", None]),
                st.sampled_from([ReplicaState.READY, ReplicaState.READY, ReplicaState.DRAINING]),
            ),
        )
    )
    def membership(self, members: dict[str, tuple[str, Role, str | None, ReplicaState]]) -> None:
        replicas = tuple(
            replica(name, role, connector, boot, state)
            for name, (boot, role, connector, state) in members.items()
        )
        self.router.set_membership(Membership(1, replicas), self.clock())

    @rule(
        tokens=st.sampled_from([1, 100, 3000, 100_000]),
        excluded=st.frozensets(names.map(ReplicaId), max_size=2),
        can=st.booleans(),
    )
    def choose(self, tokens: int, excluded: frozenset[ReplicaId], can: bool) -> None:
        request = Request("m", prompt_tokens=tokens, excluded=excluded, can_hand_over=can)
        choice = self.router.choose(request, self.clock())
        candidates = [load for load in self.router.eligible("m") if load.replica.id not in excluded]
        if choice is None:
            assert not candidates
            return
        answers = choice.booking.replica
        assert answers.id not in excluded
        assert answers.role is not Role.PREFILL or all(c.replica.role is Role.PREFILL for c in candidates)
        self.open.append(choice.booking)
        if choice.handover is not None:
            prefills = choice.handover.booking.replica
            assert can
            assert prefills.id != answers.id
            assert prefills.id not in excluded
            assert prefills.role is not Role.DECODE
            assert prefills.kv_connector == answers.kv_connector is not None
            assert choice.booking.uncached_tokens == 1
            self.open.append(choice.handover.booking)

    @rule(data=st.data(), done=st.booleans())
    def answered(self, data: st.DataObject, done: bool) -> None:
        if bookings := self.done if done else self.open:
            self.router.answered(data.draw(st.sampled_from(bookings)), self.clock())

    @rule(data=st.data(), times=st.integers(1, 2))
    def release(self, data: st.DataObject, times: int) -> None:
        if self.open:
            booking = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
            self.done.append(booking)
            for _ in range(times):
                self.router.release(booking, self.clock())

    @rule(
        name=names, boot=boots, running=st.integers(0, 30), backlog=st.integers(0, 50_000), kv=st.floats(0, 1)
    )
    def report(self, name: str, boot: str, running: int, backlog: int, kv: float) -> None:
        self.sequence += 1
        transfers = (Transfer(running * 100, kv),)
        told = report(name, running, backlog, kv, self.sequence, boot, transfers)
        self.router.report(told, self.clock())

    @rule(seconds=st.floats(0, 2))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def books_balance(self) -> None:
        self.router.check_integrity()
        assert self.router.loads.open_bookings == len(self.open)

    def teardown(self) -> None:
        for booking in self.open:
            self.router.release(booking, self.clock())
        for load in self.router.loads.all():
            assert (load.booked, load.unreported, load.arriving_tokens, load.shown_tokens) == (0, 0, 0, 0)
        assert self.router.loads.open_bookings == 0


TestHandoverMachine = HandoverMachine.TestCase
TestHandoverMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_hits_on_either_side_count() -> None:
    """A prompt that the decode side holds is not moved, one that the prefill side holds is not computed."""
    router = router_of(*pools(2, 2))
    for name in ("d0", "d1"):
        router.report(report(name, running=12), 0.0)
    halves = Halves(router.eligible("m"))
    assert halves.prefilling is not None
    held = np.zeros(4, np.int32)
    held[[load_of(router, "p1").slot, load_of(router, "d1").slot]] = 15_000, 4000
    halves.answering.hits = halves.prefilling.hits = Hits(held)
    split = PerRequest(make_policy("delay", 0)).split(
        LONG, halves.answering, halves.prefilling, make_policy("delay", 0)
    )
    assert split.prefill is not None
    assert split.prefill.load.replica.id == "p1"
    assert split.prefill.hit_tokens == 15_000
    assert split.decode.load.replica.id == "d1"
    assert split.tokens == 16_000
