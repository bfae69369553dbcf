"""A small HTTP client of one gateway, on the connections that the gateway itself uses towards replicas.

A call costs a third of what it costs with httpx over the same socket, and less than httpx without a socket, through
the gateway's ASGI face in this process (`headrace_bench.api_cost`), which also gives a stream out only when it is over.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping
from time import monotonic
from typing import Any

from headrace.api.error_reply import error_of
from headrace.errors import ShortageError, UpstreamFailed
from headrace.gateway.http_response import ResponseHead
from headrace.gateway.upstream import Target, UpstreamConnection, UpstreamPool
from headrace_router.types import BootId, Endpoints, Replica, ReplicaId, Role

MAX_UNREAD_BYTES = 256 * 1024
"""Of one stream; beyond it the gateway is made to wait, and it the replica."""


class Client:
    """Of one gateway. Belongs to one event loop; `close` cuts what is under way."""

    def __init__(self, loop: asyncio.AbstractEventLoop, url: str, api_key: str | None = None) -> None:
        self._url = url
        server = Replica(ReplicaId("gateway"), BootId(""), "", Role.UNIFIED, Endpoints(url))
        self._target = Target(server, None if api_key is None else f"Bearer {api_key}".encode())
        self._pool = UpstreamPool(loop, monotonic)

    async def get(self, path: str) -> Any:
        """The JSON at `path`. Raises HeadraceError."""
        async with _Reply(self, b"GET %b HTTP/1.1\r\n%b\r\n" % (path.encode(), self._target.prefix)) as reply:
            return await reply.json()

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that answers `body`. Raises HeadraceError; cancelled, the replica stops working on it."""
        async with _Reply(self, self._post(path, body)) as reply:
            return await reply.json()

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Any]:
        """The events that answer `body`, as JSON, to the end of the stream. Raises HeadraceError, also in the middle;
        closed early (`aclose`), the replica stops working on it."""
        async with _Reply(self, self._post(path, body)) as reply:
            async for event in reply.events():
                yield event

    def close(self) -> None:
        """Cut every connection."""
        self._pool.close()

    def _post(self, path: str, body: Mapping[str, Any]) -> bytes:
        content = json.dumps(body).encode()
        return b"POST %b HTTP/1.1\r\n%bcontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
            path.encode(),
            self._target.prefix,
            len(content),
            content,
        )

    async def connect(self, fresh: bool) -> UpstreamConnection:
        """A connection to the gateway. Raises ShortageError when it does not answer."""
        kept = None if fresh else self._pool.take(self._target)
        if kept is not None:
            return kept
        try:
            return await self._pool.connect(self._target)
        except OSError as error:
            raise ShortageError(f"no gateway answers at {self._url}: {error.strerror or error}") from error


class _Reply:
    """One exchange, as a context: left before its end, its connection is cut. A `Receiver` of the connection."""

    def __init__(self, client: Client, request: bytes) -> None:
        self._client = client
        self._request = request
        self._connection: UpstreamConnection | None = None
        self._head: ResponseHead | None = None
        self._parts: deque[bytes] = deque()
        self._unread = 0
        self._paused = False
        self._ended = False
        self._lost: str | None = None
        self._news = asyncio.Event()

    async def __aenter__(self) -> _Reply:
        await self._send(fresh=False)
        if self._lost is not None and self._head is None:
            # A kept connection that the gateway had closed meanwhile; on a new one it is a failure.
            await self._send(fresh=True)
        head = self._head
        if head is None:
            raise UpstreamFailed(f"the gateway gave no answer: {self._lost}")
        if head.status >= 400:
            try:
                body = await self._whole()
            finally:
                self._cut()
            raise error_of(head.status, body, _retry_after_s(head.fields))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._cut()

    def _cut(self) -> None:
        if self._connection is not None and not self._ended:
            self._connection.abort()

    async def _send(self, fresh: bool) -> None:
        self._lost = None
        connection = self._connection = await self._client.connect(fresh)
        connection.send(self, self._request)
        try:
            while self._head is None and self._lost is None:
                await self._wait()
        finally:
            if self._head is None:
                self._cut()

    async def json(self) -> Any:
        body = await self._whole()
        try:
            return json.loads(body)
        except ValueError:
            raise UpstreamFailed(f"the gateway's answer is not JSON: {body[:100]!r}") from None

    async def events(self) -> AsyncIterator[Any]:
        held = b""
        async for part in self._read():
            *whole, held = (held + part).split(b"\n\n")
            for event in whole:
                data = event.strip()
                if not data.startswith(b"data:") or data == b"data: [DONE]":
                    continue
                read = json.loads(data[5:])
                if isinstance(read, dict) and read.get("error"):
                    code = read["error"].get("code") if isinstance(read["error"], dict) else None
                    status = code if isinstance(code, int) and code >= 400 else 502
                    raise error_of(status, data[5:])
                yield read

    async def _whole(self) -> bytes:
        return b"".join([part async for part in self._read()])

    async def _read(self) -> AsyncIterator[bytes]:
        while True:
            while self._parts:
                part = self._parts.popleft()
                self._unread -= len(part)
                if self._paused and self._unread < MAX_UNREAD_BYTES // 2 and self._connection is not None:
                    self._paused = False
                    self._connection.resume_reading()
                yield part
            if self._ended:
                return
            if self._lost is not None:
                raise UpstreamFailed(f"the answer broke off: {self._lost}")
            await self._wait()

    async def _wait(self) -> None:
        await self._news.wait()
        self._news.clear()

    # --- Receiver

    def upstream_head(self, head: ResponseHead) -> None:
        self._head = head

    def upstream_body(self, data: bytes) -> None:
        self._parts.append(data)
        self._unread += len(data)
        if self._unread > MAX_UNREAD_BYTES and not self._paused and self._connection is not None:
            self._paused = True
            self._connection.pause_reading()

    def upstream_event(self, framed: bytes, start: int) -> None:
        self.upstream_body(framed[start:-2])
        self._news.set()

    def upstream_complete(self) -> None:
        self._ended = True
        self._news.set()

    def upstream_flush(self) -> None:
        self._news.set()

    def upstream_lost(self, reason: str) -> None:
        self._lost = reason.replace("the replica", "the gateway")
        self._news.set()


def _retry_after_s(fields: bytes) -> float | None:
    for line in fields.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"retry-after":
            try:
                return float(value)
            except ValueError:
                return None
    return None
