"""A replica that leaves the membership to sleep and comes back under the same boot id, its cache forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import openai
from disaggregated import MODEL, Fleet, open_fleet

PROMPT = list(range(1000, 1640))


def known_blocks(fleet: Fleet) -> int:
    assert fleet.context.prefixes is not None
    return fleet.context.prefixes.index.num_blocks


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0)


async def test_what_it_has_forgotten_is_not_expected_of_it() -> None:
    async with open_fleet(0, 0, 1, policy="delay", disaggregation="never_remote") as fleet:
        url = f"http://127.0.0.1:{fleet.port}/v1"
        prefixes = fleet.context.prefixes
        assert prefixes is not None
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1)
            await until(lambda: known_blocks(fleet) == len(PROMPT) // 16)
            await fleet.settled()
            fleet.tell("u0")
            backend = fleet.backends["u0"]
            await until(lambda: not backend.unfinished())
            await backend.sleep()
            await backend.wake()
            fleet.tell()
            await until(lambda: bool(fleet.context.router.eligible(MODEL)))
            await until(lambda: bool(prefixes.feed.num_streams) and not prefixes.feed.num_catching_up)
            assert known_blocks(fleet) == 0
            await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1)
            await until(lambda: known_blocks(fleet) == len(PROMPT) // 16)
            await fleet.settled()
