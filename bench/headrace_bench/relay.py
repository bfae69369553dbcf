"""The relay benchmark: what a gateway costs per request and per streamed token, ours beside its peers.

    python -m headrace_bench.relay [--rounds 5] [--quick] [--gateways headrace,vllm-router,...]
                                   [--policy round_robin] [--prompt-bytes 1024,32768] [--patience 60]
                                   [--out DIR] [--name NAME]

Two mock backends, one gateway at a time on a core of its own, in alternation; each round starts each gateway
afresh. The primary figures are CPU time of the gateway, from the scheduler's own count, since elapsed times
drift between rounds. A gateway that is not installed or fails is reported and left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from headrace_bench import relay_measure as measure
from headrace_bench import relay_report as report
from headrace_bench.gateway_process import DidNotStart, Process, cores, start
from headrace_bench.peers import GATEWAYS, REPOSITORY, PeerMissing, launch

QUIET_CORES = 0.15  # other work above this shows in the figures
NOTES = """
How to read it: the median of the rounds (smallest..largest); `ratio` is to vllm-router in the same round.

- CPU is that of the gateway's whole process tree, pinned to one core.
- µs/request: unstreamed chat requests, 32 users who never pause, answers of 667 bytes. `of its core`: how busy
  the gateway was meanwhile. `other work`: cores taken by processes outside the benchmark; above 0.2 the caches
  were not the gateway's own, and all figures are higher than on a quiet machine.
- µs/chunk: many slow streams at once, one write per token. `chunks/read`: tokens a client gets per read; above 1
  somebody joined them.
- added TTFT: through the gateway less straight to the mock, one at a time.
- abort: from a client's leaving during a prefill of 1.2 s to the backend's connection closing, before any byte
  and after the head of a stream (vLLM sends it at once). About 900 ms: noticed at the next byte only.
- stall: growth of resident memory while one client stops reading a fast stream.
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    rounds: int
    prompt_bytes: tuple[int, ...]
    connections: int = 32
    streams: int = 256
    interval_ms: float = 20.0
    warm_s: float = 1.0
    window_s: float = 3.0
    ttft_pairs: int = 300
    abort_tries: int = 3
    stall_mb: float = 50.0
    patience_s: float = 0.0  # longest wait for a quiet machine before each turn
    fault_rounds: int = 2  # aborts and stalls: costly to measure, and the same each time


def quick(plan: Plan) -> Plan:
    """The same in about two minutes, for a look; its spread is wider."""
    return replace(
        plan,
        rounds=min(plan.rounds, 2),
        warm_s=0.5,
        window_s=1.5,
        ttft_pairs=100,
        abort_tries=1,
        fault_rounds=1,
    )


def figures(plan: Plan) -> tuple[report.Figure, ...]:
    """The columns."""
    kinds = []
    for size in plan.prompt_bytes:
        kinds.append(report.Figure(f"request_us_{size}", f"µs/request, {_size(size)}", 1, True))
        kinds.append(report.Figure(f"requests_per_s_{size}", f"requests/s, {_size(size)}", 0))
        kinds.append(report.Figure(f"core_use_{size}", "of its core", 2))
        kinds.append(report.Figure(f"other_cores_{size}", "other work, cores", 2))
    return (
        *kinds,
        report.Figure("chunk_us", f"µs/chunk, {plan.streams} streams", 1, True),
        report.Figure("chunks_per_read", "chunks/read", 2),
        report.Figure("added_ttft_ms", "added TTFT ms", 2),
        report.Figure("abort_unstreamed_ms", "abort ms, no byte yet", 1),
        report.Figure("abort_streamed_ms", "abort ms, head sent", 1),
        report.Figure("stall_mb", f"stall, MB of {plan.stall_mb:.0f}", 1),
    )


def _size(number: int) -> str:
    return f"{number // 1024} KB" if number % 1024 == 0 else f"{number} B"


class Bench:
    """One run. `mocks` and the gateway under test are the only processes it starts, and all are ended."""

    def __init__(
        self, plan: Plan, gateways: Sequence[str], policy: str, folder: Path, console: Console
    ) -> None:
        self.plan = plan
        self.policy = policy
        self.folder = folder
        self.console = console
        self.samples = {name: report.Samples(name, "") for name in gateways}
        self.missing: dict[str, str] = {}
        self.mocks: list[Process] = []

    async def run(self) -> None:
        gateway_cores, other_cores = cores()
        os.sched_setaffinity(0, other_cores)
        command = (sys.executable, "-m", "headrace_bench.mock_backend")
        try:
            self.mocks = [Process(command, other_cores, self.folder, f"mock-{number}") for number in range(2)]
            backends = tuple([await mock.ready_line() for mock in self.mocks])
            for number in range(self.plan.rounds):
                for name in self.samples:
                    if name not in self.missing:
                        await self._turn(name, number, backends, gateway_cores)
        finally:
            for mock in self.mocks:
                mock.stop()

    async def _turn(self, name: str, number: int, backends: tuple[str, ...], pinned: frozenset[int]) -> None:
        """One gateway's share of one round."""
        label = f"round {number + 1}/{self.plan.rounds} {name:14}"
        samples = self.samples[name]
        try:
            gateway = launch(name, backends, self.policy, self.folder)
            samples.version = gateway.version
            process, url = await start(gateway, pinned, self.folder)
        except (PeerMissing, DidNotStart) as error:
            self.missing[name] = str(error)
            self.console.print(f"{label} left out: {error}")
            return
        try:
            load_pids = (os.getpid(), *(mock.pid for mock in self.mocks))
            target = measure.Target(url, process.pid, backends, load_pids)
            await measure.quiet(target, QUIET_CORES, self.plan.patience_s)
            said = [
                f"{key} {value:.1f}" for key, value in (await self._measure(target, number, samples)).items()
            ]
            self.console.print(f"{label} {', '.join(said)}")
        except (measure.MeasurementFailed, OSError, ValueError, TimeoutError) as error:
            samples.remarks.append(f"round {number + 1} broken off: {type(error).__name__}: {error}")
            self.console.print(f"{label} broken off: {error}")
        finally:
            process.stop()

    async def _measure(
        self, target: measure.Target, number: int, samples: report.Samples
    ) -> dict[str, float]:
        plan, found = self.plan, {figure.key: None for figure in figures(self.plan)}
        values: dict[str, float] = {}
        try:
            for size in plan.prompt_bytes:
                cost = await measure.request_cost(target, size, plan.connections, plan.warm_s, plan.window_s)
                values[f"request_us_{size}"] = cost.cpu_us
                values[f"requests_per_s_{size}"] = cost.per_second
                values[f"core_use_{size}"] = cost.core_use
                values[f"other_cores_{size}"] = cost.other_cores
            chunks = await measure.chunk_cost(target, plan.streams, plan.interval_ms, plan.window_s)
            values["chunk_us"], values["chunks_per_read"] = chunks.cpu_us, chunks.chunks_per_read
            if chunks.pace < 0.95:
                samples.remarks.append(
                    f"round {number + 1}: only {chunks.pace:.0%} of the chunks came on time"
                )
            values["added_ttft_ms"] = await measure.added_ttft_ms(target, plan.ttft_pairs)
            if number < plan.fault_rounds:
                for key, stream in (("abort_unstreamed_ms", False), ("abort_streamed_ms", True)):
                    values[key] = median(await measure.abort_ms(target, plan.abort_tries, stream))
                values["stall_mb"] = await measure.stalled_growth_mb(target, plan.stall_mb)
        finally:  # a round broken off still counts with what it has; the others line up by round
            for key in found:
                samples.add(key, values.get(key))
        return values

    def measured(self) -> list[report.Samples]:
        """The gateways with at least one figure."""
        return [samples for samples in self.samples.values() if samples.rounds]


def show(console: Console, header: Sequence[str], body: Sequence[Sequence[str]], title: str) -> None:
    """The table on the screen: one column per gateway, so that it fits."""
    table = Table(title=title)
    for cell in [header[0], *[row[0] for row in body]]:
        table.add_column(cell)
    for index, name in enumerate(header[1:], start=1):
        table.add_row(name, *[row[index] for row in body])
    console.print(table)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="headrace_bench.relay", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--gateways", default=",".join(GATEWAYS), help="in this order; default %(default)s")
    parser.add_argument(
        "--policy", default="round_robin", help="of every gateway that has it; default %(default)s"
    )
    parser.add_argument(
        "--patience", type=float, default=0.0, metavar="S",
        help="wait up to S seconds for a quiet machine before each turn; default 0",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-bytes", default="1024", help="request body sizes, comma-separated; default 1024"
    )
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "bench" / "results", help="folder of the results"
    )
    parser.add_argument("--name", default="relay", help="file name of the results; default relay")
    args = parser.parse_args(arguments)
    try:
        args.sizes = tuple(int(size) for size in args.prompt_bytes.split(","))
    except ValueError:
        parser.error(f"--prompt-bytes {args.prompt_bytes!r} is not a list of numbers such as 1024,32768")
    if args.rounds < 1 or min(args.sizes) < 512:
        parser.error("--rounds must be at least 1, --prompt-bytes at least 512")
    args.names = tuple(args.gateways.split(","))
    if unknown := sorted(set(args.names) - set(GATEWAYS)):
        parser.error(f"no gateway is called {', '.join(unknown)}; there are {', '.join(GATEWAYS)}")
    return args


def about(args: argparse.Namespace, command: Sequence[str], bench: Bench) -> dict[str, Any]:
    """What a reader needs to judge or repeat the run."""
    gateway_cores, other_cores = cores()
    facts = {
        "title": "What a gateway costs",
        "date": datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": report.machine(),
        "cores": f"gateway on core {min(gateway_cores)}, load and mock backends on {sorted(other_cores)}",
        "command": " ".join(["python -m headrace_bench.relay", *command]).strip(),
        "policy": args.policy,
        "rounds": bench.plan.rounds,
        "scheduling": _scheduling(),
    }
    if bench.missing:
        facts["left out"] = "; ".join(f"{name} ({reason})" for name, reason in bench.missing.items())
    return facts


def _scheduling() -> str:
    policy = "normal" if os.sched_getscheduler(0) == os.SCHED_OTHER else "real-time"
    return f"{policy}, niceness {os.getpriority(os.PRIO_PROCESS, 0)}"


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parse_arguments(given)
    plan = Plan(rounds=args.rounds, prompt_bytes=args.sizes, patience_s=args.patience)
    plan = quick(plan) if args.quick else plan
    # Messages hold foreign brackets, and a table in a file need not fit a screen.
    width = None if sys.stdout.isatty() else 170
    console = Console(markup=False, highlight=False, soft_wrap=True, width=width)
    own_cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory(prefix="headrace-relay-") as folder:
        bench = Bench(plan, args.names, args.policy, Path(folder), console)
        try:
            uvloop.run(bench.run())
        except KeyboardInterrupt:
            console.print("stopped; writing what there is")
        finally:
            os.sched_setaffinity(0, own_cores)
    measured = bench.measured()
    if not measured:
        console.print("nothing was measured")
        return 1
    facts, columns = about(args, given, bench), figures(plan)
    show(console, *report.rows(measured, columns), title=facts["machine"])
    args.out.mkdir(parents=True, exist_ok=True)
    page, data = args.out / f"{args.name}.md", args.out / f"{args.name}.json"
    page.write_text(report.markdown(measured, columns, facts, NOTES))
    data.write_text(
        json.dumps(report.document(measured, columns, facts), indent=1, ensure_ascii=False) + "\n"
    )
    console.print(f"written: {page} and {data.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
