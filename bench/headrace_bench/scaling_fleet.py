"""A fleet that is scaled, in virtual time: production's router, queue and simulated engine under any scaler.

    arrival ──free replica?──> router ──1 ms──> engine ──> first token, end
       └──none──> fair queue ──take──> router

    scaler ── each second ──> more: starting ──cold start──> ready
                              fewer: draining ──its last request ends──> gone

A replica costs GPU time from the moment it is asked for until it is gone. Equal arguments give equal results, to the
last digit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import Any

from headrace.backends.simulated_cache import CacheEvent
from headrace.config import SimulatedEngine
from headrace.fleet.demand_book import PoolTotals
from headrace.fleet.scaling_sample import ReplicaLoad, pool_sample
from headrace.gateway.demand import DemandMeter
from headrace.gateway.metrics import GatewayMetrics
from headrace.gateway.openai import Usage
from headrace_bench.scaled_replicas import ScaledReplica, ScaledReplicas
from headrace_bench.scaling_run import Answered, ScaledRun
from headrace_bench.scaling_sample import TICK_S, Bounds, FleetSample, ReplicaSample, Scaler
from headrace_bench.simulated_workload import SimulatedRequest
from headrace_bench.simulator import KV_EVENT_S, REPORT_S, SEND_S
from headrace_router.fair_queue import FairQueue
from headrace_router.queue_ticket import Ticket
from headrace_router.router import Choice
from headrace_router.saturation import all_saturated, is_saturated
from headrace_router.types import ReplicaState, Request

REPORT_GAP_S = 0.1
"""Shortest time between two load reports of a replica. Production's is 5 ms; steps here take 20 ms and more, and every
report costs a run time."""

PROGRESS_EVERY = 100
"""Requests between two calls of `progress`."""


class _Live:
    """A request on its way."""

    __slots__ = ("choice", "first_s", "replica", "request")

    def __init__(self, request: SimulatedRequest) -> None:
        self.request = request
        self.choice: Choice | None = None
        self.replica: ScaledReplica | None = None
        self.first_s = -1.0


class ScalingSimulation:
    """One run. Build it, call `run` once."""

    def __init__(
        self,
        requests: Sequence[SimulatedRequest],
        engine: SimulatedEngine,
        scaler: Scaler,
        *,
        bounds: Bounds,
        cold_start_s: float,
        initial: int,
        seed: int,
        policy: str = "delay",
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """`initial` replicas are ready as the first request comes. `progress` is told the number of requests that have
        ended, now and then. Raises `CallerError` on bounds that cannot be, KeyError on an unknown policy."""
        bounds.check()
        self._block_size = engine.block_size
        self._knows_prefixes = any(request.prompt_hashes.size for request in requests)
        self.fleet = ScaledReplicas(
            engine, policy, seed, cold_start_s, bounds, knows_prefixes=self._knows_prefixes
        )
        metrics = GatewayMetrics(self.fleet.router)
        self._measures = metrics.of(self.fleet.model)
        self._demand = DemandMeter(self.fleet.router, metrics, self)
        self._requests = requests
        self._scaler = scaler
        self._bounds = bounds
        self._progress = progress
        self._queue: FairQueue[_Live] = FairQueue()
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._order = count()
        self._now_s = 0.0
        self._live: dict[str, _Live] = {}
        self._answered: list[Answered] = []
        self._refused = self._ended = 0
        self._targets: list[tuple[float, int]] = []
        self._next = 0  # request to come
        self._end_s = requests[-1].arrival_s if requests else 0.0
        self.begun = self.fleet.start(bounds.clip(initial), 0.0, is_warm=True)
        self._at(0.0, self._tick, None)

    @property
    def num_queued(self) -> int:
        """Requests that wait in the gateway."""
        return len(self._queue)

    def held(self, model: str) -> int:
        """The same, as the gateway's own count of demand asks for it."""
        return len(self._queue)

    def run(self) -> ScaledRun:
        """Answer or refuse every request. GPU time is counted from 0 to the last arrival."""
        self.run_until(inf)
        return self.ended()

    def run_until(self, moment_s: float) -> None:
        """Everything that happens before `moment_s`; for whoever lets several fleets go in step."""
        requests, events = self._requests, self._events
        while self._next < len(requests) or events:
            arrival_s = requests[self._next].arrival_s if self._next < len(requests) else inf
            event_s = events[0][0] if events else inf
            if min(arrival_s, event_s) >= moment_s:
                return
            if event_s <= arrival_s:
                self._advance()
            else:
                self._now_s = arrival_s
                self._next += 1
                self._arrive(requests[self._next - 1])

    def ended(self) -> ScaledRun:
        """What came of it, once nothing is left to happen."""
        self._check()
        return ScaledRun(
            answered=tuple(sorted(self._answered)),
            refused=self._refused,
            end_s=self._end_s,
            lives=self.fleet.lives(),
            targets=tuple(self._targets),
            busy_s=self.fleet.busy_s,
        )

    def _advance(self) -> None:
        self._now_s, _, act, argument = heappop(self._events)
        act(argument)

    def _at(self, when_s: float, act: Callable[..., None], argument: object) -> None:
        heappush(self._events, (when_s, next(self._order), act, argument))

    # --- requests

    def _arrive(self, request: SimulatedRequest) -> None:
        measures = self._measures
        measures.arrived += 1
        live = _Live(request)
        if request.prompt_tokens + request.answer_tokens > self.fleet.max_context:
            self._refuse(live)
        elif not len(self._queue) and not all_saturated(self.fleet.eligible, request.prompt_tokens):
            self._send(live)
            assert live.choice is not None
            measures.arrived_tokens += request.prompt_tokens - live.choice.decision.hit_tokens
        else:
            measures.arrived_tokens += round(request.prompt_tokens * (1.0 - measures.usual_hits))
            self._wait(live)

    def _wait(self, live: _Live) -> None:
        request = live.request
        tokens = request.prompt_tokens + request.answer_tokens
        offer = self._queue.offer(
            live, tokens=tokens, now_s=self._now_s, size_bytes=4 * request.prompt_tokens
        )
        for ticket in offer.evicted:
            self._refuse(ticket.item)
        if offer.ticket is None:
            self._refuse(live)

    def _refuse(self, live: _Live) -> None:
        self._refused += 1
        self._count_ended()

    def _send(self, live: _Live) -> None:
        request = live.request
        live.choice = self.fleet.router.choose(
            Request(
                self.fleet.model,
                prompt_bytes=4 * request.prompt_tokens,
                max_tokens=request.answer_tokens,
                session=request.session,
                prompt_tokens=request.prompt_tokens,
                block_hashes={self._block_size: request.prompt_hashes} if self._knows_prefixes else None,
            ),
            self._now_s,
        )
        assert live.choice is not None, "sent without a replica"
        live.replica = self.fleet.of(live.choice.booking)
        live.replica.on_the_way += 1
        self._at(self._now_s + SEND_S, self._deliver, live)

    def _deliver(self, live: _Live) -> None:
        replica = live.replica
        assert replica is not None
        replica.on_the_way -= 1
        request_id = str(live.request.number)
        self._live[request_id] = live
        if replica.engine.arrive(request_id, live.request, self._now_s):
            self._wake_later(replica)
        self._report_soon(replica)

    def _pump(self, replica: ScaledReplica | None) -> None:
        """Let those that wait go on: to `replica`, of which something new is known, or wherever there is room."""
        while len(self._queue):
            ticket: Ticket[_Live] | None = self._queue.peek(self._now_s)
            if ticket is None:
                return
            tokens = ticket.item.request.prompt_tokens
            if replica is None:
                full = all_saturated(self.fleet.eligible, tokens)
            else:
                full = not replica.is_ready or is_saturated(self.fleet.load(replica), tokens)
            if full:
                return
            self._queue.take(self._now_s)
            self._send(ticket.item)

    # --- engines

    def _wake_later(self, replica: ScaledReplica) -> None:
        if replica.engine.until_s is not None:
            self._at(replica.engine.until_s, self._wake, (replica, replica.engine.version))

    def _wake(self, call: tuple[ScaledReplica, int]) -> None:
        replica, version = call
        engine = replica.engine
        if version != engine.version:
            return
        step = engine.end_step()
        for request_id in step.emitted:
            live = self._live[request_id]
            if live.first_s < 0:
                live.first_s = self._now_s
                assert live.choice is not None
                self.fleet.router.answered(live.choice.booking, self._now_s)
        for request_id in step.finished:
            self._end(self._live.pop(request_id))
        if step.events and self._knows_prefixes:
            self._at(self._now_s + KV_EVENT_S, self._deliver_kv, (replica, step.events))
        engine.begin(self._now_s)
        self._wake_later(replica)
        self._report_soon(replica)
        if replica.is_draining:
            self.fleet.stop_if_drained(replica, self._now_s)

    def _end(self, live: _Live) -> None:
        assert live.choice is not None
        request = live.request
        self.fleet.router.release(live.choice.booking, self._now_s)
        usage = Usage(request.prompt_tokens, request.answer_tokens, live.choice.decision.hit_tokens)
        self._measures.finish(200, "", self._now_s - request.arrival_s, usage)
        self._answered.append(
            Answered(
                request.number,
                request.arrival_s,
                live.first_s - request.arrival_s,
                self._now_s - request.arrival_s,
                request.answer_tokens,
            )
        )
        self._count_ended()

    def _count_ended(self) -> None:
        self._ended += 1
        if self._progress is not None and self._ended % PROGRESS_EVERY == 0:
            self._progress(self._ended)

    def _report_soon(self, replica: ScaledReplica) -> None:
        engine = replica.engine
        if not engine.report_due:
            engine.report_due = True
            self._at(max(self._now_s, engine.reported_s + REPORT_GAP_S) + REPORT_S, self._report, replica)

    def _report(self, replica: ScaledReplica) -> None:
        self.fleet.router.report(replica.engine.report(self._now_s), self._now_s)
        if len(self._queue):
            self._pump(replica)

    def _deliver_kv(self, batch: tuple[ScaledReplica, list[CacheEvent]]) -> None:
        self.fleet.kv_events(*batch)

    # --- scaling

    def _tick(self, _: None) -> None:
        now_s = self._now_s
        for ticket in self._queue.expire(now_s):
            self._refuse(ticket.item)
        for replica in self.fleet.present:
            if replica.engine.reported_s < now_s - TICK_S and not replica.is_idle:
                self._report_soon(replica)
        target = self._bounds.clip(self._scaler.target(self._sample()))
        if not self._targets or self._targets[-1][1] != target:
            self._targets.append((now_s, target))
        self._follow(target)
        # Where nothing is left to come or to end, nobody is asked any more.
        if now_s + TICK_S <= self._end_s or len(self._queue) or self._live:
            self._at(now_s + TICK_S, self._tick, None)

    def _follow(self, target: int) -> None:
        for due_s, replica in self.fleet.follow(target, self._now_s):
            self._at(due_s, self._ready, replica)

    def _ready(self, replica: ScaledReplica) -> None:
        if self.fleet.make_ready(replica, self._now_s):
            self._pump(None)

    def _sample(self) -> FleetSample:
        fleet = self.fleet
        ready = [replica for replica in fleet.present if replica.is_ready]
        seen = tuple(
            ReplicaSample(one.engine.engine.running, one.engine.engine.waiting, one.engine.engine.kv_use)
            for one in ready
        )
        members = [
            ReplicaLoad(
                ReplicaState.READY,
                pulse_age_s=0.0,
                running=load.running,
                waiting=load.waiting,
                kv_use=load.kv_use,
                utilisation=float(one.engine.until_s is not None),
            )
            for one, load in zip(ready, seen, strict=True)
        ]
        members += [ReplicaLoad(ReplicaState.STARTING)] * fleet.num_starting
        (told,) = self._demand.build().pools
        totals = PoolTotals(told.held, told.arrived, told.arrived_work_s, told.backlog_s)
        pool = pool_sample(self._now_s, members, len(members), totals, fleet.seen_cold_start_s)
        return FleetSample(pool, seen)

    def _check(self) -> None:
        """Nothing may be left over: every request ended once, every block and booking came back."""
        assert not self._live and not len(self._queue), f"{len(self._live)} requests never ended"
        assert self._ended == len(self._requests) == len(self._answered) + self._refused
        self._queue.check_integrity()
        self.fleet.check_integrity()
