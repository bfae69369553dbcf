"""The fast face: an HTTP protocol class that relays inference requests itself and leaves the rest to uvicorn.

uvicorn's HttpToolsProtocol parses; requests to an inference path never become an ASGI task, they become an `Exchange`
(19 against 47 µs a request, measured by `headrace_bench.relay`). Everything else falls through to the ASGI app. The
class is private API of uvicorn, which is therefore pinned.

A hostile or careless client gets a clear 4xx: heads and bodies are bounded in size and time, a second request sent
before the first is answered (pipelining) is dropped and the connection closed after the answer.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

import httptools
from uvicorn.config import Config as UvicornConfig
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from headrace.errors import BadRequest, BodyTooLarge, HeadraceError, HeadTooLarge, RequestTimeout
from headrace.gateway import openai
from headrace.gateway.context import GatewayContext
from headrace.gateway.http_request import RequestHead, read_head
from headrace.gateway.relay import Exchange

# How long a connection that was answered early (body too large, say) may go on sending before it is cut. Closing at
# once would reset it, and the client would lose the answer that tells it why.
LINGER_S = 2.0


class GatewayProtocol(HttpToolsProtocol):
    """One client connection."""

    def __init__(
        self,
        context: GatewayContext,
        connections: set[GatewayProtocol],
        config: UvicornConfig,
        server_state: ServerState,
    ) -> None:
        super().__init__(config, server_state, {}, context.loop)
        # A request smuggled behind `connection: close` must not be parsed as a second one.
        self.parser = httptools.HttpRequestParser(self)
        self._context = context
        self._live = connections
        self.take_limits()
        self._exchange: Exchange | None = None
        self._relayed = False  # the message being received goes to an exchange
        self._deaf = False  # nothing more is taken from this connection
        self._receiving = False  # between the first byte of a message and its end
        self._head_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._head: RequestHead | None = None
        self._keep_alive = True
        self._old_client = False  # HTTP/1.0: no chunked encoding
        self._chunked = False
        self._out: list[bytes] = []
        self.deadline_s = monotonic() + context.config.timeouts.keep_alive_s

    def take_limits(self) -> None:
        """From the gateway's settings as they are now."""
        limits, timeouts = self._context.config.limits, self._context.timeouts
        self._max_head_bytes, self._max_body_bytes = limits.head_bytes, limits.body_bytes
        self._head_s, self._body_s, self._idle_s = timeouts.head_s, timeouts.body_s, timeouts.keep_alive_s

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._live.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._live.discard(self)
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.client_left()
        self._out.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if not self._receiving:
            self._receiving = True
            self._head_bytes = 0
            self.deadline_s = monotonic() + self._head_s
        if self._head_bytes >= 0:  # the head is still coming
            self._head_bytes += len(data)
        self._feed(data)
        if self._head_bytes > self._max_head_bytes and not self._deaf:
            self._refuse(HeadTooLarge(f"the request head is over the limit of {self._max_head_bytes} bytes"))

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if not self._deaf:
                cause = error.__cause__ or error.__context__
                self._refuse(
                    cause if isinstance(cause, HeadraceError) else BadRequest(f"malformed HTTP: {error}")
                )

    def _ignore_upgrade(self, rest: bytes) -> None:
        """A wish to change the protocol may be ignored (RFC 9110, 7.8); Java's client sends one by default.

        The parser stops for good at such a message and skips its body, so a new one gets the same head again
        without the wish, and what came behind it.
        """
        method = self.parser.get_method()
        self.parser = httptools.HttpRequestParser(self)
        if self._deaf:
            return
        if method == b"CONNECT":
            self._refuse(BadRequest("this is not a proxy: CONNECT is not supported"))
            return
        head = [b"%b %b HTTP/1.1\r\n" % (method, self.url)]
        for name, value in self.headers:
            if name not in (b"upgrade", b"http2-settings"):
                head.append(b"%b: %b\r\n" % (name, value))
        self._feed(b"%b\r\n%b" % (b"".join(head), rest))

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._exchange is not None:
            self._exchange.client_paused()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._exchange is not None:
            self._exchange.client_resumed()

    # --- httptools callbacks

    def on_message_begin(self) -> None:
        if self._busy:
            # A pipelined request: answer the first, then close; the client sends the second again (RFC 9112, 9.3.2).
            self._deaf = True
            self._keep_alive = False
            self.headers = []  # the first request's own list is in use
            if self.cycle is not None:
                self.cycle.keep_alive = False
            return
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._relayed = False
        self._body = []
        self._body_bytes = 0

    @property
    def _busy(self) -> bool:
        return self._exchange is not None or (self.cycle is not None and not self.cycle.response_complete)

    def on_url(self, url: bytes) -> None:
        if not self._deaf:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._deaf or self.parser.should_upgrade():
            return
        if (
            self._head_bytes > self._max_head_bytes
        ):  # perhaps only because some of the body came in the same read
            head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if head_bytes > self._max_head_bytes:
                raise HeadTooLarge(
                    f"the request head is {head_bytes} bytes, over the limit of {self._max_head_bytes}"
                )
        self._head_bytes = -1
        self.deadline_s = monotonic() + self._body_s
        parser = self.parser
        path = self.url.partition(b"?")[0]
        if path in openai.INFERENCE_PATHS and parser.get_method() == b"POST":
            self._relayed = True
            self._old_client = parser.get_http_version() == "1.0"
            self._keep_alive = not self._old_client and parser.should_keep_alive()
            self._read_head()
            return
        if not self.url.startswith(b"/"):
            raise BadRequest("the request target must be a path")
        # The base class builds the ASGI scope when a message begins; here only those that need one pay for it.
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url = url
        self.expect_100_continue = (b"expect", b"100-continue") in headers
        self.headers.extend(headers)
        super().on_headers_complete()

    def _read_head(self) -> None:
        head = self._head = read_head(self.headers, self._context.header_meanings)
        limit = self._max_body_bytes
        if head.content_length is not None and head.content_length > limit:
            raise BodyTooLarge(f"the body is {head.content_length} bytes, over the limit of {limit}")
        if head.expects_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        if self._deaf:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self._max_body_bytes:
            raise BodyTooLarge(f"the body is over the limit of {self._max_body_bytes} bytes")
        self.deadline_s = monotonic() + self._body_s
        if self._relayed:
            self._body.append(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._deaf or self.parser.should_upgrade():
            return
        self._receiving = False
        self.deadline_s = float("inf")  # the exchange has its own
        if not self._relayed:
            super().on_message_complete()
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        assert self._head is not None
        exchange = self._exchange = Exchange(self._context, self, self.url, self._head, body)
        exchange.start()

    # --- relay.Client

    def send_head(self, status: int, fields: bytes, content_length: int | None) -> None:
        if content_length is not None:
            framing = b"content-length: %d\r\n" % content_length
        elif self._old_client:
            framing = b""
        else:
            self._chunked = True
            framing = b"transfer-encoding: chunked\r\n"
        end = b"\r\n" if self._keep_alive else b"connection: close\r\n\r\n"
        self._out.append(b"%b%b%b%b" % (STATUS_LINE[status], fields, framing, end))

    def send_body(self, data: bytes) -> None:
        if self._chunked:
            self._out.append(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self._out.append(data)

    def send_chunk(self, framed: bytes, start: int) -> None:
        self.transport.write(framed if self._chunked else framed[start:-2])

    def end(self) -> None:
        if self._chunked:
            self._out.append(b"0\r\n\r\n")
            self._chunked = False
        self.flush()
        self._exchange = None
        self.server_state.total_requests += 1
        if not self._keep_alive:
            self._close()
        else:
            self.deadline_s = monotonic() + self._idle_s

    def flush(self) -> None:
        if self._out:
            self.transport.write(self._out[0] if len(self._out) == 1 else b"".join(self._out))
            self._out.clear()

    def abort(self) -> None:
        self._exchange = None
        self._deaf = True
        self._out.clear()
        self.transport.abort()

    # --- ends

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # `deadline_s` does that here
        self.deadline_s = monotonic() + self._idle_s
        if self._deaf and not self.transport.is_closing():
            self._close()

    def expire(self) -> None:
        """`deadline_s` has passed: the client did not send in time, or has been idle long enough."""
        if self._busy:  # an answer is under way and has its own deadline
            self.deadline_s = float("inf")
        elif self._deaf:
            self.transport.abort()
        elif not self._receiving:
            self.transport.close()
        elif self._head_bytes >= 0:
            self._refuse(_timeout("request head", self._head_s))
        elif self._relayed:
            self._refuse(_timeout("request body", self._body_s))
        else:
            self.transport.abort()

    def shutdown(self) -> None:
        """The server stops: finish what runs, close what idles."""
        self._keep_alive = False
        if self._exchange is None:
            super().shutdown()

    def _refuse(self, error: HeadraceError) -> None:
        """Answer a request that never became one, then close."""
        self._deaf = True
        self._keep_alive = False
        if self._busy:  # an answer is under way: nothing can be said in between, it ends with the connection
            if self._exchange is None:
                self.transport.close()
            return
        self._old_client = False
        body = openai.error_body(error)
        self.send_head(error.status, openai.error_fields(error, openai.request_id(None)), len(body))
        self.send_body(body)
        self.flush()
        self._context.metrics.unknown.finish(error.status, type(error).__name__, 0.0, None)
        self._close()

    def _close(self) -> None:
        """Close gracefully: the client reads our answer to its end even if it is still sending."""
        if self.transport.is_closing():
            return
        if self._deaf and self.transport.can_write_eof():
            self.transport.write_eof()
            self.deadline_s = monotonic() + LINGER_S
        else:
            self.transport.close()


def _timeout(what: str, limit_s: float) -> RequestTimeout:
    return RequestTimeout(f"the {what} did not arrive within {limit_s:g} s")


def protocol_factory(
    context: GatewayContext, config: UvicornConfig, server_state: ServerState
) -> tuple[Any, set[GatewayProtocol]]:
    """A factory for `loop.create_server`, and the live set of connections it makes."""
    live: set[GatewayProtocol] = set()
    return (lambda: GatewayProtocol(context, live, config, server_state)), live
