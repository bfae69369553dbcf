"""What it costs that several gateways share no state, and what is left of that when they tell each other their choices.

    python -m headrace_bench.gateways_study [--seeds 4] [--requests 3000]

Writes bench/results/gateways_study.md. One, two and four gateways before the same replicas, in simulation: Mooncake's
conversations (few long prompts with much in common) and short prompts with forty system prompts (many a second, where
a load report is old before it arrives). The seed moves the arrivals.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import NamedTuple

from headrace.errors import HeadraceError
from headrace_bench.scenario import STUDY_SLO, Scenario
from headrace_bench.simulate_summary import summarise_run
from headrace_bench.simulator import Simulation
from headrace_bench.timing_profile import DEFAULT_ENGINE, with_cache
from headrace_bench.trace import TraceRecord, read_trace, truncate

HOME = Path(__file__).resolve().parent.parent
TRACE = HOME.parent.parent / "shared" / "traces" / "mooncake_conversation.jsonl.gz"
SETTINGS = ((1, True), (2, False), (2, True), (4, False), (4, True))  # gateways, whether they tell
LOADS = (0.5, 0.8, 0.95)
REPLICAS = 16
CACHE_TOKENS = 300_000


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    workload: str
    load: float
    gateways: int
    tells: bool
    seed: int


class Outcome(NamedTuple):
    """What the table shows of it."""

    ttft_s: float
    ttft_p99_s: float
    hit_rate: float
    imbalance: float  # prefill tokens, busiest over mean
    requests_per_s: float


def short_prompts(count: int) -> list[TraceRecord]:
    """520 to 920 tokens, the first 512 one of forty system prompts; answers of 20 to 80."""
    draw = Random("short prompts")
    at_s = 0.0
    records = []
    for number in range(count):
        at_s += draw.expovariate(100)
        ids = (draw.randrange(40), 1000 + number)
        records.append(TraceRecord(at_s, 520 + draw.randrange(400), 20 + draw.randrange(60), ids))
    return records


def run_one(case: Case, requests: int, trace: Path) -> Outcome:
    """In whatever process."""
    is_short = case.workload == "short"
    records = short_prompts(2 * requests) if is_short else truncate(read_trace(trace), requests)
    scenario = Scenario(
        tuple(records),
        with_cache(DEFAULT_ENGINE, CACHE_TOKENS),
        REPLICAS,
        jitter_s=0.05 if is_short else None,
    ).at_utilisation(case.load)
    arriving = scenario.requests(case.seed)
    run = Simulation(
        arriving,
        scenario.engine,
        REPLICAS,
        policy="delay",
        seed=case.seed,
        gateways=case.gateways,
        gateways_tell=case.tells,
    ).run()
    summary = summarise_run(run, arriving, scenario.engine, policy="delay", seed=case.seed, slo=STUDY_SLO)
    assert summary.ttft_s is not None
    return Outcome(
        summary.ttft_s.mean,
        summary.ttft_s.p99,
        summary.hit_rate,
        summary.imbalance.prefill_tokens,
        summary.requests_per_s,
    )


def render(outcomes: dict[Case, Outcome], command: str) -> str:
    """The tables."""
    seeds = len({case.seed for case in outcomes})
    lines = [
        "# What several gateways cost",
        "",
        f"`{command}`: policy `delay`, {REPLICAS} simulated replicas of {CACHE_TOKENS:,} tokens of cache, means of "
        f"{seeds} seeds, the standard deviation between seeds in brackets. *tell*: gateways tell each other where "
        "they send what, 1 ms later; *apart*: each knows of the others what load reports and KV events show.",
    ]
    for workload, load in dict.fromkeys((case.workload, case.load) for case in outcomes):
        name = "short prompts" if workload == "short" else "Mooncake's conversations"
        rows = {
            (case.gateways, case.tells): [
                outcomes[other]
                for other in outcomes
                if (other.workload, other.load, other.gateways, other.tells)
                == (workload, load, case.gateways, case.tells)
            ]
            for case in outcomes
        }
        rate = statistics.mean(one.requests_per_s for one in rows[(1, True)])
        alone = statistics.mean(one.ttft_s for one in rows[(1, True)])
        lines += [
            "",
            f"## {name}, load {load:g}, {rate:.0f} requests/s",
            "",
            "| gateways | mean TTFT, ms | to one gateway | p99 TTFT, ms | hit rate | busiest replica / mean |",
            "|---|---|---|---|---|---|",
        ]
        for (gateways, tells), found in rows.items():
            ttft = [1000 * one.ttft_s for one in found]
            spread = statistics.stdev(ttft) if len(ttft) > 1 else 0.0
            mean = statistics.mean(ttft)
            label = "1" if gateways == 1 else f"{gateways}, {'tell' if tells else 'apart'}"
            lines.append(
                f"| {label} | {mean:.1f} ({spread:.1f}) | {mean / alone / 1000:.3f} | "
                f"{1000 * statistics.mean(one.ttft_p99_s for one in found):.0f} | "
                f"{statistics.mean(one.hit_rate for one in found):.3f} | "
                f"{statistics.mean(one.imbalance for one in found):.3f} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 with a line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m headrace_bench.gateways_study", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="(default 4)")
    parser.add_argument(
        "--requests", type=int, default=3000, metavar="N", help="of the trace; twice as many short ones"
    )
    parser.add_argument("--trace", type=Path, default=TRACE, help="Mooncake's conversations")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="at a time (default 2)")
    parser.add_argument("--out", type=Path, default=HOME / "results" / "gateways_study.md")
    args = parser.parse_args(words)
    cases = [
        Case(workload, load, gateways, tells, seed)
        for workload in ("short", "mooncake")
        for load in LOADS
        for gateways, tells in SETTINGS
        for seed in range(args.seeds)
    ]
    try:
        with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
            found = pool.map(run_one, cases, [args.requests] * len(cases), [args.trace] * len(cases))
            outcomes = dict(zip(cases, found, strict=True))
    except HeadraceError as error:
        print(f"gateways_study: {error}", file=sys.stderr)
        return 1
    command = shlex.join(["python", "-m", "headrace_bench.gateways_study", *words])
    args.out.write_text(render(outcomes, command))
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
