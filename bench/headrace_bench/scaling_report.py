"""The scaling study as a page and a picture. Pure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from statistics import fmean

from headrace_bench.scaling_arms import OURS
from headrace_bench.scaling_cells import BOUNDS, NUM_REQUESTS, TTFT_SLO_S, Cell, Outcome

HOW = f"""Production's router, fair queue, saturation bound, simulated engine and autoscaler
(`headrace.fleet.autoscaler.decide`, each second) in virtual time; the engine is `scaling_cells.ENGINE`. *azure*: the
arrivals and lengths of Azure's conversation trace of 2023 (an hour), its local rate raised to the power 2.5 by leaving
requests out and repeating others; *bursty*: one wave between 1 and 10 with bursts of 1.5 to 3
times on it. About
{NUM_REQUESTS:,} requests each; the work that comes is that of 4 to 40 replicas. All scalers: {BOUNDS.min_replicas} to
{BOUNDS.max_replicas} replicas, the same at the start, the same queue before them (which refuses after 60 s), the same
cold start. GPU hours count starting and draining replicas, until the last arrival. Attained: requests with
TTFT <= {TTFT_SLO_S:g} s of all, refused ones included. Defaults are those of each project's source (see
`headrace_bench/scalers`); the other rows are a sweep of what its users tune. Means over seeds."""

FIELDS = (
    ("gpu_h", "GPU hours", 1.0, "{:.2f}"),
    ("attained", "attained %", 100.0, "{:.2f}"),
    ("ttft_mean_s", "TTFT s", 1.0, "{:.2f}"),
    ("ttft_p99_s", "p99", 1.0, "{:.1f}"),
    ("tpot_p90_s", "TPOT p90 ms", 1e3, "{:.0f}"),
    ("refused", "refused", 1.0, "{:.0f}"),
    ("gpu_s_per_request", "GPU s per request", 1.0, "{:.2f}"),
    ("idle_gpu_h", "idle GPU hours", 1.0, "{:.2f}"),
    ("reversals", "reversals", 1.0, "{:.0f}"),
    ("most_replicas", "most replicas", 1.0, "{:.0f}"),
)

Means = Mapping[str, Mapping[str, float]]
"""arm → field → mean over seeds."""


def means_of(outcomes: Sequence[Outcome], cell: Cell) -> Means:
    """Of one cell."""
    by_arm: dict[str, list[Outcome]] = {}
    for one in outcomes:
        if (one.workload, one.cold_start_s) == (cell.workload, cell.cold_start_s):
            by_arm.setdefault(one.arm, []).append(one)
    return {
        arm: {field: fmean(float(getattr(one.figures, field)) for one in runs) for field, *_ in FIELDS}
        for arm, runs in by_arm.items()
    }


def is_ours(arm: str) -> bool:
    return arm == OURS or arm.startswith(OURS + " ")


def better_than(means: Means, arm: str) -> list[str]:
    """Baselines that cost fewer GPU hours and attain more than `arm`: empty where it is on the Pareto front."""
    ours = means[arm]
    return [
        name
        for name, theirs in means.items()
        if not is_ours(name) and theirs["gpu_h"] < ours["gpu_h"] and theirs["attained"] > ours["attained"]
    ]


def cheapest_as_good(means: Means, arm: str) -> str | None:
    """The baseline of fewest GPU hours that attains at least as much as `arm`; None where none does."""
    good = [
        name
        for name, theirs in means.items()
        if not is_ours(name) and theirs["attained"] >= means[arm]["attained"]
    ]
    return min(good, key=lambda name: means[name]["gpu_h"], default=None)


def best_as_cheap(means: Means, arm: str) -> str | None:
    """The baseline that attains most at no more GPU hours than `arm`; None where all cost more."""
    cheap = [
        name for name, theirs in means.items() if not is_ours(name) and theirs["gpu_h"] <= means[arm]["gpu_h"]
    ]
    return max(cheap, key=lambda name: means[name]["attained"], default=None)


def render(outcomes: Sequence[Outcome], cells: Sequence[Cell], command: str, tuned: str) -> str:
    """Markdown. `tuned` says on what ours was tuned."""
    seeds = ", ".join(map(str, sorted({one.seed for one in outcomes})))
    lines = ["# Scaling study", "", f"`{command}`: seeds {seeds}.", "", HOW, "", tuned, ""]
    lines += [
        "![attained over GPU hours](scaling_study.png)",
        "",
        "## Ours with its defaults, and the baselines",
        "",
    ]
    lines += ["| load | ours: GPU hours, attained | better in both | cheapest baseline that attains as much "
              "| baseline that attains most at no more GPU hours |", "|---|---|---|---|---|"]  # fmt: skip
    for cell in cells:
        means = means_of(outcomes, cell)
        if OURS in means:
            lines.append(_verdict(cell, means))
    for cell in cells:
        if means := means_of(outcomes, cell):
            lines += ["", *_table(cell, means)]
    return "\n".join(lines) + "\n"


def _verdict(cell: Cell, means: Means) -> str:
    said = [cell.name, _pair(means, OURS)]
    better = better_than(means, OURS)
    said.append(", ".join(f"**{name}** ({_pair(means, name)})" for name in better) or "none")
    others = (cheapest_as_good(means, OURS), best_as_cheap(means, OURS))
    said += ["none" if name is None else f"{name}: {_pair(means, name)}" for name in others]
    return f"| {' | '.join(said)} |"


def _pair(means: Means, arm: str) -> str:
    return f"{means[arm]['gpu_h']:.2f} h, {means[arm]['attained']:.2%}"


def _table(cell: Cell, means: Means) -> list[str]:
    lines = [f"## {cell.name}", "", f"| scaler | {' | '.join(title for _, title, *_ in FIELDS)} |"]
    lines.append("|---" * (len(FIELDS) + 1) + "|")
    for arm in sorted(means, key=lambda name: means[name]["gpu_h"]):
        name = f"**{arm}**" if is_ours(arm) else arm
        values = (form.format(means[arm][field] * scale) for field, _, scale, form in FIELDS)
        lines.append(f"| {name} | {' | '.join(values)} |")
    return lines


def draw(outcomes: Sequence[Outcome], cells: Sequence[Cell], families: Sequence[str]) -> bytes:
    """PNG: one picture per cell, missed requests (logarithmic, few at the top) over GPU hours."""
    from matplotlib.figure import Figure

    shown = [cell for cell in cells if means_of(outcomes, cell)]
    columns = 3
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(5.6 * columns, 4.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for index, cell in enumerate(shown):
        place = axes[index // columns][index % columns]
        means = means_of(outcomes, cell)
        for number, family in enumerate(families):
            arms = [arm for arm in means if arm == family or arm.startswith(family + " ")]
            arms.sort(key=lambda arm: means[arm]["gpu_h"])
            if not arms:
                continue
            ours = family == OURS
            hours = [means[arm]["gpu_h"] for arm in arms]
            missed = [max(1e-5, 1 - means[arm]["attained"]) * 100 for arm in arms]
            colour = "black" if ours else f"C{number}"
            place.plot(
                hours, missed, marker="o", markersize=4, linewidth=2.2 if ours else 0.9, color=colour,
                label=family, zorder=3 if ours else 2,
            )  # fmt: skip
            if ours and OURS in means:
                place.plot(
                    [means[OURS]["gpu_h"]], [max(1e-5, 1 - means[OURS]["attained"]) * 100],
                    marker="*", markersize=15, color="black", zorder=4,
                )  # fmt: skip
        place.set_yscale("log")
        place.invert_yaxis()
        place.set_title(cell.name)
        place.set_xlabel("GPU hours")
        place.set_ylabel(f"% of requests with TTFT > {TTFT_SLO_S:g} s, refused ones included")
        place.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    return buffer.getvalue()
