"""What `DelayAwareRequestRouter` knows and decides, without Ray: the router of `headrace_router` over Serve's replicas.

Prompts are known by their text, learned from this router's own routing; loads by its own bookings, and by Serve's
queue lengths for what others send there; the pace by the time to the first token of requests that found a replica
idle. It is one pace for all but those that are clearly quicker or slower: replicas of a deployment are alike, and such
times, with HTTP and queues in them, differ more from each other than replicas do. Learned of each by itself, whichever
seemed quicker drew conversations away from the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from headrace_kernels.block_hash import hash_chunks, salt
from headrace_router.cost_model import CostModel
from headrace_router.load_table import Booking, ReplicaLoad
from headrace_router.policies import POLICIES, make_policy
from headrace_router.router import Router
from headrace_router.text_index import TextIndex
from headrace_router.types import BootId, Endpoints, Iteration, Membership, Replica, ReplicaId, Request, Role

MODEL = "deployment"
_TICK_S = 0.1

_CLEARLY = 1.5
"""By so much a replica's own pace must differ from that of all to count,"""
_TOLD = 10
"""learned from so many answers."""


class RequestRouting:
    """One router's state. Mutable; one event loop owns it. Times are seconds on one clock that never goes back."""

    def __init__(self, policy: str = "delay", seed: int = 0) -> None:
        """Raises ValueError for an unknown policy."""
        if policy not in POLICIES:
            raise ValueError(f"no policy {policy!r}; it must be one of {', '.join(sorted(POLICIES))}")
        self._texts = TextIndex()
        self._router = Router(make_policy(policy, seed), texts=self._texts)
        self._pace = CostModel()  # of all
        self._paces: dict[str, CostModel] = {}  # of each
        self._requests: dict[str, tuple[Request, Booking]] = {}
        self._others: dict[str, list[Booking]] = {}  # by replica: what somebody else sent there
        self._version = 0
        self._ticked_s = 0.0

    @property
    def num_requests(self) -> int:
        """Requests that have been given a replica and have not ended."""
        return len(self._requests)

    def follow(self, names: Iterable[str], now_s: float) -> None:
        """Exactly these replicas are there. Serve never gives a name twice."""
        self._version += 1
        members = tuple(
            Replica(ReplicaId(name), BootId(name), MODEL, Role.UNIFIED, Endpoints("")) for name in names
        )
        self._router.set_membership(Membership(self._version, members), now_s)
        present = {member.id for member in members}
        self._paces = {name: self._paces.get(name) or CostModel() for name in present}
        self._take_paces()
        for name in [name for name in self._others if name not in present]:
            for booking in self._others.pop(name):
                self._router.release(booking, now_s)

    def rank(
        self,
        request_id: str,
        prompt: bytes,
        candidates: Sequence[str],
        queue_lengths: Mapping[str, int | None],
        now_s: float,
        *,
        lora: str = "",
        max_tokens: int | None = None,
    ) -> list[str]:
        """Candidates, the best first; the request is booked on that one. Asked again, the older booking is given back.

        `prompt`: what equal prompts begin with equally; empty where nobody knows, then load decides.
        """
        self._tick(now_s)
        self.ended(request_id, now_s)
        self._note_others(queue_lengths, now_s)
        excluded = frozenset(
            load.replica.id for load in self._router.eligible(MODEL) if load.replica.id not in set(candidates)
        )
        chunks = hash_chunks(prompt, self._texts.chunk_bytes, salt(MODEL, lora=lora or None))
        request = Request(
            MODEL,
            len(prompt),
            max_tokens,
            excluded=excluded,
            chunk_hashes=chunks if chunks.size else None,
        )
        choice = self._router.choose(request, now_s)
        if choice is None:
            return []
        self._requests[request_id] = (request, choice.booking)
        decision = choice.decision
        others: list[ReplicaLoad] = list(decision.candidates)
        if decision.costs is not None:
            costs = {load.replica.id: float(cost) for load, cost in zip(others, decision.costs, strict=True)}
            others.sort(key=lambda load: costs[load.replica.id])
        first = decision.load.replica.id
        return [first, *(load.replica.id for load in others if load.replica.id != first)]

    def routed(self, request_id: str, name: str, now_s: float) -> None:
        """Serve has sent the request to this replica, which need not be the first of the ranking."""
        known = self._requests.get(request_id)
        load = self._router.loads.get(name)
        if known is None or load is None or known[1].replica.id == name:
            return
        request, booking = known
        self._router.release(booking, now_s)
        # The next ranking sees what the index had of this replica; here the whole prompt counts.
        booking = self._router.loads.book(
            load, request.size_tokens, request.size_tokens, request.max_tokens or 0, now_s
        )
        self._requests[request_id] = (request, booking)
        self._texts.routed(request, load.slot, now_s)

    def answered(self, request_id: str, now_s: float) -> None:
        """The first token of its answer has come. Unknown requests are passed over."""
        known = self._requests.get(request_id)
        if known is not None:
            booking = known[1]
            if booking.alone and booking.answered_at_s is None and booking.uncached_tokens:
                told = (Iteration(now_s - booking.booked_at_s, booking.uncached_tokens, 0),)
                for model in (self._pace, self._paces.get(booking.replica.id)):
                    # That which the router goes by, it teaches by itself.
                    if model is not None and model is not booking.load.cost_model:
                        model.observe(told)
            self._router.answered(booking, now_s)
            self._take_paces()

    def ended(self, request_id: str, now_s: float, name: str | None = None) -> None:
        """However it ended. Safe to call again, and for requests never seen.

        `name`: of the replica where it ended. One that turned the request down may be heard of after the request was
        given to another one, where it goes on.
        """
        known = self._requests.get(request_id)
        if known is not None and name in (None, known[1].replica.id):
            del self._requests[request_id]
            self._router.release(known[1], now_s)

    def _take_paces(self) -> None:
        for load in self._router.loads.all():
            own = self._paces[load.replica.id]
            ratio = own.seconds_per_token() / self._pace.seconds_per_token()
            is_other = own.observed >= _TOLD and not 1 / _CLEARLY < ratio < _CLEARLY
            load.cost_model = own if is_other else self._pace
            load.refresh()

    def _note_others(self, queue_lengths: Mapping[str, int | None], now_s: float) -> None:
        """Bring the bookings that stand for other routers' requests to what Serve counts beyond our own."""
        for load in self._router.loads.all():
            name = load.replica.id
            others = self._others.setdefault(name, [])
            own = load.booked - len(others)
            wanted = max(0, (queue_lengths.get(name) or 0) - own)
            while len(others) > wanted:
                self._router.release(others.pop(), now_s)
            while len(others) < wanted:
                booking = self._router.loads.book(load, now_s=now_s)
                booking.alone = False  # somebody else's: its answer tells nothing
                self._router.answered(booking, now_s)  # how long its prompt is, nobody says: it only runs
                others.append(booking)

    def _tick(self, now_s: float) -> None:
        """Upkeep, and answers whose first token nobody could see: their prompts are computed by now, as predicted."""
        if now_s - self._ticked_s < _TICK_S:
            return
        self._ticked_s = now_s
        self._router.tick(now_s, silence_limit_s=float("inf"))
        for _, booking in self._requests.values():
            if booking.answered_at_s is None:
                prefill_s = booking.wait_s + booking.uncached_tokens * booking.load.token_s
                if now_s > booking.booked_at_s + 2 * prefill_s + 1.0:
                    booking.alone = False  # assumed, not seen: it teaches no pace
                    self._router.answered(booking, now_s)

    def check_integrity(self) -> None:
        """Raise AssertionError unless exactly the requests under way, and others' beyond them, are booked."""
        self._router.check_integrity()
        held = len(self._requests) + sum(map(len, self._others.values()))
        assert self._router.loads.open_bookings == held, (
            f"{self._router.loads.open_bookings} booked, {held} held"
        )
