"""Clients that ask without a pause, and what became of each request."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

_TIMEOUT_S = 60.0
_PATIENCE_S = 120.0


@dataclass(slots=True)
class Load:
    """Counts; no try of a request is repeated by its client."""

    answered: int = 0
    streamed: int = 0
    failed: list[str] = field(default_factory=list)  # before their answer had begun
    broken: list[float] = field(
        default_factory=list
    )  # streams that ended early: when each had begun, loop time
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def more(self, count: int) -> None:
        """Return once so many more requests and streams have been answered to their end."""
        until = self.answered + self.streamed + count
        async with asyncio.timeout(_PATIENCE_S):
            while self.answered + self.streamed < until:
                await self._news.wait()

    def note(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


@asynccontextmanager
async def load(*urls: str, clients: int = 30, streams: int = 6, tokens: int = 24) -> AsyncIterator[Load]:
    """So many clients for as long as the context lasts, spread over the gateways; some of them stream. Those that run
    at its end are waited for."""
    counted, is_over = Load(), asyncio.Event()
    async with httpx.AsyncClient(timeout=_TIMEOUT_S, limits=httpx.Limits(max_connections=None)) as http:

        async def client(number: int) -> None:
            url = urls[number % len(urls)]
            while not is_over.is_set():
                if number < streams:
                    await _stream(http, url, counted, 4 * tokens)
                else:
                    await _ask(http, url, counted, tokens)
                counted.note()

        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(client(number))
            try:
                yield counted
            finally:
                is_over.set()


async def ask(url: str) -> str:
    """Ask once; the id of the replica that answered. Raises AssertionError for anything but an answer."""
    async with httpx.AsyncClient(timeout=_TIMEOUT_S) as http:
        answer = await http.post(
            f"{url}/v1/completions", json=_request(4), headers={"x-headrace-explain": "1"}
        )
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"]
    return answer.headers["x-headrace-replica"]


async def stream(url: str, tokens: int = 16) -> None:
    """Stream once, to its end. Raises AssertionError where that does not come."""
    counted = Load()
    async with httpx.AsyncClient(timeout=_TIMEOUT_S) as http:
        await _stream(http, url, counted, tokens)
    assert counted.streamed == 1, (counted.failed, counted.broken)


def _request(tokens: int, **more: object) -> dict[str, object]:
    return {"model": "sim", "prompt": "Tell me of rivers.", "max_tokens": tokens, "ignore_eos": True, **more}


async def _ask(http: httpx.AsyncClient, url: str, counted: Load, tokens: int) -> None:
    try:
        answer = await http.post(f"{url}/v1/completions", json=_request(tokens))
        if answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == tokens:
            counted.answered += 1
        else:
            counted.failed.append(f"{answer.status_code}: {answer.text}")
    except (httpx.HTTPError, ValueError) as error:
        counted.failed.append(repr(error))


async def _stream(http: httpx.AsyncClient, url: str, counted: Load, tokens: int) -> None:
    begun_s, chunks = 0.0, 0
    try:
        async with http.stream("POST", f"{url}/v1/completions", json=_request(tokens, stream=True)) as answer:
            if answer.status_code != 200:
                counted.failed.append(f"{answer.status_code}: {(await answer.aread()).decode()}")
                return
            async for line in answer.aiter_lines():
                begun_s = begun_s or asyncio.get_running_loop().time()
                if line == "data: [DONE]" and chunks >= tokens:
                    counted.streamed += 1
                    return
                if line.startswith("data: {"):
                    chunks += bool(json.loads(line.removeprefix("data: ")).get("choices"))
        error: object = f"a stream ended after {chunks} tokens"
    except httpx.HTTPError as caught:
        error = caught
    if begun_s:
        counted.broken.append(begun_s)
    else:
        counted.failed.append(repr(error))


if __name__ == "__main__":  # for clients on a host
    print(asyncio.run(ask(sys.argv[1])))
