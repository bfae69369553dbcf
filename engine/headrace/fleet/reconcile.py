"""What to do about the difference between the fleet as it is and as it should be. Pure.

missing            -> Start
failed             -> Start after a backoff; never again where the reason is fatal and it has never been ready
starting too long  -> Kill
no longer wanted   -> Stop: drained, then gone; Forget where nothing is left of it
of another kind    -> Stop, then Start as what is wanted
wanted again       -> Recall, while it drains and would still take requests
to sleep           -> Sleep: drained first; wanted while it sleeps -> Wake
without room       -> Start again after a moment; it waits as long as it must
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from headrace_router.types import ReplicaId, ReplicaState

STABLE_AFTER_S = 30.0
"""A replica that was ready for this long has proven that it can start; its next failure counts as the first."""


ROOM_RETRY_S = 1.0
"""How often a place is looked for that was not there."""

_BEFORE_READY = (ReplicaState.PENDING, ReplicaState.STARTING)


@dataclass(frozen=True, slots=True)
class Observed:
    """One replica as it is. `since_s` is when it entered its state, on the clock of `now_s`."""

    id: ReplicaId
    state: ReplicaState
    since_s: float
    failures: int = 0  # in a row
    is_fatal: bool = False  # of the last failure
    was_ready: bool = False  # ever
    waits_for_room: bool = False  # asked for, and the cluster has no place for it
    can_be_recalled: bool = False  # it drains, and would still take requests
    is_other: bool = False  # it runs as something else than is wanted


@dataclass(frozen=True, slots=True)
class Start:
    id: ReplicaId


@dataclass(frozen=True, slots=True)
class Kill:
    id: ReplicaId
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Drain, then release."""

    id: ReplicaId


@dataclass(frozen=True, slots=True)
class Recall:
    """It drains no longer."""

    id: ReplicaId


@dataclass(frozen=True, slots=True)
class Sleep:
    """Drain, then sleep."""

    id: ReplicaId


@dataclass(frozen=True, slots=True)
class Wake:
    """It is to serve again."""

    id: ReplicaId


@dataclass(frozen=True, slots=True)
class Forget:
    """Nothing is left of it, and nobody wants it."""

    id: ReplicaId


Action = Start | Kill | Stop | Recall | Sleep | Wake | Forget


def backoff_s(failures: int, max_backoff_s: float) -> float:
    """How long a replica waits after its n-th failure in a row: 0, 1, 2, 4, ... seconds."""
    if failures <= 1:
        return 0.0
    return float(min(max_backoff_s, 2.0 ** min(failures - 2, 30)))


def has_given_up(observed: Observed) -> bool:
    """Whether this replica will not be started again.

    One that has been ready is tried for ever: the same start succeeded once, so what is in its way may leave.
    """
    return observed.state is ReplicaState.FAILED and observed.is_fatal and not observed.was_ready


def failures_after(observed: Observed, now_s: float) -> int:
    """Failures in a row, counting one now."""
    was_stable = observed.state is ReplicaState.READY and now_s - observed.since_s >= STABLE_AFTER_S
    return 1 if was_stable else observed.failures + 1


def reconcile(
    desired: Collection[ReplicaId],
    observed: Mapping[ReplicaId, Observed],
    now_s: float,
    *,
    start_timeout_s: float,
    max_backoff_s: float,
    asleep: Collection[ReplicaId] = (),
) -> tuple[Action, ...]:
    """The actions due now. Doing them and asking again gives none until something changes or time passes.

    Those `asleep` are to sleep; one that dies is not started again for that.
    """
    actions: list[Action] = []
    wanted = frozenset((*desired, *asleep))
    for replica_id in desired:
        action = _of_wanted(replica_id, observed.get(replica_id), now_s, start_timeout_s, max_backoff_s)
        if action is not None:
            actions.append(action)
    for replica_id in asleep:
        replica = observed.get(replica_id)
        if replica is not None and replica.state is ReplicaState.READY:
            actions.append(Sleep(replica_id))
        elif replica is not None and replica.state in (ReplicaState.STOPPED, ReplicaState.FAILED):
            actions.append(Forget(replica_id))
    for replica_id, replica in observed.items():
        if replica_id in wanted:
            continue
        if replica.state in (ReplicaState.STOPPED, ReplicaState.FAILED):
            actions.append(Forget(replica_id))
        elif replica.state is not ReplicaState.DRAINING:
            actions.append(Stop(replica_id))
    return tuple(actions)


def _of_wanted(
    replica_id: ReplicaId,
    replica: Observed | None,
    now_s: float,
    start_timeout_s: float,
    max_backoff_s: float,
) -> Action | None:
    if replica is None or _is_due(replica, now_s, max_backoff_s):
        return Start(replica_id)
    if replica.state is ReplicaState.FAILED or (replica.waits_for_room and not replica.is_other):
        return None
    if replica.state is ReplicaState.DRAINING:
        return Recall(replica_id) if replica.can_be_recalled and not replica.is_other else None
    if replica.is_other:
        return Stop(replica_id)
    action: Action | None = None
    if replica.state is ReplicaState.SLEEPING:
        action = Wake(replica_id)
    elif replica.state in _BEFORE_READY and now_s - replica.since_s > start_timeout_s:
        action = Kill(replica_id, f"not ready after {start_timeout_s:g} s (fleet.start_timeout_s)")
    return action


def _is_due(replica: Observed, now_s: float, max_backoff_s: float) -> bool:
    """Whether it is to be started, again."""
    if replica.state is ReplicaState.FAILED:
        may_start = replica.is_other or not has_given_up(replica)
        return may_start and now_s >= replica.since_s + backoff_s(replica.failures, max_backoff_s)
    if replica.waits_for_room:
        return not replica.is_other and now_s - replica.since_s >= ROOM_RETRY_S
    return replica.state is ReplicaState.STOPPED
