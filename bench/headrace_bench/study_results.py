"""What a study keeps: the figures of every run, in one JSON file that grows run by run.

Runs are kept with a fingerprint of the code that made them; those of other code are not taken over.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

SOURCES = (
    "headrace_router",
    "headrace_kernels",
    "headrace.backends.simulated_engine",
    "headrace.backends.simulated_leap",
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


class Run(Protocol):
    """One run of a study, as a row of its file."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What was run. Another run of the same takes its place."""
        ...

    def row(self) -> list[Any]:
        """Its columns' values."""
        ...

    @classmethod
    def columns(cls) -> list[str]: ...

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> Self: ...


class FlatRun:
    """Rows of a dataclass whose fields are the columns."""

    def row(self) -> list[Any]:
        return [getattr(self, column) for column in self.columns()]

    @classmethod
    def columns(cls) -> list[str]:
        return list(cls.__dataclass_fields__)  # type: ignore[attr-defined]

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> Self:
        return cls(*row)


AnyRun = TypeVar("AnyRun", bound=Run)


@dataclass(slots=True)
class Results(Generic[AnyRun]):
    """Of runs of one kind. Mutable: `add` and `write`."""

    path: Path
    kind: type[AnyRun]
    setting: Mapping[str, Any] | None  # None: runs say themselves what made them
    runs: dict[tuple[Any, ...], AnyRun] = field(default_factory=dict)

    @classmethod
    def resume(
        cls, path: Path, kind: type[AnyRun], setting: Mapping[str, Any] | None = None
    ) -> Results[AnyRun]:
        """The results in `path` if they are of the same columns and setting (code included), else none."""
        results = cls(path, kind, setting)
        try:
            data = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError):
            return results
        if data.get("setting") == setting and data.get("columns") == kind.columns():
            for row in data["runs"]:
                results.add(kind.of_row(row))
        return results

    def add(self, run: AnyRun) -> None:
        self.runs[run.key] = run

    def in_order(self) -> list[AnyRun]:
        """By their keys."""
        return [self.runs[key] for key in sorted(self.runs)]

    def write(self) -> None:
        """The whole file, or nothing of it: an interrupted write leaves the old one. Raises `OSError`."""
        rows = ",\n".join(json.dumps(run.row()) for run in self.in_order())
        setting = "" if self.setting is None else f'"setting": {json.dumps(self.setting)},\n'
        columns = json.dumps(self.kind.columns())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(f'{{{setting}"columns": {columns},\n"runs": [\n{rows}\n]}}\n')
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
