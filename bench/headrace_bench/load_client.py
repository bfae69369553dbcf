"""The HTTP client of the load generator: asyncio protocols over httptools, one request per connection.

Made to be cheap per chunk (one clock reading per read of the socket, one typed decode per event), because a
client that is slower than the server measures itself. Times are `time.monotonic()` seconds, which every
process of a machine shares.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

from headrace.errors import CallerError
from headrace_bench.exchange import Exchange

MAX_IDLE_S = 2.0
"""An idle connection is not used again after this. Servers close theirs after 5 s (uvicorn) or later; staying
well below means that a request never meets a closing connection, so none needs a retry, which would hide a
real failure."""


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
