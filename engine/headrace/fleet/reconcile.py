"""What to do about the difference between the fleet as it is and as it should be. Pure.

missing            -> Start
failed             -> Start after a backoff; never again where the reason is fatal and it has never been ready
starting too long  -> Kill
no longer wanted   -> Stop
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from headrace_router.types import ReplicaId, ReplicaState

STABLE_AFTER_S = 30.0
"""A replica that was ready for this long has proven that it can start; its next failure counts as the first."""


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


Action = Start | Kill | Stop


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
) -> tuple[Action, ...]:
    """The actions due now. Doing them and asking again gives none until something changes or time passes."""
    actions: list[Action] = []
    for replica_id in desired:
        replica = observed.get(replica_id)
        if replica is None or replica.state is ReplicaState.STOPPED:
            actions.append(Start(replica_id))
        elif replica.state is ReplicaState.FAILED:
            due_s = replica.since_s + backoff_s(replica.failures, max_backoff_s)
            if not has_given_up(replica) and now_s >= due_s:
                actions.append(Start(replica_id))
        elif replica.state in _BEFORE_READY and now_s - replica.since_s > start_timeout_s:
            actions.append(Kill(replica_id, f"not ready after {start_timeout_s:g} s (fleet.start_timeout_s)"))
    wanted = frozenset(desired)
    over = (ReplicaState.DRAINING, ReplicaState.STOPPED, ReplicaState.FAILED)
    actions += [
        Stop(id) for id, replica in observed.items() if id not in wanted and replica.state not in over
    ]
    return tuple(actions)
