"""The scaling study: TTFT objective attained against GPU hours, ours and what others scale by.

    python -m headrace_bench.scaling_study [--seeds 2] [--cells "azure"] [--arms kpa]

Writes bench/results/scaling_study.md, .json and .png after every few runs; started again, it goes on where it was. A
run is made anew when the code that makes it has changed. One process; about 10 s per run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from headrace.errors import CallerError, HeadraceError
from headrace_bench.load_plots import require_matplotlib
from headrace_bench.policy_study import HOME, TRACES
from headrace_bench.scaling_arms import OURS, Arm, study_arms
from headrace_bench.scaling_cells import COLD_STARTS_S, Cell, Outcome, code_of, run_arm, study_cells
from headrace_bench.scaling_report import better_than, draw, means_of, render
from headrace_bench.study_results import Results

WRITE_EVERY_S = 20.0

TUNED = """Ours: the autoscaler's windows and drain time were chosen on *bursty* of seed 100, which is not among those
reported; its settings (`ScalingSpec`) are the defaults, and a smaller and a larger headroom. The others' settings were
chosen to show each at its best that a few tries found, on the reported loads' engine."""


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 with a line on stderr; 2 where a baseline is better than ours in both."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _study(_parser().parse_args(words), words)
    except HeadraceError as error:
        print(f"scaling_study: {error}", file=sys.stderr)
        return 1


def _study(args: argparse.Namespace, words: Sequence[str]) -> int:
    require_matplotlib()
    cells = [
        cell for cell in study_cells() if not args.cells or any(word in cell.name for word in args.cells)
    ]
    # Ours always, and first: without it there is nothing to compare with.
    arms = [
        arm
        for arm in study_arms()
        if not args.arms or arm.family == OURS or any(word in arm.name for word in args.arms)
    ]
    if not cells:
        raise CallerError("no cell's name holds what --cells asks for")
    stem = Path(args.out)
    results = Results.resume(stem.with_suffix(".json"), Outcome)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    # Seed by seed, scaler by scaler: an early stop leaves every cell with the same ones.
    todo = [
        (cell, arm, seed)
        for seed in seeds
        for arm in sorted(arms, key=lambda arm: bool(arm.setting))  # defaults first
        for cell in cells
        if not _is_known(results, cell, arm, seed)
    ]
    _run_all(todo, Path(args.trace), results, args.budget)
    named = {arm.name for arm in study_arms()}
    outcomes = [one for one in results.in_order() if one.arm in named]
    # Where a stop left a cell with more seeds for some, only those that all have are compared.
    shared = _shared(outcomes)
    command = shlex.join(["python", "-m", "headrace_bench.scaling_study", *words])
    stem.with_suffix(".md").write_text(render(shared, study_cells(), command, TUNED))
    families = list(dict.fromkeys(arm.family for arm in study_arms()))
    stem.with_suffix(".png").write_bytes(draw(shared, study_cells(), families))
    short = 0
    for cell in study_cells():
        means = means_of(shared, cell)
        if OURS in means and (better := better_than(means, OURS)):
            short += 1
            print(f"{cell.name}: better in both: {', '.join(better)}")
    print(f"{stem.with_suffix('.md')}: {len(shared)} runs, ours is off the front in {short} cells")
    return 2 if short else 0


def _is_known(results: Results[Outcome], cell: Cell, arm: Arm, seed: int) -> bool:
    outcome = results.runs.get((cell.workload, cell.cold_start_s, arm.name, seed))
    return outcome is not None and outcome.code == code_of(arm)


def _shared(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those of seeds that every scaler of the cell has run."""
    seeds: dict[tuple[str, float], dict[str, set[int]]] = {}
    for one in outcomes:
        seeds.setdefault((one.workload, one.cold_start_s), {}).setdefault(one.arm, set()).add(one.seed)
    common = {cell: set.intersection(*by_arm.values()) for cell, by_arm in seeds.items()}
    return [one for one in outcomes if one.seed in common[one.workload, one.cold_start_s]]


def _run_all(
    todo: Sequence[tuple[Cell, Arm, int]], trace: Path, results: Results[Outcome], budget_s: float
) -> None:
    screen = Console(stderr=True)
    began_s = written_s = time.monotonic()
    try:
        for number, (cell, arm, seed) in enumerate(todo):
            if time.monotonic() - began_s > budget_s:
                screen.print(f"{len(todo) - number} runs are left for the next start", highlight=False)
                return
            if _is_known(results, cell, arm, seed):
                continue  # a fixed fleet, known from another cold start
            for outcome in _same_everywhere(run_arm(cell, arm, seed, trace), arm):
                results.add(outcome)
            now_s = time.monotonic()
            if now_s - written_s > WRITE_EVERY_S:
                results.write()
                written_s = now_s
                screen.print(
                    f"{now_s - began_s:.0f} s: {number + 1}/{len(todo)}, {arm.name}", highlight=False
                )
    finally:
        results.write()


def _same_everywhere(outcome: Outcome, arm: Arm) -> list[Outcome]:
    """A fleet that never scales is the same at every cold start."""
    if arm.family != "fixed":
        return [outcome]
    return [replace(outcome, cold_start_s=cold_s) for cold_s in COLD_STARTS_S]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m headrace_bench.scaling_study", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--trace", default=TRACES / "AzureLLMInferenceTrace_conv.csv", help="Azure's format")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="(default 2)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="K", help="(default 0)")
    parser.add_argument(
        "--cells", action="append", metavar="WORDS", help="whose name holds this; may be repeated"
    )
    parser.add_argument(
        "--arms", action="append", metavar="WORDS", help="others whose name holds this; may be repeated"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=float("inf"),
        metavar="S",
        help="start no run after so long (default: no bound)",
    )
    parser.add_argument(
        "--out", default=HOME / "results" / "scaling_study", metavar="STEM", help="of .md, .json and .png"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
