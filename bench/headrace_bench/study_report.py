"""The policy study as a page: one line per cell, then every cell in full. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from headrace_bench.study_figures import Figures

OURS = "delay"
NEAR = 1.03
"""A mean this much above the best still counts as the best's equal."""

HIT_SHARE = 0.95
"""Of the pooled ceiling, at the knee."""

HOW = """The simulator (`headrace simulate`) runs production's router, policies, index, load table and simulated engine
in virtual time. Engine: see `timing_profile.DEFAULT_ENGINE`. Rates are stated as the utilisation of a fleet with one
pooled cache and perfect balance: light 0.3, knee 0.8, overload 1.1 (`ceilings.speed_at`); the speed that makes it is
in each table. A seed spreads the arrivals of each of the trace's 3-second instants over its 3 seconds and seeds the
policies' own chance. Values are means over requests, then over seeds, (smallest..largest seed) behind them. Pooled:
the hit rate of one LRU cache of the fleet's total size; it knows of a prompt the moment it arrives, a fleet only once
it is computed."""


def by_cell(runs: Sequence[Figures]) -> dict[str, dict[str, list[Figures]]]:
    """cell → policy → runs."""
    cells: dict[str, dict[str, list[Figures]]] = {}
    for run in runs:
        cells.setdefault(run.cell, {}).setdefault(run.policy, []).append(run)
    return cells


def render(runs: Sequence[Figures], order: Sequence[str], command: str, setting: Mapping[str, object]) -> str:
    """Markdown. `order` are the cells' names."""
    cells = by_cell(runs)
    named = [name for name in order if name in cells]
    seeds = sorted({run.seed for run in runs})
    lines = [
        "# Policy study",
        "",
        f"`{command}`: {setting['requests']} requests, seeds {', '.join(map(str, seeds))}, code {setting['code']}.",
        "",
        HOW,
        "",
        *_overview(cells, named),
    ]
    for name in named:
        lines += ["", *_cell(name, cells[name])]
    return "\n".join(lines) + "\n"


def shortfalls(policies: Mapping[str, Sequence[Figures]], at_knee: bool) -> list[str]:
    """Where ours is neither best nor near it, in words; empty where it is."""
    if OURS not in policies or len(policies) < 2:
        return []
    said = []
    for field, label in (("ttft_s", "TTFT"), ("e2e_s", "end-to-end")):
        ratio, best = _against_best(policies, field)
        if ratio > NEAR:
            said.append(f"{label} {ratio:.3f} x {best}")
    ours = policies[OURS]
    share = _mean(ours, "hit_rate") / max(_mean(ours, "pooled"), 1e-9)
    if at_knee and _mean(ours, "pooled") > 0 and share < HIT_SHARE:
        said.append(f"hit rate {share:.1%} of pooled")
    return said


def _overview(cells: Mapping[str, Mapping[str, Sequence[Figures]]], named: Sequence[str]) -> list[str]:
    lines = [
        "| cell | mean TTFT s | best other | ratio | mean e2e s | best other | ratio | hit / pooled | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in named:
        policies = cells[name]
        if OURS not in policies or len(policies) < 2:
            continue
        ours = policies[OURS]
        cellwords = [name]
        for field in ("ttft_s", "e2e_s"):
            ratio, best = _against_best(policies, field)
            cellwords += [
                f"{_mean(ours, field):.3f}", f"{_mean(policies[best], field):.3f} {best}", f"{ratio:.3f}",
            ]  # fmt: skip
        pooled = _mean(ours, "pooled")
        cellwords.append(f"{_mean(ours, 'hit_rate') / pooled:.1%}" if pooled else "nothing shared")
        said = shortfalls(policies, name.endswith("knee"))
        lines.append(f"| {' | '.join([*cellwords, '; '.join(said) or 'best or within 3%'])} |")
    return lines


def _cell(name: str, policies: Mapping[str, Sequence[Figures]]) -> list[str]:
    any_run = next(iter(policies.values()))[0]
    lines = [
        f"## {name}",
        "",
        f"{any_run.speed:.4g} x the trace's speed; hit rate ceilings {any_run.infinite:.1%} infinite, "
        f"{any_run.pooled:.1%} pooled.",
        "",
        "| policy | TTFT s | p99 | ITL ms | p99 | e2e s | p99 | hit | goodput | imbalance |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for policy in sorted(policies, key=lambda policy: _mean(policies[policy], "ttft_s")):
        runs = policies[policy]
        words = (
            policy, _spread(runs, "ttft_s"), f"{_mean(runs, 'ttft_p99_s'):.2f}",
            f"{_mean(runs, 'itl_s') * 1e3:.1f}", f"{_mean(runs, 'itl_p99_s') * 1e3:.0f}",
            _spread(runs, "e2e_s"), f"{_mean(runs, 'e2e_p99_s'):.2f}",
            f"{_mean(runs, 'hit_rate'):.1%}", f"{_mean(runs, 'goodput'):.1%}", f"{_mean(runs, 'imbalance'):.2f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(words)} |")
    return lines


def _against_best(policies: Mapping[str, Sequence[Figures]], field: str) -> tuple[float, str]:
    """Ours over the best other, and its name."""
    best = min(
        (policy for policy in policies if policy != OURS), key=lambda policy: _mean(policies[policy], field)
    )
    return _mean(policies[OURS], field) / _mean(policies[best], field), best


def _mean(runs: Sequence[Figures], field: str) -> float:
    return fmean(float(getattr(run, field)) for run in runs)


def _spread(runs: Sequence[Figures], field: str) -> str:
    values = [float(getattr(run, field)) for run in runs]
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{fmean(values):.3f} ({min(values):.3f}..{max(values):.3f})"
