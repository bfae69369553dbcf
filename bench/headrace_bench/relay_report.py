"""The relay benchmark's figures as a table for people and a document for programs."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headrace_bench.spread import Spread, ratios, spread

BASELINE = "vllm-router"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity. `primary` figures also get their ratio to the baseline."""

    key: str
    title: str
    digits: int
    primary: bool = False


@dataclass(slots=True)
class Samples:
    """Everything measured of one gateway: per figure one value per round, None where a round has none."""

    name: str
    version: str
    rounds: dict[str, list[float | None]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, figure: str, value: float | None) -> None:
        self.rounds.setdefault(figure, []).append(value)

    def spread(self, figure: str) -> Spread | None:
        return spread([value for value in self.rounds.get(figure, ()) if value is not None])


def machine() -> str:
    """The machine in general terms: `2-core AMD EPYC VM, 24 GiB, Linux 6.1`."""
    processor, virtual = platform.machine(), ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            processor = value.strip()
        if key.strip() == "flags":
            virtual = " VM" if " hypervisor" in value else ""
            break
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kernel = ".".join(platform.release().split(".")[:2])
    return f"{os.cpu_count()}-core {processor}{virtual}, {memory_gib:.0f} GiB, Linux {kernel}"


def ratio_to_baseline(all_samples: Sequence[Samples], name: str, figure: str) -> Spread | None:
    """Ratio of a gateway's figure to the baseline's of the same round."""
    by_name = {samples.name: samples for samples in all_samples}
    if name == BASELINE or BASELINE not in by_name or name not in by_name:
        return None
    return spread(ratios(by_name[name].rounds.get(figure, ()), by_name[BASELINE].rounds.get(figure, ())))


def _number(value: float, digits: int) -> str:
    return "never" if math.isinf(value) else f"{value:.{digits}f}"


def cell(found: Spread | None, digits: int) -> str:
    """`26.1 (25.0..27.3)`, or a dash where nothing was measured."""
    if found is None:
        return "-"
    if found.samples == 1 or math.isinf(found.high):
        return _number(found.median, digits)
    return found.text(digits)


def rows(all_samples: Sequence[Samples], figures: Sequence[Figure]) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table."""
    header = ["gateway"]
    for figure in figures:
        header += [figure.title, "ratio"] if figure.primary else [figure.title]
    body = []
    for samples in all_samples:
        row = [f"{samples.name} {samples.version}".strip()]
        for figure in figures:
            row.append(cell(samples.spread(figure.key), figure.digits))
            if figure.primary:
                row.append(
                    "1"
                    if samples.name == BASELINE
                    else cell(ratio_to_baseline(all_samples, samples.name, figure.key), 2)
                )
        body.append(row)
    return header, body


def markdown(
    all_samples: Sequence[Samples], figures: Sequence[Figure], about: Mapping[str, Any], notes: str
) -> str:
    """The whole page."""
    header, body = rows(all_samples, figures)
    lines = [f"# {about['title']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "title"]
    lines += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    remarks = [f"- {samples.name}: {remark}" for samples in all_samples for remark in samples.remarks]
    if remarks:
        lines += ["", "Remarks:", "", *remarks]
    return "\n".join([*lines, "", notes.strip(), ""])


def document(
    all_samples: Sequence[Samples], figures: Sequence[Figure], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The same for programs. Infinities become the string `never`: JSON has none."""
    gateways: dict[str, Any] = {}
    for samples in all_samples:
        measured: dict[str, Any] = {}
        for figure in figures:
            found = samples.spread(figure.key)
            if found is None:
                continue
            ratio = ratio_to_baseline(all_samples, samples.name, figure.key) if figure.primary else None
            measured[figure.key] = {
                "title": figure.title,
                **asdict(found),
                "rounds": samples.rounds[figure.key],
                "ratio_to_" + BASELINE: asdict(ratio) if ratio else None,
            }
        gateways[samples.name] = {"version": samples.version, "figures": measured, "remarks": samples.remarks}
    safe: dict[str, Any] = _without_infinities({"about": dict(about), "gateways": gateways})
    return safe


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(item) for item in value]
    return "never" if isinstance(value, float) and math.isinf(value) else value
