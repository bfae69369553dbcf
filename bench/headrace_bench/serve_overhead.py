"""What each way into one vLLM replica adds: our gateway, our gateway within Ray Serve, Ray Serve LLM.

    python -m headrace_bench.serve_overhead          # about 5 minutes; writes results/serve_1.* and serve_8.*
    python -m headrace_bench.serve_overhead --add    # more rounds of the same, until --requests are reached

Two vLLM engines with the same model and arguments run on the same core: our replica, asked directly, through our own
gateway and through our application in Ray Serve; and that within Ray Serve LLM's `build_openai_app`, asked through the
same Serve proxy. They are asked in turn, a block of requests each, so only one of them works at a time. Added time to
the first token is that of a way less that of the direct one in the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

import msgspec

from headrace_bench.fixed_gateway import write_replicas
from headrace_bench.gateway_process import Process, cores
from headrace_bench.load_client import LoadClient, Target
from headrace_bench.peers import REPOSITORY
from headrace_bench.real_replica import MODEL
from headrace_bench.relay_report import machine
from headrace_bench.serve_ground import Ground, cpu_s, llm_config, our_config, serve_ground
from headrace_bench.serve_overhead_report import page

RESULTS = REPOSITORY / "bench" / "results"
FLEET = "bench-serve"
DIRECT, GATEWAY, OURS, PEER = "vLLM itself", "our gateway", "ours in Ray Serve", "Ray Serve LLM"
_WARM_UP = 8
_PROXY = ("SERVE_PROXY_ACTOR", "ProxyActor")
_OUR_REPLICA = ("ray::ReplicaActor", f"{FLEET}/{MODEL}")


@dataclass(frozen=True, slots=True)
class Way:
    """One way to an engine. `cpu_s`: seconds on a core so far of all that serves it, engine cores excepted."""

    name: str
    target: Target
    cpu_s: Callable[[], float]


@dataclass(slots=True)
class Block:
    """What one block of requests through one way gave."""

    way: str
    round: int
    ttft_s: list[float] = field(default_factory=list)
    tokens: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    failed: list[str] = field(default_factory=list)


@asynccontextmanager
async def ways(ground: Ground, folder: Path) -> AsyncIterator[list[Way]]:
    """Everything started and answering."""
    from ray import serve
    from ray.serve.llm import build_openai_app

    from headrace.config import parse
    from headrace.fleet.membership import ControllerMembership
    from headrace.serve import build_app
    from headrace.serve.fleet_keeper import join
    from headrace.serve.fleet_owner import FleetOwner

    config = parse(our_config(FLEET))
    peer = build_openai_app({"llm_configs": [llm_config(MODEL, 0)]})
    targets = [
        serve.RunTarget(build_app(config), name="ours", route_prefix="/ours"),
        serve.RunTarget(peer, name="peer", route_prefix="/peer"),
    ]
    await asyncio.to_thread(serve.run_many, targets)
    controller, token = await join(config, FleetOwner("ours", "HeadraceIngress"), 0)
    membership = await ControllerMembership(controller).watch(None)
    replica = membership.replicas[0]
    listed = folder / "replicas.json"
    write_replicas([replace(replica, api_key=f"Bearer {token}")], listed)
    command = (
        sys.executable, "-m", "headrace_bench.fixed_gateway", "--replicas", str(listed), "--policy", "delay",
    )  # fmt: skip
    gateway = Process(command, frozenset().union(*cores()), folder, "gateway")
    try:
        url = await gateway.ready_line(60)
        authorized = {"authorization": f"Bearer {token}"}
        yield [
            Way(DIRECT, Target.parse(replica.endpoints.url, authorized), lambda: ground.cpu_s(_OUR_REPLICA)),
            Way(GATEWAY, Target.parse(url), lambda: ground.cpu_s(_OUR_REPLICA) + cpu_s(gateway.pid)),
            Way(
                OURS,
                Target.parse(ground.url("/ours")),
                lambda: ground.cpu_s((*_OUR_REPLICA, *_PROXY, *_replicas_of("ours"))),
            ),
            Way(
                PEER,
                Target.parse(ground.url("/peer")),
                lambda: ground.cpu_s((*_PROXY, *_replicas_of("peer"))),
            ),
        ]
    finally:
        gateway.stop()


def _replicas_of(app: str) -> tuple[str, str]:
    """What the titles of a Serve application's replicas hold, idle and at work."""
    return f"SERVE_REPLICA::{app}#", f"ServeReplica:{app}:"


async def block(
    way: Way, client: LoadClient, number: int, requests: int, *, streams: int, max_tokens: int
) -> Block:
    """`requests` chats, `streams` of them at a time, each with a text of its own."""
    done = Block(way.name, number)
    left = iter(range(requests))

    async def one_after_another() -> None:
        for index in left:
            text = f"{number} {index} {way.name}: tell me in a few words what the river said to the old mill."
            body = {
                "model": MODEL,
                "messages": [{"role": "user", "content": text}],
                "stream": True,
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "temperature": 0,
            }
            answer = await client.exchange(
                "POST", "/v1/chat/completions", msgspec.json.encode(body), streamed=True
            )
            if answer.error is not None or answer.first_s is None:
                done.failed.append(f"{answer.error}: {answer.detail}")
            else:
                done.ttft_s.append(answer.first_s - answer.sent_s)
                done.tokens += max_tokens

    before_s, began_s = way.cpu_s(), time.monotonic()
    await asyncio.gather(*(one_after_another() for _ in range(streams)))
    done.wall_s = time.monotonic() - began_s
    done.cpu_s = way.cpu_s() - before_s
    return done


@dataclass(slots=True)
class Course:
    """So many streams at a time: its blocks so far, and where they are written."""

    streams: int
    stem: Path
    blocks: list[Block] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        return 1 + max((one.round for one in self.blocks), default=-1)


async def measure(args: argparse.Namespace, courses: list[Course]) -> None:
    """Rounds of every course, each with its share of the time; what is known is written after every round."""
    with serve_ground() as ground, tempfile.TemporaryDirectory(prefix="headrace-serve-") as name:
        async with ways(ground, Path(name)) as found:
            clients = {way.name: LoadClient(way.target) for way in found}
            for course in courses:
                shape = {"streams": course.streams, "max_tokens": args.max_tokens}
                for way in found:
                    await block(way, clients[way.name], -1, _WARM_UP, **shape)
                limit_s = time.monotonic() + args.limit / len(courses)
                while time.monotonic() < limit_s and course.rounds * args.block < args.requests:
                    await _round(args, course, found, clients)
            for client in clients.values():
                client.close()


async def _round(
    args: argparse.Namespace, course: Course, found: list[Way], clients: dict[str, LoadClient]
) -> None:
    number, began_s = course.rounds, time.monotonic()
    shape = {"streams": course.streams, "max_tokens": args.max_tokens}
    done = []
    for place in range(len(found)):
        # Every way begins a round in turn, so that none always follows the same one.
        way = found[(place + number) % len(found)]
        done.append(await block(way, clients[way.name], number, args.block, **shape))
    course.blocks += done
    write(course, args)
    _say(f"{course.streams} at a time, round {number + 1}: {time.monotonic() - began_s:.0f} s")


def report(course: Course, args: argparse.Namespace) -> dict[str, Any]:
    """The figures by way, and what they were measured with."""
    blocks = course.blocks
    direct = {one.round: fmean(one.ttft_s) for one in blocks if one.way == DIRECT and one.ttft_s}
    figures = {}
    for name in dict.fromkeys(one.way for one in blocks):
        mine = [one for one in blocks if one.way == name and one.ttft_s]
        samples = [ttft for one in mine for ttft in one.ttft_s]
        added = [fmean(one.ttft_s) - direct[one.round] for one in mine if one.round in direct]
        figures[name] = {
            "requests": len(samples),
            "failed": sum(len(one.failed) for one in blocks if one.way == name),
            "failures": sorted({text for one in blocks if one.way == name for text in one.failed})[:3],
            "ttft_median_ms": 1e3 * median(samples),
            "ttft_mean_ms": 1e3 * fmean(samples),
            "added_by_median_ms": 1e3
            * (median(samples) - median(t for one in blocks if one.way == DIRECT for t in one.ttft_s)),
            "added_ms": 1e3 * median(added),
            "added_low_ms": 1e3 * sorted(added)[len(added) // 4],
            "added_high_ms": 1e3 * sorted(added)[(3 * len(added)) // 4],
            "tokens_per_s": sum(one.tokens for one in mine) / sum(one.wall_s for one in mine),
            "cpu_ms": 1e3 * sum(one.cpu_s for one in mine) / len(samples),
        }
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "command": " ".join(["python -m headrace_bench.serve_overhead", *sys.argv[1:]]),
        "streams": course.streams,
        "block": args.block,
        "max_tokens": args.max_tokens,
        "figures": figures,
        "blocks": [asdict(one) for one in blocks],
    }


def write(course: Course, args: argparse.Namespace) -> None:
    """STEM.json and STEM.md."""
    found = report(course, args)
    course.stem.with_suffix(".json").write_text(json.dumps(found) + "\n")
    course.stem.with_suffix(".md").write_text(page(found))


def _begun(streams: int, stem: Path, *, add: bool) -> Course:
    path = stem.with_suffix(".json")
    earlier = json.loads(path.read_text())["blocks"] if add and path.exists() else []
    return Course(streams, stem, [Block(**one) for one in earlier])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    options = argparse.ArgumentParser(prog="headrace_bench.serve_overhead")
    options.add_argument("--streams", default="1,8", metavar="N,...", help="at a time")
    options.add_argument("--requests", type=int, default=500, metavar="N", help="through each way")
    options.add_argument(
        "--block", type=int, default=25, metavar="N", help="requests before the next way's turn"
    )
    options.add_argument("--max-tokens", type=int, default=4, metavar="N", help="of an answer")
    options.add_argument("--limit", type=float, default=120.0, metavar="S", help="no round begins later")
    options.add_argument("--add", action="store_true", help="to the rounds of earlier calls")
    options.add_argument(
        "--out", type=Path, default=RESULTS / "serve", metavar="STEM", help="gets _STREAMS added"
    )
    args = options.parse_args()
    courses = [
        _begun(streams, args.out.with_name(f"{args.out.name}_{streams}"), add=args.add)
        for streams in map(int, args.streams.split(","))
    ]
    asyncio.run(measure(args, courses))
    for course in courses:
        print(page(report(course, args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
