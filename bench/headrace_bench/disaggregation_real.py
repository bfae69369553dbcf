"""Prefill and decode apart or together, on two real replicas: what long prompts do to streams that run.

    python -m headrace_bench.disaggregation_real [--quick] [--out bench/results/disaggregation_real]

Two vLLM replicas with a core each. Some users stream answers one after another, from short prompts; meanwhile long
prompts arrive at random, each with a short answer. Measured of the streams: time between tokens (p99); of the long
prompts: time to first token (mean); of both: goodput, requests a second that kept the SLO. The same arrivals for every
arm:

    1P+1D  per_request     one replica for prompts, one for answers; handed over when it costs less
           always_remote   every prompt is handed over
    2U     never_remote    two that do everything, by predicted delay
           per_request     two that do everything and may hand over to each other
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from headrace_bench.exchange import Exchange
from headrace_bench.fixed_gateway import write_replicas
from headrace_bench.gateway_process import Process
from headrace_bench.load_client import LoadClient, Target
from headrace_bench.real_fleet import RealFleet, real_fleet
from headrace_bench.real_replica import MODEL
from headrace_bench.real_run import ANSWERS_S, answers
from headrace_bench.relay_report import machine
from headrace_router.types import Role

SLO_TTFT_S, SLO_ITL_S = 3.0, 0.15
"""A long prompt takes 1.5 s alone on such a core, and a stream of eight some 40 ms a token."""

STREAM_PROMPT, STREAM_TOKENS = 60, 96
LONG_TOKENS, LONG_ANSWER = 1200, 8
CONNECTOR = "NixlConnector"


@dataclass(frozen=True, slots=True)
class Arm:
    """How the two replicas share the work."""

    pools: str  # "1P+1D" or "2U"
    disaggregation: str

    @property
    def name(self) -> str:
        return f"{self.pools} {self.disaggregation}"

    @property
    def roles(self) -> tuple[Role, Role]:
        return (Role.PREFILL, Role.DECODE) if self.pools == "1P+1D" else (Role.UNIFIED, Role.UNIFIED)


ARMS = (
    Arm("1P+1D", "per_request"),
    Arm("1P+1D", "always_remote"),
    Arm("2U", "never_remote"),
    Arm("2U", "per_request"),
)


@dataclass(frozen=True, slots=True)
class Load:
    """Streams that always run, and long prompts per second."""

    streams: int
    long_per_s: float
    duration_s: float
    seed: int  # of the arrivals


@dataclass(frozen=True, slots=True)
class Result:
    """One arm under one load."""

    arm: str
    streams: int
    long_per_s: float
    requests: int
    failed: int
    itl_p50_s: float
    itl_p99_s: float
    stream_ttft_s: float
    long_ttft_s: float
    long_ttft_p90_s: float
    goodput_per_s: float
    handed_over: int


async def run_arm(arm: Arm, load: Load, fleet: RealFleet, folder: Path, text: int) -> Result:
    """`text` makes the prompts, which must be no other run's, or caches would answer. Raises `DidNotStart`."""
    listed = folder / "replicas.json"
    roles = zip(fleet.replicas, arm.roles, strict=True)
    write_replicas([replace(replica, role=role) for replica, role in roles], listed)
    command = (
        sys.executable, "-m", "headrace_bench.fixed_gateway",
        "--replicas", str(listed), "--policy", "delay", "--disaggregation", arm.disaggregation,
    )  # fmt: skip
    process = Process(command, os.sched_getaffinity(0), folder, "headrace")
    try:
        url = await process.ready_line(ANSWERS_S)
        await answers(process, url)
        client = LoadClient(Target.parse(url))
        try:
            streams, longs = await _drive(client, load, text)
            metrics = await client.exchange("GET", "/metrics")
        finally:
            client.close()
    finally:
        await asyncio.to_thread(process.stop)
    return _result(arm, load, streams, longs, bytes(metrics.body).decode())


async def _drive(client: LoadClient, load: Load, text: int) -> tuple[list[Exchange], list[Exchange]]:
    draw = random.Random(load.seed)
    ends_s = time.monotonic() + load.duration_s
    streams: list[Exchange] = []
    longs: list[asyncio.Task[Exchange]] = []

    async def user(number: int) -> None:
        turn = 0
        while time.monotonic() < ends_s:
            tokens = _tokens(STREAM_PROMPT, text, number, turn)
            streams.append(await _ask(client, tokens, STREAM_TOKENS))
            turn += 1

    users = [asyncio.create_task(user(number)) for number in range(load.streams)]
    number = 0
    while True:
        await asyncio.sleep(draw.expovariate(load.long_per_s))
        if time.monotonic() >= ends_s:
            break
        tokens = _tokens(LONG_TOKENS, text, 1000, number)
        longs.append(asyncio.create_task(_ask(client, tokens, LONG_ANSWER)))
        number += 1
    await asyncio.gather(*users)
    return streams, list(await asyncio.gather(*longs))


def _tokens(count: int, *seed: int) -> list[int]:
    """Of nobody else's prompt."""
    draw = random.Random(str(seed))
    return [draw.randrange(1000, 40_000) for _ in range(count)]


async def _ask(client: LoadClient, tokens: list[int], answer_tokens: int) -> Exchange:
    body = json.dumps(
        {
            "model": MODEL,
            "prompt": tokens,
            "max_tokens": answer_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
    ).encode()
    return await client.exchange("POST", "/v1/completions", body, streamed=True, timeout_s=120)


def _result(
    arm: Arm, load: Load, streams: Sequence[Exchange], longs: Sequence[Exchange], metrics: str
) -> Result:
    done = [one for one in streams if one.error is None]
    done_long = [one for one in longs if one.error is None]
    gaps_s = np.array([gap for one in done for gap in one.gaps_s] or [0.0])
    ttft_s = np.array([_ttft_s(one) for one in done_long] or [0.0])
    kept = [one for one in (*done, *done_long) if _ttft_s(one) <= SLO_TTFT_S and _itl_s(one) <= SLO_ITL_S]
    handed = [line for line in metrics.splitlines() if line.startswith("headrace_handovers_total{")]
    return Result(
        arm=arm.name,
        streams=load.streams,
        long_per_s=load.long_per_s,
        requests=len(streams) + len(longs),
        failed=len(streams) + len(longs) - len(done) - len(done_long),
        itl_p50_s=float(np.percentile(gaps_s, 50)),
        itl_p99_s=float(np.percentile(gaps_s, 99)),
        stream_ttft_s=float(np.mean([_ttft_s(one) for one in done] or [0.0])),
        long_ttft_s=float(ttft_s.mean()),
        long_ttft_p90_s=float(np.percentile(ttft_s, 90)),
        goodput_per_s=len(kept) / load.duration_s,
        handed_over=int(sum(float(line.rsplit(" ", 1)[1]) for line in handed)),
    )


def _ttft_s(one: Exchange) -> float:
    return float("inf") if one.first_s is None else one.first_s - one.sent_s


def _itl_s(one: Exchange) -> float:
    return sum(one.gaps_s) / len(one.gaps_s) if one.gaps_s else 0.0


def write(results: Sequence[Result], out: Path) -> str:
    """Both files; returns the table."""
    head = (
        f"# Prefill and decode on two real replicas\n\nMade {datetime.now(UTC):%Y-%m-%d %H:%M UTC} on {machine()} by\n"
        f"`python -m headrace_bench.disaggregation_real {' '.join(sys.argv[1:])}`. Streams of {STREAM_TOKENS} tokens "
        f"run all the time; prompts of {LONG_TOKENS} tokens arrive at random, each with {LONG_ANSWER} tokens of "
        f"answer. Goodput: requests a second with TTFT at most {SLO_TTFT_S:g} s and mean time between tokens at most "
        f"{SLO_ITL_S * 1000:g} ms. One run each: differences of a tenth mean little.\n\n"
        "| streams, long/s | arm | ITL p50 ms | ITL p99 ms | TTFT of long prompts, mean s | p90 s | "
        "TTFT of streams, mean s | goodput/s | handed over | failed |\n|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = "".join(
        f"| {r.streams}, {r.long_per_s:g} | {r.arm} | {r.itl_p50_s * 1000:.0f} | {r.itl_p99_s * 1000:.0f} | "
        f"{r.long_ttft_s:.2f} | {r.long_ttft_p90_s:.2f} | {r.stream_ttft_s:.2f} | {r.goodput_per_s:.2f} | "
        f"{r.handed_over} of {r.requests} | {r.failed} |\n"
        for r in results
    )
    out.with_suffix(".md").write_text(head + rows)
    out.with_suffix(".json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return head + rows


async def measure(args: argparse.Namespace) -> int:
    """0 when nothing failed."""
    duration_s = 12.0 if args.quick else args.duration
    rates = (0.3,) if args.quick else (0.15, 0.4)
    loads = [Load(4, rate, duration_s, seed) for seed, rate in enumerate(rates)]
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        async with real_fleet(2, args.kv_bytes, Path(folder), CONNECTOR) as fleet:
            for load in loads:
                for arm in ARMS:
                    result = await run_arm(arm, load, fleet, Path(folder), text=len(results))
                    results.append(result)
                    print(f"{result}", file=sys.stderr, flush=True)
    print(write(results, args.out))
    return int(any(result.failed for result in results))


def main() -> int:
    parser = argparse.ArgumentParser(prog="headrace_bench.disaggregation_real")
    parser.add_argument("--quick", action="store_true", help="one load, 12 s each")
    parser.add_argument("--duration", type=float, default=36.0, metavar="S", help="of each run; default 36")
    parser.add_argument("--kv-bytes", type=int, default=268435456, help="of each replica's cache")
    parser.add_argument("--out", type=Path, default=Path("bench/results/disaggregation_real"))
    return asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
