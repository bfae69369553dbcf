"""A server that answers like vLLM and costs next to nothing: what a gateway is measured in front of.

    python -m headrace_bench.mock_backend [--port 0] [--interval-ms 20] [--first-ms 0] [--chunks 16]

`max_tokens` sets the number of streamed tokens. The pace can also be set per request by a directive anywhere
in the body, `[mock first_ms=1200 interval_ms=0]`: gateways drop unknown fields and headers, never the prompt.
Tokens are written one write each (uvloop would join writes of one loop turn, so each takes its own turn), the
head before them, as vLLM does. `GET /mock/stats` tells what it saw, clients' departures included.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import httptools
import msgspec
import uvloop

from headrace_bench import mock_answers as answers

DIRECTIVE = re.compile(rb"\[mock ((?:\w+=[\d.]+ ?)+)\]")
MAX_DEPARTURES_KEPT = 1000
MAX_PATHS_KEPT = 32


@dataclass(frozen=True, slots=True)
class Pace:
    """How a request is answered where it does not say."""

    first_ms: float = 0.0  # from the request's end to the first token, or to the unstreamed answer
    interval_ms: float = 0.0  # between tokens; 0: as fast as the connection takes them
    chunks: int = 16


class StreamOptions(msgspec.Struct):
    """`stream_options` of a request."""

    include_usage: bool = False


class Question(msgspec.Struct):
    """The fields of a request that matter here."""

    model: str = answers.MODEL
    stream: bool = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream_options: StreamOptions | None = None


@dataclass(slots=True)
class Stats:
    """Counters since the start. `departures` are clients gone before their answer's end."""

    requests: int = 0
    in_flight: int = 0
    chunks: int = 0
    bytes_written: int = 0  # of streamed tokens, as handed to the transport
    aborts: int = 0
    not_found: dict[str, int] = field(default_factory=dict)  # what gateways ask for and a mock lacks, by path
    departures: list[dict[str, Any]] = field(default_factory=list)  # at_ns (CLOCK_MONOTONIC), chunks


def directive(body: bytes) -> dict[str, float]:
    """The numbers of the body's `[mock key=number ...]`, empty without one."""
    found = DIRECTIVE.search(body)
    if found is None:
        return {}
    pairs = (pair.split(b"=") for pair in found[1].split())
    return {key.decode(): float(value) for key, value in pairs}


def tokens_of(body: bytes) -> list[int]:
    """Made-up token ids, one per four bytes; equal beginnings of bodies have equal beginnings of tokens."""
    return memoryview(body[: len(body) // 4 * 4]).cast("I").tolist()


class Backend:
    """What all connections of one mock share."""

    def __init__(self, pace: Pace, model: str, loop: asyncio.AbstractEventLoop) -> None:
        self.pace = pace
        self.model = model
        self.loop = loop
        self.stats = Stats()
        self.decode = msgspec.json.Decoder(Question).decode
        self.whole = {
            path: answers.full(answers.completion(path.endswith(b"chat/completions"), model, 16))
            for path in (b"/v1/chat/completions", b"/v1/completions")
        }

        self.asides: dict[bytes, Callable[[bytes], object]] = {
            b"/health": lambda _: {},
            b"/v1/models": lambda _: {"object": "list", "data": [answers.model_card(model)]},
            b"/get_load": lambda _: {"load": self.stats.in_flight},
            b"/tokenize": lambda body: {
                "count": len(body) // 4,
                "max_model_len": 1 << 20,
                "tokens": tokens_of(body),
            },
            b"/v1/chat/completions/render": lambda body: {
                "request_id": "render",
                "token_ids": tokens_of(body),
            },
            b"/mock/stats": lambda _: self.stats,
        }

    def aside(self, path: bytes, body: bytes) -> bytes:
        """The answer to what a gateway asks for itself: health, load, models, a prompt's tokens."""
        if path == b"/metrics":
            text = f'vllm:num_requests_running{{model_name="{self.model}"}} {self.stats.in_flight}\n'
            return answers.full(text.encode(), content_type=b"text/plain; version=0.0.4")
        answer = self.asides.get(path)
        if answer is not None:
            return answers.full(msgspec.json.encode(answer(body)))
        name, lacking = path.decode("latin-1"), self.stats.not_found
        if name in lacking or len(lacking) < MAX_PATHS_KEPT:
            lacking[name] = lacking.get(name, 0) + 1
        return answers.full(b'{"error":{"message":"not found","code":404}}', b"404 Not Found")


class Connection(asyncio.Protocol):
    """One client connection: one request at a time, kept alive."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.parser = httptools.HttpRequestParser(self)
        self.transport: asyncio.Transport
        self.path = b""
        self.body: list[bytes] = []
        self.answering = self.keep_alive = False
        self.writable = True
        self.timer: asyncio.Handle | None = None
        self.left = 0  # tokens still to be written
        self.interval_s = 0.0
        self.chunk = self.ending = b""

    # --- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.write(answers.full(b"", b"400 Bad Request"))
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.answering:
            stats = self.backend.stats
            stats.in_flight -= 1
            stats.aborts += 1
            stats.departures.append({"at_ns": time.monotonic_ns(), "chunks_left": self.left})
            del stats.departures[:-MAX_DEPARTURES_KEPT]

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        if self.answering and self.left > 0 and self.timer is None:
            self.write_token()

    # --- one request

    def on_url(self, url: bytes) -> None:
        self.path = url.partition(b"?")[0]
        self.body.clear()

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        if self.answering:  # pipelined: no gateway does that
            self.transport.abort()
            return
        self.keep_alive = self.parser.should_keep_alive()  # the parser knows it only now
        whole = self.backend.whole.get(self.path)
        if whole is None or self.parser.get_method() != b"POST":
            self.transport.write(self.backend.aside(self.path, b"".join(self.body)))
            self.end_of_answer()
            return
        self.answer(whole, b"".join(self.body))

    def answer(self, whole: bytes, body: bytes) -> None:
        backend, stats = self.backend, self.backend.stats
        try:
            question = backend.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.transport.write(
                answers.full(b'{"error":{"message":"bad body","code":400}}', b"400 Bad Request")
            )
            self.end_of_answer()
            return
        stats.requests += 1
        stats.in_flight += 1
        self.answering = True
        asked = directive(body)
        first_s = asked.get("first_ms", backend.pace.first_ms) / 1000
        if question.stream:
            self.interval_s = asked.get("interval_ms", backend.pace.interval_ms) / 1000
            self.begin_stream(question, first_s)
        elif first_s > 0:
            self.timer = backend.loop.call_later(first_s, self.write_whole, whole)
        else:
            self.write_whole(whole)

    def write_whole(self, whole: bytes) -> None:
        self.timer = None
        self.transport.write(whole)
        self.release()

    def begin_stream(self, question: Question, first_s: float) -> None:
        chat = self.path.endswith(b"chat/completions")
        tokens = question.max_completion_tokens or question.max_tokens or self.backend.pace.chunks
        answer_id = f"{'chatcmpl' if chat else 'cmpl'}-{self.backend.stats.requests:032x}"
        event = answers.token_event(chat, question.model, answer_id, " headrace", last=False)
        ending = answers.framed(answers.token_event(chat, question.model, answer_id, " headrace", last=True))
        if question.stream_options is not None and question.stream_options.include_usage:
            ending += answers.framed(answers.usage_event(chat, question.model, answer_id, tokens))
        self.chunk = answers.framed(event)
        self.ending = ending + answers.framed(answers.DONE) + answers.LAST_CHUNK
        self.left = tokens
        self.transport.write(answers.STREAM_HEAD)
        loop = self.backend.loop
        self.timer = (
            loop.call_later(first_s, self.write_token) if first_s > 0 else loop.call_soon(self.write_token)
        )

    def write_token(self) -> None:
        self.timer = None
        if not self.writable and self.interval_s == 0:
            return  # `resume_writing` goes on
        stats = self.backend.stats
        self.left -= 1
        data = self.chunk if self.left else self.ending
        stats.chunks += 1
        stats.bytes_written += len(data)
        self.transport.write(data)
        if self.left == 0:
            self.release()
        elif self.interval_s > 0:
            self.timer = self.backend.loop.call_later(self.interval_s, self.write_token)
        else:
            self.timer = self.backend.loop.call_soon(self.write_token)

    def release(self) -> None:
        self.answering = False
        self.backend.stats.in_flight -= 1
        self.end_of_answer()

    def end_of_answer(self) -> None:
        if not self.keep_alive:
            self.transport.close()


async def listen(
    pace: Pace, model: str = answers.MODEL, port: int = 0
) -> tuple[asyncio.Server, str, Backend]:
    """Serve on the loopback; port 0 takes a free one. Returns the server, its URL and its shared state."""
    loop = asyncio.get_running_loop()
    backend = Backend(pace, model, loop)
    server = await loop.create_server(lambda: Connection(backend), "127.0.0.1", port, backlog=4096)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", backend


async def serve(pace: Pace, model: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    server, url, _ = await listen(pace, model, port)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    print(f"ready: {url}", flush=True)
    await stopped.wait()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="headrace_bench.mock_backend", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default=answers.MODEL)
    parser.add_argument("--first-ms", type=float, default=0.0)
    parser.add_argument("--interval-ms", type=float, default=0.0)
    parser.add_argument("--chunks", type=int, default=16, help="tokens of a stream without max_tokens")
    args = parser.parse_args()
    pace = Pace(args.first_ms, args.interval_ms, args.chunks)
    uvloop.run(serve(pace, args.model, args.port))


if __name__ == "__main__":
    main()
