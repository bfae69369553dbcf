"""The request router's decisions, without Ray."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

pytest.importorskip("ray.serve")

from headrace.serve.request_routing import RequestRouting

A, B, C = "app#llm#a", "app#llm#b", "app#llm#c"


def routing(*names: str) -> RequestRouting:
    made = RequestRouting()
    made.follow(names or (A, B), 0.0)
    return made


def test_a_conversation_returns_to_where_it_began() -> None:
    router = routing()
    prompt = b"once upon a time there was a river. " * 60
    home = router.rank("0", prompt, (A, B), {}, 0.0)[0]
    router.ended("0", 1.0)
    for turn in range(1, 6):
        prompt += b"and then it went on, as rivers do. " * 20
        assert router.rank(str(turn), prompt, (A, B), {}, turn)[0] == home
        router.ended(str(turn), turn + 0.5)


def test_new_conversations_spread() -> None:
    router = routing()
    homes = [router.rank(str(n), bytes([n]) * 4000, (A, B), {}, 0.0)[0] for n in range(10)]
    assert homes.count(A) == homes.count(B) == 5


def test_a_busy_home_is_left_when_waiting_costs_more_than_computing() -> None:
    router = routing()
    prompt = b"a short story. " * 100
    home = router.rank("0", prompt, (A, B), {}, 0.0)[0]
    router.ended("0", 0.5)
    for n in range(40):
        router.rank(f"long {n}", bytes([n]) * 40_000, (home,), {}, 1.0)
    assert router.rank("1", prompt, (A, B), {}, 1.0)[0] != home


def test_what_others_send_counts_by_serves_queue_lengths() -> None:
    router = routing()
    firsts = [router.rank(str(n), bytes([n]) * 2000, (A, B), {A: 30, B: 0}, 0.0)[0] for n in range(3)]
    assert firsts == [B, B, B]
    for n in range(3):
        router.ended(str(n), 1.0)
    assert router.rank("4", b"x" * 2000, (A, B), {A: 0, B: 30}, 2.0)[0] == A
    router.check_integrity()


def test_a_slow_answer_of_one_replica_draws_no_conversation_away_from_it() -> None:
    """One pace for all: the time of a single answer says little of its replica."""
    router = routing()
    story = b"once upon a time there was a river. " * 60
    home = router.rank("0", story, (A, B), {}, 0.0)[0]
    router.answered("0", 9.0)
    router.ended("0", 9.5)
    other = router.rank("1", b"another story. " * 150, (A, B), {}, 10.0)[0]
    assert other != home
    router.answered("1", 10.1)
    router.ended("1", 10.2)
    for turn in range(2, 6):
        story += b"and then it went on, as rivers do. " * 3
        assert router.rank(str(turn), story, (A, B), {}, 10.0 * turn)[0] == home
        router.answered(str(turn), 10.0 * turn + 5)
        router.ended(str(turn), 10.0 * turn + 6)
    router.check_integrity()


def test_ranks_only_candidates_and_all_of_them() -> None:
    router = routing(A, B, C)
    assert sorted(router.rank("0", b"x" * 600, (A, C), {}, 0.0)) == [A, C]
    assert router.rank("1", b"x" * 600, (B,), {}, 0.0) == [B]
    assert router.rank("2", b"x" * 600, (), {}, 0.0) == []


def test_adapters_share_no_prefix() -> None:
    router = routing()
    prompt = b"the same words " * 200
    first = router.rank("0", prompt, (A, B), {}, 0.0, lora="one")[0]
    router.ended("0", 1.0)
    other = router.rank("1", prompt, (A, B), {}, 2.0, lora="two")[0]
    router.ended("1", 3.0)
    assert other != first  # nothing known of it: it takes its turn
    assert router.rank("2", prompt, (A, B), {}, 4.0, lora="one")[0] == first


def test_a_quicker_replica_is_learned_from_first_tokens() -> None:
    router = routing()
    for n in range(30):
        for name, seconds in ((A, 2.0), (B, 0.2)):
            now_s = n * 10.0
            router.rank(f"{name}{n}", bytes([n, seconds > 1]) * 2000, (name,), {}, now_s)
            router.answered(f"{name}{n}", now_s + seconds)
            router.ended(f"{name}{n}", now_s + seconds)
    firsts = [router.rank(f"new {n}", bytes([200, n]) * 2000, (A, B), {}, 1000.0)[0] for n in range(5)]
    assert firsts == [B] * 5


def test_a_refusal_heard_late_does_not_release_the_next_try() -> None:
    router = routing()
    first, second = router.rank("0", b"x" * 600, (A, B), {}, 0.0)
    router.routed("0", first, 0.0)
    router.rank("0", b"x" * 600, (second,), {}, 0.1)
    router.routed("0", second, 0.1)
    router.ended("0", 0.2, first)
    assert router.num_requests == 1
    router.ended("0", 0.3, second)
    assert router.num_requests == 0
    router.check_integrity()


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        RequestRouting("nonsense")


class Bookings(RuleBasedStateMachine):
    """Whatever happens in whatever order, exactly the requests under way are booked."""

    @initialize()
    def begin(self) -> None:
        self.router, self.now_s, self.names = RequestRouting(), 0.0, [A, B, C]
        self.router.follow(self.names, 0.0)

    @rule(dt=st.floats(0, 20), names=st.sets(st.sampled_from([A, B, C])))
    def members_change(self, dt: float, names: set[str]) -> None:
        self.now_s += dt
        self.names = sorted(names)
        self.router.follow(self.names, self.now_s)

    @rule(
        request=st.integers(0, 9),
        size=st.integers(0, 5000),
        lengths=st.dictionaries(st.sampled_from([A, B, C]), st.none() | st.integers(0, 20)),
    )
    def ranks(self, request: int, size: int, lengths: dict[str, int | None]) -> None:
        ranked = self.router.rank(str(request), b"y" * size, self.names, lengths, self.now_s)
        assert sorted(ranked) == self.names

    @rule(request=st.integers(0, 9), name=st.sampled_from([A, B, C]))
    def is_routed(self, request: int, name: str) -> None:
        self.router.routed(str(request), name, self.now_s)

    @rule(request=st.integers(0, 9), dt=st.floats(0, 3))
    def is_answered(self, request: int, dt: float) -> None:
        self.now_s += dt
        self.router.answered(str(request), self.now_s)

    @rule(request=st.integers(0, 9), name=st.none() | st.sampled_from([A, B, C]))
    def ends(self, request: int, name: str | None) -> None:
        self.router.ended(str(request), self.now_s, name)

    @invariant()
    def conserves(self) -> None:
        self.router.check_integrity()


TestBookings = Bookings.TestCase
