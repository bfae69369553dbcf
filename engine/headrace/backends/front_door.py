"""The door in front of an engine's HTTP app: the fleet's internal token, and a way to close it.

Pure ASGI, so that it adds nothing to a streamed answer.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

RELEASE_PATH = "/headrace/release_kv"

_UNAUTHORIZED = {
    "message": "this replica answers its fleet's gateway only; send the request to the gateway",
    "type": "invalid_request_error",
    "param": None,
    "code": "invalid_api_key",
}
_CLOSED = {
    "message": "this replica takes no requests now",
    "type": "service_unavailable",
    "param": None,
    "code": "shutting_down",
}


_BROKEN = {
    "message": "this replica's engine died before it answered",
    "type": "service_unavailable",
    "param": None,
    "code": "engine_dead",
}


class FrontDoor:
    """Lets in requests that carry `authorization: Bearer <token>`; everything when `token` is None.

    After `close()`, until `open()`, every new request gets 503 while those inside finish. While `is_broken()` an
    answer that would begin with 500 becomes 503: it is the engine's death that speaks, not the request's fault, and
    whoever asked may ask another replica.
    """

    def __init__(
        self,
        app: App,
        token: str | None,
        is_broken: Callable[[], bool] = lambda: False,
        release_kv: Callable[[list[str]], Awaitable[None]] | None = None,
    ) -> None:
        """`release_kv` frees the blocks held for hand-overs that will not happen: POST /headrace/release_kv with
        {"request_ids": [...]}, also after `close`."""
        self._app = app
        self._release_kv = release_kv
        self._is_broken = is_broken
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._is_open = True
        self.inside = 0  # requests let in and not yet answered to their end

    def close(self) -> None:
        """Refuse what comes from now on."""
        self._is_open = False

    def open(self) -> None:
        """Let in again what comes from now on."""
        self._is_open = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
        elif not self._admits(scope):
            await _refuse(scope, receive, send, 401, _UNAUTHORIZED)
        elif self._release_kv is not None and scope["path"] == RELEASE_PATH:
            await _release(self._release_kv, receive, send)
        elif not self._is_open:
            await _refuse(scope, receive, send, 503, _CLOSED)
        else:
            is_http = scope["type"] == "http"
            self.inside += 1
            try:
                await self._app(
                    scope, receive, self._unless_broken(scope, receive, send) if is_http else send
                )
            finally:
                self.inside -= 1

    def _unless_broken(self, scope: Scope, receive: Receive, send: Send) -> Send:
        is_replaced = False

        async def checked(message: MutableMapping[str, Any]) -> None:
            nonlocal is_replaced
            if is_replaced:
                return
            if message["type"] == "http.response.start" and message["status"] == 500 and self._is_broken():
                is_replaced = True
                await _refuse(scope, receive, send, 503, _BROKEN)
                return
            await send(message)

        return checked

    def _admits(self, scope: Scope) -> bool:
        if self._expected is None:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._expected)


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, error: dict[str, Any]) -> None:
    if scope["type"] == "websocket":
        await receive()  # "websocket.connect": a close before it is a protocol error
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _release(release_kv: Callable[[list[str]], Awaitable[None]], receive: Receive, send: Send) -> None:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    try:
        request_ids = [str(name) for name in json.loads(body)["request_ids"]]
    except (ValueError, KeyError, TypeError):
        status = 400
    else:
        status = 200
        await release_kv(request_ids)
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
