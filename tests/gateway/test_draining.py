"""A replica that drains gets nothing new, finishes what it has, and hands on what it has not begun to answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import openai
from disaggregated import MODEL, Fleet, open_fleet

from headrace_router.types import ReplicaState

SLOW = {"step_s": 0.01, "max_running": 64}


def drain(fleet: Fleet, name: str) -> None:
    fleet.replicas[name] = replace(fleet.replicas[name], state=ReplicaState.DRAINING)
    fleet.tell()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0)


def client_of(fleet: Fleet) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{fleet.port}/v1", api_key="none", max_retries=0)


async def ask(client: openai.AsyncOpenAI, tokens: int) -> int:
    answer = await client.completions.create(
        model=MODEL, prompt="Rivers.", max_tokens=tokens, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    return answer.usage.completion_tokens


async def test_what_runs_is_finished_and_nothing_new_comes() -> None:
    async with open_fleet(0, 0, 2, engine=SLOW, policy="round_robin", disaggregation="never_remote") as fleet:
        async with client_of(fleet) as client:
            first = [asyncio.create_task(ask(client, 40)) for _ in range(8)]
            await until(lambda: fleet.in_flight("u0") == fleet.in_flight("u1") == 4)
            drain(fleet, "u0")
            await until(lambda: len(fleet.context.router.eligible(MODEL)) == 1)
            later = [asyncio.create_task(ask(client, 5)) for _ in range(8)]
            assert fleet.in_flight("u0") <= 4
            assert await asyncio.gather(*first) == [40] * 8
            assert await asyncio.gather(*later) == [5] * 8
            assert fleet.backends["u0"].unfinished() == 0
        await fleet.settled()


async def test_what_is_unanswered_at_the_deadline_is_answered_elsewhere() -> None:
    async with open_fleet(0, 0, 2, engine=SLOW, policy="round_robin", disaggregation="never_remote") as fleet:
        async with client_of(fleet) as client:
            asked = [asyncio.create_task(ask(client, 60)) for _ in range(8)]
            await until(lambda: fleet.in_flight("u0") == fleet.in_flight("u1") == 4)
            drain(fleet, "u0")
            await fleet.backends["u0"].stop(0.0)
            assert await asyncio.gather(*asked) == [60] * 8
            assert fleet.context.metrics.of(MODEL).retries == 4
        await fleet.settled()


async def test_a_request_still_being_read_counts_as_work() -> None:
    """What the engine does not know yet, a drain must not overlook."""
    async with open_fleet(0, 0, 1, disaggregation="never_remote") as fleet:
        backend = fleet.backends["u0"]
        host, _, port = fleet.replicas["u0"].endpoints.url.removeprefix("http://").partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer fleet\r\n"
            b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"
        )
        await until(lambda: backend.unfinished() == 1)
        report = backend.load()
        assert report is not None
        assert report.running == report.waiting == 0
        writer.close()
        await until(lambda: backend.unfinished() == 0)


async def test_a_model_that_sleeps_is_ready_and_listed() -> None:
    async with open_fleet(0, 0, 0) as fleet:
        fleet._membership = replace(fleet._membership, version=99, models=(MODEL,), coming=(MODEL,))
        fleet._changed.set()
        await until(lambda: fleet.context.membership.coming == (MODEL,))
        async with client_of(fleet) as client:
            assert [model.id async for model in client.models.list()] == [MODEL]
            ready = await client.with_options(base_url=f"http://127.0.0.1:{fleet.port}").get(
                "/ready", cast_to=object
            )
        assert ready == {"ready": True, "replicas": {MODEL: 0}, "coming": [MODEL]}
