"""The answer of one exchange, on its way from the replica to the client.

It reaches the replica and receives what comes back. What concerns the request (its bytes, another try, failure, the
end) it asks of its `Errand`; what concerns the answer's bytes it does itself: the head once, whole events, and what is
measured of them.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Protocol

from headrace.errors import NotFound
from headrace.gateway import openai, reach
from headrace.gateway.client import Client
from headrace.gateway.http_response import ResponseHead
from headrace.gateway.metrics import ModelMeasures
from headrace.gateway.sse import EventRelay
from headrace.gateway.upstream import Target

if TYPE_CHECKING:
    from headrace.gateway.context import GatewayContext

# Answers that say the replica, not the request, is at fault; worth another replica while nothing was relayed.
ILL_STATUSES = frozenset({502, 503})
# What FastAPI says where vLLM offers no route for a path: its model does not do embeddings, say.
_NO_SUCH_ROUTE = b'{"detail":"Not Found"}'
_TAIL_BYTES = 8192


class Errand(reach.Errand, Protocol):
    """The exchange, as its answer knows it."""

    model: str | None
    done: bool
    hide_usage: bool  # the client did not ask for the usage that the replica was asked for
    paused: bool  # the client does not keep up
    started_s: float
    measures: ModelMeasures

    @property
    def path(self) -> bytes: ...

    def request_to(self, target: Target) -> bytes:
        """The client's HTTP request, for the replica that answers."""
        ...

    def try_elsewhere(self) -> bool:
        """Move to another replica; False, changing nothing, when there is none."""
        ...

    def answer_begins(self, head: ResponseHead) -> bytes:
        """From here on there is no other try. Returns the header lines to send."""
        ...

    def first_token(self, now_s: float) -> None:
        """Of a stream."""
        ...

    def answer_complete(self) -> None: ...

    def answer_lost(self, reason: str, *, suspend: bool = False) -> None:
        """The replica failed before the answer or within it, or (`suspend`) takes no connections."""
        ...


class Answer(reach.Reach):
    """`status` is 0 until the head has been relayed."""

    _errand: Errand
    status = 0
    events: EventRelay | None = None  # of a stream
    first_byte_s = 0.0
    _last_byte_s = 0.0
    _held_head: ResponseHead | None = None
    _tail = b""

    def __init__(self, errand: Errand, context: GatewayContext, client: Client) -> None:
        self._errand = errand
        self._context = context
        self._client = client
        self._idle_s = context.idle_s

    @property
    def usage(self) -> openai.Usage | None:
        """The engine's token counts, as far as they have been seen."""
        return self.events.usage if self.events is not None else openai.find_usage(self._tail)

    def upstream_head(self, head: ResponseHead) -> None:
        if head.status in ILL_STATUSES and self._errand.try_elsewhere():
            return
        if head.status == 404 and head.content_length == len(_NO_SUCH_ROUTE):
            self._held_head = head  # perhaps the server's own "no such path"; the body tells
            return
        self._begin(head)

    def _begin(self, head: ResponseHead) -> None:
        self.status = head.status
        self._last_byte_s = monotonic()
        if head.is_event_stream:
            self.events = EventRelay(self._errand.hide_usage)
        self._client.send_head(head.status, self._errand.answer_begins(head), head.content_length)

    def upstream_body(self, data: bytes) -> None:
        if self._held_head is not None:
            head, self._held_head = self._held_head, None
            if data == _NO_SUCH_ROUTE:
                self._errand.fail(
                    NotFound(f"the model `{self._errand.model}` does not offer {self._errand.path.decode()}")
                )
                return
            self._begin(head)
        now_s = monotonic()
        events = self.events
        if self.first_byte_s == 0.0:
            self.first_byte_s = now_s
            if self.status < 400:
                self._errand.measures.time_to_first_token.observe(now_s - self._errand.started_s)
                if events is not None:
                    self._errand.first_token(now_s)
        elif events is not None:
            self._errand.measures.inter_token.observe(now_s - self._last_byte_s)
        self._last_byte_s = now_s
        if events is not None:
            data = events.feed(data)
            if not data:
                return
        else:
            # The usage stands near the end of a body that may come in several pieces.
            self._tail = data if not self._tail else (self._tail + data)[-_TAIL_BYTES:]
        self._client.send_body(data)

    def upstream_event(self, framed: bytes, start: int) -> None:
        events = self.events
        if events is None or events.holds or self.first_byte_s == 0.0 or b'"usage":' in framed:
            self.upstream_body(framed[start:-2])
            self.upstream_flush()
            return
        now_s = monotonic()
        errand = self._errand
        errand.measures.inter_token.observe(now_s - self._last_byte_s)
        self._last_byte_s = now_s
        if not errand.paused:
            errand.deadline_s = now_s + self._idle_s
        self._client.send_chunk(framed, start)

    def upstream_complete(self) -> None:
        self._connection = None
        if self.events is not None:
            rest = self.events.rest()
            if rest:
                self._client.send_body(rest)
        self._errand.answer_complete()

    def upstream_flush(self) -> None:
        if self.status and not self._errand.done:
            if not self._errand.paused:
                self._errand.deadline_s = self._last_byte_s + self._idle_s
            self._client.flush()

    # --- Reach

    @property
    def _has_begun(self) -> bool:
        return self.status != 0

    def _request(self, target: Target) -> bytes:
        return self._errand.request_to(target)

    def upstream_lost(self, reason: str) -> None:
        self._held_head = None
        super().upstream_lost(reason)

    def _lost(self, reason: str, *, suspend: bool = False) -> None:
        self._errand.answer_lost(reason, suspend=suspend)
