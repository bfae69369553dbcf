"""The load of a calibration: prompts of several lengths alone, then several answers side by side.

Each prompt begins with words of its own, so that nothing is found in a cache. Engines that report their steps
(`--load`, or a fleet of ours) are listened to meanwhile; of others, the client's own clock has to do.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from headrace.backends.load_publisher import decode_report
from headrace_bench.calibration import CalibrationError, decode_steps, prefill_step
from headrace_bench.exchange import Exchange
from headrace_bench.load_client import LoadClient
from headrace_bench.load_probe import ServerFacts
from headrace_bench.prompt_text import Passage, render
from headrace_router.types import Iteration

OUTPUT_TOKENS = 48
SETTLE_S = 0.5
"""A subscription takes a moment to reach the publisher; reports of the last step take one to come."""


@dataclass(frozen=True, slots=True)
class ProbeLoad:
    """How much is asked."""

    max_prompt_tokens: int = 1024
    concurrencies: tuple[int, ...] = (1, 2, 4, 8)
    repeats: int = 3
    timeout_s: float = 300.0

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Halved from the longest down to 32."""
        lengths: list[int] = []
        length = self.max_prompt_tokens
        while length >= 32 and len(lengths) < 6:
            lengths.append(length)
            length //= 2
        return tuple(reversed(lengths))

    @property
    def rounds(self) -> int:
        """Steps of a progress bar."""
        return self.repeats * (len(self.prompt_lengths) + 2 * len(self.concurrencies))


@dataclass(slots=True)
class Seen:
    """What a calibration saw."""

    reported: list[Iteration] = field(default_factory=list)  # by engines
    timed: list[Iteration] = field(default_factory=list)  # by the client's clock
    failed: str = ""  # an example

    @property
    def steps(self) -> list[Iteration]:
        """The engines' own where there are any."""
        return self.reported or self.timed


async def observe(
    client: LoadClient,
    facts: ServerFacts,
    load: ProbeLoad,
    endpoints: Sequence[str] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> Seen:
    """Run the load. Raises `CalibrationError` when every request failed."""
    seen = Seen()
    listening = asyncio.create_task(_listen(endpoints, seen)) if endpoints else None
    try:
        if listening is not None:
            await asyncio.sleep(SETTLE_S)
        await _ask(client, facts, load, seen, progress)
        if listening is not None:
            await asyncio.sleep(SETTLE_S)
    finally:
        if listening is not None:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
    if not seen.steps:
        raise CalibrationError(
            f"no step was seen: {seen.failed or 'the server sent no usage with its streams'}"
        )
    return seen


async def _ask(
    client: LoadClient, facts: ServerFacts, load: ProbeLoad, seen: Seen, progress: Callable[[int], None]
) -> None:
    done = 0
    for _ in range(load.repeats):
        for length in load.prompt_lengths:
            exchange = await _one(client, facts, length, 1, load.timeout_s)
            if (step := prefill_step(exchange)) is not None:
                seen.timed.append(step)
            elif exchange.error is not None:
                seen.failed = f"{exchange.error}: {exchange.detail}"
            done += 1
            progress(done)
        for count in load.concurrencies:
            for length in (64, max(64, load.max_prompt_tokens // 2)):
                answers = await asyncio.gather(
                    *(_one(client, facts, length, OUTPUT_TOKENS, load.timeout_s) for _ in range(count))
                )
                seen.timed.extend(decode_steps(answers))
                done += 1
                progress(done)


async def _one(
    client: LoadClient, facts: ServerFacts, tokens: int, answer: int, timeout_s: float
) -> Exchange:
    words = facts.calibration.words_for(tokens)
    text = render(0, (Passage(secrets.token_hex(8), words),))
    body = {
        "model": facts.model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": answer,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if facts.ignore_eos:
        body["ignore_eos"] = True
    return await client.exchange(
        "POST", "/v1/chat/completions", msgspec.json.encode(body), streamed=True, timeout_s=timeout_s
    )


async def _listen(endpoints: Sequence[str], seen: Seen) -> None:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.SUB)
    try:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        for endpoint in endpoints:
            socket.connect(endpoint)
        while True:
            report = decode_report(await socket.recv())
            seen.reported.extend(report.iterations)
    finally:
        socket.close(0)
        context.term()
