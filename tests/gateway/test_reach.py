"""How a replica is reached: connections kept and new, those that went stale, and those that never came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

from headrace.config import Gateway
from headrace.gateway.context import GatewayContext
from headrace.gateway.http_response import ResponseHead
from headrace.gateway.reach import Reach
from headrace.gateway.upstream import Target, UpstreamPool
from headrace_router.policies import make_policy
from headrace_router.router import Router
from headrace_router.types import BootId, Endpoints, Membership, Replica, ReplicaId, Role

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
NAME = ReplicaId("r")


class Server:
    """Answers each connection's requests by `script`, one entry a connection: how many it answers, and with what it
    breaks off the next."""

    def __init__(self, *script: tuple[int, bytes]) -> None:
        self.script = list(script)
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, last = self.script[self.connections]
        self.connections += 1
        try:
            for _ in range(answers):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(ANSWER)
            await reader.readuntil(b"\r\n\r\n")
            writer.write(last)
        except asyncio.IncompleteReadError:
            pass
        writer.close()


class Request(Reach):
    """One request, and what became of it."""

    deadline_s = 0.0
    times_sent = 0

    def __init__(self, context: GatewayContext) -> None:
        self._errand = self  # type: ignore[assignment]
        self._context = context
        self.head: ResponseHead | None = None
        self.body = b""
        self.suspends: bool | None = None  # of the loss
        self.over = asyncio.Event()

    async def ask(self) -> Request:
        self.reach(self._context.targets[NAME])
        async with asyncio.timeout(20):
            await self.over.wait()
        return self

    def goes_out(self) -> None:
        self.times_sent += 1

    def fail(self, error: Exception) -> None:
        raise error

    @property
    def _has_begun(self) -> bool:
        return self.head is not None

    def _request(self, target: Target) -> bytes:
        return b"POST / HTTP/1.1\r\n%bcontent-length: 0\r\n\r\n" % target.prefix

    def _lost(self, reason: str, *, suspend: bool = False) -> None:
        self.suspends = suspend
        self.over.set()

    def upstream_head(self, head: ResponseHead) -> None:
        self.head = head

    def upstream_body(self, data: bytes) -> None:
        self.body += data

    def upstream_event(self, framed: bytes, start: int) -> None:
        self.body += framed[start:-2]

    def upstream_flush(self) -> None:
        pass

    def upstream_complete(self) -> None:
        self._connection = None
        self.over.set()


class Unreachable(UpstreamPool):
    """No connection ever comes."""

    async def connect(self, target: Target) -> Any:
        await asyncio.Event().wait()


@asynccontextmanager
async def before(*script: tuple[int, bytes]) -> AsyncIterator[tuple[GatewayContext, Server]]:
    server = Server(*script)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    context = GatewayContext(Gateway(), Router(make_policy("round_robin", 0)), asyncio.get_running_loop())
    endpoints = Endpoints(f"http://127.0.0.1:{port}")
    context.set_membership(Membership(1, (Replica(NAME, BootId("b"), "m", Role.UNIFIED, endpoints),)))
    try:
        yield context, server
    finally:
        context.pool.close()
        listening.close()
        await listening.wait_closed()


async def test_a_connection_that_was_kept_is_used_again() -> None:
    async with before((2, b"")) as (context, server):
        assert [(await Request(context).ask()).body for _ in range(2)] == [b"ok"] * 2
        assert server.connections == 1


async def test_one_that_went_stale_is_replaced_and_the_same_replica_asked_again() -> None:
    async with before((1, b""), (1, b"")) as (context, server):
        await Request(context).ask()
        asked = await Request(context).ask()
        assert (asked.body, asked.suspends, server.connections) == (b"ok", None, 2)
        assert asked.times_sent == 2


async def test_a_fresh_one_that_breaks_is_a_loss() -> None:
    async with before((0, b"")) as (context, server):
        assert (await Request(context).ask()).suspends is False
        assert server.connections == 1


async def test_once_the_answer_has_begun_nobody_is_asked_twice() -> None:
    async with before((1, ANSWER[:-1])) as (context, server):
        await Request(context).ask()
        asked = await Request(context).ask()
        assert (asked.body, asked.suspends, server.connections) == (b"o", False, 1)


async def test_a_stale_one_of_a_replica_that_has_left_is_a_loss() -> None:
    async with before((1, b"")) as (context, _):
        await Request(context).ask()
        request = Request(context)
        request.reach(context.targets[NAME])
        context.targets.clear()
        async with asyncio.timeout(20):
            await request.over.wait()
        assert request.suspends is False


async def test_a_replica_that_refuses_is_to_be_left_alone() -> None:
    async with before() as (context, _):
        pass
    assert (await Request(context).ask()).suspends is True


async def test_a_connection_that_does_not_come_in_time_is_given_up() -> None:
    async with before() as (context, _):
        context.pool = Unreachable(context.loop, monotonic)
        request = Request(context)
        assert not request.gives_up()
        request.reach(context.targets[NAME])
        assert request.deadline_s > monotonic()
        assert request.gives_up()
        assert request.suspends is True
        assert not request.gives_up(), "once is enough"


async def test_whoever_lets_go_hears_nothing_more() -> None:
    async with before((1, b"")) as (context, _):
        request = Request(context)
        request.reach(context.targets[NAME])
        while request._connecting is not None:
            await asyncio.sleep(0)
        request.let_go()
        request.let_go()
        while context.pool.num_connections:
            await asyncio.sleep(0)
        assert (request.head, request.suspends) == (None, None)
