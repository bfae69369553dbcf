"""What a tenant gets of a full fleet beside one that sends ten times more, through the real gateway.

    python -m headrace_bench.queue_fairness [--loads 0.85,1.3] [--seconds 20] [--seed 1]    # results/queue_fairness.md

Simulated replicas in real time, the gateway, and the clients of two tenants, all in one process. `alone`: the smaller
tenant by itself on its fair share, half of the replicas. `both`: on all of them, while the other tenant sends ten times
as much. Loads are in parts of the fair share: above 1 even the smaller tenant wants more than it can get.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from time import monotonic
from typing import NamedTuple

import uvloop

from headrace.backends.simulated import SimulatedBackend
from headrace.config import Gateway, SimulatedEngine
from headrace.gateway.server import GatewayServer
from headrace.gateway.settings import GatewaySettings
from headrace_bench.fixed_gateway import FixedMembership
from headrace_bench.peers import REPOSITORY
from headrace_bench.relay_report import machine
from headrace_router.types import Replica, ReplicaId, Role

REPLICAS = 4
TOKENS_PER_S = 2000.0  # of prompts, of one replica
MEAN_TOKENS = 400
ANSWER_TOKENS = 4
TIMES_MORE = 10
ENGINE = SimulatedEngine(
    step_s=0.002, prefill_token_s=1 / TOKENS_PER_S, decode_sequence_s=0.0001, num_blocks=16384
)
QUEUE = {"max_requests": 256, "max_wait_s": 8.0}


class Sent(NamedTuple):
    """One request."""

    at_s: float
    tenant: str
    tokens: int


class Fate(NamedTuple):
    """What became of one tenant's requests."""

    ttft_s: tuple[float, ...]
    refused: int

    @property
    def p90_s(self) -> float:
        return sorted(self.ttft_s)[int(0.9 * len(self.ttft_s))]

    @property
    def refused_share(self) -> float:
        return self.refused / max(1, self.refused + len(self.ttft_s))


def arrivals(rng: Random, tenant: str, tokens_per_s: float, seconds: float) -> list[Sent]:
    """Poisson, prompts of 100 to 1,600 tokens."""
    sent: list[Sent] = []
    at_s = 0.0
    while True:
        at_s += rng.expovariate(tokens_per_s / MEAN_TOKENS)
        if at_s > seconds:
            return sent
        tokens = int(rng.lognormvariate(5.83, 0.56))  # mean 400
        sent.append(Sent(at_s, tenant, min(1600, max(100, tokens))))


@asynccontextmanager
async def gateway(replicas: int) -> AsyncIterator[int]:
    """The port of a gateway before so many simulated replicas."""
    backends = [
        SimulatedBackend(ENGINE, "m", ReplicaId(f"r{number}"), internal_token="bench", report_interval_s=0.05)
        for number in range(replicas)
    ]
    present = []
    for number, backend in enumerate(backends):
        started = await backend.start(lambda _phase: None)
        present.append(
            Replica(
                ReplicaId(f"r{number}"), started.boot_id, "m", Role.UNIFIED, started.endpoints,
                block_size=started.block_size, num_blocks=started.num_blocks,
                max_running=started.max_running,
            )
        )  # fmt: skip
    config = Gateway.model_validate({"port": 0, "access_log": False, "queue": QUEUE})
    server = GatewayServer(GatewaySettings(0, config, 5.0), FixedMembership(present), internal_token="bench")
    _, port = server.bind()
    await server.start()
    try:
        yield port
    finally:
        await server.stop()
        for backend in backends:
            await backend.stop()


async def send(port: int, one: Sent, number: int) -> float | None:
    """Seconds to the first event, None where it was refused."""
    text = f"{one.tenant}{number:08}" * (one.tokens // 2)
    body = json.dumps(
        {"model": "m", "prompt": text[: 4 * one.tokens], "max_tokens": ANSWER_TOKENS, "stream": True}
    ).encode()
    began_s = monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-tenant-id: %b\r\n"
            b"content-length: %d\r\n\r\n%b" % (one.tenant.encode(), len(body), body)
        )
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.partition(b"\r\n")[0]:
            return None
        await reader.readuntil(b"data: ")
        ttft_s = monotonic() - began_s
        await reader.read()
        return ttft_s
    finally:
        writer.close()


async def run(sent: Sequence[Sent], replicas: int) -> dict[str, Fate]:
    """Send everything at its time."""
    async with gateway(replicas) as port:
        began_s = monotonic()
        tasks: list[tuple[str, asyncio.Task[float | None]]] = []
        for number, one in enumerate(sorted(sent)):
            await asyncio.sleep(max(0.0, began_s + one.at_s - monotonic()))
            tasks.append((one.tenant, asyncio.ensure_future(send(port, one, number))))
        results = await asyncio.gather(*(task for _, task in tasks))
    fates = {}
    for tenant in {one.tenant for one in sent}:
        own = [result for (name, _), result in zip(tasks, results, strict=True) if name == tenant]
        answered = tuple(result for result in own if result is not None)
        fates[tenant] = Fate(answered, len(own) - len(answered))
    return fates


class Row(NamedTuple):
    """One load."""

    load: float
    alone: Fate
    both: Fate
    flood: Fate

    @property
    def ratio(self) -> float:
        return self.both.p90_s / self.alone.p90_s


async def measure(load: float, seconds: float, seed: int) -> Row:
    """The smaller tenant by itself, then beside the other."""
    rng = Random(seed)
    share = REPLICAS / 2 * TOKENS_PER_S
    small = arrivals(rng, "small", load * share, seconds)
    flood = arrivals(rng, "flood", TIMES_MORE * load * share, seconds)
    alone = await run(small, REPLICAS // 2)
    both = await run([*small, *flood], REPLICAS)
    return Row(load, alone["small"], both["small"], both["flood"])


def markdown(rows: Sequence[Row], command: str) -> str:
    """The results as a page."""
    now = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [
        "# A tenant beside one that sends ten times more",
        "",
        f"- date: {now}",
        f"- machine: {machine()}",
        f"- command: {command}",
        f"- {REPLICAS} simulated replicas of {TOKENS_PER_S:g} prompt tokens/s, in real time; {QUEUE}",
        "",
        "| load of the smaller, of its fair share | TTFT p90 alone, s | beside the flood, s | ratio | refused alone "
        "| refused beside | flood refused |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.load:g} | {row.alone.p90_s:.2f} | {row.both.p90_s:.2f} | {row.ratio:.2f} "
        f"| {row.alone.refused_share:.0%} | {row.both.refused_share:.0%} | {row.flood.refused_share:.0%} |"
        for row in rows
    ]
    lines += ["", __doc__.rpartition("\n\n")[2].strip(), ""]
    return "\n".join(lines)


async def _all(args: argparse.Namespace) -> list[Row]:
    rows = []
    for load in args.loads.split(","):
        row = await measure(float(load), args.seconds, args.seed)
        print(
            f"load {row.load:g}: p90 {row.both.p90_s:.2f} s beside, {row.alone.p90_s:.2f} s alone, "
            f"ratio {row.ratio:.2f}; refused {row.both.refused} beside, {row.alone.refused} alone, "
            f"flood {row.flood.refused}",
            flush=True,
        )
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the page."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--loads", default="0.85,1.3")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals, for each run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench" / "results" / "queue_fairness.md")
    args = parser.parse_args(given)
    rows = uvloop.run(_all(args))
    args.out.write_text(markdown(rows, " ".join(["python -m headrace_bench.queue_fairness", *given])))
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
