"""The router: choose, book, release. The one mutable object of this package.

Read path: `choose` picks among the eligible replicas of a model and books the request on it in the same breath, so
that the next choice already sees it. Write path: `set_membership`, `report`, `suspend`, `tick`, `release`.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from headrace_router.load_table import Booking, LoadTable, ReplicaLoad
from headrace_router.policies import Policy
from headrace_router.types import LoadReport, Membership, Replica, ReplicaState, Request


class Choice(NamedTuple):
    """A replica, the booking on it (to be released exactly once) and the reason for it."""

    booking: Booking
    reason: str


class Router:
    """Decides where requests run. Not thread-safe: one event loop owns it; no call blocks or does I/O."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.loads = LoadTable()
        self._models: dict[str, list[ReplicaLoad]] = {}  # every replica of the model, whatever its state
        self._eligible: dict[str, list[ReplicaLoad]] = {}  # those that may take new requests

    # --- read path

    def knows(self, model: str) -> bool:
        """Whether any replica, ready or not, serves this model."""
        return model in self._models

    def models(self) -> list[str]:
        """Every known model, in the order of membership."""
        return list(self._models)

    def eligible(self, model: str) -> list[ReplicaLoad]:
        """Replicas that may take a new request of this model. Not to be modified."""
        return self._eligible.get(model, [])

    def choose(self, request: Request) -> Choice | None:
        """Choose a replica and book the request on it. None when no replica of the model is eligible."""
        candidates = self._eligible.get(request.model)
        if not candidates:
            return None
        if request.excluded:
            candidates = [load for load in candidates if load.replica.id not in request.excluded]
            if not candidates:
                return None
        load, reason = self.policy.choose(request, candidates)
        return Choice(self.loads.book(load), reason)

    # --- write path

    def release(self, booking: Booking) -> None:
        """The request has ended, however it ended. Safe to call again."""
        self.loads.release(booking)

    def set_membership(self, membership: Membership, now_s: float) -> list[Replica]:
        """Take the fleet as it now is; returns the replicas that went (a restarted one counts as gone)."""
        gone = self.loads.replace(membership.replicas, now_s)
        self._models = {}
        for load in self.loads.all():
            self._models.setdefault(load.replica.model, []).append(load)
        for model in self._models:
            self._rebuild(model)
        for model in [m for m in self._eligible if m not in self._models]:
            del self._eligible[model]
        return [load.replica for load in gone]

    def report(self, report: LoadReport, now_s: float) -> bool:
        """Take in a load report; a replica suspended for its silence is back. False if it was not usable."""
        accepted = self.loads.report(report, now_s)
        if accepted:
            load = self.loads.get(report.replica_id)
            if load is not None and load.suspended is not None and load.suspended_until_s == inf:
                self._resume(load)
        return accepted

    def suspend(self, replica: Replica, reason: str, until_s: float = inf) -> bool:
        """Keep new requests away from a replica that seems dead, until `until_s` or, by default, its next report.

        Returns whether anything changed: not when another boot has taken its place or it already is suspended.
        """
        load = self.loads.get(replica.id)
        if load is None or load.replica.boot_id != replica.boot_id or load.suspended is not None:
            return False
        load.suspended = reason
        load.suspended_until_s = until_s
        self._rebuild(load.replica.model)
        return True

    def tick(self, now_s: float, silence_limit_s: float) -> list[Replica]:
        """Let suspended replicas whose time is over in again; suspend those silent for more than the limit.

        Returns the newly suspended ones. Replicas that never report (external servers) are never silent.
        """
        silent = []
        for load in self.loads.all():
            if load.suspended is not None:
                if load.suspended_until_s <= now_s:
                    self._resume(load)
            elif load.reported_at_s is not None and now_s - load.reported_at_s > silence_limit_s:
                self.suspend(load.replica, f"silent for {now_s - load.reported_at_s:.1f} s")
                silent.append(load.replica)
        return silent

    def _resume(self, load: ReplicaLoad) -> None:
        load.suspended = None
        self._rebuild(load.replica.model)

    def _rebuild(self, model: str) -> None:
        self._eligible[model] = [
            load
            for load in self._models[model]
            if load.suspended is None and load.replica.state is ReplicaState.READY
        ]

    def check_integrity(self) -> None:
        """Raise AssertionError unless the eligible lists follow from membership and bookings add up."""
        self.loads.check_integrity()
        for model, loads in self._models.items():
            expected = [
                load for load in loads if load.suspended is None and load.replica.state is ReplicaState.READY
            ]
            assert self._eligible[model] == expected, f"stale view of {model}"
        assert set(self._eligible) == set(self._models)
