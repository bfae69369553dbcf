"""What a simulation looks like: tables on the screen, a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headrace_bench.ceilings import Ceilings
from headrace_bench.load_summary import Distribution
from headrace_bench.scenario import Scenario
from headrace_bench.simulate_summary import SimulationSummary, ceilings_dict
from headrace_bench.timing_profile import TimingProfile

FORMAT = 1
"""Of the JSON file. Grows when a field changes its meaning or goes away."""

COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """One scenario, one or more policies."""

    trace: str  # file name
    profile: TimingProfile
    scenario: Scenario
    ceilings: Ceilings
    summaries: tuple[SimulationSummary, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "trace": self.trace,
            "profile": self.profile.name,
            "scenario": self.scenario.as_dict(),
            "ceilings": ceilings_dict(self.ceilings),
            "policies": [summary.as_dict() for summary in self.summaries],
        }

    def headline(self) -> str:
        """One line: what was simulated."""
        scenario = self.scenario
        handing_over = scenario.handing_over
        pools = (
            f" ({handing_over.pools or 'flexible'}, {handing_over.disaggregation})" if handing_over else ""
        )
        cache_tokens = scenario.engine.num_blocks * scenario.engine.block_size
        return (
            f"{len(scenario.records)} requests of {self.trace} at {scenario.speed:.4g}x on {scenario.num_replicas} "
            f"replicas{pools} of {cache_tokens} tokens, profile {self.profile.name}"
        )

    def write(self, path: Path) -> None:
        """Raises `OSError`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n")


def print_one(report: SimulationReport, console: Console) -> None:
    """One policy, in full."""
    summary = report.summaries[0]
    table = Table(title=f"{summary.policy}: {report.headline()}", title_style="bold")
    table.add_column("ms")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for name, distribution in _latencies(summary):
        if distribution is not None:
            table.add_row(name, *(f"{getattr(distribution, column) * 1e3:.1f}" for column in COLUMNS))
    console.print(table)
    for name, value in total_rows(report, summary):
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True, markup=False)


def print_comparison(report: SimulationReport, console: Console) -> None:
    """Policies beside each other, best mean TTFT first."""
    table = Table(title=report.headline(), title_style="bold")
    table.add_column("policy")
    for name, _ in comparison_cells(report.summaries[0]):
        table.add_column(name, justify="right")
    for summary in ranked(report.summaries):
        table.add_row(summary.policy, *(value for _, value in comparison_cells(summary)))
    console.print(table)
    console.print(f"hit rate ceilings: {_ceilings_words(report.ceilings)}", highlight=False, soft_wrap=True)


def ranked(summaries: Sequence[SimulationSummary]) -> list[SimulationSummary]:
    """Best mean TTFT first."""
    return sorted(summaries, key=lambda summary: summary.ttft_s.mean if summary.ttft_s else float("inf"))


def comparison_cells(summary: SimulationSummary) -> list[tuple[str, str]]:
    """Column and value."""

    def seconds(distribution: Distribution | None, column: str) -> str:
        return "-" if distribution is None else f"{getattr(distribution, column):.3f}"

    def milliseconds(distribution: Distribution | None, column: str) -> str:
        return "-" if distribution is None else f"{getattr(distribution, column) * 1e3:.1f}"

    return [
        ("TTFT mean s", seconds(summary.ttft_s, "mean")),
        ("p50", seconds(summary.ttft_s, "p50")),
        ("p99", seconds(summary.ttft_s, "p99")),
        ("ITL mean ms", milliseconds(summary.itl_s, "mean")),
        ("p99", milliseconds(summary.itl_s, "p99")),
        ("e2e mean s", seconds(summary.e2e_s, "mean")),
        ("p99", seconds(summary.e2e_s, "p99")),
        ("hit", f"{summary.hit_rate:.1%}"),
        ("goodput", f"{summary.goodput_share:.1%}"),
        ("imbalance", f"{summary.imbalance.prefill_tokens:.2f}"),
    ]


def total_rows(report: SimulationReport, summary: SimulationSummary) -> list[tuple[str, str]]:
    """Everything but latencies, as words."""
    bounds = ", ".join(f"{name} <= {bound * 1e3:g} ms" for name, bound in report.scenario.slo.bounds())
    share = summary.hit_rate / report.ceilings.pooled if report.ceilings.pooled else 0.0
    rejected = f", {summary.rejected} too long for the engine" if summary.rejected else ""
    imbalance = summary.imbalance
    handed_over = (
        [("handed over", f"{summary.handed_over:.1%} of requests")]
        if report.scenario.handing_over is not None
        else []
    )
    return [
        ("requests", f"{summary.requests}{rejected}, in {summary.window_s:.1f} s"),
        (
            "throughput",
            f"{summary.requests_per_s:.2f} requests/s, {summary.output_tokens_per_s:.0f} output tokens/s; "
            f"{summary.utilisation:.0%} of the fleet's time is prefill and decode work",
        ),
        (
            "hit rate",
            f"{summary.hit_rate:.1%} of prompt tokens; ceilings: {_ceilings_words(report.ceilings)}"
            + (f"; {share:.1%} of the pooled one" if share else "")
            + f"; predicted: {summary.predicted_hit_rate:.1%}",
        ),
        (
            f"goodput ({bounds})",
            f"{summary.goodput_per_s:.2f} requests/s, {summary.goodput_share:.1%} of requests",
        ),
        (
            "imbalance (busiest replica over the mean)",
            f"requests {imbalance.requests:.2f}, prefill tokens {imbalance.prefill_tokens:.2f}, "
            f"time {imbalance.busy_s:.2f}",
        ),
        ("preemptions", str(summary.preemptions)),
        *handed_over,
    ]


def _latencies(summary: SimulationSummary) -> list[tuple[str, Distribution | None]]:
    return [
        ("TTFT", summary.ttft_s),
        ("ITL", summary.itl_s),
        ("TPOT", summary.tpot_s),
        ("end-to-end", summary.e2e_s),
    ]


def _ceilings_words(ceilings: Ceilings) -> str:
    return f"{ceilings.infinite:.1%} infinite shared cache, {ceilings.pooled:.1%} pooled LRU"
