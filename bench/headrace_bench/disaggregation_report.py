"""The disaggregation study as a page and a picture. Pure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import fmean

from headrace_bench.disaggregation_arms import Outcome

NEAR = 0.97
"""A goodput of at least this share of the best one's is on the front."""

HOW = """`headrace simulate` with production's router, decision and simulated engine: 8 replicas of
`timing_profile.DEFAULT_ENGINE` (1.5 million tokens of KV cache each), links of 25 GB/s that carry one transfer at a
time, 160 KiB per token, 5 ms latency. Speed is that of the trace's arrivals. Goodput is the share of requests with
TTFT < 2 s and mean ITL < 40 ms. `P` prefill, `D` decode; *flexible*: every replica may take either half of a request.
`delay` is aware of caches and load, `round_robin` of nothing; *per request* decides in seconds
(`headrace_router.disaggregation`), *threshold* goes remote above 2,048 uncached tokens. Means over seeds."""

FIELDS = (
    ("goodput", "Goodput", 1.0, "{:.3f}"),
    ("ttft_s", "Mean TTFT, s", 1.0, "{:.2f}"),
    ("e2e_s", "Mean end-to-end, s", 1.0, "{:.2f}"),
    ("itl_p99_s", "p99 inter-token, ms", 1e3, "{:.0f}"),
    ("hit_rate", "Hit rate", 1.0, "{:.3f}"),
    ("handed_over", "Share handed over", 1.0, "{:.2f}"),
)


def mean(outcomes: Sequence[Outcome], arm: str, speed: float, field: str) -> float | None:
    """Over seeds; None where the arm has not run at that speed."""
    values = [float(getattr(one, field)) for one in outcomes if one.arm == arm and one.speed == speed]
    return fmean(values) if values else None


def fronts(outcomes: Sequence[Outcome], default: str) -> list[tuple[float, float, str, float]]:
    """Of each speed: the default's goodput, the best arm and its goodput."""
    rows = []
    for speed in sorted({one.speed for one in outcomes}):
        goodputs = {one.arm: mean(outcomes, one.arm, speed, "goodput") or 0.0 for one in outcomes}
        if default in goodputs:
            best = max(goodputs, key=goodputs.__getitem__)
            rows.append((speed, goodputs[default], best, goodputs[best]))
    return rows


def render(outcomes: Sequence[Outcome], arms: Sequence[str], command: str, setting: str) -> str:
    """Markdown. The first of `arms` is the default."""
    seeds = ", ".join(map(str, sorted({one.seed for one in outcomes})))
    lines = ["# Disaggregation study", "", f"`{command}`: {setting}, seeds {seeds}.", "", HOW, ""]
    lines += ["![goodput and end-to-end time over speed](disaggregation_study.png)", ""]
    lines += [f"## The default ({arms[0]}) and the best", ""]
    lines += ["| speed | default | best | its goodput | default / best |", "|---|---|---|---|---|"]
    for speed, ours, best, goodput in fronts(outcomes, arms[0]):
        ratio = ours / goodput if goodput else 1.0
        said = "" if ratio >= NEAR else " **short**"
        lines.append(f"| {speed:g}x | {ours:.3f} | {best} | {goodput:.3f} | {ratio:.3f}{said} |")
    speeds = sorted({one.speed for one in outcomes})
    for field, title, scale, form in FIELDS:
        lines += ["", f"## {title}", ""]
        lines += [
            f"| arm | {' | '.join(f'{speed:g}x' for speed in speeds)} |",
            "|---" * (len(speeds) + 1) + "|",
        ]
        for arm in arms:
            values = [mean(outcomes, arm, speed, field) for speed in speeds]
            words = ["" if value is None else form.format(value * scale) for value in values]
            lines.append(f"| {arm} | {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


def draw(outcomes: Sequence[Outcome], arms: Sequence[str]) -> bytes:
    """PNG: goodput and end-to-end time over speed, the default as the thick line. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    speeds = sorted({one.speed for one in outcomes})
    for place, (field, title) in zip(
        figure.subplots(1, 2), (("goodput", "goodput"), ("e2e_s", "mean end-to-end, s")), strict=True
    ):
        for number, arm in enumerate(arms):
            values = [mean(outcomes, arm, speed, field) for speed in speeds]
            known = [(speed, value) for speed, value in zip(speeds, values, strict=True) if value is not None]
            style = "--" if "round_robin" in arm else ":" if "threshold" in arm else "-"
            place.plot(
                [speed for speed, _ in known], [value for _, value in known], style, marker=".", label=arm,
                color="black" if number == 0 else f"C{number % 10}", linewidth=3 if number == 0 else 1.2,
            )  # fmt: skip
        place.set_title(title)
        place.set_xlabel("speed of the trace")
        place.grid(alpha=0.3)
        if field == "e2e_s":
            place.set_yscale("log")
        else:
            place.legend(fontsize="x-small")
    buffer = io.BytesIO()
    # Without the software's version in its metadata, equal simulations write equal files.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
