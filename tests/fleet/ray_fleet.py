"""A controller on a local Ray with simulated replicas, a real gateway before them, and what tests ask of both."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import openai

from headrace.config import Config, Gateway
from headrace.fleet import cluster, warden
from headrace.fleet.membership import ControllerMembership
from headrace.fleet.status import FleetStatus
from headrace.gateway.server import GatewayServer
from headrace.gateway.settings import GatewaySettings
from headrace_router.types import Membership, Replica, ReplicaState

PATIENCE_S = 60.0
TOKEN = "token"


@dataclass
class Fleet:
    connection: cluster.Connection
    controller: Any
    server: GatewayServer | None = None  # of the last gateway

    async def until(self, holds: Callable[[Membership], bool]) -> Membership:
        """The first membership of which `holds` is true, by long poll."""
        source = ControllerMembership(self.controller)
        async with asyncio.timeout(PATIENCE_S):
            membership = await source.watch(None)
            while not holds(membership):
                membership = await source.watch(membership)
        return membership

    async def ready(self, count: int, model: str = "sim") -> Membership:
        """The first membership in which a model has exactly `count` replicas, all ready."""

        def holds(now: Membership) -> bool:
            states = [one.state for one in now.replicas if one.model == model]
            return states == [ReplicaState.READY] * count

        return await self.until(holds)

    async def shrink(self, count: int) -> Replica:
        """Pin the pool to `count`; the first replica that is told to drain."""
        # Looked for from before: a drain can be over before the next poll.
        draining = asyncio.create_task(self._draining())
        await self.scale(count)
        return await draining

    async def _draining(self) -> Replica:
        membership = await self.until(
            lambda now: any(one.state is ReplicaState.DRAINING for one in now.replicas)
        )
        return next(one for one in membership.replicas if one.state is ReplicaState.DRAINING)

    async def status(self) -> FleetStatus:
        status: FleetStatus = await self.controller.status.remote()
        return status

    async def scale(self, count: int | None, pool: str = "sim") -> Any:
        return await self.controller.scale.remote(pool, count)

    async def rolled(self, id: str) -> FleetStatus:
        """The fleet once the rollout of that id has ended."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status = await self.status()
                rollout = status.rollout
                if status.is_surveyed:
                    assert rollout is not None and rollout.id == id
                    if rollout.state != "rolling":
                        return status
                await self.changed()

    async def changed(self) -> None:
        """Return after the next change of the members, or a moment."""
        source = ControllerMembership(self.controller)
        known = await source.watch(None)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(source.watch(known), 0.2)

    @asynccontextmanager
    async def gateway(self, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
        """A client of a gateway that follows the controller. No try of it is repeated."""
        config = Gateway.model_validate({"port": 0, "access_log": False, "policy": "round_robin", **options})
        line = ControllerMembership(self.controller)
        server = self.server = GatewayServer(GatewaySettings(0, config, 5.0), line, internal_token=TOKEN)
        host, port = server.bind()
        await server.start()
        try:
            client = openai.AsyncOpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0)
            async with client:
                yield client
            assert server.context is not None
            server.context.check_integrity()
        finally:
            await server.stop()


@contextmanager
def ray_fleet(config: Config) -> Iterator[Fleet]:
    """Everything of it is gone afterwards."""
    stdout = sys.stdout
    connection = cluster.start_local()
    sys.stdout.close()
    sys.stdout = stdout
    from headrace.fleet import controller

    try:
        yield Fleet(connection, controller.create(config, TOKEN, "127.0.0.1"))
    finally:
        cluster.leave(connection)
        assert warden.marked(connection.mark) == []


async def count_tokens(client: openai.AsyncOpenAI, tokens: int, begun: asyncio.Event | None = None) -> int:
    """Stream an answer of so many tokens to its end; how many came. Raises what the client raises."""
    text, counted = "", 0
    async for chunk in await client.completions.create(
        model="sim",
        prompt="Tell me of rivers.",
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    ):
        if chunk.choices:
            text += chunk.choices[0].text
        if chunk.usage is not None:
            counted = chunk.usage.completion_tokens
        if begun is not None:
            begun.set()
    assert text
    return counted


@asynccontextmanager
async def asking(count: int, ask: Callable[[asyncio.Event], Awaitable[int]]) -> AsyncIterator[list[int]]:
    """So many who stream one answer after the other, each with `ask`, which sets the event when its answer has begun.
    Once all have begun, yields how many tokens each answer had; raises what a client has seen."""
    had: list[int] = []
    enough = asyncio.Event()

    async def one(begun: asyncio.Event) -> None:
        while not enough.is_set():
            had.append(await ask(begun))

    begun = [asyncio.Event() for _ in range(count)]
    tasks = [asyncio.create_task(one(event)) for event in begun]
    await asyncio.gather(*(event.wait() for event in begun))
    try:
        yield had
    finally:
        enough.set()
        await asyncio.gather(*tasks)
