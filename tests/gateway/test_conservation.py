"""Whatever mixture of ends requests come to, nothing stays booked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.config import Queue, Timeouts
from headrace_router.types import Role

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
        "tenant": st.sampled_from(["", "t", "u"]),
        "priority": st.sampled_from([0, 0, 3]),
        "timeout_s": st.sampled_from([None, None, 0.02]),
    }
)


async def _one(gateway: Any, request: dict[str, Any]) -> None:
    """Send a request and read to its end, or leave after so many bytes of the answer."""
    body = json.dumps(
        {
            "model": "m" if request["known_model"] else "other",
            "stream": request["stream"],
            "prompt": "x",
            "priority": request["priority"],
            "script": {"a": request["a"], "b": request["b"]},
        }
    ).encode()
    reader, writer = await gateway.connect()
    headers = f"x-tenant-id: {request['tenant']}\r\n" if request["tenant"] else ""
    headers += f"x-request-timeout: {request['timeout_s']}\r\n" if request["timeout_s"] else ""
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n%bcontent-length: %d\r\n\r\n%b"
        % (headers.encode(), len(body), body)
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


async def _run(open_front: Open, batch: list[dict[str, Any]], face: str, **more: Any) -> None:
    timeouts = Timeouts(first_byte_s=0.3, idle_s=0.3)
    async with open_front(face, timeouts=timeouts, policy="least_loaded", **more) as gateway:
        await asyncio.wait_for(asyncio.gather(*(_one(gateway, request) for request in batch)), 60)
        await asyncio.wait_for(gateway.settled(), 60)
        measures = gateway.context.metrics
        known = sum(request["known_model"] for request in batch)
        # Clients that leave at once may be gone before their request was whole; the others all have an end.
        stayed = sum(request["known_model"] and request["leave_after_bytes"] is None for request in batch)
        ended = sum(measures.of("m").ended.values())
        assert stayed <= ended <= known
        assert all(load.booked == 0 for load in gateway.context.router.loads.all())


WEATHER = [
    "a busy",
    "b busy",
    "a busy",
    "b busy",
    "a free",
    "b free",
    "a gone",
    "all gone",
    "none comes",
    "back",
]


async def _change(gateway: Any, weather: list[str]) -> None:
    """Replicas fill up, come free, leave and come back while requests come and go."""
    replicas = [replica.replica for replica in gateway.replicas]
    for step in weather:
        what, _, how = step.partition(" ")
        if how == "busy":
            gateway.saturate(what)
        elif how == "free":
            gateway.tell(what)
        elif step == "a gone":
            gateway.source.change(replicas[1:], models=("m",))
        elif step == "all gone":
            gateway.source.change([], models=("m",), coming=("m",))
        elif step == "none comes":
            gateway.source.change([], models=("m",))
        else:
            gateway.source.change(replicas)
        for _ in range(30):
            await asyncio.sleep(0)
            gateway.context.check_integrity()
    gateway.source.change(replicas)
    while len(gateway.context.membership.replicas) < len(replicas):
        await asyncio.sleep(0)
    gateway.tell("a")
    gateway.tell("b")


async def _run_under_load(
    open_front: Open, batch: list[dict[str, Any]], weather: list[str], face: str, **more: Any
) -> None:
    queue = Queue(max_requests=5, max_wait_s=0.2, max_start_wait_s=0.2)
    timeouts = Timeouts(first_byte_s=0.3, idle_s=0.3)
    settings = {"timeouts": timeouts, "policy": "least_loaded", "reports": True, "queue": queue, **more}
    async with open_front(face, **settings) as gateway:
        gateway.saturate("a", "b")
        asking = asyncio.gather(*(_one(gateway, request) for request in batch))
        await asyncio.wait_for(_change(gateway, weather), 60)
        await asyncio.wait_for(asking, 60)
        await asyncio.wait_for(gateway.settled(), 60)
        counts = gateway.context.admission.measures.counts("m")
        ended = sum(gateway.context.metrics.of("m").ended.values())
        assert sum(counts.values()) - counts.get("dispatched", 0) <= ended
        assert all(load.booked == 0 for load in gateway.context.router.loads.all())


mixtures = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@mixtures
@given(batch=st.lists(requests, min_size=1, max_size=40))
def test_in_flight_counts_return_to_zero(front: Open, face: str, batch: list[dict[str, Any]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(front, batch, face))


@mixtures
@given(batch=st.lists(requests, min_size=1, max_size=40))
def test_in_flight_counts_return_to_zero_with_handovers(
    front: Open, face: str, batch: list[dict[str, Any]]
) -> None:
    """`a` computes the prompts, `b` answers; each half comes to any of these ends."""
    roles = (Role.PREFILL, Role.DECODE)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(front, batch, face, roles=roles, disaggregation="always_remote"))


weathers = st.lists(st.sampled_from(WEATHER), max_size=12)


@mixtures
@given(batch=st.lists(requests, min_size=1, max_size=30), weather=weathers)
def test_whoever_waits_is_counted_once_and_gone_in_the_end(
    front: Open, face: str, batch: list[dict[str, Any]], weather: list[str]
) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run_under_load(front, batch, weather, face))


@mixtures
@given(batch=st.lists(requests, min_size=1, max_size=30), weather=weathers)
def test_whoever_waits_is_counted_once_and_gone_in_the_end_with_handovers(
    front: Open, face: str, batch: list[dict[str, Any]], weather: list[str]
) -> None:
    roles = (Role.PREFILL, Role.DECODE)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run_under_load(front, batch, weather, face, roles=roles, disaggregation="always_remote"))
