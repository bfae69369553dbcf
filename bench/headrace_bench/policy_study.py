"""The policy study: every policy, fleet, cache and rate, in simulation.

    python -m headrace_bench.policy_study [--requests 4000] [--seeds 5] [--cells "8 replicas"] [--policies delay,…]

Writes bench/results/policy_study.md and .json after every few runs; started again, it goes on where it was, unless
the code that makes the figures has changed. Every run is one process's work; two work at a time by default.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from headrace.errors import CallerError, HeadraceError
from headrace_bench.study_cells import Cell, Traces, cell_ceilings, cell_scenario, study_cells
from headrace_bench.study_figures import Figures
from headrace_bench.study_report import by_cell, render, shortfalls
from headrace_bench.study_results import Results, fingerprint
from headrace_router.policies import POLICIES

HOME = Path(__file__).resolve().parent.parent
TRACES = HOME.parent.parent / "shared" / "traces"
WRITE_EVERY_S = 10.0


def simulate_one(cell: Cell, policy: str, seed: int, traces: Traces) -> Figures:
    """One run, in whatever process."""
    scenario = cell_scenario(cell, traces)
    summary, _ = scenario.simulate(policy, seed)
    ceiling = cell_ceilings(cell, traces, seed)
    return Figures.of(cell, summary, scenario.speed, ceiling.pooled, ceiling.infinite)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 with a line on stderr; 2 where the default policy falls short in a cell."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    args.words = words
    try:
        return _study(args)
    except HeadraceError as error:
        print(f"policy_study: {error}", file=sys.stderr)
        return 1


def _study(args: argparse.Namespace) -> int:
    traces = Traces(Path(args.trace), Path(args.azure), args.requests)
    cells = [
        cell for cell in study_cells() if not args.cells or any(word in cell.name for word in args.cells)
    ]
    policies = args.policies or list(POLICIES)
    if unknown := set(policies) - set(POLICIES):
        raise CallerError(f"unknown policies {', '.join(sorted(unknown))}; there are {', '.join(POLICIES)}")
    if not cells:
        raise CallerError("no cell's name holds what --cells asks for")
    traces.check()
    setting = {"requests": args.requests or "all", "code": fingerprint()}
    stem = Path(args.out)
    results = Results.resume(stem.with_suffix(".json"), Figures, setting)
    # Seed by seed: an early stop leaves every cell with the same seeds.
    todo = [
        (cell, policy, seed)
        for seed in range(args.seeds)
        for cell in cells
        for policy in policies
        if (cell.name, policy, seed) not in results.runs
    ]
    _run_all(todo, traces, results, args.processes)
    order = [cell.name for cell in study_cells()]
    runs = results.in_order()
    command = shlex.join(["python", "-m", "headrace_bench.policy_study", *args.words])
    stem.with_suffix(".md").write_text(render(runs, order, command, setting))
    said = [
        f"{name}: {'; '.join(short)}"
        for name, by_policy in by_cell(runs).items()
        if (short := shortfalls(by_policy, name.endswith("knee")))
    ]
    for line in said:
        print(line)
    print(f"{stem.with_suffix('.md')}: {len(runs)} runs, {len(said)} cells fall short")
    return 2 if said else 0


def _run_all(
    todo: Sequence[tuple[Cell, str, int]], traces: Traces, results: Results[Figures], processes: int
) -> None:
    if not todo:
        return
    screen = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    written_s = time.monotonic()
    # Spawned, so that a worker does not inherit the parent's threads.
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        Progress(*columns, console=screen, disable=not screen.is_terminal) as bar,
    ):
        task = bar.add_task("", total=len(todo))
        pending = {pool.submit(simulate_one, *each, traces) for each in todo}
        try:
            while pending:
                ended, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in ended:
                    figures = future.result()
                    results.add(figures)
                    bar.update(task, advance=1, description=f"{figures.cell}: {figures.policy}")
                if time.monotonic() - written_s > WRITE_EVERY_S:
                    results.write()
                    written_s = time.monotonic()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            results.write()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m headrace_bench.policy_study", description=__doc__.split("\n")[0]
    )

    def words(text: str) -> list[str]:
        return [word.strip() for word in text.split(",") if word.strip()]

    parser.add_argument(
        "--trace", default=TRACES / "mooncake_conversation.jsonl.gz", help="Mooncake's conversations"
    )
    parser.add_argument("--azure", default=TRACES / "AzureLLMInferenceTrace_conv.csv", help="Azure's")
    parser.add_argument("--requests", type=int, metavar="N", help="of each trace, the first N (default: all)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="(default 5)")
    parser.add_argument(
        "--cells", action="append", metavar="WORDS", help="whose name holds this; may be repeated"
    )
    parser.add_argument("--policies", type=words, metavar="P,…", help="(default: all)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="at a time (default 2)")
    parser.add_argument(
        "--out", default=HOME / "results" / "policy_study", metavar="STEM", help="of .md and .json"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
