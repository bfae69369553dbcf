"""Requests that come by handle, not by HTTP: the same exchange, with values in place of bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from headrace.errors import BadRequest, CallerError, HeadraceError, ShortageError
from headrace.gateway.asgi import App, Message

_MAX_UNREAD = 16
"""Messages that a slow caller may leave unread before the replica is paused."""

_DONE = b"[DONE]"


async def call(app: App, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one request that is no stream. Raises HeadraceError as an HTTP client would get a status."""
    if body.get("stream"):
        raise BadRequest(
            "`stream` is set; call the method that ends in `_stream`, with `stream=True` in options()"
        )
    async with aclosing(_exchange(app, path, body)) as messages:
        status = (await anext(messages))["status"]
        content = b"".join([message["body"] async for message in messages])
    return _answer(status, content)


async def call_stream(app: App, path: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The chunks of one stream, as they come. Raises HeadraceError, also in the middle of the stream."""
    async with aclosing(_exchange(app, path, {**body, "stream": True})) as messages:
        status = (await anext(messages))["status"]
        if status >= 400:
            _answer(status, b"".join([message["body"] async for message in messages]))
        rest = b""
        async for message in messages:
            *events, rest = (rest + message["body"]).split(b"\n\n")
            for event in events:
                chunk = _chunk(event)
                if chunk is not None:
                    yield chunk


def _chunk(event: bytes) -> dict[str, Any] | None:
    data = b"".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
    if not data or data == _DONE:
        return None
    chunk: dict[str, Any] = json.loads(data)
    if "error" in chunk:
        raise _error(chunk["error"], int(chunk["error"].get("code") or 0))
    return chunk


def _answer(status: int, content: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(content)
    if status >= 400:
        raise _error(answer.get("error", answer), status)
    return answer


def _error(told: Any, status: int) -> HeadraceError:
    """The exception that an error body tells of; the status decides its family."""
    told = told if isinstance(told, Mapping) else {"message": str(told)}
    message, param = str(told.get("message", told)), told.get("param")
    error: HeadraceError
    if 400 <= status < 500:
        error = CallerError(message, param=param)
    else:
        error = ShortageError(message, param=param)
    error.status = status or error.status
    error.type = str(told.get("type", error.type))
    return error


async def _exchange(app: App, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Message, None]:
    """What the app sends. Leaving early cancels the app, which takes it for its client's departure."""
    content = json.dumps(body).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }
    sent: asyncio.Queue[Message | None] = asyncio.Queue(_MAX_UNREAD)
    requests: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def run() -> None:
        try:
            await app(scope, receive, sent.put)
        finally:
            await sent.put(None)

    running = asyncio.ensure_future(run())
    try:
        while (message := await sent.get()) is not None:
            yield message
        await running  # raises what the app raised: an answer that broke off must not look complete
    except ConnectionAbortedError as error:
        raise ShortageError(str(error)) from None
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
