"""The cells of the policy study: fleets, caches and rates, each with its own name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from headrace_bench.ceilings import Ceilings
from headrace_bench.scenario import Scenario
from headrace_bench.timing_profile import DEFAULT_ENGINE, with_cache
from headrace_bench.trace import TraceRecord, read_trace, truncate

REPLICAS = (8, 16, 64)
CACHES_TOKENS = (300_000, 1_500_000)
LOADS = {"light": 0.3, "knee": 0.8, "overload": 1.1}
"""Utilisation of a fleet with one pooled cache and perfect balance, prefill and decode work alone
(`ceilings.speed_at`). At 0.8 queues form wherever a policy wastes prefill or balances badly; above 1 they grow for as
long as the trace lasts."""

SHARING, STRIPPED, LENGTHS = "mooncake", "mooncake without shared prefixes", "azure"


@dataclass(frozen=True, slots=True)
class Cell:
    """One table of the study. `workload` is one of the three above."""

    workload: str
    num_replicas: int
    cache_tokens: int
    load: str

    @property
    def name(self) -> str:
        cache = f"{self.cache_tokens / 1e6:.1f}M"
        return f"{self.workload}, {self.num_replicas} replicas, {cache} tokens each, {self.load}"


@dataclass(frozen=True, slots=True)
class Traces:
    """Where the traces are, and how much of them is used."""

    mooncake: Path
    azure: Path
    requests: int | None = None

    def check(self) -> None:
        """Raises `TraceError` where one cannot be read."""
        for path in (self.mooncake, self.azure):
            _records(path, self.requests)


def study_cells() -> list[Cell]:
    """Every cell: three fleets, two caches and three rates with sharing; the knee without."""
    cells = [
        Cell(SHARING, num_replicas, cache_tokens, load)
        for num_replicas in REPLICAS
        for cache_tokens in CACHES_TOKENS
        for load in LOADS
    ]
    return [*cells, *(Cell(workload, 8, 300_000, "knee") for workload in (STRIPPED, LENGTHS))]


@lru_cache(maxsize=32)
def cell_scenario(cell: Cell, traces: Traces) -> Scenario:
    """What a cell simulates. Raises `TraceError` where a trace is missing."""
    path = traces.azure if cell.workload == LENGTHS else traces.mooncake
    records: Sequence[TraceRecord] = _records(path, traces.requests)
    if cell.workload == STRIPPED:
        records = [replace(record, hash_ids=()) for record in records]
    scenario = Scenario(tuple(records), with_cache(DEFAULT_ENGINE, cell.cache_tokens), cell.num_replicas)
    return scenario.at_utilisation(LOADS[cell.load])


@lru_cache(maxsize=32)
def cell_ceilings(cell: Cell, traces: Traces, seed: int) -> Ceilings:
    """The hit rates that no routing can beat there."""
    scenario = cell_scenario(cell, traces)
    return scenario.ceilings(scenario.requests(seed))


@lru_cache(maxsize=4)
def _records(path: Path, requests: int | None) -> tuple[TraceRecord, ...]:
    return truncate(read_trace(path), requests)
