"""What a call of the Python API costs, beside other ways to ask a gateway in the same process.

    python -m headrace_bench.api_cost [--requests 400]

Writes bench/results/api_cost.md. The gateway runs on a thread of this process, as `headrace.Fleet` runs it; one
simulated replica runs in another. CPU is that of this process, client and gateway together.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from headrace.api.fleet import Fleet
from headrace.api.loop_thread import LoopThread
from headrace.backends.simulated import SimulatedBackend
from headrace.config import Gateway, SimulatedEngine
from headrace.gateway.app import build_app
from headrace.gateway.asgi import RelayApp
from headrace.gateway.server import GatewayServer
from headrace.gateway.settings import GatewaySettings
from headrace.gateway.static_fleet import StaticFleet
from headrace_router.types import ReplicaId

HOME = Path(__file__).resolve().parent.parent
MODEL = "sim"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
STREAM_TOKENS = 100


class Cost(NamedTuple):
    """Of one request."""

    cpu_us: float
    wall_us: float


def replica(pipe: Connection) -> None:
    """A process: one simulated replica that takes no time."""

    async def serve() -> None:
        engine = SimulatedEngine(step_s=0.0, prefill_token_s=0.0, decode_sequence_s=0.0)
        backend = SimulatedBackend(engine, MODEL, ReplicaId("r"))
        started = await backend.start(lambda _phase: None)
        pipe.send(started.endpoints.url)
        await asyncio.to_thread(pipe.recv)
        await backend.stop()

    asyncio.run(serve())


async def timed(ask: Callable[[], Awaitable[Any]], count: int) -> Cost:
    """One request at a time, after some that warm up."""
    for _ in range(20):
        await ask()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    for _ in range(count):
        await ask()
    return Cost(1e6 * (time.process_time() - cpu_s) / count, 1e6 * (time.perf_counter() - wall_s) / count)


async def measure(fleet: Fleet, app: RelayApp, thread: LoopThread, count: int) -> dict[str, Cost]:
    """Every way once."""

    async def chat() -> None:
        fleet.chat("Hello", max_tokens=1)

    async def stream() -> None:
        for _ in fleet.stream_chat("Hello", max_tokens=STREAM_TOKENS, ignore_eos=True):
            pass

    async def astream() -> None:
        async for _ in fleet.astream_chat("Hello", max_tokens=STREAM_TOKENS, ignore_eos=True):
            pass

    found = {
        "Fleet.chat": await timed(chat, count),
        "await Fleet.achat": await timed(lambda: fleet.achat("Hello", max_tokens=1), count),
        f"Fleet.stream_chat, {STREAM_TOKENS} pieces": await timed(stream, count // 10),
        f"Fleet.astream_chat, {STREAM_TOKENS} pieces": await timed(astream, count // 10),
    }
    url = fleet.url + "/v1/chat/completions"
    async with httpx.AsyncClient() as client:
        found["httpx over loopback"] = await timed(lambda: client.post(url, json=BODY), count)

    async def in_process() -> Cost:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await timed(lambda: client.post("/v1/chat/completions", json=BODY), count)

    found["httpx's ASGITransport, no socket"] = await thread.join(in_process())
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """0."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m headrace_bench.api_cost", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HOME / "results" / "api_cost.md")
    args = parser.parse_args(words)
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=replica, args=(theirs,), daemon=True)
    process.start()
    thread = LoopThread("gateway")
    config = Gateway(port=0, access_log=False, policy="round_robin")
    server = GatewayServer(GatewaySettings(0, config), StaticFleet([ours.recv()]))
    _, port = server.bind()
    thread.run(server.start())
    rounds: list[dict[str, Cost]]
    try:
        assert server.context is not None
        app = RelayApp(build_app(server.context), server.context)
        with Fleet.connect(url=f"http://127.0.0.1:{port}") as fleet:
            rounds = [asyncio.run(measure(fleet, app, thread, args.requests)) for _ in range(args.rounds)]
    finally:
        thread.run(server.stop())
        thread.close()
        ours.send("end")
        process.join(10)
    rows = "\n".join(
        f"| {name} | {_spread([one[name].cpu_us for one in rounds])} | "
        f"{_spread([one[name].wall_us for one in rounds])} |"
        for name in rounds[0]
    )
    command = shlex.join(["python", "-m", "headrace_bench.api_cost", *words])
    report = (
        f"# What a call of the Python API costs\n\n`{command}`: one request at a time through a gateway in the same "
        f"process to a simulated replica in another that takes no time; a chat of one token unless it says otherwise. "
        f"Median of {args.rounds} rounds, least and most in brackets. Wall clock "
        "includes what else the machine did.\n\n"
        f"| way | CPU of client and gateway, µs | wall clock, µs |\n|---|---|---|\n{rows}\n"
    )
    args.out.write_text(report)
    print(report)
    return 0


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


if __name__ == "__main__":
    raise SystemExit(main())
