"""The router: choose, book, release. The one mutable object of this package.

Read path: `choose` picks among the eligible replicas of a model and books the request on it in the same breath, so
that the next choice already sees it. Write path: `set_membership`, `report`, `suspend`, `tick`, `answered`, `release`;
KV events go to `index` directly.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from headrace_router.cost_model import DEFAULT_PRIOR, TimingPrior
from headrace_router.load_columns import LoadColumns
from headrace_router.load_table import Booking, LoadTable, ReplicaLoad
from headrace_router.prefix_source import PrefixSource
from headrace_router.types import LoadReport, Membership, Replica, ReplicaState, Request
from headrace_router.view import Decision, Policy, View

WIDE_FLEET = 40
"""Candidates from which on numpy decides quicker than a loop (`headrace_bench.decision_bench`)."""


class Choice(NamedTuple):
    """The booking on the chosen replica (to be released exactly once) and the decision behind it."""

    booking: Booking
    decision: Decision

    @property
    def reason(self) -> str:
        return self.decision.reason


class Router:
    """Decides where requests run. Not thread-safe: one event loop owns it; no call blocks or does I/O.

    Times are seconds on one clock that never goes back; a call without one takes the latest that any call brought.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        index: PrefixSource | None = None,
        texts: PrefixSource | None = None,
        prior: TimingPrior = DEFAULT_PRIOR,
    ) -> None:
        """`index` knows prompts by token blocks, `texts` by text chunks; without either only load decides."""
        self.policy = policy
        self.index = index
        self.texts = texts
        self.loads = LoadTable(prior)
        self._now_s = 0.0
        self._known: dict[str, None] = {}  # configured models, and those of replicas; in order
        self._models: dict[str, list[ReplicaLoad]] = {}  # every replica of the model, whatever its state
        self._views: dict[str, View] = {}  # those that may take new requests

    # --- read path

    def knows(self, model: str) -> bool:
        """Whether the fleet is to serve this model, be a replica of it ready or not."""
        return model in self._known

    def models(self) -> list[str]:
        """Every known model, in the order of membership."""
        return list(self._known)

    def eligible(self, model: str) -> list[ReplicaLoad]:
        """Replicas that may take a new request of this model."""
        view = self._views.get(model)
        return [] if view is None else list(view.loads)

    def first_eligible(self, model: str) -> ReplicaLoad | None:
        """One replica that may take a new request, as a sample of its pool."""
        view = self._views.get(model)
        return view.loads[0] if view is not None and view.loads else None

    def choose(self, request: Request, now_s: float | None = None) -> Choice | None:
        """Choose a replica and book the request on it. None when no replica of the model is eligible."""
        view = self._views.get(request.model)
        if view is None or not view.loads:
            return None
        if request.excluded:
            loads = [load for load in view.loads if load.replica.id not in request.excluded]
            if not loads:
                return None
            view = View(loads)
        if now_s is None:
            now_s = self._now_s
        else:
            self._now_s = now_s
        source = None
        if request.block_hashes is not None:
            source = self.index
        elif request.chunk_hashes is not None:
            source = self.texts
        view.now_s = now_s
        view.hits = (
            None if source is None or not self.policy.reads_prefixes else source.look_up(request, now_s)
        )
        decision = self.policy.choose(request, view)
        load = decision.load
        tokens = request.size_tokens
        uncached = tokens - decision.hit_tokens
        booking = self.loads.book(load, tokens, max(uncached, 1), request.max_tokens or 0, now_s)
        if source is not None:
            source.routed(request, load.slot, now_s)
        return Choice(booking, decision)

    # --- write path

    def answered(self, booking: Booking, now_s: float) -> None:
        """The request's first token has come. Safe to call again, or never; a decision knows more with it."""
        self._now_s = now_s
        self.loads.answered(booking, now_s)

    def release(self, booking: Booking, now_s: float | None = None) -> None:
        """The request has ended, however it ended. Safe to call again."""
        if now_s is None:
            now_s = self._now_s
        self.loads.release(booking, now_s)

    def set_membership(self, membership: Membership, now_s: float) -> list[Replica]:
        """Take the fleet as it now is; returns the replicas that went (a restarted one counts as gone)."""
        self._now_s = now_s
        gone = self.loads.replace(membership.replicas, now_s)
        present = self.loads.all()
        for source in (self.index, self.texts):
            if source is not None:
                source.follow([(load.replica, load.slot) for load in present])
        self._models = {}
        for load in present:
            self._models.setdefault(load.replica.model, []).append(load)
        self._known = dict.fromkeys((*membership.models, *self._models))
        for model in self._models:
            self._rebuild(model)
        for model in [m for m in self._views if m not in self._models]:
            del self._views[model]
        return [load.replica for load in gone]

    def report(self, report: LoadReport, now_s: float) -> bool:
        """Take in a load report; a replica suspended for its silence is back. False if it was not usable."""
        self._now_s = now_s
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
        self._now_s = now_s
        for source in (self.index, self.texts):
            if source is not None:
                source.tick(now_s)
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
        everyone = self._models[model]
        eligible = [load for load in everyone if _is_eligible(load)]
        columns = LoadColumns(len(eligible)) if len(eligible) >= WIDE_FLEET else None
        for load in everyone:
            load.attach(None, 0)
        for row, load in enumerate(eligible):
            load.attach(columns, row)
        self._views[model] = View(eligible, columns)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the views follow from membership and bookings add up."""
        self.loads.check_integrity()
        for model, loads in self._models.items():
            assert self.eligible(model) == [load for load in loads if _is_eligible(load)], f"stale: {model}"
        assert set(self._views) == set(self._models)
        for source in (self.index, self.texts):
            if source is not None:
                source.check_integrity()


def _is_eligible(load: ReplicaLoad) -> bool:
    return load.suspended is None and load.replica.state is ReplicaState.READY
