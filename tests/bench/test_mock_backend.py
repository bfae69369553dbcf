"""The mock backend over real sockets: vLLM's shapes, the pace on request, and who left."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest_asyncio

from headrace_bench.http_wire import address, get_json, post
from headrace_bench.mock_backend import Backend, Pace, directive, listen
from headrace_bench.prompt_bodies import chat_body
from headrace_bench.relay_client import Counter, Timed, dismiss, listeners, users


@pytest_asyncio.fixture
async def mock() -> AsyncIterator[tuple[str, Backend]]:
    server, url, backend = await listen(Pace())
    yield url, backend
    server.close()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until something it serves has happened."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


async def ask(url: str, request: bytes) -> tuple[bytes, bytes]:
    """Head and raw body of one answer on a connection of its own."""
    reader, writer = await asyncio.open_connection(*address(url))
    writer.write(request.replace(b"host: bench", b"host: bench\r\nconnection: close"))
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return head, body


def events(body: bytes) -> list[Any]:
    """The JSON of each chunk of a chunked event stream; `[DONE]` as None. Each chunk holds one event."""
    found = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        chunk, body = rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        if chunk:
            assert chunk.startswith(b"data: ") and chunk.endswith(b"\n\n")
            found.append(None if chunk == b"data: [DONE]\n\n" else json.loads(chunk[6:]))
    return found


async def test_an_unstreamed_answer_has_vllms_form(mock: tuple[str, Backend]) -> None:
    head, body = await ask(mock[0], post(chat_body("hello", stream=False, max_tokens=4)))
    answer = json.loads(body)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert answer["object"] == "chat.completion" and answer["choices"][0]["message"]["role"] == "assistant"
    assert (
        answer["usage"]["total_tokens"]
        == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
    )
    assert 500 < len(body) < 750


async def test_a_stream_has_the_tokens_asked_for_then_usage_then_done(mock: tuple[str, Backend]) -> None:
    fields = json.loads(chat_body("hello", stream=True, max_tokens=5))
    fields["stream_options"] = {"include_usage": True}
    _, body = await ask(mock[0], post(json.dumps(fields).encode()))
    *tokens, usage, done = events(body)
    assert [token["choices"][0]["delta"]["content"] for token in tokens] == [" headrace"] * 5
    assert [token["choices"][0]["finish_reason"] for token in tokens] == [None] * 4 + ["length"]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 5
    assert done is None


async def test_a_text_completion_is_one_too(mock: tuple[str, Backend]) -> None:
    request = post(b'{"prompt":"hi","stream":true,"max_tokens":1}', b"/v1/completions")
    (token, done) = events((await ask(mock[0], request))[1])
    assert (
        token["object"] == "text_completion" and token["choices"][0]["text"] == " headrace" and done is None
    )


async def test_the_paths_that_gateways_ask_for(mock: tuple[str, Backend]) -> None:
    url = mock[0]
    assert (await get_json(url, "/v1/models"))["data"][0]["id"] == "mock"
    assert await get_json(url, "/get_load") == {"load": 0}
    for path, status in ((b"/health", b"200"), (b"/metrics", b"200"), (b"/nothing", b"404")):
        head, _ = await ask(url, b"GET %b HTTP/1.1\r\nhost: bench\r\n\r\n" % path)
        assert head.split(b" ")[1] == status
    assert mock[1].stats.not_found == {"/nothing": 1}


async def test_prompts_that_begin_alike_have_tokens_that_begin_alike(mock: tuple[str, Backend]) -> None:
    bodies = [
        chat_body(prompt, stream=False, max_tokens=1)
        for prompt in ("same words, then this", "same words, or that")
    ]
    found = [json.loads((await ask(mock[0], post(body, b"/tokenize")))[1]) for body in bodies]
    assert found[0]["count"] == len(found[0]["tokens"]) == len(bodies[0]) // 4
    assert found[0]["tokens"][:20] == found[1]["tokens"][:20] and found[0]["tokens"] != found[1]["tokens"]


async def test_a_body_that_is_not_json_is_the_callers_fault(mock: tuple[str, Backend]) -> None:
    head, _ = await ask(mock[0], post(b"{").replace(b"host", b"connection: close\r\nhost"))
    assert head.split(b" ")[1] == b"400"


async def test_a_client_that_leaves_is_counted_with_the_time_it_left(mock: tuple[str, Backend]) -> None:
    url, backend = mock
    _, writer = await asyncio.open_connection(*address(url))
    writer.write(post(chat_body("x", stream=True, max_tokens=9, directive="[mock first_ms=60000] ")))
    await until(lambda: backend.stats.in_flight == 1)
    writer.close()
    await until(lambda: backend.stats.aborts == 1)
    stats = await get_json(url, "/mock/stats")
    assert stats["in_flight"] == 0 and stats["departures"][0]["chunks_left"] == 9


async def test_a_client_that_does_not_read_holds_the_stream_up(mock: tuple[str, Backend]) -> None:
    url, backend = mock
    reader, writer = await asyncio.open_connection(*address(url), limit=1024)
    tokens = 100_000
    writer.write(
        post(chat_body("x", stream=True, max_tokens=tokens)).replace(b"host:", b"connection: close\r\nhost:")
    )
    seen = -1
    while seen != backend.stats.chunks or seen == 0:  # until a hundred turns of the loop bring nothing more
        seen = backend.stats.chunks
        for _ in range(100):
            await asyncio.sleep(0)
    assert 0 < seen < tokens
    body = b""
    while data := await reader.read(1 << 20):
        body = (body + data)[-100:]
    assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and backend.stats.chunks == tokens
    writer.close()


def test_a_directive_is_found_inside_any_body() -> None:
    assert directive(b'{"x":"[mock first_ms=1200 interval_ms=0.5] hi"}') == {
        "first_ms": 1200,
        "interval_ms": 0.5,
    }
    assert directive(b'{"x":"[mock] hi"}') == {}


async def test_a_closed_loop_answers_every_user(mock: tuple[str, Backend]) -> None:
    counter = Counter()
    opened = await users(mock[0], [chat_body("x", stream=False, max_tokens=1)], 4, counter)
    await until(lambda: counter.answers >= 100)
    dismiss(opened)
    await until(lambda: all(user.transport.is_closing() for user in opened))
    assert counter.errors == 0 and counter.answers == mock[1].stats.requests


async def test_listeners_count_every_event_and_say_when_all_have_ended(mock: tuple[str, Backend]) -> None:
    counter = Counter()
    body = chat_body("x", stream=True, max_tokens=7)
    ended = await listeners(mock[0], body, streams=3, spread_s=0.0, counter=counter)
    await ended.wait()
    assert (counter.events, counter.answers, counter.started, counter.errors) == (21, 3, 3, 0)


async def test_the_first_token_is_timed_on_one_connection_again_and_again(mock: tuple[str, Backend]) -> None:
    transport, timed = await asyncio.get_running_loop().create_connection(Timed, *address(mock[0]))
    request = post(chat_body("x", stream=True, max_tokens=2))
    assert all([await timed.ttft_ns(request) > 0 for _ in range(3)])
    assert mock[1].stats.requests == 3
    transport.close()
