"""Whatever mixture of ends requests come to, nothing stays booked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.config import Timeouts

Open = Callable[..., Any]

SCRIPTS = [
    "answer",
    "reset",
    "cut",
    "status500",
    "status503",
    "status400",
    "hang",
    "stream_then_hang",
    "answer_and_close",
]
requests = st.fixed_dictionaries(
    {
        "stream": st.booleans(),
        "a": st.sampled_from(SCRIPTS),
        "b": st.sampled_from(SCRIPTS),
        "leave_after_bytes": st.sampled_from([None, None, 0, 1, 200]),
        "known_model": st.sampled_from([True, True, True, False]),
    }
)


async def _one(gateway: Any, request: dict[str, Any]) -> None:
    """Send a request and read to its end, or leave after so many bytes of the answer."""
    body = json.dumps(
        {
            "model": "m" if request["known_model"] else "other",
            "stream": request["stream"],
            "script": {"a": request["a"], "b": request["b"]},
        }
    ).encode()
    reader, writer = await gateway.connect()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
        % (len(body), body)
    )
    await writer.drain()
    try:
        if request["leave_after_bytes"] is None:
            await reader.read()
        elif request["leave_after_bytes"]:
            await reader.read(request["leave_after_bytes"])
    except ConnectionError:
        pass
    writer.transport.abort()


async def _run(open_front: Open, batch: list[dict[str, Any]], face: str) -> None:
    timeouts = Timeouts(first_byte_s=0.3, idle_s=0.3)
    async with open_front(face, timeouts=timeouts, policy="least_loaded") as gateway:
        await asyncio.wait_for(asyncio.gather(*(_one(gateway, request) for request in batch)), 60)
        await asyncio.wait_for(gateway.settled(), 60)
        measures = gateway.context.metrics
        known = sum(request["known_model"] for request in batch)
        # Clients that leave at once may be gone before their request was whole; the others all have an end.
        stayed = sum(request["known_model"] and request["leave_after_bytes"] is None for request in batch)
        ended = sum(measures.of("m").ended.values())
        assert stayed <= ended <= known
        assert all(load.booked == 0 for load in gateway.context.router.loads.all())


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(batch=st.lists(requests, min_size=1, max_size=40))
def test_in_flight_counts_return_to_zero(front: Open, face: str, batch: list[dict[str, Any]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(front, batch, face))
