"""Connections from the gateway to replicas: one HTTP/1.1 exchange at a time each, kept alive in a pool.

It knows nothing of routing or clients: what arrives is handed to the `Receiver` of the moment, whoever that is.
Aborting is immediate (a reset, not a graceful close), so that an engine stops working for a client that left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast
from urllib.parse import urlsplit

from headrace.gateway.http_response import (
    MAX_HEAD_BYTES,
    ChunkedBody,
    MalformedResponse,
    ResponseHead,
    chunk_start,
    parse_head,
)
from headrace_router.types import BootId, Replica, ReplicaId

# An idle connection kept longer than this is closed by us. vLLM's uvicorn closes after 5 s itself; other servers may
# keep connections for minutes, and a pool must shrink after a burst.
IDLE_S = 60.0
MAX_IDLE_PER_REPLICA = 512

_UNTIL_CLOSED = -1


class Receiver(Protocol):
    """Takes what one upstream exchange brings, in this order: head, body*, complete; or lost at any point."""

    def upstream_head(self, head: ResponseHead) -> None: ...

    def upstream_body(self, data: bytes) -> None: ...

    def upstream_event(self, framed: bytes, start: int) -> None:
        """One read that was exactly one chunk, ending as an event does: body and flush in one call.

        `framed` is the chunk as it came; its payload is `framed[start:-2]`.
        """
        ...

    def upstream_complete(self) -> None: ...

    def upstream_flush(self) -> None:
        """Everything that one read brought has been delivered: write it out now, once."""
        ...

    def upstream_lost(self, reason: str) -> None:
        """The connection ended before the answer did. Nothing more follows."""
        ...


class UpstreamConnection(asyncio.Protocol):
    """One connection to one replica. Idle, or busy with exactly one receiver."""

    transport: asyncio.Transport | None = None
    receiver: Receiver | None = None
    exchanges = 0  # completed on this connection; above zero means "reused"
    idle_since_s = 0.0
    _head: ResponseHead | None = None  # of the answer under way
    _partial_head = b""
    _remaining = 0  # body bytes still to come, or _UNTIL_CLOSED
    _chunks: ChunkedBody | None = None

    def __init__(self, pool: UpstreamPool, key: PoolKey) -> None:
        self._pool = pool
        self.key = key

    def send(self, receiver: Receiver, request: bytes) -> None:
        """Write a whole request; its answer goes to `receiver`."""
        assert self.receiver is None and self.transport is not None
        self.receiver = receiver
        self.transport.write(request)

    def abort(self) -> None:
        """Cut the connection at once; the receiver hears nothing more."""
        self.receiver = None
        if self.transport is not None:
            self.transport.abort()

    def pause_reading(self) -> None:
        """Stop reading until `resume_reading`: the client does not keep up. Safe on a dead connection."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Undo `pause_reading`. Safe on a dead connection."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from asyncio's

    def data_received(self, data: bytes) -> None:
        receiver = self.receiver
        if receiver is None:  # bytes that nobody asked for: the connection cannot be trusted any more
            self.abort()
            return
        chunks = self._chunks
        if chunks is not None and chunks.between and data.endswith(b"\n\n\r\n"):
            # The usual read of a stream: a server writes an event at a time.
            start = chunk_start(data)
            if start:
                receiver.upstream_event(data, start)
                return
        try:
            if self._head is None:
                data = self._read_head(receiver, data)
            if data and self.receiver is not None:
                self._read_body(receiver, data)
        except MalformedResponse as error:
            self._fail(f"the replica sent malformed HTTP: {error}")
            return
        receiver.upstream_flush()

    def _read_head(self, receiver: Receiver, data: bytes) -> bytes:
        """Take the head off; returns the bytes of the body that came with it."""
        if self._partial_head:
            data = self._partial_head + data
            self._partial_head = b""
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > MAX_HEAD_BYTES:
                    raise MalformedResponse(f"its head is over {MAX_HEAD_BYTES} bytes")
                self._partial_head = data
                return b""
            head = parse_head(data[:end])
            data = data[end + 4 :]
            if head.status >= 200:
                break  # 100 Continue and its kind come before the answer
        self._head = head
        if head.is_chunked:
            self._chunks = ChunkedBody()
            self._remaining = 0
        else:
            self._remaining = _UNTIL_CLOSED if head.content_length is None else head.content_length
        receiver.upstream_head(head)
        if self._chunks is None and self._remaining == 0 and self.receiver is not None:
            self._complete(receiver, data)
            return b""
        return data

    def _read_body(self, receiver: Receiver, data: bytes) -> None:
        chunks = self._chunks
        if chunks is not None:
            payload = chunks.feed(data)
            if payload:
                receiver.upstream_body(payload)
            if chunks.done and self.receiver is not None:
                self._complete(receiver, chunks.rest)
            return
        if self._remaining == _UNTIL_CLOSED:
            receiver.upstream_body(data)
            return
        surplus = data[self._remaining :]
        if surplus:
            data = data[: self._remaining]
        self._remaining -= len(data)
        receiver.upstream_body(data)
        if self._remaining == 0 and self.receiver is not None:
            self._complete(receiver, surplus)

    def _complete(self, receiver: Receiver, surplus: bytes) -> None:
        head, self._head = self._head, None
        self._chunks = None
        self.receiver = None
        self.exchanges += 1
        if head is not None and head.keep_alive and not surplus:
            self._pool.put_back(self)
        else:
            self.abort()
        receiver.upstream_complete()

    def eof_received(self) -> None:
        if self.receiver is not None and self._head is not None and self._remaining == _UNTIL_CLOSED:
            receiver = self.receiver
            self._complete(receiver, b"")
            receiver.upstream_flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        receiver, self.receiver = self.receiver, None
        if receiver is not None:
            receiver.upstream_lost(f"the connection to the replica broke: {exc or 'closed'}")

    def _fail(self, reason: str) -> None:
        receiver = self.receiver
        self.abort()
        if receiver is not None:
            receiver.upstream_lost(reason)


PoolKey = tuple[ReplicaId, BootId]


class Target:
    """Where a replica listens and the head lines that every request to it carries."""

    __slots__ = ("authorized", "host", "key", "port", "prefix", "ssl")

    def __init__(self, replica: Replica, authorization: bytes | None) -> None:
        url = urlsplit(replica.endpoints.url)
        self.key: PoolKey = (replica.id, replica.boot_id)
        self.host = url.hostname or "127.0.0.1"
        self.ssl = url.scheme == "https"
        self.port = url.port or (443 if self.ssl else 80)
        self.prefix = b"host: %s\r\n" % url.netloc.rpartition("@")[2].encode()
        self.authorized = authorization is not None  # with ours; the client's own is then not passed on
        if authorization is not None:
            self.prefix += b"authorization: %s\r\n" % authorization


class UpstreamPool:
    """Idle connections by replica boot; newest first, so that the surplus grows old and is closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        self._loop = loop
        self._clock = clock
        self._idle: dict[PoolKey, list[UpstreamConnection]] = {}
        self._all: set[UpstreamConnection] = set()

    @property
    def num_connections(self) -> int:
        """Open connections, idle and busy."""
        return len(self._all)

    def take(self, target: Target) -> UpstreamConnection | None:
        """An idle connection, None when there is none."""
        idle = self._idle.get(target.key)
        while idle:
            connection = idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
        return None

    async def connect(self, target: Target) -> UpstreamConnection:
        """Open a new connection. Raises OSError."""
        _, connection = await self._loop.create_connection(
            lambda: UpstreamConnection(self, target.key), target.host, target.port, ssl=target.ssl or None
        )
        self._all.add(connection)
        return connection

    def put_back(self, connection: UpstreamConnection) -> None:
        """A finished connection, for the next request."""
        idle = self._idle.get(connection.key)
        if idle is None:
            idle = self._idle[connection.key] = []
        elif len(idle) >= MAX_IDLE_PER_REPLICA:
            connection.abort()
            return
        connection.idle_since_s = self._clock()
        idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        """The connection is gone. Safe for one that is not known."""
        self._all.discard(connection)
        idle = self._idle.get(connection.key)
        if idle is not None and connection in idle:
            idle.remove(connection)

    def expire(self, present: set[PoolKey]) -> None:
        """Close idle connections of replicas that went and those unused for IDLE_S."""
        now_s = self._clock()
        for key in list(self._idle):
            idle = self._idle[key]
            keep_from = 0
            if key in present:
                while keep_from < len(idle) and now_s - idle[keep_from].idle_since_s > IDLE_S:
                    keep_from += 1
            else:
                keep_from = len(idle)
                del self._idle[key]
            expired, idle[:] = idle[:keep_from], idle[keep_from:]
            for connection in expired:
                connection.abort()

    def close(self) -> None:
        """Cut every connection, busy ones included."""
        for connection in list(self._all):
            connection.abort()
        self._idle.clear()
