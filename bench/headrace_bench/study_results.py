"""What the policy study keeps: the figures of every run, in one JSON file that grows run by run.

A run is kept with a fingerprint of the code that made it; runs of other code are not taken over.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from headrace_bench.simulate_summary import SimulationSummary
from headrace_bench.study_cells import Cell

SOURCES = (
    "headrace_router",
    "headrace_kernels",
    "headrace.backends.simulated_engine",
    "headrace.backends.simulated_cache",
    "headrace.backends.simulated_sequence",
    "headrace.backends.simulated_report",
    "headrace.backends.timing_model",
    "headrace_bench.ceilings",
    "headrace_bench.handing_over",
    "headrace_bench.scenario",
    "headrace_bench.simulate_summary",
    "headrace_bench.simulated_gateway",
    "headrace_bench.simulated_replica",
    "headrace_bench.simulated_workload",
    "headrace_bench.simulator",
    "headrace_bench.study_cells",
    "headrace_bench.timing_profile",
    "headrace_bench.trace",
)
"""Whatever can change a figure."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One run: a cell, a policy, a seed. Seconds and shares."""

    cell: str
    policy: str
    seed: int
    speed: float
    pooled: float  # hit rate ceilings
    infinite: float
    ttft_s: float
    ttft_p99_s: float
    itl_s: float
    itl_p99_s: float
    e2e_s: float
    e2e_p99_s: float
    hit_rate: float
    goodput: float
    imbalance: float

    @classmethod
    def of(
        cls, cell: Cell, summary: SimulationSummary, speed: float, pooled: float, infinite: float
    ) -> Figures:
        """Rounded: a file of a thousand runs is read by people too."""
        ttft, itl, e2e = summary.ttft_s, summary.itl_s, summary.e2e_s
        assert ttft is not None and itl is not None and e2e is not None
        numbers = (
            speed, pooled, infinite, ttft.mean, ttft.p99, itl.mean, itl.p99, e2e.mean, e2e.p99,
            summary.hit_rate, summary.goodput_share, summary.imbalance.prefill_tokens,
        )  # fmt: skip
        return cls(cell.name, summary.policy, summary.seed, *(round(number, 5) for number in numbers))

    @property
    def key(self) -> tuple[str, str, int]:
        return self.cell, self.policy, self.seed


@dataclass(slots=True)
class Results:
    """Mutable: `add` and `write`."""

    path: Path
    setting: dict[str, Any]
    runs: dict[tuple[str, str, int], Figures] = field(default_factory=dict)

    @classmethod
    def resume(cls, path: Path, setting: dict[str, Any]) -> Results:
        """The results in `path` if they are of the same setting (code included), else none."""
        results = cls(path, setting)
        try:
            data = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError):
            return results
        if data.get("setting") == setting:
            for row in data["runs"]:
                figures = Figures(**dict(zip(data["columns"], row, strict=True)))
                results.runs[figures.key] = figures
        return results

    def add(self, figures: Figures) -> None:
        self.runs[figures.key] = figures

    def write(self) -> None:
        """The whole file, or nothing of it: an interrupted write leaves the old one. Raises `OSError`."""
        columns = list(Figures.__dataclass_fields__)
        rows = [[getattr(self.runs[key], column) for column in columns] for key in sorted(self.runs)]
        lines = ",\n".join(json.dumps(row) for row in rows)
        head = f'{{"setting": {json.dumps(self.setting)},\n"columns": {json.dumps(columns)},\n"runs": [\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(f"{head}{lines}\n]}}\n")
        os.replace(unfinished, self.path)


def fingerprint(sources: Sequence[str] = SOURCES) -> str:
    """Of the named modules, packages with all their files."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sources:
        source = Path(import_module(name).__file__ or "")
        files = sorted(source.parent.rglob("*.py")) if source.name == "__init__.py" else [source]
        for file in files:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
