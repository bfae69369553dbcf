"""A picture of a simulation: latencies of the policies beside each other, as PNG and as one HTML page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headrace_bench.load_plots import require_matplotlib
from headrace_bench.simulate_report import SimulationReport, comparison_cells, ranked, total_rows
from headrace_bench.simulator import Run

POINTS = 400
"""Quantiles of a curve; more would not be seen."""


def write_plot(report: SimulationReport, runs: Sequence[Run], stem: Path) -> tuple[Path, Path]:
    """STEM.png and STEM.html, which holds the picture too. `runs` belong to `report.summaries`, in order.

    Raises `OSError`, and `load_plots.PlotsMissing` without matplotlib.
    """
    require_matplotlib()
    picture = _draw(report, runs)
    stem.parent.mkdir(parents=True, exist_ok=True)
    image, page = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".html")
    image.write_bytes(picture)
    page.write_text(_page(report, picture))
    return image, page


def _draw(report: SimulationReport, runs: Sequence[Run]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(report.headline())
    axes = figure.subplots(2, 2)
    names = [summary.policy for summary in report.summaries]
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    shares = np.linspace(0, 1, POINTS)
    for name, run in zip(names, runs, strict=True):
        for place, values in (
            (axes[0][0], [one.ttft_s for one in run.served]),
            (axes[0][1], [one.e2e_s for one in run.served]),
        ):
            if values:
                place.plot(np.quantile(values, shares), shares, label=name, color=colours[name])
    for place, title in ((axes[0][0], "TTFT"), (axes[0][1], "end-to-end")):
        place.set_title(f"{title}: share of requests at or below")
        place.set_xscale("log")
        place.set_xlabel("seconds")
        place.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    order = ranked(report.summaries)
    labels = [summary.policy for summary in order]
    bars = (
        (axes[1][0], "mean TTFT, seconds", [s.ttft_s.mean if s.ttft_s else 0.0 for s in order]),
        (axes[1][1], "hit rate (lines: pooled LRU, infinite cache)", [s.hit_rate for s in order]),
    )
    for place, title, values in bars:
        drawn = place.bar(labels, values, color=[colours[name] for name in labels])
        place.bar_label(drawn, fmt="%.3g", fontsize="small")
        place.set_title(title)
        place.tick_params(axis="x", rotation=30)
    axes[1][1].axhline(report.ceilings.pooled, color="black", linestyle="--", linewidth=1)
    axes[1][1].axhline(report.ceilings.infinite, color="black", linestyle=":", linewidth=1)
    buffer = io.BytesIO()
    # Without the software's version in its metadata, equal simulations write equal files.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _page(report: SimulationReport, picture: bytes) -> str:
    escape = html.escape
    summaries = ranked(report.summaries)
    heads = "".join(f"<th>{escape(name)}</th>" for name, _ in comparison_cells(summaries[0]))
    rows = "".join(
        f"<tr><th>{escape(summary.policy)}</th>"
        + "".join(f"<td>{escape(value)}</td>" for _, value in comparison_cells(summary))
        + "</tr>"
        for summary in summaries
    )
    totals = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in total_rows(report, summaries[0])
    )
    setting = escape(json.dumps(report.scenario.as_dict(), indent=2))
    return f"""<!doctype html>
<html lang=en><meta charset=utf-8><title>headrace simulate</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; color: #1c2330 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ border-bottom: 1px solid #d5dbe5; padding: .3rem .8rem; text-align: right }}
th:first-child {{ text-align: left }} img {{ max-width: 100% }}
pre {{ background: #f3f5f9; padding: .8rem; overflow-x: auto }}
</style>
<h1>{escape(report.headline())}</h1>
<table><tr><th>policy</th>{heads}</tr>{rows}</table>
<img src="data:image/png;base64,{base64.b64encode(picture).decode()}" alt="latencies and hit rates by policy">
<h2>{escape(summaries[0].policy)}</h2><table>{totals}</table>
<h2>Setting</h2><pre>{setting}</pre>
</html>
"""
