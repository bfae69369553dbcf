"""The relay: one exchange carries one request from its client to a replica and the answer back.

A request's life:
 1. a face (protocol or ASGI) hands over method, path, headers and the whole body        `Exchange.start`
 2. the needed fields are read, the model is looked up                                    `_admit`
 3. where the policy wants it, the prompt is read: tokens, or text chunks                 `_read_prompt`
 4. where every replica is saturated it waits, until one has room                         `dispatch`, `admission`
 5. the router chooses a replica and books the request on it                              `dispatch`
 5a. where another one computes the prompt, that half goes out first                      `handover`
 6. the original bytes go out on a pooled connection, or a new one                        `reach`
 7. the answer's head comes back: relayed, or tried elsewhere if the replica is ill       `Answer`
 8. bytes flow; a client that does not read pauses the replica, not our memory            `Answer`
 9. however it ends, `_end` runs exactly once: booking released, metrics, access log

Nothing here blocks; all calls come from one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING

from headrace.errors import (
    HeadraceError,
    ModelNotFound,
    NoReplica,
    ShuttingDown,
    UpstreamTimeout,
)
from headrace.gateway import handover, openai
from headrace.gateway.answer import Answer
from headrace.gateway.client import Client
from headrace.gateway.context import GatewayContext
from headrace.gateway.decisions import decision_fields, queue_field
from headrace.gateway.dispatch import Dispatch
from headrace.gateway.http_request import RequestHead
from headrace.gateway.http_response import ResponseHead
from headrace_router.types import Request

if TYPE_CHECKING:  # importing it for real would bring numba, which a policy that reads no prompts never needs
    from headrace.gateway.prefixes import Prefixes
    from headrace.gateway.prompt_reader import Prompt

log = logging.getLogger(__name__)


class Exchange(Dispatch):
    """One request and its answer."""

    # Defaults stand on the class: an exchange only pays for what happens to it.
    model: str | None = None
    paused = False
    _reading: asyncio.Task[Prompt] | None = None
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
        self._answer = Answer(self, context, client)

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
        self._answer.pause()

    def client_resumed(self) -> None:
        """The client has caught up."""
        self.paused = False
        self.deadline_s = monotonic() + self._context.timeouts.idle_s
        self._answer.resume()

    def expire(self) -> None:
        """`deadline_s` has passed: whatever was awaited did not come."""
        if self.paused:
            self._error_kind = "client_stalled"
            self._client.abort()
            self._end(self._answer.status)
        elif not (self._answer.gives_up() or (self._first is not None and self._first.gives_up())):
            timeouts = self._context.timeouts
            timeout_s = timeouts.idle_s if self._answer.status else timeouts.first_byte_s
            self.fail(UpstreamTimeout(f"the replica was silent for {timeout_s:g} s"))

    def cut(self) -> None:
        """The gateway stops and will not wait for this exchange any longer."""
        self.fail(ShuttingDown("the gateway shut down before the answer was complete"))

    @property
    def left(self) -> bool:
        """Whether the client ended this exchange by leaving."""
        return self._error_kind == "client_left"

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

    def answer_complete(self) -> None:
        """All of it has been relayed."""
        self._end(self._answer.status)
        self._client.end()

    # --- ends

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

    def _end(self, status: int) -> None:
        """The one way out. Runs exactly once."""
        if self.done:
            return
        self.done = True
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        now_s = monotonic()
        self._let_go(now_s)
        context = self._context
        context.active.discard(self)
        answer = self._answer
        usage = answer.usage
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
