"""The router: choose, book, release. The one mutable object of this package.

Read path: `choose` picks among the eligible replicas of a model and books the request on it in the same breath, so
that the next choice already sees it. Write path: `set_membership`, `report`, `suspend`, `tick`, `answered`, `release`;
KV events go to `index` directly.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import NamedTuple

from headrace_router.cost_model import DEFAULT_PRIOR, TimingPrior
from headrace_router.disaggregation import PER_REQUEST, Disaggregation, Split, make_disaggregation
from headrace_router.halves import Halves
from headrace_router.load_table import Booking, LoadTable, ReplicaLoad
from headrace_router.policies.delay import Delay
from headrace_router.prefix_source import PrefixSource
from headrace_router.saturation import SaturationBound, all_saturated, is_full, is_saturated
from headrace_router.types import BootId, LoadReport, Membership, Replica, ReplicaId, ReplicaState, Request
from headrace_router.view import Decision, Policy, View


class Handover(NamedTuple):
    """The prefilling half of a request that another replica answers."""

    booking: Booking  # to be released exactly once, independently of the other half's
    decision: Decision
    tokens: int  # of the prompt, predicted to move
    transfer_s: float  # predicted


class Choice(NamedTuple):
    """The booking on the replica that answers (to be released exactly once) and the decision behind it."""

    booking: Booking
    decision: Decision
    handover: Handover | None = None  # who computes the prompt, where that is another one

    @property
    def reason(self) -> str:
        return self.decision.reason


Told = Callable[[Request, Decision, Booking], None]
"""Called with each request as it is booked on a replica that computes its prompt."""


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
        disaggregation: Disaggregation | None = None,
    ) -> None:
        """`index` knows prompts by token blocks, `texts` by text chunks; without either only load decides.

        `disaggregation` matters to requests that can be handed over between replicas with a connector; by default
        the decision is made per request.
        """
        self.policy = policy
        self.disaggregation = disaggregation or make_disaggregation(PER_REQUEST, policy.name, 0)
        self.index = index
        self.texts = texts
        self.loads = LoadTable(prior)
        self.told: Told | None = None  # hears of each request that joins a replica's queue
        self._now_s = 0.0
        self._known: dict[str, None] = {}  # configured models, and those of replicas; in order
        self._models: dict[str, list[ReplicaLoad]] = {}  # every replica of the model, whatever its state
        self._views: dict[str, View] = {}  # those that may answer new requests
        self._halves: dict[str, Halves] = {}  # those that may take either half of one

    def decide_by(self, policy: Policy, disaggregation: Disaggregation) -> None:
        """Choose otherwise from now on. What is booked stays booked."""
        self.policy, self.disaggregation = policy, disaggregation

    def know(self, index: PrefixSource, texts: PrefixSource) -> None:
        """Know prompts from now on, where nothing was known of them before."""
        self.index, self.texts = index, texts
        present = [(load.replica, load.slot) for load in self.loads.all()]
        for source in (index, texts):
            source.follow(present)

    # --- read path

    def knows(self, model: str) -> bool:
        """Whether the fleet is to serve this model, be a replica of it ready or not."""
        return model in self._known

    def models(self) -> list[str]:
        """Every known model, in the order of membership."""
        return list(self._known)

    def eligible(self, model: str) -> list[ReplicaLoad]:
        """Replicas that may take a new request of this model."""
        halves = self._halves.get(model)
        return [] if halves is None else list(halves.everyone)

    def first_eligible(self, model: str) -> ReplicaLoad | None:
        """One replica that may take a new request, as a sample of its pool."""
        view = self._views.get(model)
        return view.loads[0] if view is not None and view.loads else None

    def has_room(self, request: Request, bound: SaturationBound) -> bool | None:
        """Whether some replica can take the request without making it wait; None when none is eligible. Reads only.

        Of a request that may be handed over: whether it can go at least one of the ways open to it, that is whether
        some answering replica is free, or some prefilling one is and an answering one has the memory.
        """
        view = self._views.get(request.model)
        if view is None or not view.loads:
            return None
        if not request.can_hand_over and not request.excluded:  # the usual case
            return not all_saturated(view.loads, request.size_tokens, bound)
        halves = self._halves[request.model]
        if request.excluded:
            halves = halves.without(request.excluded)
        loads, tokens = halves.answering.loads, request.size_tokens
        if not loads:
            return None
        local, remote = True, False
        if request.can_hand_over and halves.prefilling is not None:
            local, remote = self.disaggregation.ways(request)
        if local and not all_saturated(loads, tokens, bound):
            return True
        if not remote or halves.prefilling is None or all_saturated(halves.prefilling.loads, tokens, bound):
            return False
        return any(not is_full(load, tokens, bound) for load in loads)

    def saturated(self, request: Request, bound: SaturationBound) -> frozenset[ReplicaId]:
        """Replicas that the policy is not to be offered for a request that has waited until another came free.

        Empty for `delay`, whose costs hold every wait: it may prefer a short one to computing a long prefix again.
        """
        if isinstance(self.policy, Delay) or request.can_hand_over:
            return frozenset()
        loads, tokens = self._views[request.model].loads, request.size_tokens
        return frozenset(load.replica.id for load in loads if is_saturated(load, tokens, bound))

    def may_recover(self, model: str) -> bool:
        """Whether a replica of the model takes requests, or is only suspended from it for a moment."""
        return any(load.replica.state is ReplicaState.READY for load in self._models.get(model, ()))

    def choose(self, request: Request, now_s: float | None = None) -> Choice | None:
        """Choose who answers and, where a hand-over is possible and worth it, who computes the prompt; book both.

        None when no replica of the model is eligible.
        """
        view = self._views.get(request.model)
        if view is None or not view.loads:
            return None
        prefilling = self._halves[request.model].prefilling if request.can_hand_over else None
        if request.excluded:
            halves = self._halves[request.model].without(request.excluded)
            if not halves.everyone:
                return None
            view = halves.answering
            prefilling = halves.prefilling if request.can_hand_over else None
        if now_s is None:
            now_s = self._now_s
        else:
            self._now_s = now_s
        source = self._source(request)
        view.now_s = now_s
        view.hits = (
            None if source is None or not self.policy.reads_prefixes else source.look_up(request, now_s)
        )
        if prefilling is not None:
            prefilling.now_s, prefilling.hits = now_s, view.hits
            split = self.disaggregation.split(request, view, prefilling, self.policy)
            if split.prefill is not None:
                return self._book_pair(request, split, split.prefill, source, now_s)
            decision = split.decode
        else:
            decision = self.policy.choose(request, view)
        load = decision.load
        tokens = request.size_tokens
        uncached = tokens - decision.hit_tokens
        booking = self.loads.book(load, tokens, max(uncached, 1), request.max_tokens or 0, now_s)
        if source is not None:
            source.routed(request, load.slot, now_s)
        if self.told is not None:
            self.told(request, decision, booking)
        return Choice(booking, decision)

    def _source(self, request: Request) -> PrefixSource | None:
        """Who knows of this prompt."""
        if request.block_hashes is not None:
            return self.index
        return self.texts if request.chunk_hashes is not None else None

    def _book_pair(
        self, request: Request, split: Split, prefill: Decision, source: PrefixSource | None, now_s: float
    ) -> Choice:
        tokens = request.size_tokens
        uncached = max(tokens - prefill.hit_tokens, 1)
        first = self.loads.book(prefill.load, tokens, uncached, 1, now_s)
        second = self.loads.book_pair(first, split.decode.load, split.tokens, request.max_tokens or 0, now_s)
        if source is not None:
            source.routed(request, prefill.load.slot, now_s)
            source.routed(request, split.decode.load.slot, now_s)
        if self.told is not None:
            self.told(request, prefill, first)
        return Choice(second, split.decode, Handover(first, prefill, split.tokens, split.transfer_s))

    # --- write path

    def heard(
        self, request: Request, replica_id: str, boot_id: str, uncached_tokens: int, now_s: float
    ) -> None:
        """Another gateway has sent a request to a replica: it counts there until a report can show it, and its prompt
        is expected there. Of `request` the hashes matter, of blocks perhaps only those that the replica does not hold.
        """
        load = self.loads.get(replica_id)
        if load is None or load.replica.boot_id != boot_id:
            return
        self.loads.booked_elsewhere(replica_id, boot_id, uncached_tokens, now_s)
        source = self._source(request)
        if source is not None:
            source.routed(request, load.slot, now_s)

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
            del self._views[model], self._halves[model]
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

    def is_suspended(self, replica_id: ReplicaId, boot_id: BootId) -> bool:
        """Whether that boot of the replica is kept from new requests."""
        load = self.loads.get(replica_id)
        return load is not None and load.replica.boot_id == boot_id and load.suspended is not None

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
            if load.suspended is not None and load.suspended_until_s <= now_s:
                self._resume(load)
            if load.suspended is not None or load.reported_at_s is None:
                continue
            if now_s - load.reported_at_s > silence_limit_s:
                self.suspend(load.replica, f"silent for {now_s - load.reported_at_s:.1f} s")
                silent.append(load.replica)
        return silent

    def _resume(self, load: ReplicaLoad) -> None:
        load.suspended = None
        self._rebuild(load.replica.model)

    def _rebuild(self, model: str) -> None:
        halves = Halves([load for load in self._models[model] if _is_eligible(load)])
        for load in self._models[model]:
            load.attach(None, 0)
        halves.attach()
        self._halves[model], self._views[model] = halves, halves.answering

    def check_integrity(self) -> None:
        """Raise AssertionError unless the views follow from membership and bookings add up."""
        self.loads.check_integrity()
        for model, loads in self._models.items():
            assert self.eligible(model) == [load for load in loads if _is_eligible(load)], f"stale: {model}"
            assert self._views[model] is self._halves[model].answering
        assert set(self._views) == set(self._halves) == set(self._models)
        for source in (self.index, self.texts):
            if source is not None:
                source.check_integrity()


def _is_eligible(load: ReplicaLoad) -> bool:
    return load.suspended is None and load.replica.state is ReplicaState.READY
