"""Who waits in the gateway, and when they are let in: late binding.

    must_wait? ── no ──> the router chooses at once; nothing here is touched
        │ every replica that may take it is saturated, or there is none and one is coming
    hold ──> waiting line of the model ──pump──> let in, the router chooses among the replicas as they are now
               ├── its deadline passes, its model goes ──> turned away
               ├── another tenant's request takes its place in a full queue ──> turned away
               └── its client leaves

A pump is asked for by whatever may make room: a released or answered booking, a load report, a membership, the tick.
It runs once per turn of the event loop, never inside its cause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from time import monotonic
from typing import NamedTuple

from headrace.config import Queue
from headrace.errors import (
    BodyTooLarge,
    HeadraceError,
    NoReplica,
    Overloaded,
    QueueFull,
    QueueTimeout,
)
from headrace.gateway.queue_measures import QueueMeasures
from headrace.gateway.waiting_line import Held, Waiter, WaitingLine
from headrace_router.queue_ticket import Offer, QueueLimits
from headrace_router.replica_load import ReplicaLoad
from headrace_router.router import Router
from headrace_router.saturation import SaturationBound, is_full, is_saturated
from headrace_router.types import ReplicaId, Request

NO_REPLICA_RETRY_S = 2.0


class Arrival(NamedTuple):
    """What is told of a request that must wait."""

    request: Request
    size_bytes: int
    answer_tokens: int  # expected
    came_s: float
    tenant: str
    timeout_s: float | None  # from its arrival; None: the client did not say


class Admission:
    """Of one gateway. One event loop owns it."""

    def __init__(
        self,
        config: Queue,
        router: Router,
        loop: asyncio.AbstractEventLoop,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """`weights` of the configured tenants."""
        self._max_start_wait_s = config.max_start_wait_s
        self._limits = QueueLimits(config.max_requests, config.max_bytes, config.max_wait_s)
        self._bound = SaturationBound(config.saturated_wait_s, config.free_kv)
        self._router = router
        self._loop = loop
        self._weights = dict(weights or {})
        self._coming: frozenset[str] = frozenset()
        self._woken: set[str] = set()  # models whose lines are to be pumped in this turn of the loop
        self.lines: dict[str, WaitingLine] = {}  # of models for which somebody waits
        self.measures = QueueMeasures(self._weights)
        self.starved: Callable[[str], None] = lambda model: None
        """Called when a request is held whose model has no replica: whoever starts some should know at once."""

    def go_by(self, config: Queue, weights: Mapping[str, float]) -> None:
        """Take other bounds and weights. A line in which somebody waits keeps those that it was made with."""
        self._max_start_wait_s = config.max_start_wait_s
        self._limits = QueueLimits(config.max_requests, config.max_bytes, config.max_wait_s)
        self._bound = SaturationBound(config.saturated_wait_s, config.free_kv)
        self._weights.clear()
        self._weights.update(weights)

    @property
    def num_waiting(self) -> int:
        return sum(len(line) for line in self.lines.values())

    def held(self, model: str) -> int:
        """Requests that wait for this model."""
        line = self.lines.get(model)
        return 0 if line is None else len(line)

    def is_coming(self, model: str) -> bool:
        """Whether a replica of it starts, or would on demand."""
        return model in self._coming

    def must_wait(self, request: Request, *, returns: bool = False) -> bool:
        """Whether `hold` should take it. It `returns` if it has had its turn, and then goes before those in line."""
        if self.lines and not returns and request.model in self.lines:
            return True
        room = self._router.has_room(request, self._bound)
        if room:
            return False
        return room is not None or request.model in self._coming

    def hold(self, waiter: Waiter, arrival: Arrival, *, returns: bool = False) -> Held:
        """Let it wait. Raises BodyTooLarge, QueueFull or Overloaded where it may not; others may be evicted for it."""
        now_s = monotonic()
        request = arrival.request
        line = self.lines.get(request.model)
        if line is None:
            line = self.lines[request.model] = WaitingLine(self._limits, self._weights)
        self._expire(request.model, line, now_s)
        is_starved = self._router.first_eligible(request.model) is None
        max_wait_s = self._max_start_wait_s if is_starved else self._limits.max_wait_s
        # One that returns is given half of the longest wait at least; its replica may have failed only at the end.
        latest_s = max(arrival.came_s + max_wait_s, now_s + max_wait_s / 2) if returns else now_s + max_wait_s
        timeout_s = arrival.timeout_s
        deadline_s = latest_s if timeout_s is None else min(latest_s, arrival.came_s + timeout_s)
        tokens = request.size_tokens + min(arrival.answer_tokens, request.max_tokens or arrival.answer_tokens)
        held = Held(
            waiter, request, line.name(arrival.tenant), arrival.size_bytes, max(1, tokens), now_s, deadline_s
        )
        if returns:
            line.rejoin(held)
        else:
            offer = line.join(held, now_s, max_wait_s)
            if offer.ticket is None:
                self.measures.ended(request.model, held.tenant, "refused")
                self._sweep(request.model)
                raise _refusal(request.model, offer)
            for victim in offer.evicted:
                self._turn_away(request.model, victim.item, "evicted", self._evicted(request.model, line))
            if line.returned:
                self.wake(request.model)  # who is before it may be unable to go where it could
        if is_starved:
            self.starved(request.model)
        return held

    def leave(self, held: Held) -> None:
        """Its exchange has ended. Always safe."""
        model = held.request.model
        line = self.lines.get(model)
        if line is not None and line.leave(held):
            self.measures.ended(model, held.tenant, "left")
            self._sweep(model)
            self.wake(model)  # who was behind it may fit where it did not

    # --- what may make room

    def freed(self, load: ReplicaLoad) -> None:
        """This replica has less to do than before. Cheap where it is still saturated."""
        model = load.replica.model
        if model not in self.lines or model in self._woken:
            return
        # Whoever receives computed prompts needs memory for them, whatever waits there.
        is_busy = is_saturated if load.replica.kv_connector is None else is_full
        if not is_busy(load, 1, self._bound):
            self.wake(model)

    def wake(self, model: str) -> None:
        """Look who can be let in, in this turn of the event loop."""
        if model in self.lines:
            if not self._woken:
                self._loop.call_soon(self._pump_woken)
            self._woken.add(model)

    def follow(self, coming: Collection[str], gone: Collection[ReplicaId]) -> None:
        """The router has taken a new membership: `coming` models, replicas that went or started anew."""
        self._coming = frozenset(coming)
        for line in self.lines.values():
            line.forget(gone)
        self.tick()

    def tick(self) -> None:
        """Called a few times a second: those whose deadline has passed, or whom nobody will serve, are told."""
        now_s = monotonic()
        for model, line in list(self.lines.items()):
            self._expire(model, line, now_s)
            if model not in self._coming and not self._router.may_recover(model):
                for held in list(line):
                    line.leave(held)
                    self._turn_away(model, held, "no_replica", no_replica(model))
            self._sweep(model)
            self.wake(model)

    def _pump_woken(self) -> None:
        woken, self._woken = self._woken, set()
        for model in woken:
            line = self.lines.get(model)
            if line is not None:
                self._pump(model, line)
                self._sweep(model)

    def _pump(self, model: str, line: WaitingLine) -> None:
        """Let in whoever is next for as long as there is room for him."""
        router, bound, now_s = self._router, self._bound, monotonic()
        self._expire(model, line, now_s)
        for held in list(line.returned):
            if held.waiting and router.has_room(held.request, bound):
                self._let_in(model, line, held, now_s)
            elif held.waiting and not router.has_room(held.request._replace(excluded=frozenset()), bound):
                return  # it waits for the same room as those behind it
        while (ticket := line.fair.peek(now_s)) is not None and router.has_room(ticket.item.request, bound):
            self._let_in(model, line, ticket.item, now_s)

    def _let_in(self, model: str, line: WaitingLine, held: Held, now_s: float) -> None:
        line.take(held, now_s)
        self.measures.let_in(model, held.tenant, now_s - held.since_s)
        held.waiter.let_in(self._router.saturated(held.request, self._bound))

    def _expire(self, model: str, line: WaitingLine, now_s: float) -> None:
        """Comes before whatever else is asked of a line, so that nobody waits who is too late."""
        for held in line.expire(now_s):
            self._turn_away(model, held, "expired", self._too_late(model, line, held, now_s))

    def _turn_away(self, model: str, held: Held, outcome: str, error: HeadraceError) -> None:
        self.measures.ended(model, held.tenant, outcome)
        held.waiter.fail(error)

    def _sweep(self, model: str) -> None:
        """A line without anybody is forgotten, so that light load finds none."""
        line = self.lines.get(model)
        if line is not None and not len(line):
            del self.lines[model]

    def _too_late(self, model: str, line: WaitingLine, held: Held, now_s: float) -> QueueTimeout:
        waited_s = now_s - held.since_s
        why = "no replica came up" if self._router.first_eligible(model) is None else "every replica was busy"
        return QueueTimeout(
            f"the request waited {waited_s:.1f} s for `{model}` and its time is over: {why}; try again",
            retry_after_s=line.fair.room_after_s(held.size_bytes, now_s) if len(line.fair) else 1.0,
        )

    def _evicted(self, model: str, line: WaitingLine) -> QueueFull:
        return QueueFull(
            f"every replica of `{model}` is busy and the queue is full; this tenant held the largest part of it",
            retry_after_s=line.fair.room_after_s(0, monotonic()),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless whoever waits is counted once, and no line is empty."""
        for model, line in self.lines.items():
            line.check_integrity()
            assert len(line), f"an empty line for {model}"
            assert all(held.request.model == model for held in line)


def no_replica(model: str) -> NoReplica:
    """What to say where nobody can answer and nobody is coming."""
    return NoReplica(f"no replica of `{model}` is ready; try again shortly", retry_after_s=NO_REPLICA_RETRY_S)


def _refusal(model: str, offer: Offer[Held]) -> HeadraceError:
    if offer.retry_after_s is None:
        return BodyTooLarge(f"every replica of `{model}` is busy, and {offer.refusal}")
    family = Overloaded if offer.is_late else QueueFull
    return family(f"every replica of `{model}` is busy: {offer.refusal}", retry_after_s=offer.retry_after_s)
