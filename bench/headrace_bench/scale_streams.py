"""Thousands of concurrent streams against one gateway address, counted, not read."""

from __future__ import annotations

import asyncio
import json
from random import Random
from time import monotonic

from headrace_bench.scale_crowd import MODEL


class Streams:
    """`count` clients, each of which asks again when its answer has ended, until `stop`."""

    def __init__(
        self,
        port: int,
        count: int,
        *,
        prompt_tokens: int,
        shared_tokens: int,
        answer_tokens: int,
        spread_s: float = 15.0,
    ) -> None:
        """Prompts begin with one of 64 runs of `shared_tokens` token ids, and go on with ids of their own. Clients
        arrive over `spread_s`, not in one instant."""
        self._port = port
        self._count = count
        self._own_tokens = prompt_tokens - shared_tokens
        self._answer_tokens = answer_tokens
        self._spread_s = spread_s
        draw = Random("prompts")
        self._shared = [[draw.randrange(1000, 40_000) for _ in range(shared_tokens)] for _ in range(64)]
        self._draw = draw
        self._is_stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self.open = 0  # streams whose first event has come and whose end has not
        self.ended = 0
        self.errors = 0
        self.events = 0
        self.ttft_s: list[float] = []

    def start(self) -> None:
        """Let them come."""
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(self._count)]

    async def until_open(self, count: int, timeout_s: float) -> None:
        """Return once so many streams are open, or after `timeout_s`."""
        deadline_s = monotonic() + timeout_s
        while self.open < count and monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.5)

    async def stop(self) -> None:
        """Ask no more; return when every stream has ended."""
        self._is_stopping = True
        await asyncio.gather(*self._tasks)

    async def _client(self, number: int) -> None:
        await asyncio.sleep(self._spread_s * number / self._count)
        while not self._is_stopping:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError:
                self.errors += 1
                await asyncio.sleep(0.5)
                continue
            try:
                while not self._is_stopping:
                    await self._ask(reader, writer)
            except (OSError, asyncio.IncompleteReadError, ValueError):
                self.errors += 1
            finally:
                writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        draw = self._draw
        ids = [*draw.choice(self._shared), *(draw.randrange(1000, 40_000) for _ in range(self._own_tokens))]
        body = json.dumps(
            {
                "model": MODEL,
                "prompt": ids,
                "max_tokens": self._answer_tokens,
                "stream": True,
                "ignore_eos": True,
            }
        ).encode()
        began_s = monotonic()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise ValueError(head[:100])
        is_first = True
        piece = b""
        while b"data: [DONE]" not in piece:
            piece = await reader.readuntil(b"\n\n\r\n")
            self.events += piece.count(b'data: {"')
            if is_first:
                is_first = False
                self.open += 1
                self.ttft_s.append(monotonic() - began_s)
        await reader.readuntil(b"0\r\n\r\n")
        self.open -= 1
        self.ended += 1
