"""`headrace simulate`: replay a trace on a simulated fleet, print what came of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from headrace.errors import CallerError
from headrace_bench import simulate_options
from headrace_bench.autoscale_command import autoscale
from headrace_bench.load_plots import require_matplotlib
from headrace_bench.simulate_plots import write_plot
from headrace_bench.simulate_progress import progress_bar
from headrace_bench.simulate_report import SimulationReport, print_comparison, print_one


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
    if args.autoscale:
        return autoscale(args)
    if args.scaler or args.cold_start is not None:
        raise CallerError("--scaler and --cold-start are of a fleet that scales; add --autoscale MIN:MAX")
    policies = simulate_options.policies(args)
    profile, scenario = simulate_options.scenario(args)
    stem = args.plot or ("simulation" if args.compare else None)
    if stem:
        require_matplotlib()
    screen = Console(stderr=True)
    done = []
    with progress_bar(screen, len(policies) * len(scenario.records)) as tell:
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
