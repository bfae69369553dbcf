"""A request's way to a replica: it waits for one, is booked on it, goes out, and goes elsewhere when that one fails.

    dispatch ── every replica saturated ──> held ──let_in──┐
        └──────────────────────────────────────────────────┴─> choose ── one replica ──────────────> its answer
                                                 ^               └─ two: first half, then the second ───┘
    a replica fails before the answer ── try_elsewhere, sent to at most `retries` more ─────────────────────┘

`Exchange` inherits it, and holds what is the client's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from headrace.errors import UpstreamFailed
from headrace.gateway import handover, openai, tenant_names
from headrace.gateway.admission import Arrival, no_replica
from headrace.gateway.answer import Answer
from headrace.gateway.context import GatewayContext
from headrace.gateway.handover import FirstHalf
from headrace.gateway.http_request import RequestHead
from headrace.gateway.http_response import ResponseHead
from headrace.gateway.metrics import ModelMeasures
from headrace.gateway.upstream import Target
from headrace.gateway.waiting_line import Held
from headrace_router.load_table import Booking
from headrace_router.router import Choice, Handover
from headrace_router.types import BootId, Replica, ReplicaId, Request
from headrace_router.view import Decision

if TYPE_CHECKING:  # importing it for real would bring numba, which a policy that reads no prompts never needs
    from headrace.gateway.prompt_reader import Prompt


class Dispatch(ABC):
    """What a request holds of replicas, and how it comes to it. `_let_go` gives all of it back."""

    # Set for every exchange.
    request_id: bytes
    measures: ModelMeasures
    started_s: float
    deadline_s: float
    _context: GatewayContext
    _head: RequestHead
    _target: bytes  # of the request, as received
    _body: bytes  # whole; empty once the answer has begun
    _answer: Answer

    # Defaults stand on the class: an exchange only pays for what happens to it.
    done = False
    hide_usage = False
    decision: Decision | None = None
    _prompt: Prompt | None = None
    _request: Request | None = None
    _booking: Booking | None = None
    _first: FirstHalf | None = None  # of a request that is handed over
    _computed: Decision | None = None  # who computes the prompt, where that is another one
    _tries = 0
    _num_sent = 0  # of these tries those that went out
    _is_sent = False  # the present one
    _tried: dict[ReplicaId, BootId] | None = None  # those that failed on it
    _held: Held | None = None  # while it waits in the gateway
    _last_held: Held | None = None  # when it last did
    _waited_s = 0.0

    @property
    def path(self) -> bytes:
        """The request target without its query."""
        return self._target.partition(b"?")[0]

    @abstractmethod
    def fail(self, error: Exception) -> None:
        """End with an error."""

    # --- to wait or to choose

    def _dispatch(self) -> None:
        """Choose a replica and send, or wait for one. Raises NoReplica when there is none to choose and none comes, and
        what `Admission.hold` raises."""
        request = self._request
        assert request is not None
        if self._context.admission.must_wait(request):
            measures = self.measures
            measures.arrived_tokens += round(request.size_tokens * (1.0 - measures.usual_hits))
            self._hold(request)
            return
        decision = self._choose()
        self.measures.arrived_tokens += request.size_tokens - decision.hit_tokens

    def _hold(self, request: Request, *, returns: bool = False) -> None:
        head, usual = self._head, self.measures.usual_answer_tokens
        arrival = Arrival(
            request,
            len(self._body),
            int(usual),
            self.started_s,
            tenant_names.tenant(head),
            tenant_names.timeout_s(head),
        )
        self._booking = None
        self.deadline_s = inf  # the line has its own
        self._last_held = self._held = self._context.admission.hold(self, arrival, returns=returns)

    def let_in(self, avoid: frozenset[ReplicaId]) -> None:
        """It has waited, and a replica has room."""
        held, self._held = self._held, None
        assert held is not None
        self._waited_s += monotonic() - held.since_s
        self._request = held.request
        try:
            self._choose(avoid)
        except Exception as error:
            self.fail(error)

    @property
    def is_held(self) -> bool:
        """Whether it waits for a replica with room."""
        return self._held is not None

    def _choose(self, avoid: frozenset[ReplicaId] = frozenset()) -> Decision:
        request = self._request
        assert request is not None
        asked = request._replace(excluded=request.excluded | avoid) if avoid else request
        choice = self._context.router.choose(asked, monotonic())
        if choice is None:
            if self._tries:
                raise UpstreamFailed(
                    f"{self._tries} replica(s) of `{request.model}` failed on this request and no other is ready"
                )
            raise no_replica(request.model)
        self._take(choice)
        return self._computed or choice.decision

    def _take(self, choice: Choice) -> None:
        booking = self._booking = choice.booking
        self.decision = choice.decision
        self._tries += 1
        self._is_sent = False
        context = self._context
        self.measures.decided(choice.decision.reason)
        context.decisions.add(
            self.request_id,
            booking.replica.model,
            self._tries,
            self._prompt,
            choice.decision,
            handover=choice.handover,
            waited_s=self._waited_s,
        )
        if choice.handover is not None:
            self._hand_over(choice.handover, choice.decision)
        else:
            self._answer.reach(context.targets[booking.replica.id])

    def goes_out(self) -> None:
        """A replica gets the request, or its first half."""
        self._num_sent += not self._is_sent
        self._is_sent = True

    # --- the first half, where another replica computes the prompt

    def _hand_over(self, handed: Handover, decision: Decision) -> None:
        replica = handed.booking.replica
        assert replica.kv_connector is not None
        self._computed = handed.decision
        first = self._first = FirstHalf(
            self,
            self._context,
            handed,
            decision.reason,
            body=handover.first_half(self._body, self.path, replica.kv_connector),
            # A name of its own: where both halves end up in one engine's log, they can be told apart.
            request_id=self.request_id + b"-prefill",
        )
        first.reach(self._context.targets[replica.id])

    def prefilled(self) -> None:
        """The prompt is computed: the second half goes out."""
        assert self._booking is not None
        try:
            self._answer.reach(self._context.targets[self._booking.replica.id])
        except Exception as error:
            self.fail(error)

    def prefill_refused(self, head: ResponseHead, body: bytes) -> None:
        """The client's fault: told as one replica alone would have."""
        self._answer.upstream_head(head)
        if body:
            self._answer.upstream_body(body)
        if not self.done:
            self._answer.upstream_complete()

    def prefill_failed(self, reason: str, *, suspend: bool = False) -> None:
        """Another replica computes the prompt, or whoever answers does."""
        first = self._first
        if self.done or first is None:
            return
        first.outcome = "prefill_failed"
        self._note_failure(first.booking, reason, suspend)
        try:
            if not self._try_without(first.booking.replica):
                self.fail(UpstreamFailed(f"the replica that computed the prompt failed: {reason}"))
        except Exception as error:
            self.fail(error)

    # --- the replica that answers

    def request_to(self, target: Target, body: bytes | None = None, request_id: bytes = b"") -> bytes:
        """The client's HTTP request, with what the first half brought; with another `body` under another name."""
        if body is None:
            request_id = self.request_id
            body = openai.with_usage(self._body) if self.hide_usage else self._body
            if self._first is not None:
                body = handover.second_half(body, self._first.params)
        authorization = b""
        if not target.authorized and self._head.authorization is not None:
            authorization = b"authorization: %b\r\n" % self._head.authorization
        return b"POST %b HTTP/1.1\r\n%b%b%bcontent-length: %d\r\nx-request-id: %b\r\n\r\n%b" % (
            self._target,
            target.prefix,
            authorization,
            self._head.fields,
            len(body),
            request_id,
            body,
        )

    def first_token(self, now_s: float) -> None:
        """The replica has prefilled the prompt."""
        if self._booking is not None:
            self._context.answered(self._booking, now_s)

    def answer_lost(self, reason: str, *, suspend: bool = False) -> None:
        """The replica failed under us before or within the answer."""
        if self.done:
            return
        self._note_failure(self._booking, reason, suspend)
        try:
            if self._answer.status == 0 and self.try_elsewhere():
                return
            self.fail(UpstreamFailed(f"the replica failed: {reason}"))
        except Exception as error:
            self.fail(error)

    # --- when a replica fails

    def replicas_gone(self, gone: set[tuple[ReplicaId, BootId]]) -> None:
        """Membership says that these are no more (a node may never send a reset)."""
        booking, first = self._booking, self._first
        if booking is not None and _is_on(booking, gone):
            self.answer_lost("the replica left the fleet")
        elif first is not None and not first.is_done and _is_on(first.booking, gone):
            self.prefill_failed("the replica left the fleet")

    def replica_silent(self, silent: set[tuple[ReplicaId, BootId]]) -> None:
        """These have not reported for long: an unanswered request moves to another replica, if there is one, else it
        goes on waiting. A node that is cut off resets no connection."""
        booking, first = self._booking, self._first
        if first is not None and not first.is_done:
            if _is_on(first.booking, silent):
                self.prefill_failed("the replica fell silent")
        elif booking is None or self._answer.status or self.done:
            return
        elif _is_on(booking, silent) and self.try_elsewhere():
            self.measures.count_upstream_error("silent")

    def _note_failure(self, booking: Booking | None, reason: str, suspend: bool) -> None:
        self.measures.count_upstream_error("connect" if suspend else "reset")
        if suspend and booking is not None:
            self._context.suspend(booking.replica, reason)

    def try_elsewhere(self) -> bool:
        """Move to a replica not yet tried. False, changing nothing, when there is none or tries are used up."""
        if self._booking is None:
            return False
        if self._first is not None:
            self._first.outcome = "decode_failed"
        return self._try_without(self._booking.replica)

    def _try_without(self, replica: Replica) -> bool:
        context, request = self._context, self._request
        # A replica that takes no connection has not seen the request: only those that may have died of it count. With a
        # node several go at once, and the next one is as likely to be of that node.
        if request is None or self._num_sent > context.config.retries:
            return False
        tried = {**(self._tried or {}), replica.id: replica.boot_id}
        # One that has started anew since is another one.
        present = {name for name, boot in tried.items() if context.has_boot(name, boot)}
        request = request._replace(excluded=frozenset(present))
        choice = None
        now_s = monotonic()
        if not context.admission.must_wait(request, returns=True):
            choice = context.router.choose(request, now_s)
            if choice is None:
                return False
        self._request, self._tried = request, tried
        self._let_go(now_s)
        self._computed = None
        self.measures.retries += 1
        if choice is None:
            self._hold(request, returns=True)
        else:
            self._take(choice)
        return True

    # --- what is held

    def _let_go(self, now_s: float) -> None:
        """Give back what is held: the place in line, the connections, the bookings."""
        if self._held is not None:
            held, self._held = self._held, None
            self._waited_s += now_s - held.since_s
            self._context.admission.leave(held)
        self._answer.let_go()
        if self._booking is not None:
            self._context.release(self._booking, now_s)
        if self._first is not None:
            first, self._first = self._first, None
            first.stop()
            self.measures.handed_over(first.reason, first.outcome)

    @property
    def open_bookings(self) -> int:
        """Claims on replicas that are not given back."""
        held = [self._booking, self._first.booking if self._first is not None else None]
        return sum(booking is not None and not booking.released for booking in held)


def _is_on(booking: Booking, replicas: set[tuple[ReplicaId, BootId]]) -> bool:
    return (booking.replica.id, booking.replica.boot_id) in replicas
