"""The clients of the relay benchmark: asyncio protocols that do little more than count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from typing import cast

from headrace_bench.http_wire import AnswerScanner, address, post

EVENT = b"data: {"


class Counter:
    """What all connections of one load add up."""

    __slots__ = ("answers", "errors", "events", "last_error", "reads", "started")

    def __init__(self) -> None:
        self.answers = self.errors = self.events = self.reads = self.started = 0
        self.last_error = ""

    def fail(self, reason: str) -> None:
        self.errors += 1
        self.last_error = reason


class User(asyncio.Protocol):
    """Sends the next request as soon as the last one is answered, until told to stop."""

    def __init__(self, requests: Iterator[bytes], counter: Counter) -> None:
        self.requests = requests
        self.counter = counter
        self.scanner = AnswerScanner()
        self.transport: asyncio.Transport
        self.stopping = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses
        self.transport.write(next(self.requests))

    def data_received(self, data: bytes) -> None:
        try:
            done = self.scanner.feed(data)
        except ValueError as error:
            self.counter.fail(str(error))
            self.transport.abort()
            return
        if done:
            self.counter.answers += 1
            if self.stopping:
                self.transport.close()
            else:
                self.transport.write(next(self.requests))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.stopping:
            self.counter.fail(f"connection lost: {exc or 'closed by the server'}")


class Listener(asyncio.Protocol):
    """Reads one stream and counts its events."""

    def __init__(self, request: bytes, counter: Counter, ended: Callable[[], None] = lambda: None) -> None:
        self.request = request
        self.counter = counter
        self.ended = ended
        self.scanner = AnswerScanner()
        self.transport: asyncio.Transport
        self.begun = self.done = False
        self.tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        counter = self.counter
        events = (self.tail + data).count(EVENT)  # the tail is too short to hold a counted one again
        self.tail = data[-len(EVENT) + 1 :]
        if events:
            counter.events += events
            counter.reads += 1
            if not self.begun:
                self.begun = True
                counter.started += 1
        try:
            if self.scanner.feed(data):
                counter.answers += 1
                self.done = True
                self.transport.close()
        except ValueError as error:
            counter.fail(str(error))
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done:
            self.counter.fail(f"stream cut: {exc or 'closed by the server'}")
        self.ended()


class Timed(asyncio.Protocol):
    """One connection on which streams are asked for one after another and their first event is timed."""

    def __init__(self) -> None:
        self.scanner = AnswerScanner()
        self.transport: asyncio.Transport
        self.asked_ns = 0
        self.first_ns = 0
        self.answered: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses

    async def ttft_ns(self, request: bytes) -> int:
        """Nanoseconds from the request's write to the first event. Raises ConnectionError or ValueError."""
        self.answered = asyncio.get_running_loop().create_future()
        self.first_ns = 0
        self.asked_ns = time.perf_counter_ns()
        self.transport.write(request)
        async with asyncio.timeout(30):
            return await self.answered

    def data_received(self, data: bytes) -> None:
        if self.first_ns == 0 and EVENT in data:
            self.first_ns = time.perf_counter_ns()
        try:
            done = self.scanner.feed(data)
        except ValueError as error:
            if self.answered is not None and not self.answered.done():
                self.answered.set_exception(error)
            return
        if done and self.answered is not None:
            self.answered.set_result(self.first_ns - self.asked_ns)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answered is not None and not self.answered.done():
            self.answered.set_exception(ConnectionError("connection lost"))


async def users(url: str, bodies: Iterable[bytes], connections: int, counter: Counter) -> list[User]:
    """Start a closed loop of `connections` users that take turns through `bodies`; `dismiss` ends it."""
    loop = asyncio.get_running_loop()
    requests = cycle([post(body) for body in bodies])
    host, port = address(url)
    opened: list[User] = []
    for _ in range(connections):
        _, user = await loop.create_connection(lambda: User(requests, counter), host, port)
        opened.append(user)
    return opened


def dismiss(opened: Iterable[User]) -> None:
    """End a closed loop: every user leaves after the answer it waits for."""
    for user in opened:
        user.stopping = True


async def listeners(url: str, body: bytes, streams: int, spread_s: float, counter: Counter) -> asyncio.Event:
    """Open `streams` streams evenly over `spread_s`, so that their tokens do not march in step.

    Returns an event that is set when the last one has ended.
    """
    loop = asyncio.get_running_loop()
    host, port = address(url)
    request, all_ended = post(body), asyncio.Event()
    left = streams

    def ended() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            all_ended.set()

    for _ in range(streams):
        await loop.create_connection(lambda: Listener(request, counter, ended), host, port)
        await asyncio.sleep(spread_s / streams)
    return all_ended
