"""The load client against servers that answer well, badly, in pieces or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace_bench.answer_stream import EventSplitter, error_message
from headrace_bench.exchange import answer_of
from headrace_bench.load_client import LoadClient, Target, TargetError

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def event(payload: object) -> bytes:
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    line = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(line), line)


def said(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


USAGE = event(
    {
        "choices": [],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
    }
)
ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
WHOLE = HEAD + ROLE + said("He") + said("llo") + said("", "stop") + USAGE + event(b"[DONE]") + END


def full(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode() + body


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), 0)
    return head + await reader.readexactly(length)


def answer_with(data: bytes, *, close: bool = False) -> Answer:
    """Answers every request of a connection with `data`; `close` ends the connection after it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(data)
            await writer.drain()
            if close:
                return

    return answer


@asynccontextmanager
async def served(answer: Answer) -> AsyncIterator[LoadClient]:
    """A client of a server that runs `answer` for every connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    client = LoadClient(Target.parse(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"))
    try:
        yield client
    finally:
        client.close()
        server.close()
        await server.wait_closed()


async def test_a_stream_is_text_usage_and_times() -> None:
    async with served(answer_with(WHOLE)) as client:
        seen = await client.exchange("POST", "/v1/chat/completions", b"{}", streamed=True)
    text, usage = answer_of(seen)
    assert (seen.error, seen.status, text) == (None, 200, "Hello")
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (9, 2, 4)
    assert seen.first_s is not None
    assert seen.sent_s <= seen.first_s <= seen.last_s <= seen.end_s
    assert len(seen.gaps_s) == 1  # neither the role, the finish nor the usage chunk is content


async def test_a_stream_that_comes_byte_by_byte_is_the_same() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for number in range(len(WHOLE)):
            writer.write(WHOLE[number : number + 1])
            await writer.drain()
            await asyncio.sleep(0)

    async with served(answer) as client:
        seen = await client.exchange("POST", "/", b"{}", streamed=True)
    assert (seen.error, "".join(seen.text), len(seen.gaps_s)) == (None, "Hello", 1)


async def test_a_whole_answer_is_read_without_a_stream() -> None:
    body = json.dumps(
        {
            "choices": [{"message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": None},
        }
    ).encode()
    async with served(answer_with(full(body))) as client:
        seen = await client.exchange("POST", "/", b"{}")
    text, usage = answer_of(seen)
    assert text == "Hi"
    assert usage is not None
    assert usage.cached_tokens is None


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    data = b"HTTP/1.1 200 OK\r\n\r\n" + b'{"choices": []}'
    async with served(answer_with(data, close=True)) as client:
        seen = await client.exchange("GET", "/")
    assert (seen.error, bytes(seen.body)) == (None, b'{"choices": []}')


@pytest.mark.parametrize(
    ("data", "kind", "told"),
    [
        (full(b'{"error": {"message": "slow down"}}', "429 Too Many"), "http_429", "slow down"),
        (full(b'{"error": "no"}', "400 Bad"), "http_400", "no"),
        (full(b"<html>\n busy", "503 Busy"), "http_503", "<html> busy"),
        (full(b"", "500 Oops"), "http_500", ""),
        (HEAD + said("a") + END, "cut", "after 1 chunks without"),
        (HEAD + said("a") + said("b"), "cut", "closed after 2 chunks"),
        (
            HEAD + said("a") + event({"error": {"message": "engine died"}}) + END,
            "stream_error",
            "engine died",
        ),
        (HEAD + event(b"{nonsense") + END, "bad_response", "JSON"),
        (HEAD + event({"choices": 5}) + END, "bad_response", "array"),
        (b"SSH-2.0-OpenSSH\r\n", "bad_response", "HTTP"),
        (b"", "cut", "before the first byte"),
    ],
)
async def test_a_failure_has_a_kind_and_a_reason(data: bytes, kind: str, told: str) -> None:
    async with served(answer_with(data, close=True)) as client:
        seen = await client.exchange("POST", "/", b"{}", streamed=True)
    assert seen.error == kind
    assert told in seen.detail
    assert "\n" not in seen.detail


async def test_nobody_listening_is_a_connect_error() -> None:
    async with served(answer_with(b"")) as client:
        target = client.target
    seen = await LoadClient(target).exchange("GET", "/")
    assert seen.error == "connect"


async def test_silence_is_a_timeout_and_the_server_sees_the_client_leave() -> None:
    left = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + said("a"))
        assert await reader.read() == b""
        left.set()

    async with served(answer) as client:
        seen = await client.exchange("POST", "/", b"{}", streamed=True, timeout_s=0.05)
        await left.wait()
    assert seen.error == "timeout"
    assert len(seen.text) == 1


async def test_a_cancelled_exchange_closes_its_connection() -> None:
    came, left = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        came.set()
        assert await reader.read() == b""
        left.set()

    async with served(answer) as client:
        task = asyncio.create_task(client.exchange("POST", "/", b"{}"))
        await came.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await left.wait()
    assert task.cancelled()


async def test_connections_are_kept_and_used_again() -> None:
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await answer_with(WHOLE)(reader, writer)

    async with served(answer) as client:
        for _ in range(5):
            assert (await client.exchange("POST", "/", b"{}", streamed=True)).error is None
        assert connections == 1
        await asyncio.gather(*(client.exchange("POST", "/", b"{}", streamed=True) for _ in range(3)))
        assert connections == 3


async def test_a_connection_that_the_server_closes_is_not_used_again() -> None:
    data = full(b"{}", more="connection: close\r\n")
    async with served(answer_with(data, close=True)) as client:
        for _ in range(5):
            assert (await client.exchange("GET", "/")).error is None


@settings(deadline=None)
@given(st.lists(st.binary(max_size=30).filter(lambda b: b"\n" not in b), max_size=8), st.data())
def test_events_are_the_same_wherever_the_stream_is_cut(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(b"data: " + payload + b"\n\n" for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    splitter = EventSplitter()
    seen = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        seen += splitter.feed(stream[start:end])
    assert seen == [payload.strip() for payload in payloads]


def test_an_endless_line_is_refused() -> None:
    splitter = EventSplitter(max_line=100)
    with pytest.raises(ValueError, match="100 bytes"):
        for _ in range(100):
            splitter.feed(b"data: aaaaaaaaa")


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_an_error_message_is_one_short_line_of_anything(body: bytes) -> None:
    told = error_message(body)
    assert len(told) <= 200
    assert len(told.splitlines()) <= 1


@pytest.mark.parametrize(
    ("url", "prefix", "port"),
    [
        ("http://127.0.0.1:8000", "", 8000),
        ("http://127.0.0.1:8000/v1/", "", 8000),
        ("https://example.org/llm/v1", "/llm", 443),
        ("http://[::1]:9", "", 9),
    ],
)
def test_a_url_may_end_in_v1(url: str, prefix: str, port: int) -> None:
    target = Target.parse(url)
    assert (target.prefix, target.port, target.tls) == (prefix, port, url.startswith("https"))


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://a", "http://", "http://a:b", "http://me:key@host"]
)
def test_a_url_that_cannot_be_called_is_refused(url: str) -> None:
    with pytest.raises(TargetError):
        Target.parse(url)


def test_a_header_cannot_carry_a_second_one() -> None:
    with pytest.raises(TargetError, match="line break"):
        Target.parse("http://a", {"x": "1\r\ny: 2"})
