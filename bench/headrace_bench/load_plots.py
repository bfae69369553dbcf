"""Plots of a run, as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from headrace.errors import CallerError
from headrace_bench.outcome import Outcome
from headrace_bench.slo import Slo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 100


class PlotsMissing(CallerError):
    """matplotlib is not installed."""


@dataclass(frozen=True, slots=True)
class Plot:
    name: str  # file name without its ending
    caption: str
    png: bytes

    @property
    def data_url(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def require_matplotlib() -> None:
    """Raise `PlotsMissing` now rather than after a long run."""
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        raise PlotsMissing("--report draws with matplotlib: pip install 'headrace[bench]'") from None


def draw(outcomes: Sequence[Outcome], slo: Slo) -> list[Plot]:
    """Every plot that these outcomes have data for."""
    require_matplotlib()
    measured = [outcome for outcome in outcomes if outcome.measured]
    if not measured:
        return []
    plots = [
        _plot(
            "latency", "Latency: share of requests (ITL: of chunks) at or below", _draw_latency, measured, slo
        ),
        _plot(
            "timeline", "TTFT by the moment of sending; failed requests below", _draw_timeline, measured, slo
        ),
        _plot("load", "Requests in flight and output tokens per second", _draw_load, measured, slo),
    ]
    if any(outcome.turn for outcome in measured):
        plots.append(_plot("turns", "TTFT by turn of the conversation", _draw_turns, measured, slo))
    return plots


def _plot(name: str, caption: str, drawing: object, measured: Sequence[Outcome], slo: Slo) -> Plot:
    # The object interface, not pyplot: no global state, no display, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    assert callable(drawing)
    drawing(figure, measured, slo)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Plot(name, caption, buffer.getvalue())


def _cumulative(axes: Axes, values_s: Sequence[float], label: str, bound_s: float | None) -> None:
    axes.set_title(label)
    axes.set_xlabel("ms")
    axes.grid(alpha=0.3)
    if not values_s:
        return
    # A thousand quantiles draw the same line as a million samples.
    shares = np.linspace(0, 1, min(1000, len(values_s) + 1))
    axes.plot(np.quantile(values_s, shares) * 1e3, shares)
    axes.set_ylim(0, 1.01)
    if bound_s is not None:
        axes.axvline(bound_s * 1e3, color="tab:red", linestyle="--", linewidth=1)


def _draw_latency(figure: Figure, measured: Sequence[Outcome], slo: Slo) -> None:
    good = [outcome for outcome in measured if outcome.error is None]
    axes = figure.subplots(1, 3)
    _cumulative(axes[0], [o.ttft_s for o in good if o.ttft_s is not None], "TTFT", slo.ttft_s)
    _cumulative(axes[1], [gap for outcome in good for gap in outcome.gaps_s], "ITL", slo.itl_s)
    _cumulative(axes[2], [outcome.e2e_s for outcome in good], "end-to-end", slo.e2e_s)


def _draw_timeline(figure: Figure, measured: Sequence[Outcome], slo: Slo) -> None:
    axes = figure.subplots()
    good = [o for o in measured if o.error is None and o.ttft_s is not None]
    failed = [outcome.sent_s for outcome in measured if outcome.error is not None]
    axes.scatter(
        [o.sent_s for o in good], [(o.ttft_s or 0.0) * 1e3 for o in good], s=8, alpha=0.6, label="TTFT"
    )
    if failed:
        axes.scatter(failed, [0.0] * len(failed), s=14, marker="x", color="tab:red", label="failed")
    if slo.ttft_s is not None:
        axes.axhline(slo.ttft_s * 1e3, color="tab:red", linestyle="--", linewidth=1)
    axes.set_xlabel("seconds since the start")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_load(figure: Figure, measured: Sequence[Outcome], slo: Slo) -> None:
    begin = min(outcome.sent_s for outcome in measured)
    end = max(outcome.end_s for outcome in measured)
    edges = np.linspace(begin, max(end, begin + 1e-6), BINS + 1)
    sent = np.sort([outcome.sent_s for outcome in measured])
    ended = np.sort([outcome.end_s for outcome in measured])
    in_flight = np.searchsorted(sent, edges, "right") - np.searchsorted(ended, edges, "right")
    tokens = np.zeros(BINS)
    width_s = edges[1] - edges[0]
    for outcome in measured:
        if outcome.ttft_s is not None:
            first_s = outcome.sent_s + outcome.ttft_s
            moments = first_s + np.concatenate(([0.0], np.cumsum(np.asarray(outcome.gaps_s, dtype=float))))
            chunks, _ = np.histogram(moments, edges)
            tokens += chunks * (outcome.output_tokens / len(moments))
    above, below = figure.subplots(2, 1, sharex=True)
    above.step(edges, in_flight, where="post")
    above.set_ylabel("in flight")
    below.plot((edges[:-1] + edges[1:]) / 2, tokens / width_s)
    below.set_ylabel("output tokens/s")
    below.set_xlabel("seconds since the start")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)


def _draw_turns(figure: Figure, measured: Sequence[Outcome], slo: Slo) -> None:
    axes = figure.subplots()
    last = max(outcome.turn for outcome in measured)
    by_turn = [
        [o.ttft_s * 1e3 for o in measured if o.turn == turn and o.error is None and o.ttft_s is not None]
        for turn in range(last + 1)
    ]
    axes.boxplot(by_turn, showfliers=False)
    axes.set_xlabel("turn")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
