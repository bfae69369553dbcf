"""Replacing the replicas of a fleet one after another while the others serve. Pure.

    outdated ── there is room ──> a successor starts beside it ── ready ──> the old one drains and goes
             └─ there is none ──> it drains and goes ──> its successor starts in its place ── ready ──> the next

`advance` is asked in every round of supervision and remembers nothing: what is outdated stands in the plan, what has
become of successors in what is observed. So a controller that is restarted in the middle goes on from what it finds.

One pool at a time, in the order of the configuration. A pool never has more than `Pace.max_unavailable` replicas too
few on a rollout's account; where a replica fails meanwhile, the rollout waits until it is back. A successor that does
not become ready stops the rollout: the rest keeps serving as it is, until a configuration is applied or a restart is
asked for again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from headrace.fleet.fleet_plan import FleetPlan, PoolPlan
from headrace.fleet.pools import PoolKey
from headrace.fleet.reconcile import Observed, has_given_up
from headrace.fleet.specs import numbered
from headrace.fleet.victims import Seen, victims
from headrace_router.types import ReplicaState

MAX_START_FAILURES = 3
"""Failed starts in a row of one successor after which the rollout stops; one is enough where the reason is fatal."""

ROOM_PATIENCE_S = 2.0
"""How long a successor may look for a place before its predecessor makes it one. Ray finds one that there is within
milliseconds."""


class RolloutState(StrEnum):
    """Of one rollout. It starts rolling and ends in one of the others."""

    ROLLING = "rolling"
    DONE = "done"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Pace:
    """How much of one pool may change at a time."""

    max_unavailable: int = 1  # replicas that may be missing
    surge: int = 1  # successors that may start beside what there is


@dataclass(frozen=True, slots=True)
class Rollout:
    """What was asked for and how it stands. The same words are shown to people."""

    id: str  # drawn for each
    what: str  # "restart of smollm2"
    pools: tuple[PoolKey, ...]  # those that it concerns
    total: int  # replicas that were outdated when it began
    state: RolloutState = RolloutState.ROLLING
    reason: str = ""  # why it stopped, or what it waits for
    pace: Pace = Pace()
    without_room: tuple[PoolKey, ...] = ()  # pools in which a successor found no place

    @property
    def is_rolling(self) -> bool:
        return self.state is RolloutState.ROLLING


@dataclass(frozen=True, slots=True)
class Present:
    """One replica that there is, a member of its pool or not."""

    observed: Observed
    seen: Seen
    since_s: float  # when it was asked for, or entered its state
    reason: str = ""  # of the last failure

    @property
    def is_ready(self) -> bool:
        return self.observed.state is ReplicaState.READY


Fleet = Mapping[PoolKey, Mapping[int, Present]]
"""What there is, by pool and number."""


def advance(plan: FleetPlan, rollout: Rollout, fleet: Fleet, now_s: float) -> tuple[FleetPlan, Rollout]:
    """The plan and the rollout after this round. The same two while something is being waited for."""
    if not rollout.is_rolling:
        return plan, rollout
    is_whole = True
    # What has been begun first: a successor beside its predecessor holds room that another pool may wait for.
    for key in sorted(rollout.pools, key=lambda key: not (key in plan.pools and plan.pools[key].surge)):
        pool, present = plan.pools.get(key), fleet.get(key, {})
        if pool is None:  # no longer configured: its replicas go, and that is all
            if present:
                return plan, rollout
            continue
        if failed := _failed_successor(pool, present):
            return plan.having(_without_surge(pool, present)), replace(
                rollout, state=RolloutState.STOPPED, reason=failed
            )
        if not pool.outdated and not pool.surge:
            if not _is_settling(pool, present):
                continue
            if _lacks_room_alone(pool, present):  # perhaps for long, and the others need not wait with it
                is_whole = False
                continue
        stepped, rollout = _step(pool, rollout, present, now_s)
        return plan.having(stepped), rollout
    return plan, replace(rollout, state=RolloutState.DONE, reason="") if is_whole else rollout


def _step(
    pool: PoolPlan, rollout: Rollout, present: Mapping[int, Present], now_s: float
) -> tuple[PoolPlan, Rollout]:
    ready = {n for n in pool.members if _is_ready(present, n)}
    if silent := [n for n in pool.outdated if n not in ready]:
        # They serve nobody, so replacing them costs nobody anything.
        return _succeeded(pool, silent), rollout
    if pool.surge and _waits_for_room(pool, present, now_s):
        without_room = (*rollout.without_room, pool.key)
        return _without_surge(pool, present), replace(rollout, without_room=without_room)
    if pool.surge:
        return _relieved(pool, present, len(ready)), rollout
    if not pool.outdated or _is_leaving(pool, present):
        return pool, rollout
    roomless = {n for n in pool.members if n in present and present[n].observed.waits_for_room}
    if rollout.pace.surge and pool.key not in rollout.without_room and not roomless:
        is_whole = len(ready) == len(pool.members)
        count = min(rollout.pace.surge, len(pool.outdated))
        return _surged(pool, present, count) if is_whole else pool, rollout
    # Those for which there is no room are missing on nobody's account.
    attainable = min(pool.wanted, len(pool.members) - len(roomless))
    allowed = len(ready) - (attainable - rollout.pace.max_unavailable)
    return _succeeded(pool, _first_to_go(pool, present, allowed)), rollout


def _relieved(pool: PoolPlan, present: Mapping[int, Present], num_ready: int) -> PoolPlan:
    """Without those in whose stead a successor is ready."""
    if not pool.outdated:  # scaled down meanwhile
        return replace(pool, surge=0)
    gone = _first_to_go(pool, present, min(num_ready - pool.wanted, pool.surge))
    return replace(pool.without(gone), surge=pool.surge - len(gone))


def _surged(pool: PoolPlan, present: Mapping[int, Present], count: int) -> PoolPlan:
    """With so many successors beside what there is."""
    free = (n for n in itertools.count() if n not in pool.members and n not in present)
    added = {n: numbered(pool.template, n) for n in itertools.islice(free, count)}
    return replace(pool, surge=count, members={**pool.members, **added})


def _succeeded(pool: PoolPlan, numbers: tuple[int, ...] | list[int]) -> PoolPlan:
    """With successors in the very places of these."""
    members = {**pool.members, **{n: pool.successor(n) for n in numbers}}
    return replace(pool, members=members, marked=pool.marked - set(numbers))


def _without_surge(pool: PoolPlan, present: Mapping[int, Present]) -> PoolPlan:
    """Without the successors beyond the count that are not ready."""
    waiting = [n for n in pool.members if n not in pool.outdated and not _is_ready(present, n)]
    gone = waiting[-pool.surge :] if pool.surge else []
    return replace(pool.without(gone), surge=0)


def _first_to_go(pool: PoolPlan, present: Mapping[int, Present], count: int) -> tuple[int, ...]:
    return victims({n: present[n].seen for n in pool.outdated}, pool.template, count)


def _failed_successor(pool: PoolPlan, present: Mapping[int, Present]) -> str:
    """Why a successor does not become ready, "" where none has failed."""
    for number in pool.members:
        one = present.get(number)
        if (
            one is None
            or one.observed.state is not ReplicaState.FAILED
            or one.seen.spec != pool.members[number]
        ):
            continue
        if number in pool.outdated or one.observed.was_ready:
            continue  # it had served before it died, and will be tried again for ever
        if has_given_up(one.observed) or one.observed.failures >= MAX_START_FAILURES:
            return f"{one.observed.id} did not start: {one.reason}"
    return ""


def _is_ready(present: Mapping[int, Present], number: int) -> bool:
    return number in present and present[number].is_ready


def _is_leaving(pool: PoolPlan, present: Mapping[int, Present]) -> bool:
    """Whether replicas that are no longer members still hold their room."""
    return any(number not in pool.members and number not in pool.asleep for number in present)


def _is_settling(pool: PoolPlan, present: Mapping[int, Present]) -> bool:
    """Whether it is not yet what the plan asks for, for whatever reason."""
    if len(pool.members) != pool.wanted + pool.surge:
        return True
    return _is_leaving(pool, present) or any(not _is_ready(present, number) for number in pool.members)


def _lacks_room_alone(pool: PoolPlan, present: Mapping[int, Present]) -> bool:
    """Whether all that it lacks of what the plan asks for is room."""
    if len(pool.members) != pool.wanted or _is_leaving(pool, present):
        return False
    return all(
        number in present and (present[number].is_ready or present[number].observed.waits_for_room)
        for number in pool.members
    )


def _waits_for_room(pool: PoolPlan, present: Mapping[int, Present], now_s: float) -> bool:
    return any(
        one.observed.waits_for_room and now_s - one.since_s >= ROOM_PATIENCE_S
        for number, one in present.items()
        if number in pool.members and number not in pool.outdated
    )
