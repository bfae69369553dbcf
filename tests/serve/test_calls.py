"""Requests by handle, against small ASGI apps."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from headrace.errors import CallerError, ShortageError
from headrace.serve.calls import call, call_stream


class Answering:
    """An ASGI app that reads the request and sends prepared pieces."""

    def __init__(
        self, status: int, pieces: Sequence[bytes], *, breaks: bool = False, hangs: bool = False
    ) -> None:
        self.status, self.pieces, self.breaks, self.hangs = status, pieces, breaks, hangs
        self.asked: Any = None
        self.left = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked = json.loads((await receive())["body"])
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if self.breaks:
            raise ConnectionAbortedError("the replica failed in the middle of its answer")
        if self.hangs:
            try:
                await receive()
            finally:
                self.left.set()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def test_an_answer_in_pieces_is_one_value() -> None:
    app = Answering(200, [b'{"a":', b"1}"])
    assert await call(app, "/v1/x", {"model": "m"}) == {"a": 1}
    assert app.asked == {"model": "m"}


async def test_events_are_values_wherever_they_are_cut() -> None:
    text = b'data: {"n":1}\n\n: a comment\n\ndata: {"n":2}\n\ndata: [DONE]\n\n'
    for cut in range(len(text)):
        app = Answering(200, [text[:cut], text[cut:]])
        assert [chunk["n"] async for chunk in call_stream(app, "/v1/x", {})] == [1, 2]
        assert app.asked == {"stream": True}


@pytest.mark.parametrize(("status", "family"), [(404, CallerError), (429, CallerError), (503, ShortageError)])
async def test_a_status_is_raised_with_its_message(status: int, family: type[Exception]) -> None:
    body = b'{"error":{"message":"why","type":"kind","param":"model"}}'
    with pytest.raises(family, match="why") as caught:
        await call(Answering(status, [body]), "/v1/x", {})
    assert caught.value.status == status and caught.value.type == "kind"  # type: ignore[attr-defined]
    with pytest.raises(family, match="why"):
        [chunk async for chunk in call_stream(Answering(status, [body]), "/v1/x", {})]


async def test_an_error_event_in_a_stream_is_raised() -> None:
    app = Answering(200, [b'data: {"n":1}\n\ndata: {"error":{"message":"died","code":502}}\n\n'])
    stream = call_stream(app, "/v1/x", {})
    assert (await anext(stream))["n"] == 1
    with pytest.raises(ShortageError, match="died"):
        await anext(stream)


async def test_an_answer_that_breaks_off_is_raised() -> None:
    with pytest.raises(ShortageError, match="middle of its answer"):
        await call(Answering(200, [b'{"a":'], breaks=True), "/v1/x", {})


async def test_a_caller_that_leaves_is_a_client_that_leaves() -> None:
    app = Answering(200, [b'data: {"n":1}\n\n'], hangs=True)
    stream = call_stream(app, "/v1/x", {})
    assert (await anext(stream))["n"] == 1
    await stream.aclose()  # type: ignore[attr-defined]
    assert app.left.is_set()


async def test_a_slow_caller_holds_the_app_up() -> None:
    app = Answering(200, [b'data: {"n":%d}\n\n' % number for number in range(100)])
    sent = 0

    async def counting(scope: Any, receive: Any, send: Any) -> None:
        async def count(message: Any) -> None:
            nonlocal sent
            await send(message)
            sent += 1

        await app(scope, receive, count)

    stream = call_stream(counting, "/v1/x", {})
    await anext(stream)
    for _ in range(50):
        await asyncio.sleep(0)
    assert sent < 30
    assert len([chunk async for chunk in stream]) == 99
