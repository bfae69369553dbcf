"""A fleet in virtual time: production's router, policies and simulated engine, events in place of sockets.

    arrival ──choose──> router ──1 ms──> engine ──steps──> tokens, end
                          ^                 │
                          ├── load reports ─┤   on change, at most every 5 ms, 1 ms old when they arrive
                          └── KV events ────┘   as a step ends, 2 ms old when they arrive

A request that is handed over goes to one engine for its prompt, then to another for its answer:

    prefill ──1 ms──> queue of the other ──room──> transfer ──> decode
       └── blocks held until the transfer has ended ──┘

Steps that only decode are taken together (`SimulatedEngine.leap_s`), so no event is paid per token.
Equal arguments give equal results, to the last digit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import Any

from headrace.backends.load_publisher import MIN_GAP_S
from headrace.backends.simulated_cache import CacheEvent
from headrace.backends.simulated_sequence import Step
from headrace.config import SimulatedEngine
from headrace_bench.handing_over import HandingOver
from headrace_bench.sharded_gateway import ShardedGateway
from headrace_bench.simulated_gateway import SimulatedGateway
from headrace_bench.simulated_replica import Half, SimulatedReplica
from headrace_bench.simulated_workload import SimulatedRequest
from headrace_router.router import Choice
from headrace_router.types import LoadReport, Transfer

SEND_S = 0.001
"""From the decision to the engine's queue."""

REPORT_S = 0.001
"""From an engine's load report to the router."""

HEARTBEAT_S = 0.1
"""Longest silence of a busy replica (`fleet.report_interval_s`)."""

KV_EVENT_S = 0.002
"""From the end of a step to the prefix index: a batch is longer than a report."""

HOLD_S = 120.0
"""Longest that a computed prompt is held for a decoding replica without room: then that one computes it itself. Two
full replicas that wait for each other's room would otherwise wait for ever (vLLM frees after 480 s)."""

PROGRESS_EVERY = 100
"""Requests between two calls of `progress`."""


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one request. Seconds of virtual time."""

    number: int
    replica: int
    arrival_s: float
    ttft_s: float
    e2e_s: float
    prompt_tokens: int
    cached_tokens: int
    expected_tokens: int  # cached, as the router believed
    answer_tokens: int
    moved_tokens: int = 0  # of the prompt, received from another replica

    @property
    def itl_s(self) -> float | None:
        """Mean time between tokens, None for an answer of one."""
        return (self.e2e_s - self.ttft_s) / (self.answer_tokens - 1) if self.answer_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class ReplicaUse:
    """What one replica did."""

    requests: int
    prefill_tokens: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation, ended."""

    served: tuple[Served, ...]  # in order of arrival
    rejected: int  # longer than an engine's context
    gaps_us: tuple[tuple[int, int], ...]  # (time between two tokens, how often), shortest first
    replicas: tuple[ReplicaUse, ...]
    preemptions: int
    window_s: float  # from the first arrival to the last token


class _Live:
    """A request on its way."""

    __slots__ = (
        "booking", "cached_tokens", "expected_tokens", "first_s", "handover", "last_s", "moved_tokens", "prefilled",
        "prefiller", "replica", "request",
    )  # fmt: skip

    def __init__(
        self, request: SimulatedRequest, choice: Choice, replica: int, prefiller: int | None
    ) -> None:
        self.request = request
        self.replica = replica
        self.booking = choice.booking
        self.handover = choice.handover
        self.prefiller = prefiller  # the replica that computes the prompt, where it is another one
        self.prefilled = prefiller is None
        self.moved_tokens = 0
        self.cached_tokens = -1
        decision = choice.decision if self.handover is None else self.handover.decision
        self.expected_tokens = decision.hit_tokens
        self.first_s = -1.0
        self.last_s = -1.0


class Simulation:
    """One run. Build it, call `run` once."""

    def __init__(
        self,
        requests: Sequence[SimulatedRequest],
        engine: SimulatedEngine,
        num_replicas: int,
        *,
        policy: str,
        seed: int,
        progress: Callable[[int], None] | None = None,
        handing_over: HandingOver | None = None,
        gateways: int = 1,
        gateways_tell: bool = True,
    ) -> None:
        """`progress` is told the number of requests that have ended, now and then. Several `gateways` tell each other
        what they book unless `gateways_tell` is False."""
        self.gateway: SimulatedGateway | ShardedGateway
        if gateways == 1:
            self.gateway = SimulatedGateway(policy, seed, num_replicas, engine, handing_over)
        else:
            self.gateway = ShardedGateway(
                policy, seed, num_replicas, engine, handing_over,
                count=gateways, tells=gateways_tell, schedule=self._at,
            )  # fmt: skip
        self._link = handing_over
        self.replicas = [
            SimulatedReplica(number, replica, engine) for number, replica in enumerate(self.gateway.replicas)
        ]
        self._requests = requests
        self._progress = progress
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._order = count()
        self._now_s = 0.0
        self._live: dict[str, _Live] = {}
        self._served: list[Served] = []
        self._rejected = 0
        self._gaps_us: dict[int, int] = {}

    def run(self) -> Run:
        """Serve every request."""
        events = self._events
        for request in self._requests:
            while events and events[0][0] <= request.arrival_s:
                self._advance()
            self._now_s = request.arrival_s
            self._route(request)
        while events:
            self._advance()
        self._check()
        first_s = self._requests[0].arrival_s if self._requests else 0.0
        ends = [served.arrival_s + served.e2e_s for served in self._served]
        return Run(
            served=tuple(sorted(self._served, key=lambda served: served.number)),
            rejected=self._rejected,
            gaps_us=tuple(sorted(self._gaps_us.items())),
            replicas=tuple(
                ReplicaUse(replica.requests, replica.prefill_tokens, replica.busy_s)
                for replica in self.replicas
            ),
            preemptions=sum(replica.engine.preemptions_total for replica in self.replicas),
            window_s=max(ends, default=first_s) - first_s,
        )

    def _advance(self) -> None:
        self._now_s, _, act, argument = heappop(self._events)
        act(argument)

    def _at(self, when_s: float, act: Callable[..., None], argument: object) -> None:
        heappush(self._events, (when_s, next(self._order), act, argument))

    def _route(self, request: SimulatedRequest) -> None:
        if request.prompt_tokens + request.answer_tokens > self.replicas[0].engine.max_context:
            self._rejected += 1
            return
        choice = self.gateway.choose(request, self._now_s)
        prefiller = None if choice.handover is None else self.gateway.number(choice.handover.booking)
        live = _Live(request, choice, self.gateway.number(choice.booking), prefiller)
        self._at(self._now_s + SEND_S, self._deliver, live)

    def _deliver(self, live: _Live) -> None:
        request_id = str(live.request.number)
        self._live[request_id] = live
        number, half = live.replica, Half.WHOLE if live.prefiller is None else Half.DECODE
        if live.prefiller is not None and not live.prefilled:
            number, half = live.prefiller, Half.PREFILL
        replica = self.replicas[number]
        self._changed(replica, replica.arrive(request_id, live.request, self._now_s, half))

    def _changed(self, replica: SimulatedReplica, has_new_end: bool) -> None:
        if has_new_end:
            self._wake_later(replica)
        self._report_soon(replica)

    def _hand_over(self, live: _Live) -> None:
        """The prompt is computed: off to the replica that answers."""
        assert live.handover is not None
        live.prefilled = True
        self.gateway.answered(live.handover.booking, self._now_s)
        self.gateway.release(live.handover.booking, self._now_s)
        self._at(self._now_s + SEND_S, self._deliver, live)
        self._at(self._now_s + HOLD_S, self._give_up, live)

    def _start_transfer(self, live: _Live, hit_tokens: int, since_s: float) -> None:
        assert live.prefiller is not None and self._link is not None
        sender, receiver = self.replicas[live.prefiller], self.replicas[live.replica]
        live.moved_tokens = live.request.prompt_tokens - hit_tokens
        begin_s = max(since_s, sender.link_free_s, receiver.link_free_s)
        end_s = begin_s + self._link.duration_s(live.moved_tokens)
        sender.link_free_s = receiver.link_free_s = end_s
        # What a step started is seen as it ends: never earlier than now.
        end_s = max(end_s, self._now_s)
        self._at(end_s, self._received, (live, Transfer(live.moved_tokens, end_s - since_s)))

    def _received(self, arrival: tuple[_Live, Transfer]) -> None:
        live, transfer = arrival
        self._end_hold(live, transfer)

    def _give_up(self, live: _Live) -> None:
        if live.prefiller is not None and not live.moved_tokens:
            self._end_hold(live, None)

    def _end_hold(self, live: _Live, transfer: Transfer | None) -> None:
        assert live.prefiller is not None
        request_id = str(live.request.number)
        receiver, sender = self.replicas[live.replica], self.replicas[live.prefiller]
        live.prefiller = None
        self._changed(receiver, receiver.received(request_id, transfer, self._now_s))
        self._changed(sender, sender.release(request_id, self._now_s))

    def _wake_later(self, replica: SimulatedReplica) -> None:
        if replica.until_s is not None:
            self._at(replica.until_s, self._wake, (replica, replica.version))

    def _wake(self, call: tuple[SimulatedReplica, int]) -> None:
        replica, version = call
        if version != replica.version:
            return
        now_s, live = self._now_s, self._live
        started_s = replica.started_s
        step = replica.end_step()
        self._admitted(replica, step)
        steady = 0  # sequences that also emitted as this step began
        for request_id in step.emitted:
            request = live[request_id]
            if not request.prefilled:
                continue
            last_s, request.last_s = request.last_s, now_s
            if last_s == started_s:
                steady += step.rounds
            elif last_s < 0:
                request.first_s = now_s
                self.gateway.answered(request.booking, now_s)
            else:
                self._count_gap(now_s - last_s, 1)
        if steady:
            self._count_gap(step.duration_s / step.rounds, steady)
        for request_id in step.finished:
            self._end(request_id)
        if step.events:
            self._at(now_s + KV_EVENT_S, self._deliver_kv, (replica.number, step.events))
        replica.begin(now_s)
        self._wake_later(replica)
        self._report_soon(replica)

    def _admitted(self, replica: SimulatedReplica, step: Step) -> None:
        for request_id, cached_tokens in step.admitted.items():
            if self._live[request_id].cached_tokens < 0:
                self._live[request_id].cached_tokens = cached_tokens
        for request_id in step.receiving:
            hit_tokens = replica.engine.local_tokens(request_id)
            self._start_transfer(self._live[request_id], hit_tokens, replica.started_s)

    def _end(self, request_id: str) -> None:
        if self._live[request_id].prefilled:
            self._finish(self._live.pop(request_id))
        else:
            self._hand_over(self._live[request_id])

    def _count_gap(self, gap_s: float, times: int) -> None:
        gap_us = round(gap_s * 1e6)
        self._gaps_us[gap_us] = self._gaps_us.get(gap_us, 0) + times

    def _finish(self, live: _Live) -> None:
        request = live.request
        self.gateway.release(live.booking, self._now_s)
        self._served.append(
            Served(
                number=request.number,
                replica=live.replica,
                arrival_s=request.arrival_s,
                ttft_s=live.first_s - request.arrival_s,
                e2e_s=self._now_s - request.arrival_s,
                prompt_tokens=request.prompt_tokens,
                cached_tokens=live.cached_tokens,
                expected_tokens=live.expected_tokens,
                answer_tokens=request.answer_tokens,
                moved_tokens=live.moved_tokens,
            )
        )
        if self._progress is not None and len(self._served) % PROGRESS_EVERY == 0:
            self._progress(len(self._served))

    def _report_soon(self, replica: SimulatedReplica) -> None:
        if not replica.report_due:
            replica.report_due = True
            self._at(max(self._now_s, replica.reported_s + MIN_GAP_S), self._report, replica)
        if not replica.beating:
            replica.beating = True
            self._at(self._now_s + HEARTBEAT_S, self._heartbeat, replica)

    def _heartbeat(self, replica: SimulatedReplica) -> None:
        """While nothing changes, a busy replica repeats itself; an idle one is not told from a silent one."""
        if replica.until_s is None:
            replica.beating = False
            return
        due_s = replica.reported_s + HEARTBEAT_S
        if due_s <= self._now_s and not replica.report_due:
            self._report(replica)
            due_s = self._now_s + HEARTBEAT_S
        self._at(max(due_s, self._now_s + MIN_GAP_S), self._heartbeat, replica)

    def _report(self, replica: SimulatedReplica) -> None:
        self._at(self._now_s + REPORT_S, self._deliver_report, replica.report(self._now_s))

    def _deliver_report(self, report: LoadReport) -> None:
        self.gateway.report(report, self._now_s)

    def _deliver_kv(self, batch: tuple[int, list[CacheEvent]]) -> None:
        self.gateway.kv_events(batch[0], batch[1])

    def _check(self) -> None:
        """Nothing may be left over: every request ended, every block and booking came back."""
        assert not self._live, f"{len(self._live)} requests never ended"
        for replica in self.replicas:
            replica.engine.check_integrity()
        self.gateway.check_integrity()
