"""What a run looks like: a table on the screen, a JSON file, a folder with a page, plots and requests."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headrace_bench.client_health import ClientHealth, complaints
from headrace_bench.load_summary import Distribution, Summary
from headrace_bench.outcome import Outcome
from headrace_bench.slo import Slo

FORMAT = 1
"""Of the JSON file. Grows when a field changes its meaning or goes away."""


@dataclass(frozen=True, slots=True)
class Report:
    """A run and everything needed to run it again."""

    command: str
    started: str  # ISO 8601, UTC
    setting: Mapping[str, Any]  # options, model, calibration
    summary: Summary
    slo: Slo
    clients: tuple[ClientHealth, ...]
    dropped: int
    stopped: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "command": self.command,
            "started": self.started,
            "setting": dict(self.setting),
            "summary": self.summary.as_dict(),
            "slo": asdict(self.slo),
            "clients": [asdict(client) for client in self.clients],
            "client_complaints": list(complaints(self.clients)),
            "dropped": self.dropped,
            "stopped": self.stopped,
        }

    def remarks(self) -> list[str]:
        """What a reader must know before believing the numbers."""
        summary = self.summary
        said = list(complaints(self.clients))
        for kind, count in summary.errors.items():
            said.append(f"{count} x {kind}: {summary.error_details[kind]}")
        if self.stopped:
            said.append("stopped by hand; what had ended by then was counted")
        if self.dropped:
            said.append(
                f"{self.dropped} planned requests were not sent (time was up, or a turn before them failed)"
            )
        if summary.uncounted:
            said.append(
                f"{summary.uncounted} answers came without usage; their chunks were counted as tokens"
            )
        if summary.prompt_error is not None and summary.prompt_error > 0.1:
            said.append(f"prompts were {summary.prompt_error:.0%} off their planned length, on average")
        return said


def latency_rows(summary: Summary) -> list[tuple[str, Distribution]]:
    """The four latencies, those that were seen."""
    pairs = (
        ("TTFT", summary.ttft_s),
        ("ITL", summary.itl_s),
        ("TPOT", summary.tpot_s),
        ("end-to-end", summary.e2e_s),
    )
    return [(name, seen) for name, seen in pairs if seen is not None]


def total_rows(report: Report) -> list[tuple[str, str]]:
    """Everything that is one number."""
    summary = report.summary
    rows = [
        ("requests", f"{summary.requests} in {summary.window_s:.1f} s, {summary.succeeded} succeeded"),
        (
            "throughput",
            f"{summary.requests_per_s:.2f} requests/s, {summary.prompt_tokens_per_s:.0f} prompt and "
            f"{summary.output_tokens_per_s:.0f} output tokens/s",
        ),
    ]
    if summary.cached_share is not None:
        rows.append(("prompt tokens cached", f"{summary.cached_share:.1%} of {summary.prompt_tokens}"))
    if summary.goodput is not None:
        bounds = ", ".join(f"{name} <= {bound * 1e3:g} ms" for name, bound in report.slo.bounds())
        share = f"{summary.goodput.share:.1%} of requests"
        rows.append((f"goodput ({bounds})", f"{summary.goodput.requests_per_s:.2f} requests/s, {share}"))
    if summary.errors:
        rows.append(("errors", ", ".join(f"{count} {kind}" for kind, count in summary.errors.items())))
    if summary.replicas:
        rows.append(("by replica", ", ".join(f"{name} {count}" for name, count in summary.replicas.items())))
    return rows


COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


def _cells(distribution: Distribution) -> list[str]:
    return [f"{getattr(distribution, column) * 1e3:.1f}" for column in COLUMNS]


def print_report(report: Report, console: Console) -> None:
    """The table. Remarks come last, so that they are read."""
    table = Table(
        title=f"{report.setting.get('model', '')} at {report.setting.get('url', '')}", title_style="bold"
    )
    table.add_column("ms")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for name, distribution in latency_rows(report.summary):
        table.add_row(name, *_cells(distribution))
    for turn in report.summary.turns:
        if turn.ttft_s is not None:
            cached = "" if turn.cached_share is None else f", {turn.cached_share:.0%} cached"
            table.add_row(
                f"TTFT of turn {turn.turn} ({turn.prompt_tokens:.0f} tokens{cached})", *_cells(turn.ttft_s)
            )
    console.print(table)
    for name, value in total_rows(report):
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True, markup=False)
    for remark in report.remarks():
        console.print(f"note: {remark}", style="yellow", highlight=False, soft_wrap=True, markup=False)


def write_json(report: Report, path: Path) -> None:
    """Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report.as_dict(), indent=2) + "\n")


def write_folder(report: Report, outcomes: Sequence[Outcome], folder: Path) -> Path:
    """report.html (everything in one file), report.json, requests.csv and the plots. Returns the page's path.

    Raises `OSError`; `load_plots.PlotsMissing` where matplotlib is not installed.
    """
    from headrace_bench.load_plots import draw

    folder.mkdir(parents=True, exist_ok=True)
    write_json(report, folder / "report.json")
    with (folder / "requests.csv").open("w", newline="") as file:
        rows = [outcome.row() for outcome in outcomes]
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["conversation"])
        writer.writeheader()
        writer.writerows(rows)
    plots = draw(outcomes, report.slo)
    for plot in plots:
        (folder / f"{plot.name}.png").write_bytes(plot.png)
    page = folder / "report.html"
    page.write_text(render_page(report, [(plot.caption, plot.data_url) for plot in plots]))
    return page


def render_page(report: Report, plots: Sequence[tuple[str, str]]) -> str:
    """One HTML page that needs nothing beside it. `plots` are captions and data URLs."""
    escape = html.escape
    latencies = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f"<td>{cell}</td>" for cell in _cells(distribution))
        + "</tr>"
        for name, distribution in latency_rows(report.summary)
    )
    totals = "".join(
        f"<tr><th>{escape(name)}</th><td class=text>{escape(value)}</td></tr>"
        for name, value in total_rows(report)
    )
    notes = "".join(f"<li>{escape(remark)}</li>" for remark in report.remarks())
    pictures = "".join(
        f"<figure><img src='{url}' alt='{caption}'><figcaption>{caption}</figcaption></figure>"
        for caption, url in ((escape(caption), url) for caption, url in plots)
    )
    setting = escape(json.dumps(dict(report.setting), indent=2))
    title = escape(f"{report.setting.get('model', '')} at {report.setting.get('url', '')}")
    return f"""<!doctype html>
<html lang=en><meta charset=utf-8><title>headrace bench: {title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; color: #1c2330 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ border-bottom: 1px solid #d5dbe5; padding: .3rem .8rem; text-align: right }}
th:first-child, td.text {{ text-align: left; font-weight: normal }}
figure {{ margin: 1.5rem 0 }} img {{ max-width: 100% }} figcaption {{ color: #59647a }}
pre {{ background: #f3f5f9; padding: .8rem; overflow-x: auto }} ul {{ color: #8a4b00 }}
</style>
<h1>{title}</h1>
<p>{escape(report.started)}</p><pre>{escape(report.command)}</pre>
<table><tr><th>milliseconds</th>{"".join(f"<th>{column}</th>" for column in COLUMNS)}</tr>{latencies}</table>
<table>{totals}</table>
<ul>{notes}</ul>
{pictures}
<h2>Setting</h2><pre>{setting}</pre>
</html>
"""
