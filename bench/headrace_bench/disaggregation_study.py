"""The disaggregation study: pools or flexible roles, aware of caches or not, per request or above a threshold.

    python -m headrace_bench.disaggregation_study [--requests 3000] [--seeds 2] [--speeds 0.75,1,…] [--arms flexible]

Writes bench/results/disaggregation_study.md, .json and .png; started again, it goes on where it was, unless the code
that makes the figures has changed. One process; about 2 s per 3,000 requests and run, so 7 minutes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from headrace.errors import CallerError, HeadraceError
from headrace_bench.disaggregation_arms import NUM_REPLICAS, SPEEDS, Arm, Outcome, run_arm, study_arms
from headrace_bench.disaggregation_report import NEAR, draw, fronts, render
from headrace_bench.load_plots import require_matplotlib
from headrace_bench.policy_study import HOME, TRACES
from headrace_bench.scenario import Scenario
from headrace_bench.study_results import Results, fingerprint
from headrace_bench.timing_profile import DEFAULT_ENGINE
from headrace_bench.trace import read_trace, truncate

WRITE_EVERY_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 with a line on stderr; 2 where the default falls short of the best at a speed."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _study(_parser().parse_args(words), words)
    except HeadraceError as error:
        print(f"disaggregation_study: {error}", file=sys.stderr)
        return 1


def _study(args: argparse.Namespace, words: Sequence[str]) -> int:
    require_matplotlib()
    arms = [arm for arm in study_arms() if not args.arms or any(word in arm.name for word in args.arms)]
    if not arms:
        raise CallerError("no arm's name holds what --arms asks for")
    base = Scenario(truncate(read_trace(args.trace), args.requests), DEFAULT_ENGINE, NUM_REPLICAS)
    setting = {"requests": args.requests or "all", "code": fingerprint()}
    stem = Path(args.out)
    results = Results.resume(stem.with_suffix(".json"), Outcome, setting)
    # Seed by seed: an early stop leaves every cell with the same seeds.
    todo = [
        (arm, speed, seed)
        for seed in range(args.seeds)
        for speed in args.speeds
        for arm in arms
        if (arm.name, speed, seed) not in results.runs
    ]
    _run_all(todo, base, results)
    outcomes = results.in_order()
    names = [arm.name for arm in study_arms() if any(one.arm == arm.name for one in outcomes)]
    command = shlex.join(["python", "-m", "headrace_bench.disaggregation_study", *words])
    said = f"the first {setting['requests']} requests, code {setting['code']}"
    stem.with_suffix(".md").write_text(render(outcomes, names, command, said))
    stem.with_suffix(".png").write_bytes(draw(outcomes, names))
    short = [row for row in fronts(outcomes, study_arms()[0].name) if row[1] < NEAR * row[3]]
    for speed, ours, best, goodput in short:
        print(f"{speed:g}x: {ours:.3f}, {best} has {goodput:.3f}")
    print(f"{stem.with_suffix('.md')}: {len(outcomes)} runs, short at {len(short)} speeds")
    return 2 if short else 0


def _run_all(todo: Sequence[tuple[Arm, float, int]], base: Scenario, results: Results[Outcome]) -> None:
    screen = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    written_s = time.monotonic()
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=len(todo))
        try:
            for arm, speed, seed in todo:
                bar.update(task, description=f"{speed:g}x: {arm.name}")
                results.add(run_arm(arm, base, speed, seed))
                bar.update(task, advance=1)
                if time.monotonic() - written_s > WRITE_EVERY_S:
                    results.write()
                    written_s = time.monotonic()
        finally:
            results.write()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m headrace_bench.disaggregation_study", description=__doc__.split("\n")[0]
    )

    def speeds(text: str) -> list[float]:
        return [float(word) for word in text.split(",") if word.strip()]

    parser.add_argument(
        "--trace", default=TRACES / "mooncake_conversation.jsonl.gz", help="Mooncake's format"
    )
    parser.add_argument("--requests", type=int, default=3000, metavar="N", help="the first N (default 3000)")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="(default 2)")
    parser.add_argument("--speeds", type=speeds, default=list(SPEEDS), metavar="X,…", help="of the trace")
    parser.add_argument(
        "--arms", action="append", metavar="WORDS", help="whose name holds this; may be repeated"
    )
    parser.add_argument(
        "--out",
        default=HOME / "results" / "disaggregation_study",
        metavar="STEM",
        help="of .md, .json and .png",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
