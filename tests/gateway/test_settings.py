"""A gateway that is told other settings while it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
from disaggregated import ENGINE, MODEL, TOKEN, Fleet, Told

from headrace.config import Config, Gateway, parse
from headrace.gateway.server import GatewayServer
from headrace.gateway.settings import GatewaySettings
from headrace_router.types import Role


def config(**gateway: Any) -> Config:
    return parse(
        {
            "models": [{"name": MODEL, "backend": "simulated"}],
            "gateway": {"port": 0, "access_log": False, "policy": "least_loaded", **gateway},
        }
    )


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Fleet, Told]]:
    fleet, told = Fleet(), Told()
    for number in range(2):
        await fleet.add(f"u{number}", Role.UNIFIED, ENGINE)
    first: Gateway = config().gateway
    fleet.server = GatewayServer(GatewaySettings(0, first, 5.0), fleet, internal_token=TOKEN, changes=told)
    _, fleet.port = fleet.server.bind()
    await fleet.server.start()
    try:
        yield fleet, told
    finally:
        await fleet.server.stop()
        for backend in fleet.backends.values():
            await backend.stop()


async def take(fleet: Fleet, told: Told, new: Config, version: int) -> None:
    """Tell it, and wait until the gateway asks for what comes next."""
    before = told.asked
    told.tell(new.gateway, version)
    async with asyncio.timeout(30):
        while told.asked == before:
            await asyncio.sleep(0)


def client(fleet: Fleet) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{fleet.port}/v1", api_key="none", max_retries=0)


async def test_limits_and_timeouts_hold_for_connections_that_are_open() -> None:
    async with serving() as (fleet, told), client(fleet) as ask:
        await ask.completions.create(model=MODEL, prompt="x" * 5000, max_tokens=1)
        await take(fleet, told, config(limits={"body_bytes": 1024}, retries=7, timeouts={"idle_s": 9.0}), 1)
        try:
            await ask.completions.create(model=MODEL, prompt="x" * 5000, max_tokens=1)
            raise AssertionError("it should have been too large")
        except openai.APIStatusError as refused:
            assert refused.status_code == 413
        context = fleet.context
        assert (context.config.retries, context.idle_s, context.dead_after_s) == (7, 9.0, 5.0)
        await fleet.settled()


async def test_another_policy_takes_over_between_two_tokens_of_a_stream() -> None:
    async with serving() as (fleet, told), client(fleet) as ask:
        stream = await ask.completions.create(
            model=MODEL, prompt="On and on", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = aiter(stream)
        await anext(chunks)
        await take(fleet, told, config(policy="delay"), 1)
        assert fleet.context.router.policy.name == "delay"
        assert fleet.context.prefixes is not None, "the new policy wants to know prompts"
        rest = [chunk async for chunk in chunks]
        assert rest[-1].choices[0].finish_reason == "length"
        for _ in range(4):
            await ask.completions.create(model=MODEL, prompt="Again " * 100, max_tokens=2)
        await take(fleet, told, config(policy="round_robin"), 2)
        await ask.completions.create(model=MODEL, prompt="Once more", max_tokens=2)
        assert fleet.context.router.policy.name == "round_robin"
        await fleet.settled()


async def test_a_log_can_be_turned_on_and_off() -> None:
    async with serving() as (fleet, told):
        await take(fleet, told, config(access_log=True), 1)
        assert fleet.context.access_log is not None
        await take(fleet, told, config(), 2)
        assert fleet.context.access_log is None
