"""The comparison on real replicas as a table for people and a document for programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from headrace_bench.prompt_text import Calibration
from headrace_bench.real_run import RealRun, Workload
from headrace_bench.spread import Spread, ratios, spread

OURS = "headrace delay"
BASELINE = "headrace round_robin"


@dataclass(slots=True)
class Results:
    """Everything measured, in the order of measuring."""

    date: str
    machine: str
    command: str
    scheduling: str
    workload: Workload
    engine: dict[str, Any]
    cache_tokens: int = 0  # of one replica
    calibration: Calibration = field(default_factory=Calibration)
    runs: list[RealRun] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def of(self, contender: str) -> list[RealRun]:
        """By round."""
        return sorted((run for run in self.runs if run.contender == contender), key=lambda run: run.round)

    @property
    def contenders(self) -> list[str]:
        """By median of the mean TTFT."""
        names = list(dict.fromkeys(run.contender for run in self.runs))
        return sorted(names, key=lambda name: _spread(self.of(name), _mean_ttft).median)


def write(results: Results, stem: Path) -> None:
    """STEM.json and STEM.md."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_bytes(msgspec.json.encode(results) + b"\n")
    stem.with_suffix(".md").write_text("\n".join(_page(results)) + "\n")


def load_results(path: Path) -> Results:
    """Raises OSError, msgspec.MsgspecError."""
    return msgspec.json.decode(path.read_bytes(), type=Results)


def by_round(results: Results, name: str, other: str, figure: Callable[[RealRun], float]) -> list[float]:
    """`other`'s figure over that of `name` in the same round: above 1, `name` needs less."""
    mine = {run.round: figure(run) for run in results.of(name)}
    theirs = {run.round: figure(run) for run in results.of(other)}
    rounds = sorted(mine.keys() & theirs.keys())
    return ratios([theirs[number] for number in rounds], [mine[number] for number in rounds])


def _page(results: Results) -> list[str]:
    workload = results.workload
    rounds = max((run.round for run in results.runs), default=-1) + 1
    low, high = workload.turn_tokens
    lines = [
        "# Policies on real replicas",
        "",
        f"- date: {results.date}",
        f"- machine: {results.machine}; gateway and load share the replicas' two cores",
        f"- command: {results.command}",
        f"- scheduling: {results.scheduling}",
        f"- replicas: 2 x vLLM with SmolLM2-135M, a core each; KV cache {results.cache_tokens} tokens each; "
        + ", ".join(f"{name} {value}" for name, value in results.engine.items()),
        f"- load: {workload.users} users in a closed loop, conversations of {workload.turns} turns of {low}..{high} "
        f"tokens after one of {workload.system_prompts} system prompts of {workload.system_tokens}; answers of "
        f"{workload.answer_tokens}; pauses of {workload.think_s:g} s on average, exponential",
        f"- rounds: {rounds}, every contender once in each, in turn; runs of {workload.duration_s:g} s, latencies of "
        f"what was sent after the first {workload.settle_s:g} s; text of its own and a fresh gateway for every run",
        "",
        *_table(results),
        "",
        *_verdicts(results),
        "",
        "How to read it: the median of the rounds (smallest..largest). `x` is the contender's mean TTFT over that of "
        f"`{OURS}` in the same round: above 1, ours is quicker. Tokens computed: prompt tokens that no cache had, by "
        "the engines' own counters over the whole run, per request. `busy`: share of the run that the replicas spent "
        "in steps. Predicted hits: what our gateway expected to be cached when it decided, over what the engines "
        "then reported of the same requests.",
    ]
    if results.remarks:
        lines += ["", "Remarks:", "", *(f"- {remark}" for remark in results.remarks)]
    return lines


def _table(results: Results) -> list[str]:
    lines = [
        "| contender | TTFT mean s | x | p50 s | p90 s | e2e mean s | tokens computed a request | x | hit rate "
        "| predicted / reported hits | busy | requests | failed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in results.contenders:
        runs = results.of(name)
        errors = [1 + run.prediction_error for run in runs if run.prediction_error is not None]
        gateway, policy = name.split()
        label = name if gateway == "headrace" else f"{gateway} {runs[0].version} {policy}"
        cells = (
            label,
            _spread(runs, _mean_ttft).text(3),
            _ratio(results, name, _mean_ttft),
            _spread(runs, lambda run: run.ttft_s.p50).text(3),
            _spread(runs, lambda run: run.ttft_s.p90).text(3),
            _spread(runs, lambda run: run.e2e_s.mean).text(2),
            _spread(runs, lambda run: run.computed_per_request).text(0),
            _ratio(results, name, lambda run: run.computed_per_request),
            _spread(runs, lambda run: run.hit_rate).text(3),
            _text(errors, 3),
            _spread(runs, lambda run: fmean(run.busy)).text(2),
            str(sum(run.requests for run in runs)),
            str(sum(run.failed for run in runs)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _verdicts(results: Results) -> list[str]:
    lines = []
    if results.of(OURS) and (gains := by_round(results, OURS, BASELINE, _mean_ttft)):
        lines.append(
            f"- mean TTFT, {BASELINE} over {OURS}: {_text(gains, 2)} by round; the aim is 1.5 or more."
        )
    peers = [name for name in results.contenders if not name.startswith("headrace")]
    if results.of(OURS) and peers:
        best = peers[0]
        gains = by_round(results, OURS, best, _mean_ttft)
        lines.append(
            f"- the best peer is {best}: its mean TTFT over ours {_text(gains, 2)} by round; aim 1 or more."
        )
    errors = [run.prediction_error for run in results.of(OURS) if run.prediction_error is not None]
    if errors:
        worst = max(errors, key=abs)
        lines.append(
            f"- predicted hits of {OURS} differ by at most {abs(worst):.1%} from the reported; aim 5%."
        )
    return lines


def _mean_ttft(run: RealRun) -> float:
    return run.ttft_s.mean


def _spread(runs: Sequence[RealRun], figure: Callable[[RealRun], float]) -> Spread:
    found = spread([figure(run) for run in runs])
    assert found is not None, "a contender in the results has a run"
    return found


def _ratio(results: Results, name: str, figure: Callable[[RealRun], float]) -> str:
    if name == OURS:
        return "1"
    return _text(by_round(results, OURS, name, figure), 2)


def _text(values: Sequence[float], digits: int) -> str:
    found = spread(values)
    return "-" if found is None else found.text(digits)
