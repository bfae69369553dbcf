"""Policies on real vLLM replicas, beside peers in front of the same replicas, in alternation.

    python -m headrace_bench.real_policies              # about 20 minutes on two cores; writes results/real_policies.*
    python -m headrace_bench.real_policies --quick      # about 6 minutes: one round, short runs

Two replicas, each on a core of its own, with KV caches that hold the users' conversations together but not each alone.
Every run has a gateway that has just started and text of its own: what earlier runs left in the caches is of no use to
it and makes room as it would for anything new. Lengths, pauses and what is shared are the same in every run.
With --profile the replicas' timing is fitted at the end, for `headrace_bench.simulator_check`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from headrace.config import SimulatedEngine
from headrace_bench.calibration import fit_steps
from headrace_bench.gateway_process import DidNotStart
from headrace_bench.peers import REPOSITORY, PeerMissing
from headrace_bench.real_fleet import FleetFailed, real_fleet
from headrace_bench.real_policies_report import Results, load_results, write
from headrace_bench.real_replica import MAX_RUNNING, MODEL, arguments
from headrace_bench.real_run import Contender, RealRun, Stage, Workload, calibrate_text, run_contender
from headrace_bench.relay_report import machine
from headrace_bench.timing_profile import TimingProfile
from headrace_router.types import Iteration, Replica

RESULTS = REPOSITORY / "bench" / "results"
KV_BYTES = 150_000_000  # 6,496 tokens of SmolLM2-135M in bfloat16
CONTENDERS = (
    Contender("headrace", "delay"),
    Contender("headrace", "round_robin"),
    Contender("headrace", "least_loaded"),
    Contender("headrace", "prefix_affinity"),
    Contender("vllm-router", "cache_aware"),
    Contender("sglang-router", "cache_aware"),
)
CHECKED = ("headrace delay", "headrace round_robin")
"""What `simulator_check` simulates."""


async def compare(args: argparse.Namespace) -> int:
    """0 when every contender gave a result."""
    workload = Workload(
        users=args.users, think_s=args.think, duration_s=args.duration, settle_s=args.settle, seed=args.seed
    )
    results = Results(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine(),
        command=" ".join(["python -m headrace_bench.real_policies", *sys.argv[1:]]),
        scheduling=f"niceness {os.getpriority(os.PRIO_PROCESS, 0)}",
        workload=workload,
        engine=arguments(args.kv_bytes),
    )
    chosen = [one for one in CONTENDERS if not args.only or one.name in args.only]
    _say(f"starting 2 replicas; logs in {args.logs}")
    async with real_fleet(2, args.kv_bytes, args.logs) as fleet:
        results.cache_tokens = (fleet.replicas[0].num_blocks or 0) * (fleet.replicas[0].block_size or 0)
        stage = Stage(fleet, workload, await calibrate_text(fleet))
        results.calibration = stage.calibration
        steps = await _rounds(stage, chosen, args.rounds, results, args.out)
        if args.profile:
            profile = fit_fleet(fleet.replicas[0], steps)
            profile.write(args.profile)
            _say(f"{args.profile}: {profile.origin}")
    print(args.out.with_suffix(".md").read_text())
    return 0 if {run.contender for run in results.runs} == {one.name for one in chosen} else 1


async def _rounds(
    stage: Stage, contenders: Sequence[Contender], rounds: int, results: Results, out: Path
) -> dict[str, list[Iteration]]:
    """The replicas' steps, by contender."""
    steps: dict[str, list[Iteration]] = {}
    for number in range(rounds):
        # Each round begins with another contender, so that none always follows the same one.
        shift = 2 * number % len(contenders)
        for place, contender in enumerate([*contenders[shift:], *contenders[:shift]]):
            # Texts are the same for nobody: a seed per run.
            seed = 1 + number * len(contenders) + place
            try:
                run = await run_contender(contender, stage, number, seed)
            except (PeerMissing, DidNotStart, FleetFailed) as error:
                results.remarks.append(f"{contender.name}, round {number + 1}: {error}")
                _say(results.remarks[-1])
                continue
            results.runs.append(run)
            steps.setdefault(contender.name, []).extend(stage.fleet.all_steps())
            write(results, out)
            _say(_words(run))
    return steps


def _words(run: RealRun) -> str:
    predicted = f", hits {run.predicted_tokens}/{run.reported_tokens}" if run.predicted_tokens else ""
    return (
        f"round {run.round + 1} {run.contender}: {run.requests} requests, {run.failed} failed, "
        f"TTFT mean {run.ttft_s.mean:.3f} p50 {run.ttft_s.p50:.3f} p90 {run.ttft_s.p90:.3f} s, "
        f"hit rate {run.hit_rate:.1%}, {run.computed_per_request:.0f} tokens computed a request, "
        f"busy {' '.join(f'{share:.2f}' for share in run.busy)}{predicted}"
    )


def fit_fleet(replica: Replica, steps: Mapping[str, Sequence[Iteration]]) -> TimingProfile:
    """The timing of the replicas under this very load: steps by contender, in all rounds.

    Not from the runs that `simulator_check` simulates, where there are others: a check must not know the answers. A
    calibration on an idle machine (`headrace calibrate`) is faster than what is met here, where gateway and load take
    their share of the two cores and prompts stand on long cached prefixes. Raises `CalibrationError`.
    """
    others = [name for name in steps if name not in CHECKED]
    names = others or list(steps)
    fit = fit_steps([step for name in names for step in steps[name]])
    timing = fit.timing
    engine = SimulatedEngine(
        block_size=replica.block_size or 0,
        num_blocks=replica.num_blocks or 0,
        max_batched_tokens=arguments(0)["max_num_batched_tokens"],
        max_running=MAX_RUNNING,
        max_model_len=replica.max_model_len or 0,
        step_s=timing.step_s,
        prefill_token_s=timing.prefill_token_s,
        decode_sequence_s=timing.decode_sequence_s,
        context_token_s=timing.context_token_s,
    )
    origin = (
        f"fitted to {fit.steps} steps of two {MODEL} replicas by their own reports, in the runs of "
        f"{', '.join(names)}; {fit.left_out} left out, median error {fit.median_error:.1%}"
    )
    return TimingProfile(f"{MODEL}-cpu-core", origin, engine)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="headrace_bench.real_policies", description="Policies and peers on real vLLM replicas."
    )
    usual = Workload()
    options.add_argument("--rounds", type=int, default=3, metavar="N")
    options.add_argument("--quick", action="store_true", help="one round of 25 s runs")
    options.add_argument("--duration", type=float, default=usual.duration_s, metavar="S", help="of one run")
    options.add_argument(
        "--settle", type=float, default=usual.settle_s, metavar="S", help="left out at a run's begin"
    )
    options.add_argument("--users", type=int, default=usual.users, metavar="N")
    options.add_argument(
        "--think", type=float, default=usual.think_s, metavar="S", help="mean pause between turns"
    )
    options.add_argument("--kv-bytes", type=int, default=KV_BYTES, metavar="N", help="of one replica's cache")
    options.add_argument("--seed", type=int, default=0, help="of lengths and pauses")
    options.add_argument("--only", action="append", metavar="NAME", help="a contender; may be repeated")
    options.add_argument("--out", type=Path, default=RESULTS / "real_policies", metavar="STEM")
    options.add_argument("--profile", type=Path, metavar="FILE", help="also fit a timing profile")
    options.add_argument(
        "--logs",
        type=Path,
        metavar="DIR",
        help="of the replicas, a folder that exists; default: a temporary one",
    )
    options.add_argument("--report", action="store_true", help="only write the tables again from STEM.json")
    return options


def main() -> int:
    args = parser().parse_args()
    if args.report:
        write(load_results(args.out.with_suffix(".json")), args.out)
        return 0
    if args.quick:
        args.rounds, args.duration, args.settle = 1, 25.0, 8.0
    args.logs = args.logs or Path(tempfile.mkdtemp(prefix="headrace-real-fleet-"))
    try:
        return asyncio.run(compare(args))
    except FleetFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
