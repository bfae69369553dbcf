"""A replica that falls silent without breaking a connection, as on a node whose cable is cut."""

import asyncio

import httpx
from disaggregated import MODEL, Fleet, open_fleet

HANGS = {"step_s": 30.0}  # it takes requests and answers none


async def freeze(fleet: Fleet, name: str) -> None:
    """No load report leaves any more; connections stay open."""
    await fleet.backends[name]._load.stop()


async def ask(fleet: Fleet) -> httpx.Response:
    async with httpx.AsyncClient(timeout=20) as client:
        url = f"http://127.0.0.1:{fleet.port}/v1/completions"
        return await client.post(url, json={"model": MODEL, "prompt": "x", "max_tokens": 4})


async def one_in_flight(fleet: Fleet, name: str) -> None:
    async with asyncio.timeout(10):
        while not fleet.in_flight(name):
            await asyncio.sleep(0)


async def test_unanswered_requests_leave_a_silent_replica() -> None:
    async with open_fleet(0, 0, 1, engine=HANGS, disaggregation="never_remote", dead_after_s=0.3) as fleet:
        asking = asyncio.create_task(ask(fleet))
        await one_in_flight(fleet, "u0")
        await fleet.add(
            "u1",
            fleet.replicas["u0"].role,
            {"block_size": 16, "num_blocks": 2048, "step_s": 0.001, "max_model_len": 4096},
        )
        await freeze(fleet, "u0")
        answer = await asking
        assert answer.status_code == 200
        assert fleet.context.metrics.of(MODEL).upstream_errors == {"silent": 1}
        fleet.context.check_integrity()


async def test_with_no_other_replica_a_request_goes_on_waiting() -> None:
    engine = {"step_s": 0.5}
    async with open_fleet(0, 0, 1, engine=engine, disaggregation="never_remote", dead_after_s=0.1) as fleet:
        asking = asyncio.create_task(ask(fleet))
        await one_in_flight(fleet, "u0")
        await freeze(fleet, "u0")
        answer = await asking
        assert answer.status_code == 200
        assert fleet.context.metrics.of(MODEL).upstream_errors == {}
