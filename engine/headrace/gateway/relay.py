"""The relay: one exchange carries one request from its client to a replica and the answer back.

A request's life:
 1. a face (protocol or ASGI) hands over method, path, headers and the whole body        `Exchange.start`
 2. the needed fields are read, the model is looked up                                    `_admit`
 3. where the policy wants it, the prompt is read: tokens, or text chunks                 `_read_prompt`
 4. where every replica is saturated it waits, until one has room                         `_dispatch`, `admission`
 5. the router chooses a replica and books the request on it                              `_choose`
 5a. where another one computes the prompt, that half goes out first                      `handover`
 6. the original bytes go out on a pooled connection, or a new one                        `_send`
 7. the answer's head comes back: relayed, or tried elsewhere if the replica is ill       `Answer`
 8. bytes flow; a client that does not read pauses the replica, not our memory            `Answer`
 9. however it ends, `_end` runs exactly once: booking released, metrics, access log

Nothing here blocks; all calls come from one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from headrace.errors import (
    HeadraceError,
    ModelNotFound,
    NoReplica,
    RequestTimeout,
    ShuttingDown,
    UpstreamFailed,
    UpstreamTimeout,
)
from headrace.gateway import handover, openai, tenant_names
from headrace.gateway.admission import Arrival, no_replica
from headrace.gateway.answer import Answer
from headrace.gateway.client import Client
from headrace.gateway.context import GatewayContext
from headrace.gateway.decisions import decision_fields, queue_field
from headrace.gateway.handover import FirstHalf
from headrace.gateway.http_request import RequestHead
from headrace.gateway.http_response import ResponseHead
from headrace.gateway.upstream import Target, UpstreamConnection
from headrace.gateway.waiting_line import Held
from headrace_router.load_table import Booking
from headrace_router.router import Choice, Handover
from headrace_router.types import BootId, Replica, ReplicaId, Request
from headrace_router.view import Decision

if TYPE_CHECKING:  # importing it for real would bring numba, which a policy that reads no prompts never needs
    from headrace.gateway.prefixes import Prefixes
    from headrace.gateway.prompt_reader import Prompt

log = logging.getLogger(__name__)


class Exchange:
    """One request and its answer."""

    # Defaults stand on the class: an exchange only pays for what happens to it.
    request_id = b""
    done = False
    model: str | None = None
    decision: Decision | None = None
    _reading: asyncio.Task[Prompt] | None = None
    _prompt: Prompt | None = None
    _request: Request | None = None
    _booking: Booking | None = None
    _connecting: asyncio.Task[None] | None = None
    _connection: UpstreamConnection | None = None
    _first: FirstHalf | None = None  # of a request that is handed over
    _computed: Decision | None = None  # who computes the prompt, where that is another one
    _tries = 0
    _tried: dict[ReplicaId, BootId] | None = None  # those that failed on it
    _held: Held | None = None  # while it waits in the gateway
    _last_held: Held | None = None  # when it last did
    _waited_s = 0.0
    hide_usage = False
    paused = False
    _error_kind = ""

    def __init__(
        self, context: GatewayContext, client: Client, target: bytes, head: RequestHead, body: bytes
    ) -> None:
        """`target` is the request target as received; `body` is whole."""
        self._context = context
        self._client = client
        self._target = target
        self._head = head
        self._body = body
        self.request_id = openai.request_id(head.request_id)
        self.measures = context.metrics.unknown
        self.started_s = monotonic()
        self.deadline_s = self.started_s + context.timeouts.first_byte_s
        self._answer = Answer(self, client, context.idle_s)

    # --- called by the face

    def start(self) -> None:
        """Begin. Whatever goes wrong is answered to the client; nothing is raised."""
        self._context.active.add(self)
        try:
            self._admit()
            prefixes = self._context.prefixes
            if prefixes is None:
                self._dispatch()
            else:
                self._read_prompt(prefixes)
        except Exception as error:
            self.fail(error)

    def client_left(self) -> None:
        """The client is gone: stop the replica's work at once."""
        if not self.done:
            self._error_kind = "client_left"
            self._end(499)

    def client_paused(self) -> None:
        """The client does not read as fast as the replica writes."""
        self.paused = True
        self.deadline_s = monotonic() + self._context.timeouts.client_stall_s
        if self._connection is not None:
            self._connection.pause_reading()

    def client_resumed(self) -> None:
        """The client has caught up."""
        self.paused = False
        self.deadline_s = monotonic() + self._context.timeouts.idle_s
        if self._connection is not None:
            self._connection.resume_reading()

    def expire(self) -> None:
        """`deadline_s` has passed: whatever was awaited did not come."""
        if self.paused:
            self._error_kind = "client_stalled"
            self._client.abort()
            self._end(self._answer.status)
        elif self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
            self._lost("no connection within the connect timeout", suspend=True)
        elif self._first is not None and self._first.is_connecting:
            self.prefill_failed("no connection within the connect timeout", suspend=True)
        else:
            timeouts = self._context.timeouts
            timeout_s = timeouts.idle_s if self._answer.status else timeouts.first_byte_s
            self.fail(UpstreamTimeout(f"the replica was silent for {timeout_s:g} s"))

    def replicas_gone(self, gone: set[tuple[ReplicaId, BootId]]) -> None:
        """Membership says that these are no more (a node may never send a reset)."""
        booking, first = self._booking, self._first
        if booking is not None and (booking.replica.id, booking.replica.boot_id) in gone:
            self._replica_gone()
        elif first is not None and not first.is_done:
            replica = first.booking.replica
            if (replica.id, replica.boot_id) in gone:
                self.prefill_failed("the replica left the fleet")

    def replica_silent(self, silent: set[tuple[ReplicaId, BootId]]) -> None:
        """These have not reported for long: an unanswered request moves to another replica, if there is one, else it
        goes on waiting. A node that is cut off resets no connection."""
        booking, first = self._booking, self._first
        if first is not None and not first.is_done:
            replica = first.booking.replica
            if (replica.id, replica.boot_id) in silent:
                self.prefill_failed("the replica fell silent")
        elif booking is None or self._answer.status or self.done:
            return
        elif (booking.replica.id, booking.replica.boot_id) in silent and self.try_elsewhere():
            self.measures.count_upstream_error("silent")

    def _replica_gone(self) -> None:
        if self._connection is not None:
            self._connection.abort()
        self._lost("the replica left the fleet")

    def cut(self) -> None:
        """The gateway stops and will not wait for this exchange any longer."""
        self.fail(ShuttingDown("the gateway shut down before the answer was complete"))

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

    @property
    def left(self) -> bool:
        """Whether the client ended this exchange by leaving."""
        return self._error_kind == "client_left"

    @property
    def path(self) -> bytes:
        """The request target without its query."""
        return self._target.partition(b"?")[0]

    @property
    def open_bookings(self) -> int:
        """Claims on replicas that are not given back."""
        held = [self._booking, self._first.booking if self._first is not None else None]
        return sum(booking is not None and not booking.released for booking in held)

    # --- request path

    def _admit(self) -> None:
        context = self._context
        is_form = self._head.is_form
        if is_form:
            parsed = openai.parse_form(self._body)
        else:
            parsed = openai.parse_body(self._body, context.json_depth)
        model = self.model = parsed.model
        if not context.router.knows(model):
            known = context.router.models()
            if not known:
                raise NoReplica(
                    "no replica has told yet which model it serves; try again shortly", retry_after_s=2
                )
            raise ModelNotFound(openai.unknown_model(model, known), param="model")
        self.measures = context.metrics.of(model)
        self.measures.in_flight += 1
        self.measures.arrived += 1
        if context.draining:
            raise ShuttingDown("the gateway is shutting down; send the request to another one")
        user, bound = parsed.user, parsed.max_completion_tokens or parsed.max_tokens
        self._request = Request(
            model,
            len(self._body),
            bound if isinstance(bound, int) else None,
            user if isinstance(user, str) else None,
            priority=parsed.priority if type(parsed.priority) is int else 0,
        )
        if model in context.handing_over and not is_form and handover.can_hand_over(self.path, self._body):
            self._request = self._request._replace(can_hand_over=True)
        if parsed.stream is True and not is_form and openai.asks_usage(self.path, parsed):
            self.hide_usage = True

    def _read_prompt(self, prefixes: Prefixes) -> None:
        """Find out about the prompt, at once or in a thread, then go on."""
        assert self.model is not None
        prompt = prefixes.read(self._context.router, self.model, self.path, self._body)
        if isinstance(prompt, asyncio.Task):
            self._reading = prompt
            prompt.add_done_callback(self._prompt_read)
        else:
            self._know(prompt)
            self._dispatch()

    def _prompt_read(self, reading: asyncio.Task[Prompt]) -> None:
        self._reading = None
        if self.done or reading.cancelled():
            return
        try:
            self._know(reading.result())
            self._dispatch()
        except Exception as error:
            self.fail(error)

    def _know(self, prompt: Prompt) -> None:
        request, prefixes = self._request, self._context.prefixes
        assert request is not None and prefixes is not None
        self._prompt = prompt
        self._request = request._replace(
            prompt_tokens=prompt.num_tokens,
            block_hashes=prompt.block_hashes(request.model, prefixes.index.block_sizes(request.model)),
            chunk_hashes=prompt.chunks,
        )

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

    def _choose(self, avoid: frozenset[ReplicaId] = frozenset()) -> Decision:
        request = self._request
        assert request is not None
        asked = request._replace(excluded=request.excluded | avoid) if avoid else request
        choice = self._context.router.choose(asked, monotonic())
        if choice is None:
            if self._tries:
                raise UpstreamFailed(
                    f"{self._tries} replica(s) of `{self.model}` failed on this request and no other is ready"
                )
            raise no_replica(request.model)
        self._take(choice)
        return self._computed or choice.decision

    def _take(self, choice: Choice) -> None:
        booking = self._booking = choice.booking
        self.decision = choice.decision
        self._tries += 1
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
            self._hand_over(choice.handover)
        else:
            self._reach(booking)

    def _reach(self, booking: Booking) -> None:
        context = self._context
        target = context.targets[booking.replica.id]
        connection = context.pool.take(target)
        if connection is not None:
            self._send(connection, target)
        else:
            self._connect(target)

    # --- the first half, where another replica computes the prompt

    def _hand_over(self, handed: Handover) -> None:
        assert self.decision is not None
        replica = handed.booking.replica
        assert replica.kv_connector is not None
        self._computed = handed.decision
        first = self._first = FirstHalf(self, self._context, handed, self.decision.reason)
        target = self._context.targets[replica.id]
        body = handover.first_half(self._body, self.path, replica.kv_connector)
        # A name of its own: where both halves end up in one engine's log, they can be told apart.
        first.start(target, self._http(target, body, self.request_id + b"-prefill"))

    def prefilled(self) -> None:
        """The prompt is computed: the second half goes out."""
        assert self._booking is not None
        try:
            self._reach(self._booking)
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
        self.measures.count_upstream_error("connect" if suspend else "reset")
        replica = first.booking.replica
        if suspend:
            self._context.suspend(replica, reason)
        try:
            if not self._try_without(replica):
                self.fail(UpstreamFailed(f"the replica that computed the prompt failed: {reason}"))
        except Exception as error:
            self.fail(error)

    def _http(self, target: Target, body: bytes, request_id: bytes) -> bytes:
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

    # --- the replica that answers

    def _connect(self, target: Target) -> None:
        self.deadline_s = monotonic() + self._context.timeouts.connect_s
        self._connecting = self._context.loop.create_task(self._open_connection(target))

    async def _open_connection(self, target: Target) -> None:
        try:
            connection = await self._context.pool.connect(target)
        except OSError as error:
            self._connecting = None
            self._lost(f"cannot connect: {error.strerror or error}", suspend=True)
            return
        self._connecting = None
        try:
            self._send(connection, target)
        except Exception as error:
            self.fail(error)

    def _send(self, connection: UpstreamConnection, target: Target) -> None:
        self._connection = connection
        self.deadline_s = monotonic() + self._context.timeouts.first_byte_s
        body = openai.with_usage(self._body) if self.hide_usage else self._body
        if self._first is not None:
            body = handover.second_half(body, self._first.params)
        connection.send(self._answer, self._http(target, body, self.request_id))

    # --- asked by the answer

    def answer_begins(self, head: ResponseHead) -> bytes:
        """No other try from here on: what one would need is let go, a stream may live for minutes."""
        self._body = b""
        self._request = None
        if self._prompt is not None:
            self._prompt = self._prompt._replace(token_ids=None, chunks=None)
        if head.status >= 400:
            self._error_kind = "replica_answer"  # the engine's word, 4xx mostly
        fields = b"%bx-request-id: %b\r\n" % (head.fields, self.request_id)
        if self._head.explain and self.decision is not None:
            basis = self._prompt and self._prompt.choice
            handed = None if self._first is None else self._first.handover
            fields += decision_fields(self._context.router.policy.name, basis, self.decision, handed)
            if self._last_held is not None:
                fields += queue_field(self._waited_s, self._last_held.tenant)
        if self._first is not None:
            self._first.is_taken = head.status < 400
            self._first.outcome = "completed" if head.status < 400 else "refused"
        return fields

    def first_token(self, now_s: float) -> None:
        """The replica has prefilled the prompt."""
        if self._booking is not None:
            self._context.answered(self._booking, now_s)

    def answer_complete(self) -> None:
        """All of it has been relayed."""
        self._connection = None
        self._end(self._answer.status)
        self._client.end()

    def answer_lost(self, reason: str) -> None:
        """The connection ended before the answer did."""
        reused = self._connection is not None and self._connection.exchanges > 0
        self._connection = None
        if reused and self._answer.status == 0 and self._booking is not None and not self.done:
            # A kept-alive connection that the replica closed as we wrote: the same replica, on a fresh connection.
            target = self._context.targets.get(self._booking.replica.id)
            if target is not None:
                self._connect(target)
                return
        self._lost(reason)

    # --- failure

    def try_elsewhere(self) -> bool:
        """Move to a replica not yet tried. False, changing nothing, when there is none or tries are used up."""
        if self._booking is None:
            return False
        if self._first is not None:
            self._first.outcome = "decode_failed"
        return self._try_without(self._booking.replica)

    def _try_without(self, replica: Replica) -> bool:
        context, request = self._context, self._request
        if request is None or self._tries > context.config.retries:
            return False
        tried = {**(self._tried or {}), replica.id: replica.boot_id}
        # One that has started anew since is another one.
        present = {name for name, boot in tried.items() if context.has_boot(name, boot)}
        request = request._replace(excluded=frozenset(present))
        choice = None
        waits = context.admission.must_wait(request, returns=True)
        if not waits:
            choice = context.router.choose(request, monotonic())
            if choice is None:
                return False
        self._request, self._tried = request, tried
        self._let_go()
        self._computed = None
        self.measures.retries += 1
        if choice is None:
            self._hold(request, returns=True)
        else:
            self._take(choice)
        return True

    def _lost(self, reason: str, *, suspend: bool = False) -> None:
        """The replica failed under us before or within the answer."""
        if self.done:
            return
        self._connection = None
        self.measures.count_upstream_error("connect" if suspend else "reset")
        if suspend and self._booking is not None:
            self._context.suspend(self._booking.replica, reason)
        try:
            if self._answer.status == 0 and self.try_elsewhere():
                return
            self.fail(UpstreamFailed(f"the replica failed: {reason}"))
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End with an error, in the form that the state of the answer allows."""
        if self.done:
            return
        known = openai.as_headrace_error(error)
        if known is not error:
            log.error("request %s failed", self.request_id.decode(), exc_info=error)
        self._error_kind = type(known).__name__
        client = self._client
        if self._answer.status == 0:
            self._answer_error(known)
        elif self._answer.events is not None:
            client.send_body(openai.error_event(known))
            self._end(self._answer.status)
            client.end()
        else:
            client.abort()
            self._end(self._answer.status)

    def _answer_error(self, error: HeadraceError) -> None:
        body = openai.error_body(error, self.path)
        self._client.send_head(error.status, openai.error_fields(error, self.request_id), len(body))
        self._client.send_body(body)
        self._end(error.status)
        self._client.end()

    def _let_go(self) -> None:
        """Give back what this exchange holds: the booking, the connection, what is under way for it."""
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if self._held is not None:
            held, self._held = self._held, None
            self._waited_s += monotonic() - held.since_s
            self._context.admission.leave(held)
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.abort()
        if self._booking is not None:
            self._context.release(self._booking, monotonic())
        if self._first is not None:
            first, self._first = self._first, None
            first.stop()
            self.measures.handed_over(first.reason, first.outcome)

    def _end(self, status: int) -> None:
        """The one way out. Runs exactly once."""
        if self.done:
            return
        self.done = True
        self._let_go()
        context = self._context
        context.active.discard(self)
        answer = self._answer
        usage = answer.usage
        now_s = monotonic()
        measures = self.measures
        if measures is not context.metrics.unknown:
            measures.in_flight -= 1
        measures.finish(status, self._error_kind, now_s - self.started_s, usage)
        # The usage tells of the cache of whoever computed the prompt.
        prompt, decision, prefixes = self._prompt, self._computed or self.decision, context.prefixes
        if usage is not None and prompt is not None and decision is not None and prefixes is not None:
            prefixes.settle(decision, prompt, usage)
        if context.access_log is not None:
            context.access_log.write(
                request_id=self.request_id,
                path=self.path,
                model=self.model,
                status=status,
                error=self._error_kind or None,
                replica=self._booking.replica.id if self._booking is not None else None,
                prefill=self._computed.load.replica.id if self._computed is not None else None,
                tries=self._tries,
                duration_s=now_s - self.started_s,
                ttft_s=answer.first_byte_s - self.started_s if answer.first_byte_s and status < 400 else None,
                usage=usage,
                tenant=self._last_held.tenant if self._last_held is not None else None,
                waited_s=self._waited_s if self._last_held is not None else None,
            )


def client_timeout(what: str, limit_s: float) -> RequestTimeout:
    """The client did not send `what` in time."""
    return RequestTimeout(f"the {what} did not arrive within {limit_s:g} s")
