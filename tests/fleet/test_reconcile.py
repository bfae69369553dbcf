"""What the controller decides. No clock: time is an argument."""

from hypothesis import given
from hypothesis import strategies as st

from headrace.fleet.reconcile import (
    STABLE_AFTER_S,
    Action,
    Forget,
    Kill,
    Observed,
    Recall,
    Start,
    Stop,
    backoff_s,
    failures_after,
    has_given_up,
    reconcile,
)
from headrace_router.types import ReplicaId, ReplicaState

A, B = ReplicaId("a"), ReplicaId("b")


def decide(desired: list[ReplicaId], observed: list[Observed], now_s: float) -> tuple[Action, ...]:
    by_id = {replica.id: replica for replica in observed}
    return reconcile(desired, by_id, now_s, start_timeout_s=100, max_backoff_s=60)


def test_what_is_missing_is_started() -> None:
    assert decide([A, B], [Observed(A, ReplicaState.READY, 0)], 5) == (Start(B),)


def test_a_replica_that_died_once_comes_back_at_once() -> None:
    assert decide([A], [Observed(A, ReplicaState.FAILED, 10, failures=1)], 10) == (Start(A),)


def test_repeated_failures_wait_longer_each_time() -> None:
    assert [backoff_s(n, 60) for n in range(1, 10)] == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    failed = Observed(A, ReplicaState.FAILED, 10, failures=3)
    assert decide([A], [failed], 11.9) == ()
    assert decide([A], [failed], 12.0) == (Start(A),)


def test_a_fatal_reason_is_given_no_second_try() -> None:
    failed = Observed(A, ReplicaState.FAILED, 0, failures=1, is_fatal=True)
    assert decide([A], [failed], 1e9) == ()


def test_a_replica_that_has_been_ready_is_tried_again_whatever_the_reason() -> None:
    failed = Observed(A, ReplicaState.FAILED, 0, failures=2, is_fatal=True, was_ready=True)
    assert decide([A], [failed], 0.5) == ()
    assert decide([A], [failed], 1) == (Start(A),)


def test_a_start_that_takes_too_long_is_killed_with_the_bound_named() -> None:
    (action,) = decide([A], [Observed(A, ReplicaState.STARTING, 0)], 100.1)
    assert action == Kill(A, "not ready after 100 s (fleet.start_timeout_s)")


def test_what_is_no_longer_wanted_is_drained_once() -> None:
    assert decide([], [Observed(A, ReplicaState.READY, 0)], 5) == (Stop(A),)
    assert decide([], [Observed(A, ReplicaState.DRAINING, 0)], 5) == ()


def test_nothing_is_kept_of_what_has_gone_and_nobody_wants() -> None:
    assert decide([], [Observed(A, ReplicaState.STOPPED, 0)], 5) == (Forget(A),)
    assert decide([], [Observed(A, ReplicaState.FAILED, 0)], 5) == (Forget(A),)


def test_what_drains_is_recalled_when_it_is_wanted_again_and_else_replaced_once_it_is_gone() -> None:
    assert decide([A], [Observed(A, ReplicaState.DRAINING, 0, can_be_recalled=True)], 5) == (Recall(A),)
    assert decide([A], [Observed(A, ReplicaState.DRAINING, 0)], 5) == ()
    assert decide([A], [Observed(A, ReplicaState.STOPPED, 0)], 5) == (Start(A),)


def test_a_replica_that_is_another_than_wanted_is_drained_and_started_anew() -> None:
    assert decide([A], [Observed(A, ReplicaState.READY, 0, is_other=True)], 5) == (Stop(A),)
    draining = Observed(A, ReplicaState.DRAINING, 0, is_other=True, can_be_recalled=True)
    assert decide([A], [draining], 5) == ()


def test_a_replica_without_room_waits_as_long_as_it_must() -> None:
    waiting = Observed(A, ReplicaState.PENDING, 1e5, waits_for_room=True)
    assert decide([A], [waiting], 1e5 + 0.5) == ()
    assert decide([A], [waiting], 1e5 + 1000) == (Start(A),)


def test_a_long_life_clears_the_record_of_failures() -> None:
    assert failures_after(Observed(A, ReplicaState.READY, 0, failures=5), STABLE_AFTER_S) == 1
    assert failures_after(Observed(A, ReplicaState.READY, 0, failures=5), STABLE_AFTER_S - 1) == 6
    assert failures_after(Observed(A, ReplicaState.STARTING, 0, failures=5), 1e6) == 6


IDS = [ReplicaId(name) for name in "abcd"]


@given(
    desired=st.sets(st.sampled_from(IDS)),
    replicas=st.dictionaries(
        st.sampled_from(IDS),
        st.tuples(
            st.sampled_from(list(ReplicaState)),
            st.floats(0, 100),
            st.integers(0, 50),
            st.booleans(),
            st.booleans(),
        ),
    ),
    now_s=st.floats(100, 1e6),
)
def test_no_replica_is_told_two_things_and_none_is_forgotten(
    desired: set[ReplicaId],
    replicas: dict[ReplicaId, tuple[ReplicaState, float, int, bool, bool]],
    now_s: float,
) -> None:
    observed = {id: Observed(id, *values) for id, values in replicas.items()}
    actions = reconcile(sorted(desired), observed, now_s, start_timeout_s=100, max_backoff_s=60)
    told = [action.id for action in actions]
    assert len(told) == len(set(told))
    for action in actions:
        if isinstance(action, Start):
            assert action.id in desired
            # Nothing that lives is started a second time.
            before = observed.get(action.id)
            assert before is None or before.state in (ReplicaState.FAILED, ReplicaState.STOPPED)
        if isinstance(action, Stop):
            assert action.id not in desired
    much_later = reconcile(sorted(desired), observed, now_s + 1e9, start_timeout_s=100, max_backoff_s=60)
    for id in desired:
        lives = id in observed and observed[id].state in (ReplicaState.READY, ReplicaState.DRAINING)
        gave_up = id in observed and has_given_up(observed[id])
        assert lives or gave_up or id in [action.id for action in much_later]
