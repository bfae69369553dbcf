"""Long answers hold every place of an engine's batch: who waits then waits in the gateway, in its fair order."""

import asyncio

import httpx
from disaggregated import MODEL, Fleet, open_fleet

PLACES = 4
ANSWER_TOKENS = 40
ENGINE = {"max_running": PLACES, "step_s": 0.004}


async def ask(fleet: Fleet, client: httpx.AsyncClient, tenant: str, served: list[str]) -> None:
    answer = await client.post(
        f"http://127.0.0.1:{fleet.port}/v1/completions",
        json={"model": MODEL, "prompt": "x", "max_tokens": ANSWER_TOKENS, "ignore_eos": True},
        headers={"x-tenant-id": tenant},
    )
    assert answer.status_code == 200
    served.append(tenant)


async def test_few_requests_are_answered_before_another_tenants_backlog() -> None:
    served: list[str] = []
    async with (
        open_fleet(0, 0, 1, engine=ENGINE, policy="delay") as fleet,
        httpx.AsyncClient(timeout=20, limits=httpx.Limits(max_connections=None)) as client,
        asyncio.TaskGroup() as asking,
    ):
        for _ in range(8 * PLACES):
            asking.create_task(ask(fleet, client, "flood", served))
        while fleet.context.admission.num_waiting < 4 * PLACES:
            assert not served, "all of them were sent on"
            await asyncio.sleep(0)
        assert fleet.in_flight("u0") <= PLACES + 1
        async with asyncio.TaskGroup() as few:
            few.create_task(ask(fleet, client, "few", served))
            few.create_task(ask(fleet, client, "few", served))
        assert served.count("flood") <= 3 * PLACES
    assert served.count("flood") == 8 * PLACES
