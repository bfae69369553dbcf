"""The ways into one replica as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def page(found: Mapping[str, Any]) -> str:
    """Markdown. `found` is what `serve_overhead.report` makes."""
    figures: Mapping[str, Mapping[str, Any]] = found["figures"]
    lines = [
        f"# Ways into one vLLM replica, {found['streams']} at a time",
        "",
        f"- date: {found['date']}",
        f"- machine: {found['machine']}; engines on one core, everything else where the kernel puts it",
        f"- command: {found['command']}",
        f"- load: streamed chats of about 45 prompt tokens, answers of {found['max_tokens']}; in turn, "
        f"{found['block']} through each way",
        "",
        "| way | TTFT median ms | mean ms | added TTFT ms (quartiles) | added, by medians of all ms | tokens/s "
        "| CPU ms a request | requests | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in figures.items():
        lines.append(
            f"| {name} | {one['ttft_median_ms']:.1f} | {one['ttft_mean_ms']:.1f} | {one['added_ms']:.1f} "
            f"({one['added_low_ms']:.1f}..{one['added_high_ms']:.1f}) | {one['added_by_median_ms']:.1f} "
            f"| {one['tokens_per_s']:.1f} | {one['cpu_ms']:.1f} | {one['requests']} | {one['failed']} |"
        )
    lines += [
        "",
        "How to read it: added TTFT is the mean of a block less that of the direct block of the same round, the median "
        "of the rounds. CPU is of all processes on the way (proxy, ingress, gateway, the replica's own process with "
        "vLLM's API server), engine cores excepted: the first line is what vLLM itself takes.",
    ]
    for name, one in figures.items():
        lines += [f"- {name}: {text}" for text in one["failures"]]
    return "\n".join(lines) + "\n"
