"""Who waits in the gateway, who is next, and who is told to come back. No clock: times are numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace_router.fair_queue import LONGEST_RETRY_S, SHORTEST_RETRY_S, FairQueue
from headrace_router.queue_order import MOST_AWAY, PRIORITY_SHARE
from headrace_router.queue_ticket import Offer, QueueLimits, Ticket


def offered(queue: FairQueue[str], name: str, **request: object) -> Ticket[str]:
    """Offer a request that must be let in; its tenant is the first letter of `name`."""
    plain = {"tenant": name[0], "tokens": 100, "now_s": 0.0}
    offer = queue.offer(name, **{**plain, **request})  # type: ignore[arg-type]
    assert offer.ticket is not None, offer.refusal
    return offer.ticket


def served(queue: FairQueue[str], now_s: float = 0.0) -> list[str]:
    """Take everything."""
    names = []
    while (ticket := queue.take(now_s)) is not None:
        names.append(ticket.item)
        queue.check_integrity()
    return names


# --- order


def test_a_request_alone_is_next_at_once() -> None:
    queue: FairQueue[str] = FairQueue()
    offered(queue, "a1")
    assert (len(queue), queue.tokens) == (1, 100)
    assert queue.peek(0.0) is not None
    assert served(queue) == ["a1"]
    assert queue.take(0.0) is None


def test_tenants_take_turns_however_many_requests_one_has() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(6):
        offered(queue, f"a{number}")
    offered(queue, "b0")
    offered(queue, "b1")
    assert served(queue) == ["a0", "b0", "a1", "b1", "a2", "a3", "a4", "a5"]


def test_turns_are_counted_in_tokens_not_in_requests() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(2):
        offered(queue, f"a{number}", tokens=400)
    for number in range(6):
        offered(queue, f"b{number}", tokens=100)
    assert served(queue)[:6] == ["a0", "b0", "b1", "b2", "b3", "a1"]


def test_a_tenant_of_twice_the_weight_gets_twice_the_tokens() -> None:
    queue: FairQueue[str] = FairQueue(weights={"a": 2.0})
    for number in range(12):
        offered(queue, f"a{number}")
        offered(queue, f"b{number}")
    first = served(queue)[:12]
    assert sum(name[0] == "a" for name in first) == 8


def test_absence_earns_no_credit() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(40):
        offered(queue, f"a{number:02}")
    for _ in range(20):
        queue.take(0.0)
    for number in range(10):
        offered(queue, f"b{number}")
    assert sum(name[0] == "b" for name in served(queue)[:10]) == 5


def test_within_a_tenant_the_earliest_deadline_is_first() -> None:
    queue: FairQueue[str] = FairQueue()
    for name, deadline_s in (("a-late", 50.0), ("a-soon", 5.0), ("a-later", 55.0), ("a-soon2", 5.0)):
        offered(queue, name, deadline_s=deadline_s)
    assert served(queue) == ["a-soon", "a-soon2", "a-late", "a-later"]


def test_a_more_urgent_priority_goes_first_and_the_other_still_gets_its_part() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(40):
        offered(queue, f"b{number}", priority=1)
        offered(queue, f"a{number}", priority=0)
    first = served(queue)[:36]
    assert first[0] == "a0"
    assert sum(name[0] == "b" for name in first) == 36 // (PRIORITY_SHARE + 1)


def test_an_urgent_request_that_comes_rarely_never_waits_behind_a_flood_of_others() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(100):
        offered(queue, f"b{number}", priority=5)
    for number in range(10):
        queue.take(0.0)
        offered(queue, f"a{number}", priority=0, tokens=50)
        ticket = queue.take(0.0)
        assert ticket is not None
        assert ticket.item == f"a{number}"


def test_who_was_served_ahead_of_its_share_waits_for_it_also_after_an_absence() -> None:
    queue: FairQueue[str] = FairQueue()
    offered(queue, "a0", tokens=950)
    for number in range(12):
        offered(queue, f"b{number:02}")
    first = queue.take(0.0)
    assert first is not None
    assert first.item == "a0"
    offered(queue, "a1")
    assert served(queue).index("a1") == 10


def test_a_priority_that_has_been_away_gets_no_credit_for_it() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(40):
        offered(queue, f"a{number:02}", priority=0)
    for _ in range(20):
        queue.take(0.0)
    for number in range(10):
        offered(queue, f"b{number}", priority=1)
    assert sum(name[0] == "b" for name in served(queue)[:9]) == 1


def test_when_nobody_waits_all_is_forgotten() -> None:
    queue: FairQueue[str] = FairQueue()
    offered(queue, "a0", tokens=1000)
    assert served(queue) == ["a0"]
    offered(queue, "a1")
    offered(queue, "b0")
    assert served(queue) == ["a1", "b0"]


def test_tenants_that_come_once_and_go_are_not_remembered_for_ever() -> None:
    queue: FairQueue[str] = FairQueue()
    offered(queue, "stays", tenant="stays", tokens=10**9)
    offered(queue, "stays", tenant="stays", tokens=10**9)
    for number in range(3 * MOST_AWAY):
        offered(queue, "passes", tenant=f"t{number}")
        queue.take(0.0)
    assert sum(len(one.flows) for one in queue._order._classes.values()) <= MOST_AWAY + 2


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=30),
    st.lists(st.integers(1, 500), min_size=1, max_size=30),
    st.sampled_from([0.5, 1.0, 3.0]),
)
def test_two_tenants_that_wait_never_differ_by_more_than_a_request_of_each(
    ours: list[int], theirs: list[int], weight: float
) -> None:
    """Theorem 1 of the paper that `queue_order` names."""
    queue: FairQueue[str] = FairQueue(weights={"a": weight})
    for tenant, sizes in (("a", ours), ("b", theirs)):
        for tokens in sizes:
            offered(queue, tenant, tokens=tokens)
    bound = max(ours) / weight + max(theirs)
    got = {"a": 0.0, "b": 0.0}
    while queue.waiting("a") and queue.waiting("b"):
        ticket = queue.take(0.0)
        assert ticket is not None
        got[ticket.tenant] += ticket.tokens / (weight if ticket.tenant == "a" else 1.0)
        assert abs(got["a"] - got["b"]) <= bound + 1e-6


# --- bounds


def test_a_full_queue_takes_the_last_request_of_who_holds_most() -> None:
    queue: FairQueue[str] = FairQueue(QueueLimits(max_requests=4))
    for number in range(4):
        offered(queue, f"a{number}")
    offer = queue.offer("b0", tenant="b", tokens=100, now_s=0.0)
    assert [ticket.item for ticket in offer.evicted] == ["a3"]
    assert not offer.evicted[0].waiting
    assert sorted(served(queue)) == ["a0", "a1", "a2", "b0"]


def test_who_holds_most_of_a_full_queue_is_refused() -> None:
    queue: FairQueue[str] = FairQueue(QueueLimits(max_requests=2))
    offered(queue, "a0")
    offered(queue, "b0")
    offer = queue.offer("a1", tenant="a", tokens=100, now_s=0.0)
    assert offer.ticket is None
    assert "full (2 of 2 requests" in offer.refusal
    assert offer.retry_after_s == queue.limits.max_wait_s, "nothing has moved yet"
    assert len(queue) == 2


def test_an_urgent_request_displaces_a_less_urgent_one_of_its_own_tenant() -> None:
    queue: FairQueue[str] = FairQueue(QueueLimits(max_requests=2))
    offered(queue, "a0", priority=3)
    offered(queue, "a1", priority=3)
    offer = queue.offer("a2", tenant="a", tokens=100, priority=0, now_s=0.0)
    assert [ticket.item for ticket in offer.evicted] == ["a1"]
    assert served(queue) == ["a2", "a0"]


def test_what_a_tenant_holds_of_a_full_queue_counts_by_its_weight() -> None:
    queue: FairQueue[str] = FairQueue(QueueLimits(max_requests=5), {"a": 3.0})
    for name in ("a0", "a1", "a2", "b0", "b1"):
        offered(queue, name)
    offer = queue.offer("c0", tenant="c", tokens=100, now_s=0.0)
    assert [ticket.item for ticket in offer.evicted] == ["b1"]


def test_bytes_are_bounded_too_and_as_many_go_as_are_in_the_way() -> None:
    queue: FairQueue[str] = FairQueue(QueueLimits(max_bytes=100))
    for number in range(5):
        offered(queue, f"a{number}", size_bytes=20)
    offer = queue.offer("b0", tenant="b", tokens=100, size_bytes=50, now_s=0.0)
    assert [ticket.item for ticket in offer.evicted] == ["a4", "a3", "a2"]
    assert queue.size_bytes == 90


def test_a_body_that_never_fits_is_refused_for_good_and_evicts_nobody() -> None:
    queue: FairQueue[str] = FairQueue(QueueLimits(max_bytes=100))
    offered(queue, "a0", size_bytes=100)
    offer = queue.offer("b0", tenant="b", tokens=1, size_bytes=101, now_s=0.0)
    assert (offer.ticket, offer.retry_after_s, offer.evicted) == (None, None, ())
    assert "101 bytes exceeds the queue's 100" in offer.refusal


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_is_none_is_rejected(weight: float) -> None:
    with pytest.raises(ValueError, match="weight of tenant 'a' must be above 0"):
        FairQueue(weights={"a": weight})


# --- time


def test_what_is_too_late_is_never_sent_and_told_once() -> None:
    queue: FairQueue[str] = FairQueue()
    late = offered(queue, "a-late", deadline_s=5.0)
    offered(queue, "a-good", deadline_s=50.0)
    assert served(queue, 6.0) == ["a-good"]
    assert queue.expire(6.0) == [late]
    assert queue.expire(6.0) == []
    assert not queue.cancel(late)


def test_each_deadline_is_kept_also_after_another_has_passed() -> None:
    queue: FairQueue[str] = FairQueue()
    first, second = offered(queue, "a0", deadline_s=5.0), offered(queue, "b0", deadline_s=8.0)
    offered(queue, "b1")
    assert queue.expire(6.0) == [first]
    assert served(queue, 9.0) == ["b1"]
    assert queue.expire(9.0) == [second]


def test_who_may_wait_longer_is_served_no_later_for_it() -> None:
    queue: FairQueue[str] = FairQueue(QueueLimits(max_wait_s=10.0))
    first = offered(queue, "a0", max_wait_s=100.0)
    offered(queue, "a1", now_s=5.0)
    assert first.deadline_s == 100.0
    assert served(queue, 9.0) == ["a0", "a1"]
    late = offered(queue, "a2", max_wait_s=100.0)
    assert queue.expire(50.0) == []
    assert queue.expire(101.0) == [late]


def test_nobody_waits_longer_than_the_bound_whatever_deadline_it_brings() -> None:
    queue: FairQueue[str] = FairQueue(QueueLimits(max_wait_s=10.0))
    ticket = offered(queue, "a0", deadline_s=1e9)
    assert queue.expire(10.0) == []
    assert queue.expire(10.1) == [ticket]
    assert (len(queue), queue.tokens) == (0, 0)


def paced(tokens_per_s: int = 100, waiting: int = 50, until_s: int = 10) -> FairQueue[str]:
    """Tenant a's requests of 100 tokens, of which for 10 s some were taken each second."""
    queue: FairQueue[str] = FairQueue()
    for number in range(waiting + until_s * tokens_per_s // 100):
        offered(queue, f"a{number}")
    for second in range(until_s):
        for _ in range(tokens_per_s // 100):
            queue.take(float(second + 1))
    return queue


def test_a_turn_that_would_come_after_the_deadline_is_refused_at_once() -> None:
    queue = paced(waiting=65)  # 6,500 tokens at 100 a second
    offer = queue.offer("a", tenant="a", tokens=100, now_s=10.0)
    assert offer.refusal == "its turn would come in 65.0 s, its deadline is in 60.0 s"
    assert offer.retry_after_s == pytest.approx(5.0)
    assert queue.offer("b", tenant="b", tokens=100, now_s=10.0, deadline_s=10.5).ticket, "b's turn is next"


def test_who_comes_back_when_told_is_let_in() -> None:
    queue = paced(waiting=65)
    offer = queue.offer("a", tenant="a", tokens=100, now_s=10.0)
    assert offer.retry_after_s == 5.0
    for second in range(11, 16):
        assert queue.offer("a", tenant="a", tokens=100, now_s=second - 0.5).ticket is None, "not sooner"
        queue.take(float(second))
    assert queue.offer("a", tenant="a", tokens=100, now_s=15.0).ticket


def test_only_what_is_as_urgent_is_expected_before_a_request() -> None:
    queue = paced(waiting=65)
    assert queue.predicted_wait_s("a", 0, 100.0, 10.0) == pytest.approx(65.0)
    assert queue.predicted_wait_s("a", -1, 100.0, 10.0) == 0
    assert queue.predicted_wait_s("a", 1, 100.0, 10.0) == pytest.approx(65.0)


def test_a_turn_is_expected_by_the_share_of_the_pace_that_others_leave() -> None:
    queue = paced(waiting=50)
    for number in range(10):
        offered(queue, f"b{number}", now_s=10.0)
    assert queue.predicted_wait_s("b", 0, 100.0, 10.0) == pytest.approx(20.0), "half of 100 tokens a second"


def test_a_pace_seen_for_a_moment_is_not_believed() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(50):
        offered(queue, f"a{number}")
    queue.take(0.001)
    assert queue.predicted_wait_s("a", 0, 100.0, 0.001) == 0


def test_the_pace_of_an_earlier_crowd_is_forgotten() -> None:
    queue = paced(tokens_per_s=1000, waiting=0)
    assert served(queue, 10.0) == []
    for number in range(11):
        offered(queue, f"a{number}", now_s=10.0)
    queue.take(11.0)
    assert queue.predicted_wait_s("a", 0, 100.0, 11.0) == pytest.approx(10.0), "1,000 tokens at 100 a second"


def test_a_refusal_says_whether_it_is_late_or_the_queue_is_full() -> None:
    assert paced(waiting=65).offer("a", tenant="a", tokens=100, now_s=10.0).is_late
    queue: FairQueue[str] = FairQueue(QueueLimits(max_requests=1))
    offered(queue, "a0")
    assert not queue.offer("a1", tenant="a", tokens=100, now_s=0.0).is_late


def test_a_full_queue_has_room_when_it_said_it_would() -> None:
    queue: FairQueue[str] = FairQueue(QueueLimits(max_requests=20, max_wait_s=200.0))
    for number in range(20):
        offered(queue, f"a{number}", tokens=500)
    for second in (5, 10):
        assert queue.take(float(second))
        offered(queue, "a", tokens=500, now_s=float(second))
    offer = queue.offer("a", tenant="a", tokens=500, now_s=10.0)
    assert offer.retry_after_s == pytest.approx(5.0)


def test_an_urgent_deadline_is_not_refused_for_what_its_own_tenant_has_behind_it() -> None:
    queue = paced(waiting=65)
    assert queue.offer("a", tenant="a", tokens=100, now_s=10.0, deadline_s=12.0).ticket


def test_where_nothing_is_known_nobody_is_refused() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(500):
        offered(queue, f"a{number}", tokens=10**6, deadline_s=1.0)


# --- everything at once

LIMITS = QueueLimits(max_requests=12, max_bytes=600, max_wait_s=20.0)
WEIGHTS = {"a": 1.0, "b": 2.5, "c": 0.3}


class QueueMachine(RuleBasedStateMachine):
    """Whatever comes and goes: within bounds, nothing lost, nothing served twice, nothing left booked."""

    @initialize()
    def empty(self) -> None:
        self.queue: FairQueue[int] = FairQueue(LIMITS, WEIGHTS)
        self.now_s = 0.0
        self.inside: dict[int, Ticket[int]] = {}
        self.number = 0

    def gone(self, ticket: Ticket[int]) -> None:
        assert self.inside.pop(ticket.item) is ticket, "served twice, or never let in"
        assert not ticket.waiting

    @rule(
        tenant=st.sampled_from("abcd"),
        tokens=st.integers(0, 400),
        size_bytes=st.integers(0, 650),
        priority=st.sampled_from([0, 0, 0, 1, 7]),
        within_s=st.one_of(st.none(), st.floats(0, 40)),
    )
    def offer(self, tenant: str, tokens: int, size_bytes: int, priority: int, within_s: float | None) -> None:
        self.number += 1
        offer: Offer[int] = self.queue.offer(
            self.number, tenant=tenant, tokens=tokens, size_bytes=size_bytes, priority=priority,
            now_s=self.now_s, deadline_s=None if within_s is None else self.now_s + within_s,
        )  # fmt: skip
        for victim in offer.evicted:
            self.gone(victim)
            assert victim.tenant != tenant or victim.priority > priority
        if offer.ticket is None:
            assert offer.refusal
            assert not offer.evicted
            if size_bytes > LIMITS.max_bytes:
                assert offer.retry_after_s is None
            else:
                assert offer.retry_after_s is not None
                assert SHORTEST_RETRY_S <= offer.retry_after_s <= LONGEST_RETRY_S
        else:
            assert not offer.refusal
            assert offer.ticket.deadline_s <= self.now_s + LIMITS.max_wait_s
            self.inside[self.number] = offer.ticket

    @rule()
    def take(self) -> None:
        seen = self.queue.peek(self.now_s)
        ticket = self.queue.take(self.now_s)
        assert ticket is seen
        if ticket is None:
            alive = [one for one in self.inside.values() if one.deadline_s >= self.now_s]
            assert not alive, "somebody waits, nobody is served"
            return
        self.gone(ticket)
        assert ticket.deadline_s >= self.now_s, "sent too late"
        rivals = [one for one in self.inside.values() if one.deadline_s >= self.now_s]
        same = [one for one in rivals if (one.tenant, one.priority) == (ticket.tenant, ticket.priority)]
        assert all(ticket.turn < one.turn for one in same), "out of turn"

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(list(self.inside.values())))
        if self.queue.cancel(ticket):
            self.gone(ticket)
        else:
            assert ticket.deadline_s < self.now_s, "only the late wait no longer"
        assert not self.queue.cancel(ticket)

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def expire(self) -> None:
        for ticket in self.queue.expire(self.now_s):
            assert ticket.deadline_s < self.now_s
            self.gone(ticket)
        assert all(ticket.deadline_s >= self.now_s for ticket in self.inside.values())

    @invariant()
    def adds_up(self) -> None:
        self.queue.check_integrity()
        waiting = [ticket for ticket in self.inside.values() if ticket.waiting]
        assert len(self.queue) == len(waiting)
        for tenant in "abcd":
            assert self.queue.waiting(tenant) == sum(ticket.tenant == tenant for ticket in waiting)

    def teardown(self) -> None:
        """However it came to this, everything that waits can be served, and nothing stays booked."""
        for ticket in self.queue.expire(self.now_s):
            self.gone(ticket)
        while (taken := self.queue.take(self.now_s)) is not None:
            self.gone(taken)
            self.queue.check_integrity()
        assert not self.inside, "lost"
        assert (len(self.queue), self.queue.tokens, self.queue.size_bytes) == (0, 0, 0)
        assert not self.queue._order._classes, "something is remembered of an empty queue"


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
