"""What the relay benchmark measures of one running gateway."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from headrace_bench import cpu_time
from headrace_bench.http_wire import address, get_json, post, raw_connection
from headrace_bench.prompt_bodies import bodies, chat_body
from headrace_bench.relay_client import Counter, Timed, dismiss, listeners, users

PROMPT_FAMILIES = 16
BODIES = 256
TOKEN_BYTES = 244  # of one streamed token with its framing, roughly; enough to aim at a stream's length
STALL_QUIET_S = 1.0


class MeasurementFailed(Exception):
    """The gateway answered wrongly; a figure from such a run would mean nothing."""


@dataclass(frozen=True, slots=True)
class Target:
    """A gateway under test, and the mock backends behind it."""

    url: str
    pid: int
    backends: tuple[str, ...]
    load_pids: tuple[int, ...] = ()  # processes that make and answer the load


@dataclass(frozen=True, slots=True)
class RequestCost:
    """Of short unstreamed requests in a closed loop."""

    cpu_us: float  # gateway CPU per request
    per_second: float
    core_use: float  # share of one core that the gateway took
    other_cores: float  # cores that processes outside the benchmark took meanwhile


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """Of many slow streams at once."""

    cpu_us: float  # gateway CPU per streamed chunk
    pace: float  # chunks that arrived over chunks that were due; below 1 the load itself fell behind
    chunks_per_read: float  # above 1 the gateway joins tokens


@dataclass(frozen=True, slots=True)
class Work:
    """CPU time at one moment: of the gateway, and of everything outside the benchmark. The origin is arbitrary."""

    gateway_ns: int
    others_ns: int
    at_s: float

    @classmethod
    def now(cls, target: Target) -> Work:
        gateway = cpu_time.cpu_ns(target.pid)
        load = sum(cpu_time.cpu_ns(pid) for pid in target.load_pids)
        return cls(gateway, cpu_time.busy_ns() - gateway - load, time.perf_counter())


def _check(counter: Counter, what: str) -> None:
    if counter.errors:
        raise MeasurementFailed(f"{counter.errors} of the {what} failed, the last with: {counter.last_error}")


async def quiet(target: Target, below_cores: float, patience_s: float) -> None:
    """Return when other work has taken less than `below_cores` cores for a second, or after `patience_s`."""
    deadline, before = time.monotonic() + patience_s, Work.now(target)
    while time.monotonic() < deadline:
        await asyncio.sleep(1)
        after = Work.now(target)
        if (after.others_ns - before.others_ns) / 1e9 < below_cores * (after.at_s - before.at_s):
            return
        before = after


async def request_cost(
    target: Target, body_bytes: int, connections: int, warm_s: float, window_s: float
) -> RequestCost:
    """CPU per request of `body_bytes`, with `connections` users who never pause."""
    counter = Counter()
    opened = await users(
        target.url, bodies(body_bytes, BODIES, PROMPT_FAMILIES, seed=7), connections, counter
    )
    await asyncio.sleep(warm_s)
    answers, before = counter.answers, Work.now(target)
    await asyncio.sleep(window_s)
    answers, after = counter.answers - answers, Work.now(target)
    cpu, elapsed_s = after.gateway_ns - before.gateway_ns, after.at_s - before.at_s
    dismiss(opened)
    await asyncio.sleep(0.2)
    _check(counter, "requests")
    if answers == 0:
        raise MeasurementFailed(f"no request was answered within {window_s} s")
    others = max(0.0, (after.others_ns - before.others_ns) / 1e9 / elapsed_s)
    return RequestCost(cpu / answers / 1e3, answers / elapsed_s, cpu / 1e9 / elapsed_s, others)


async def chunk_cost(target: Target, streams: int, interval_ms: float, window_s: float) -> ChunkCost:
    """CPU per chunk with `streams` open streams, a token every `interval_ms` in each."""
    spread_s = max(interval_ms / 1000, 0.5)
    tokens = int((window_s + spread_s + 1.0) / (interval_ms / 1000))
    body = chat_body("flow", stream=True, max_tokens=tokens, directive=f"[mock interval_ms={interval_ms}] ")
    counter = Counter()
    all_ended = await listeners(target.url, body, streams, spread_s, counter)
    await asyncio.sleep(0.3)
    if counter.started < streams:
        _check(counter, "streams")
        raise MeasurementFailed(
            f"only {counter.started} of {streams} streams had begun after {spread_s + 0.3:.1f} s"
        )
    events, reads, cpu = counter.events, counter.reads, cpu_time.cpu_ns(target.pid)
    began = time.perf_counter()
    await asyncio.sleep(window_s)
    events, reads, cpu = counter.events - events, counter.reads - reads, cpu_time.cpu_ns(target.pid) - cpu
    elapsed_s = time.perf_counter() - began
    async with asyncio.timeout(60):
        await all_ended.wait()
    _check(counter, "streams")
    due = streams * elapsed_s / (interval_ms / 1000)
    return ChunkCost(cpu / events / 1e3, events / due, events / max(reads, 1))


async def added_ttft_ms(target: Target, pairs: int) -> float:
    """Median time to the first token through the gateway less that of the mock itself, one at a time in turns."""
    loop = asyncio.get_running_loop()
    request = post(chat_body("first", stream=True, max_tokens=2))
    via_transport, via = await loop.create_connection(Timed, *address(target.url))
    straight_transport, straight = await loop.create_connection(Timed, *address(target.backends[0]))
    through: list[int] = []
    direct: list[int] = []
    for _ in range(pairs):
        direct.append(await straight.ttft_ns(request))
        through.append(await via.ttft_ns(request))
    via_transport.close()
    straight_transport.close()
    return (median(through) - median(direct)) / 1e6


async def abort_ms(target: Target, tries: int, stream: bool, prefill_ms: float = 1200) -> list[float]:
    """From a client's leaving during prefill to the backend's connection closing, for each try.

    A streamed request has received its head by then (vLLM sends it before the first token), an unstreamed one
    nothing. A gateway that never tells reads as the remaining prefill, or, unstreamed, as infinity.
    """
    body = chat_body(
        "left", stream=stream, max_tokens=64, directive=f"[mock first_ms={prefill_ms:.0f} interval_ms=20] "
    )
    loop = asyncio.get_running_loop()
    delays: list[float] = []
    for _ in range(tries):
        aborts = [(await get_json(url, "/mock/stats"))["aborts"] for url in target.backends]
        sock = raw_connection(target.url)
        await loop.sock_sendall(sock, post(body))
        await asyncio.sleep(0.3)
        left_ns = time.monotonic_ns()
        sock.close()
        delays.append(await _seen_leaving_ms(target.backends, aborts, left_ns, prefill_ms / 1000 + 1.0))
        if delays[-1] < 0:
            raise MeasurementFailed(f"the gateway cut a request {-delays[-1]:.0f} ms before its client left")
    return delays


async def _seen_leaving_ms(
    backends: Sequence[str], aborts: Sequence[int], left_ns: int, patience_s: float
) -> float:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        for url, before in zip(backends, aborts, strict=True):
            stats = await get_json(url, "/mock/stats")
            if stats["aborts"] > before:
                return float(stats["departures"][-1]["at_ns"] - left_ns) / 1e6
        await asyncio.sleep(0.02)
    return float("inf")


async def stalled_growth_mb(target: Target, stream_mb: float, patience_s: float = 20) -> float:
    """Growth of the gateway's resident memory, in MB, while one client takes nothing of a long fast stream.

    Ends when the backend has written all of it or nothing more for a second.
    """
    tokens = int(stream_mb * 1e6 / TOKEN_BYTES)
    body = chat_body("flood", stream=True, max_tokens=tokens, directive="[mock interval_ms=0] ")
    loop = asyncio.get_running_loop()
    base = peak = cpu_time.resident_bytes(target.pid)
    sock = raw_connection(target.url, receive_buffer_bytes=64 * 1024)
    try:
        await loop.sock_sendall(sock, post(body))
        async with asyncio.timeout(10):
            await loop.sock_recv(sock, 1024)  # the stream has begun; nothing is read from here on
        deadline, quiet_since, seen = time.monotonic() + patience_s, time.monotonic(), -1
        while time.monotonic() < min(deadline, quiet_since + STALL_QUIET_S):
            await asyncio.sleep(0.1)
            peak = max(peak, cpu_time.resident_bytes(target.pid))
            written = sum([(await get_json(url, "/mock/stats"))["bytes_written"] for url in target.backends])
            if written != seen:
                seen, quiet_since = written, time.monotonic()
    finally:
        with contextlib.suppress(OSError):
            sock.close()
    return (peak - base) / 1e6
