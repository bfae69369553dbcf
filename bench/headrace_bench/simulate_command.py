"""`headrace simulate`: replay a trace on a simulated fleet, print what came of it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from headrace.errors import CallerError
from headrace_bench import simulate_options
from headrace_bench.load_plots import require_matplotlib
from headrace_bench.simulate_plots import write_plot
from headrace_bench.simulate_report import SimulationReport, print_comparison, print_one

PLAIN_LINE_S = 5.0
"""Where the screen is no terminal, progress is a line this often."""


def add_parser(subparsers: Any) -> None:
    """Join the `headrace` command."""
    parser = subparsers.add_parser(
        "simulate",
        help="replay a trace on a simulated fleet",
        description=simulate_options.DESCRIPTION,
        epilog=simulate_options.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    simulate_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """0. Raises `HeadraceError` on a trace, a profile or an option that cannot be."""
    policies = simulate_options.policies(args)
    profile, scenario = simulate_options.scenario(args)
    stem = args.plot or ("simulation" if args.compare else None)
    if stem:
        require_matplotlib()
    screen = Console(stderr=True)
    done = []
    with _progress(screen, len(policies) * len(scenario.records)) as tell:
        for number, policy in enumerate(policies):
            told = partial(_tell, tell, policy, number * len(scenario.records))
            done.append(scenario.simulate(policy, args.seed, told))
    report = SimulationReport(
        trace=Path(args.trace).name,
        profile=profile,
        scenario=scenario,
        ceilings=scenario.ceilings(scenario.requests(args.seed)),
        summaries=tuple(summary for summary, _ in done),
    )
    # A pipe has no width to fit into: nothing is cut there.
    console = Console(width=None if sys.stdout.isatty() else 160)
    if args.compare:
        print_comparison(report, console)
    else:
        print_one(report, console)
    try:
        if args.json:
            report.write(Path(args.json))
        if stem:
            image, page = write_plot(report, [run for _, run in done], Path(stem))
            screen.print(f"plot: {image}, {page}", highlight=False)
    except OSError as error:
        raise CallerError(f"the report cannot be written: {error}") from error
    return 0


def _tell(tell: Callable[[int, str], None], policy: str, before: int, ended: int) -> None:
    tell(before + ended, policy)


@contextmanager
def _progress(screen: Console, requests: int) -> Iterator[Callable[[int, str], None]]:
    """A bar on a terminal, now and then a line elsewhere."""
    if not screen.is_terminal:
        yield _plain_progress(screen, requests)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("", total=requests)
        yield lambda ended, name: bar.update(task, completed=ended, description=name)


def _plain_progress(screen: Console, requests: int) -> Callable[[int, str], None]:
    began_s = told_s = time.monotonic()

    def tell(ended: int, name: str) -> None:
        nonlocal told_s
        now_s = time.monotonic()
        if now_s - told_s >= PLAIN_LINE_S:
            told_s = now_s
            screen.print(f"{now_s - began_s:.0f} s: {ended}/{requests}, {name}", highlight=False)

    return tell
