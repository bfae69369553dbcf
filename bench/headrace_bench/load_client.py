"""The HTTP client of the load generator: asyncio protocols over httptools, one request per connection.

Made to be cheap per chunk (one clock reading per read of the socket, one typed decode per event), because a
client that is slower than the server measures itself. Times are `time.monotonic()` seconds, which every
process of a machine shares.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec

from headrace.errors import CallerError
from headrace_bench.answer_stream import EventSplitter, Usage, decode_answer, error_message

MAX_IDLE_S = 2.0
"""An idle connection is not used again after this. Servers close theirs after 5 s (uvicorn) or later; staying
well below means that a request never meets a closing connection, so none needs a retry, which would hide a
real failure."""

MAX_BODY_BYTES = 64 * 1024 * 1024
"""Of one answer that is no stream, so that a server cannot fill the client's memory."""


class TargetError(CallerError):
    """The URL cannot be called."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the requests go."""

    host: str
    port: int
    tls: bool = False
    prefix: str = ""  # path in front of /v1
    headers: tuple[tuple[str, str], ...] = ()  # sent with every request

    @classmethod
    def parse(cls, url: str, headers: Mapping[str, str] | None = None) -> Target:
        """`http://host:8000`, with or without a trailing `/v1`. Raises `TargetError`."""
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise TargetError(f"url {url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TargetError(f"url {url!r} must look like http://HOST:PORT or https://HOST")
        if parts.username is not None:
            raise TargetError("a url must not hold a user or key; use --api-key or --header")
        pairs = tuple((headers or {}).items())
        if bad := [name for name, value in pairs if not name or any(c in name + value for c in "\r\n\0")]:
            raise TargetError(f"header {bad[0]!r} holds a line break or has no name")
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port, parts.scheme == "https", prefix, pairs)

    def head(self, method: str, path: str, length: int, extra: Mapping[str, str]) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"host: {host}:{self.port}"]
        if length:
            lines += ["content-type: application/json", f"content-length: {length}"]
        lines += [f"{name}: {value}" for name, value in (*self.headers, *extra.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and what came back. Filled by its connection; complete once `done` is."""

    done: asyncio.Future[None]
    streamed: bool
    sent_s: float = 0.0
    first_s: float | None = None  # first content
    last_s: float = 0.0  # newest content
    end_s: float = 0.0
    gaps_s: array[float] = field(default_factory=lambda: array("f"))  # between contents
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)  # of answers that are not streams
    text: list[str] = field(default_factory=list)
    usage: Usage | None = None
    finished: bool = False  # a finish_reason or [DONE] came
    error: str | None = None  # kind: connect, timeout, cut, bad_response, stream_error, http_NNN
    detail: str = ""
    events: EventSplitter = field(default_factory=EventSplitter)

    def fail(self, kind: str, detail: str) -> None:
        """End with an error. The first one stands; safe at any time."""
        if self.error is None and not self.done.done():
            self.error, self.detail = kind, detail
        self.finish()

    def finish(self) -> None:
        """End. Safe at any time and twice."""
        if not self.done.done():
            self.end_s = time.monotonic()
            self.done.set_result(None)

    def receive(self, data: bytes, now_s: float) -> None:
        """A piece of the body. Raises `ValueError` (msgspec's included) on what is no answer."""
        if not self.streamed or self.status != 200:
            self.body += data
            if len(self.body) > MAX_BODY_BYTES:
                raise ValueError(f"an answer is over {MAX_BODY_BYTES} bytes")
            return
        for payload in self.events.feed(data):
            if payload == b"[DONE]":
                self.finished = True
            elif payload:
                self._chunk(payload, now_s)

    def _chunk(self, payload: bytes, now_s: float) -> None:
        answer = decode_answer(payload)
        if answer.usage is not None:
            self.usage = answer.usage
        if answer.error is not None and self.error is None:
            self.error, self.detail = "stream_error", error_message(payload)
        for choice in answer.choices:
            said = choice.said
            if choice.finish_reason is not None:
                self.finished = True
            if said is not None:
                self.text.append(said)
                if self.first_s is None:
                    self.first_s = now_s
                else:
                    self.gaps_s.append(now_s - self.last_s)
                self.last_s = now_s

    def complete(self) -> None:
        """The whole response has come."""
        if self.status != 200:
            self.fail(f"http_{self.status}", error_message(bytes(self.body)))
        elif self.streamed and not self.finished:
            self.fail(
                "cut", f"the stream ended after {len(self.text)} chunks without [DONE] or a finish_reason"
            )
        else:
            self.finish()


class Connection(asyncio.Protocol):
    """One keep-alive connection, one exchange at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.reusable = False
        self.idle_since_s = 0.0
        self._parser: httptools.HttpResponseParser | None = None
        self._now_s = 0.0
        self._ends_with_connection = True

    def start(self, exchange: Exchange, data: bytes) -> None:
        """Send. The connection must be open and free."""
        assert self.transport is not None and self.exchange is None
        self.exchange = exchange
        self.reusable = False
        self._ends_with_connection = True
        self._parser = httptools.HttpResponseParser(self)
        self.transport.write(data)

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses

    def data_received(self, data: bytes) -> None:
        if self.exchange is None or self._parser is None:
            self.abort()  # bytes that nobody asked for
            return
        self._now_s = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            # A ValueError raised in a callback arrives as the cause.
            reason = str(error.__context__ or error) or type(error).__name__
            self._fail("bad_response", reason[:200])

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        exchange = self.exchange
        if exchange is None:
            return
        self.exchange = None
        if exchange.status and self._ends_with_connection and exc is None:
            exchange.complete()  # an answer without a length ends with its connection
            return
        came = f"after {len(exchange.text)} chunks" if exchange.status else "before the first byte"
        exchange.fail("cut", f"the connection closed {came}{f': {exc}' if exc else ''}")

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.exchange is not None:
            self.exchange.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        exchange = self.exchange
        if exchange is not None:
            exchange.status = self._parser.get_status_code()
            headers = exchange.headers
            self._ends_with_connection = not (b"content-length" in headers or b"transfer-encoding" in headers)

    def on_body(self, body: bytes) -> None:
        if self.exchange is not None:
            self.exchange.receive(body, self._now_s)

    def on_message_complete(self) -> None:
        exchange, parser = self.exchange, self._parser
        if exchange is None or parser is None or exchange.status < 200:
            return  # 100 Continue and the like: the answer follows
        self.exchange = None
        self.reusable = parser.should_keep_alive() and not self._ends_with_connection
        self.idle_since_s = time.monotonic()
        exchange.complete()

    def _fail(self, kind: str, detail: str) -> None:
        exchange, self.exchange = self.exchange, None
        self.abort()
        if exchange is not None:
            exchange.fail(kind, detail)


class LoadClient:
    """Connections to one target. Used on one event loop; `close` at the end."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._address = target.host  # the first connection's peer, so that names are resolved once
        self._idle: list[Connection] = []
        self._tls = ssl.create_default_context() if target.tls else None

    async def exchange(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        streamed: bool = False,
        timeout_s: float = 60.0,
        headers: Mapping[str, str] | None = None,
    ) -> Exchange:
        """Send and wait for the end, however it ends: failures stand in `Exchange.error`, nothing is raised.

        Cancelling closes the connection, so the server sees the client leave.
        """
        loop = asyncio.get_running_loop()
        exchange = Exchange(loop.create_future(), streamed)
        exchange.sent_s = time.monotonic()
        deadline = loop.call_later(timeout_s, exchange.fail, "timeout", f"no end within {timeout_s:g} s")
        connection: Connection | None = None
        try:
            connection = await self._connect(exchange, timeout_s)
            if connection is not None:
                connection.start(exchange, self.target.head(method, path, len(body), headers or {}) + body)
                await exchange.done
        finally:
            deadline.cancel()
            if connection is not None:
                self._give_back(connection, exchange)
        return exchange

    async def _connect(self, exchange: Exchange, timeout_s: float) -> Connection | None:
        now_s = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and now_s - connection.idle_since_s < MAX_IDLE_S:
                return connection
            connection.abort()
        loop = asyncio.get_running_loop()
        name = self.target.host if self._tls else None
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await loop.create_connection(
                    Connection, self._address, self.target.port, ssl=self._tls, server_hostname=name
                )
        except TimeoutError:
            exchange.fail("timeout", f"no connection within {timeout_s:g} s")
            return None
        except OSError as error:
            exchange.fail("connect", str(error)[:200])
            return None
        if exchange.done.done():  # timed out in the same moment
            connection.abort()
            return None
        if connection.transport is not None:
            self._address = connection.transport.get_extra_info("peername")[0]
        return connection

    def _give_back(self, connection: Connection, exchange: Exchange) -> None:
        if connection.exchange is exchange:  # timed out or cancelled: the answer is still under way
            connection.exchange = None
            connection.abort()
        elif connection.reusable and connection.transport is not None:
            self._idle.append(connection)
        else:
            connection.abort()

    def close(self) -> None:
        """Close every idle connection."""
        while self._idle:
            self._idle.pop().abort()


def answer_of(exchange: Exchange) -> tuple[str, Usage | None]:
    """Text and usage of a completed exchange, streamed or whole. Raises `ValueError` on what is no answer."""
    if exchange.streamed:
        return "".join(exchange.text), exchange.usage
    try:
        answer = decode_answer(bytes(exchange.body))
    except msgspec.DecodeError as error:
        raise ValueError(f"no answer: {error}") from error
    return "".join(choice.said or "" for choice in answer.choices), answer.usage
