"""`headrace simulate --autoscale`: replay a trace on a fleet that is scaled, by one scaler or several."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from headrace.errors import CallerError
from headrace_bench import simulate_options
from headrace_bench.scaling_arms import OURS, Arm, named_arms
from headrace_bench.scaling_cells import initial_replicas
from headrace_bench.scaling_fleet import ScalingSimulation
from headrace_bench.scaling_report import FIELDS
from headrace_bench.scaling_run import ScaledRun, ScalingFigures, figures_of
from headrace_bench.scaling_sample import Bounds
from headrace_bench.simulate_progress import progress_bar

FORMAT = 1
"""Of the JSON file. Grows when a field changes its meaning or goes away."""

COLD_START_S = 60.0


class _Setting(NamedTuple):
    """What every scaler gets."""

    bounds: Bounds
    cold_start_s: float
    initial: int
    ttft_slo_s: float
    seed: int


def autoscale(args: argparse.Namespace) -> int:
    """0. Raises `HeadraceError` on a trace, a profile or an option that cannot be."""
    if args.compare or args.pools or args.flexible or args.plot or args.utilisation is not None:
        raise CallerError(
            "--autoscale goes with --scaler, not with --compare, --pools, --utilisation or --plot"
        )
    profile, scenario = simulate_options.scenario(args)
    requests = scenario.requests(args.seed)
    initial = args.replicas or initial_replicas(requests, scenario.engine)
    ttft_slo_s = scenario.slo.ttft_s
    assert ttft_slo_s is not None, "it has a default"
    setting = _Setting(
        bounds=_bounds(args.autoscale),
        cold_start_s=COLD_START_S if args.cold_start is None else args.cold_start,
        initial=initial,
        ttft_slo_s=ttft_slo_s,
        seed=args.seed,
    )
    arms = named_arms(args.scaler or OURS, initial)
    done: list[tuple[Arm, ScaledRun, ScalingFigures]] = []
    with progress_bar(Console(stderr=True), len(arms) * len(requests)) as tell:
        for number, arm in enumerate(arms):
            run = ScalingSimulation(
                requests,
                scenario.engine,
                arm.make(setting.bounds),
                bounds=setting.bounds,
                cold_start_s=setting.cold_start_s,
                initial=arm.initial or initial,
                seed=args.seed,
                policy=args.policy,
                progress=partial(_tell, tell, arm.name, number * len(requests)),
            ).run()
            done.append((arm, run, figures_of(run, setting.ttft_slo_s)))
    _print(args, len(requests), setting, profile.name, [(arm, figures) for arm, _, figures in done])
    if args.json:
        data = {
            "format": FORMAT,
            "trace": Path(args.trace).name,
            "profile": profile.name,
            "scenario": scenario.as_dict(),
            "scaling": {**setting._asdict(), "bounds": setting.bounds._asdict()},
            "scalers": [
                {"scaler": arm.name, **asdict(figures), "targets": run.targets} for arm, run, figures in done
            ],
        }
        try:
            Path(args.json).write_text(json.dumps(data, indent=2) + "\n")
        except OSError as error:
            raise CallerError(f"the report cannot be written: {error}") from error
    return 0


def _bounds(words: str) -> Bounds:
    low, _, high = words.partition(":")
    try:
        bounds = Bounds(int(low), int(high))
    except ValueError:
        raise CallerError(f"--autoscale is MIN:MAX, as in 2:20, got {words!r}") from None
    bounds.check()
    return bounds


def _print(
    args: argparse.Namespace,
    num_requests: int,
    setting: _Setting,
    profile: str,
    done: Sequence[tuple[Arm, ScalingFigures]],
) -> None:
    title = (
        f"{num_requests} requests of {Path(args.trace).name} at {args.speed or 1:g}x, {args.autoscale} replicas, "
        f"{setting.initial} at the start, cold start {setting.cold_start_s:g} s, profile {profile}; attained: "
        f"TTFT <= {setting.ttft_slo_s:g} s"
    )
    table = Table(title=title, title_style="bold")
    table.add_column("scaler")
    for _, name, *_ in FIELDS:
        table.add_column(name, justify="right")
    for arm, figures in done:
        values = (form.format(getattr(figures, field) * scale) for field, _, scale, form in FIELDS)
        table.add_row(arm.name, *values)
    # A pipe has no width to fit into: nothing is cut there.
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _tell(tell: Callable[[int, str], None], name: str, before: int, ended: int) -> None:
    tell(before + ended, name)
