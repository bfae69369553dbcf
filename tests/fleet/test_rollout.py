"""Replacing replicas one after another: capacity is kept, it comes to an end, a bad successor stops it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import given
from hypothesis import strategies as st

from headrace.fleet.fleet_plan import FleetPlan, PoolPlan
from headrace.fleet.pools import PoolKey
from headrace.fleet.reconcile import Forget, Kill, Observed, Recall, Start, Stop, reconcile
from headrace.fleet.rollout import Pace, Present, Rollout, RolloutState, advance
from headrace.fleet.specs import ReplicaSpec, number_of
from headrace.fleet.victims import Seen
from headrace_router.types import ReplicaId, ReplicaState

READY, STARTING, DRAINING, FAILED = (
    ReplicaState.READY,
    ReplicaState.STARTING,
    ReplicaState.DRAINING,
    ReplicaState.FAILED,
)


def pool_of(count: int, model: str = "m", *, source: str = "old") -> PoolPlan:
    template = ReplicaSpec(ReplicaId(f"{model}-unified"), model, source)
    return PoolPlan(template, count).settled({})


def wanting(pool: PoolPlan, source: str) -> PoolPlan:
    return replace(pool, template=replace(pool.template, source=source))


@dataclass
class Replica:
    spec: ReplicaSpec
    state: ReplicaState
    since_s: float
    left: int  # rounds until what it does is done
    failures: int = 0
    was_ready: bool = False
    waits_for_room: bool = False


@dataclass
class World:
    """A fleet that does what `reconcile` says, as fast or slowly as it likes, on a machine with so many places."""

    plan: FleetPlan
    rollout: Rollout
    room: int
    bad: frozenset[str] = frozenset()  # sources that do not start
    start_rounds: int = 2
    drain_rounds: int = 1
    now_s: float = 0.0
    replicas: dict[ReplicaId, Replica] = field(default_factory=dict)
    least_ready: dict[PoolKey, int] = field(default_factory=dict)
    most_there: int = 0
    drained: list[ReplicaId] = field(default_factory=list)

    def run(self, rounds: int = 400) -> None:
        for _ in range(rounds):
            self.round()
            if self.rollout.state is not RolloutState.ROLLING:
                return
        raise AssertionError(f"it does not end: {self.plan} {self.replicas}")

    def settle(self) -> None:
        """Until what is planned is there, without a rollout."""
        for _ in range(50):
            self.round(rolls=False)
        self.least_ready.clear()
        self.most_there = len(self.replicas)
        self.drained.clear()

    def round(self, *, rolls: bool = True) -> None:
        self.now_s += 1.0
        self._pass()
        if rolls:
            self.plan, self.rollout = advance(self.plan, self.rollout, self.fleet(), self.now_s)
        seen = [(number_of(id), one.seen) for id, one in self._present().items()]
        self.plan = self.plan.settled(seen)
        desired = self.plan.desired()
        for action in reconcile(
            desired,
            {
                id: replace(one.observed, is_other=id in desired and desired[id] != one.seen.spec)
                for id, one in self._present().items()
            },
            self.now_s,
            start_timeout_s=1000.0,
            max_backoff_s=1.0,
        ):
            self._do(action, desired)
        self.most_there = max(self.most_there, len(self.replicas))
        for key in self.plan.pools:
            ready = sum(
                one.state is READY and (one.spec.model, one.spec.role) == key
                for one in self.replicas.values()
            )
            self.least_ready[key] = min(ready, self.least_ready.get(key, ready))

    def fleet(self) -> dict[PoolKey, dict[int, Present]]:
        by_pool: dict[PoolKey, dict[int, Present]] = {}
        for id, one in self._present().items():
            by_pool.setdefault(PoolKey(one.seen.spec.model, one.seen.spec.role), {})[number_of(id)] = one
        return by_pool

    def _present(self) -> dict[ReplicaId, Present]:
        return {
            id: Present(
                Observed(id, one.state, one.since_s, one.failures, False, one.was_ready, one.waits_for_room),
                Seen(one.state, one.spec, running=0, waiting=0),
                one.since_s,
                "it does not work",
            )
            for id, one in self.replicas.items()
        }

    def _do(
        self, action: Start | Kill | Stop | Recall | Forget, desired: dict[ReplicaId, ReplicaSpec]
    ) -> None:
        match action:
            case Start(id):
                old = self.replicas.get(id)
                fresh = old is None or old.spec != desired[id]
                one = Replica(desired[id], STARTING, self.now_s, self.start_rounds)
                if old is not None and not fresh:
                    one.failures, one.was_ready = old.failures, old.was_ready
                self.replicas[id] = one
                taken = sum(
                    other.state in (READY, STARTING, DRAINING) and not other.waits_for_room
                    for other in self.replicas.values()
                    if other is not one
                )
                one.waits_for_room = taken >= self.room
                if one.waits_for_room:
                    one.state = ReplicaState.PENDING
                    one.since_s = old.since_s if old is not None and not fresh else self.now_s
            case Stop(id):
                one = self.replicas[id]
                self.drained.append(id)
                one.left = self.drain_rounds if one.state is READY else 0
                one.state, one.since_s = DRAINING, self.now_s
                if one.waits_for_room:
                    one.state, one.waits_for_room = ReplicaState.STOPPED, False
            case Forget(id):
                del self.replicas[id]
            case _:
                raise AssertionError(action)

    def _pass(self) -> None:
        for one in self.replicas.values():
            one.left -= 1
            if one.left > 0 or one.waits_for_room:
                continue
            if one.state is STARTING and one.spec.source in self.bad:
                one.state, one.since_s, one.failures = FAILED, self.now_s, one.failures + 1
            elif one.state is STARTING:
                one.state, one.since_s, one.was_ready = READY, self.now_s, True
            elif one.state is DRAINING:
                one.state, one.since_s = ReplicaState.STOPPED, self.now_s


def world(*pools: PoolPlan, room: int, source: str = "new", **settings: int) -> World:
    """One whose replicas run as `old`, and that is to go over to `source`."""
    plan = FleetPlan({pool.key: pool for pool in pools})
    one = World(plan, Rollout("r", "apply", tuple(plan.pools), 0), room)
    one.settle()
    one.plan = FleetPlan({key: wanting(pool, source) for key, pool in one.plan.pools.items()})
    one.rollout = replace(
        one.rollout,
        total=sum(len(pool.outdated) for pool in one.plan.pools.values()),
        pace=Pace(**settings),
    )
    return one


def sources(one: World) -> set[str]:
    return {replica.spec.source for replica in one.replicas.values()}


def test_with_room_a_successor_is_ready_before_its_predecessor_goes() -> None:
    one = world(pool_of(2), room=3)
    one.run()
    assert one.rollout.state is RolloutState.DONE
    assert sources(one) == {"new"}
    assert min(one.least_ready.values()) == 2
    assert one.most_there == 3


def test_on_a_full_machine_one_goes_first() -> None:
    one = world(pool_of(3), room=3)
    one.run()
    assert one.rollout.state is RolloutState.DONE
    assert sources(one) == {"new"}
    assert min(one.least_ready.values()) == 2


def test_more_at_a_time_when_asked() -> None:
    one = world(pool_of(4), room=4, max_unavailable=2)
    one.run()
    assert min(one.least_ready.values()) == 2
    one = world(pool_of(4), room=8, surge=4)
    one.run()
    assert min(one.least_ready.values()) == 4
    assert one.most_there == 8


def test_a_successor_that_does_not_start_stops_it_and_the_rest_stays() -> None:
    for room, left in ((3, 2), (2, 1)):
        one = world(pool_of(2), room=room)
        one.bad = frozenset({"new"})
        one.run()
        assert one.rollout.state is RolloutState.STOPPED
        assert "did not start: it does not work" in one.rollout.reason
        for _ in range(20):
            one.round()
        ready = [replica for replica in one.replicas.values() if replica.state is READY]
        assert [replica.spec.source for replica in ready] == ["old"] * left
        assert len(one.drained) <= 2 - left + 1, "the old ones, and the successor that failed"


def test_the_old_configuration_rolls_a_stopped_one_back() -> None:
    for room in (2, 3):
        one = world(pool_of(2), room=room)
        one.bad = frozenset({"new"})
        one.run()
        one.plan = FleetPlan({key: wanting(pool, "old") for key, pool in one.plan.pools.items()})
        one.rollout = replace(one.rollout, state=RolloutState.ROLLING)
        one.run()
        assert one.rollout.state is RolloutState.DONE
        assert sources(one) == {"old"}
        assert len(one.replicas) == 2


def test_a_restart_replaces_replicas_in_which_nothing_changed() -> None:
    for room in (2, 3):
        one = world(pool_of(2), room=room, source="old")
        pool = next(iter(one.plan.pools.values()))
        before = [replica.spec for replica in one.replicas.values()]
        one.plan = one.plan.having(replace(pool, template=replace(pool.template, generation=1)))
        one.run()
        assert not [replica.spec for replica in one.replicas.values() if replica.spec in before]
        assert len(one.replicas) == 2


def test_one_replica_that_is_marked_is_replaced_alone() -> None:
    for room in (2, 3):
        one = world(pool_of(2), room=room, source="old")
        pool = next(iter(one.plan.pools.values()))
        marked, kept = one.plan.desired()
        one.plan = one.plan.having(replace(pool, marked=frozenset({number_of(marked)})))
        one.run()
        assert marked in one.drained and kept not in one.drained
        assert kept in one.replicas
        assert len(one.replicas) == 2
        assert not next(iter(one.plan.pools.values())).outdated


def test_one_pool_comes_after_the_other() -> None:
    one = world(pool_of(2, "a"), pool_of(2, "b"), room=5)
    while "new" not in {r.spec.source for r in one.replicas.values() if r.spec.model == "b"}:
        one.round()
    assert {r.spec.source for r in one.replicas.values() if r.spec.model == "a"} == {"new"}


def test_it_is_not_done_before_a_changed_count_is_there() -> None:
    one = world(pool_of(2), room=5, source="old")
    pool = next(iter(one.plan.pools.values()))
    one.plan = one.plan.having(replace(pool, target=4))
    one.run()
    assert [replica.state for replica in one.replicas.values()] == [READY] * 4


def test_replicas_that_do_not_serve_are_replaced_at_once() -> None:
    one = world(pool_of(3), room=3)
    for replica in one.replicas.values():
        replica.state, replica.left = STARTING, 10
    one.round()
    assert len(one.drained) == 3


def test_a_pool_that_grows_into_the_room_of_anothers_successor_is_not_waited_for() -> None:
    one = world(pool_of(2, "a"), pool_of(1, "b"), room=3)
    grown, first = False, next(iter(one.plan.pools))
    one.plan = one.plan.having(replace(one.plan.pools[first], target=1))
    for _ in range(100):
        b = next(pool for key, pool in one.plan.pools.items() if key != first)
        if b.surge and not grown:
            grown = True
            one.plan = one.plan.having(replace(one.plan.pools[first], target=2))
        one.round()
    assert grown
    assert one.rollout.state is RolloutState.DONE
    assert sources(one) == {"new"}
    assert len(one.replicas) == 3


def test_a_pool_without_room_to_grow_does_not_hold_up_the_next() -> None:
    one = world(pool_of(1, "a"), pool_of(1, "b"), room=2)
    first = next(iter(one.plan.pools))
    one.plan = one.plan.having(replace(one.plan.pools[first], target=3))
    for _ in range(100):
        one.round()
    assert one.rollout.state is RolloutState.ROLLING, "what was asked for is not there"
    assert {r.spec.source for r in one.replicas.values() if r.state is READY} == {"new"}
    assert len([r for r in one.replicas.values() if r.state is READY]) == 2


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    spare=st.integers(0, 3),
    max_unavailable=st.integers(1, 3),
    surge=st.integers(0, 3),
    start_rounds=st.integers(1, 6),
    drain_rounds=st.integers(1, 4),
    is_bad=st.booleans(),
    restarts=st.sets(st.integers(1, 60), max_size=3),
    targets=st.dictionaries(st.integers(1, 40), st.integers(1, 5), max_size=3),
)
def test_it_ends_and_capacity_is_kept(
    counts: list[int],
    spare: int,
    max_unavailable: int,
    surge: int,
    start_rounds: int,
    drain_rounds: int,
    is_bad: bool,
    restarts: set[int],
    targets: dict[int, int],
) -> None:
    pools = [pool_of(count, name) for count, name in zip(counts, "abc", strict=False)]
    one = world(*pools, room=sum(counts) + spare, max_unavailable=max_unavailable, surge=surge)
    one.bad = frozenset({"new"} if is_bad else ())
    one.start_rounds, one.drain_rounds = start_rounds, drain_rounds
    floor = {key: pool.wanted for key, pool in one.plan.pools.items()}
    first = pools[0].key
    for number in range(1000):
        if number in restarts:  # of the controller: all that it knows is the plan and what it finds
            one.rollout = replace(one.rollout, without_room=())
        if number in targets and targets[number] <= counts[0]:  # an autoscaler has a word too
            one.plan = one.plan.having(replace(one.plan.pools[first], target=targets[number]))
            floor[first] = min(floor[first], targets[number])
        one.round()
        for key, least in one.least_ready.items():
            assert least >= floor[key] - max_unavailable
        holding = [r for r in one.replicas.values() if r.state in (READY, STARTING, DRAINING)]
        assert len(holding) <= one.room
        if one.rollout.state is not RolloutState.ROLLING:
            break
    else:
        raise AssertionError("it does not end")
    assert (one.rollout.state is RolloutState.STOPPED) == is_bad
    if not is_bad:
        assert sources(one) == {"new"}
        assert all(len(pool.members) == pool.wanted and not pool.surge for pool in one.plan.pools.values())
