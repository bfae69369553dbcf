"""The kernels' micro-benchmark, beside Dynamo's `RadixTree` when it is installed.

    python -m headrace_bench.kernel_bench [--quick] [--dynamo-python PATH]

Each subject runs in its own process (`kernel_subject`) on the same workload; their rounds alternate, so that a
drift of the machine meets both. Writes bench/results/kernels.md and kernels.json. Dynamo's runtime is a wheel for
Python 3.10 and never a dependency of ours:

    python3.10 -m venv .peers/dynamo
    .peers/dynamo/bin/pip install --no-deps ai-dynamo-runtime==1.6.1 && .peers/dynamo/bin/pip install numpy
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from headrace_bench.kernel_subject import BLOCK_SIZE, PROMPT_BLOCKS, PROMPT_TOKENS
from headrace_bench.peers import PEERS, REPOSITORY
from headrace_bench.relay_report import machine
from headrace_bench.spread import ratios, spread
from headrace_kernels.compilation import warm
from headrace_kernels.prefix_table import PrefixTable

RESULTS = REPOSITORY / "bench" / "results"
FLEETS = (16, 256, 1024)
SEED = 20


class SubjectProcess:
    """A subject in its own process. Raises RuntimeError when it cannot start or dies."""

    def __init__(self, name: str, python: Path) -> None:
        self.name = name
        # The peer's Python finds this package, and nothing else of ours, through PYTHONPATH.
        environment = (
            dict(os.environ) if name != "dynamo" else os.environ | {"PYTHONPATH": str(REPOSITORY / "bench")}
        )
        self._process = subprocess.Popen(
            [str(python), "-m", "headrace_bench.kernel_subject", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, do: str, **arguments: int) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self._process.wait()} during {do!r}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def quantiles(rounds_us: list[list[float]]) -> dict[str, Any]:
    p50_us, p99_us = np.percentile([value for one in rounds_us for value in one], [50, 99])
    return {
        "p50_us": float(p50_us),
        "p99_us": float(p99_us),
        "round_p50_us": [float(np.median(one)) for one in rounds_us],
    }


def compare(pythons: dict[str, Path], num_blocks: int, lookups: int, rounds: int) -> dict[str, Any]:
    """Figures per fleet size and subject, and per subject of hashing."""
    found: dict[str, Any] = {"hash": {}, "fleets": {}}
    for num_replicas in FLEETS:
        processes = {name: SubjectProcess(name, python) for name, python in pythons.items()}
        figures: dict[str, Any] = {}
        for name, process in processes.items():
            progress(f"{name}: storing {num_blocks:,} blocks on {num_replicas} replicas")
            figures[name] = process.ask("build", num_blocks=num_blocks, num_replicas=num_replicas, seed=SEED)
        agree(
            {
                name: [process.ask("matches", index=index) for index in (0, 1, 99)]
                for name, process in processes.items()
            }
        )
        times: dict[str, dict[str, list[list[float]]]] = {name: {} for name in processes}
        hashing: dict[str, dict[str, list[list[float]]]] = {name: {} for name in processes}
        for turn in range(rounds):
            progress(f"looking up, round {turn + 1} of {rounds}")
            first = turn % len(processes)
            for name in [*processes, *processes][first : first + len(processes)]:
                for kind, more in processes[name].ask("look_up", count=lookups // rounds, seed=turn).items():
                    times[name].setdefault(kind, []).append(more)
                for kind, more in processes[name].ask("hash", count=200, seed=turn).items():
                    hashing[name].setdefault(kind, []).append(more)
        for name, process in processes.items():
            figures[name] |= process.ask("remove", num_prompts=200)
            figures[name]["lookup"] = {kind: quantiles(rounds_us) for kind, rounds_us in times[name].items()}
            found["hash"][name] = {kind: quantiles(rounds_us) for kind, rounds_us in hashing[name].items()}
            process.close()
        found["fleets"][str(num_replicas)] = figures
    return found


def agree(matches: dict[str, Any]) -> None:
    """Subjects that found different prefixes did different work; their times then compare nothing."""
    if any(answer != matches["headrace"] for answer in matches.values()):
        raise RuntimeError(f"the subjects disagree about the same prompts: {matches}")


def growth(num_blocks: int, batch: int) -> dict[str, float]:
    """The longest single `store` while a table grows from nothing, by wall and by this thread's processor time
    (the latter is ours alone; the former also holds whatever else the machine did)."""
    table = PrefixTable(256)
    hashes = np.random.default_rng(SEED).integers(0, 2**64, num_blocks, dtype=np.uint64)
    wall_ns, work_ns = 0, 0
    for first in range(0, num_blocks, batch):
        part = hashes[first : first + batch]
        started = time.perf_counter_ns(), time.thread_time_ns()
        table.store(first // batch % 256, part)
        work_ns = max(work_ns, time.thread_time_ns() - started[1])
        wall_ns = max(wall_ns, time.perf_counter_ns() - started[0])
    table.check_integrity()
    return {"batch": batch, "worst_wall_ms": wall_ns / 1e6, "worst_work_ms": work_ns / 1e6}


def churn(resident: int, stored: int, batch: int = PROMPT_BLOCKS) -> dict[str, float]:
    """Store `stored` blocks through caches that together hold `resident`: each batch evicts the oldest. Every
    fiftieth batch a replica is cleared and fills again."""
    table = PrefixTable(16)
    blocks = np.random.default_rng(SEED)
    ring: list[np.ndarray[Any, np.dtype[np.uint64]]] = []
    slots = resident // batch
    worst_ns, total_ns, most_bytes = 0, 0, 0
    for turn in range(stored // batch):
        fresh = blocks.integers(0, 2**64, batch, dtype=np.uint64)
        calls = [(table.store, turn % 16, fresh)]
        if turn >= slots:
            calls.append((table.remove, turn % 16, ring[turn % slots]))  # slots is a multiple of 16
            ring[turn % slots] = fresh
        else:
            ring.append(fresh)
        for call, replica, hashes in calls:
            started_ns = time.thread_time_ns()
            call(replica, hashes)
            spent_ns = time.thread_time_ns() - started_ns
            worst_ns, total_ns = max(worst_ns, spent_ns), total_ns + spent_ns
        if turn % 5000 == 4999:
            table.clear(turn // 5000 % 16)
        most_bytes = max(most_bytes, table.memory_bytes)
    while not table.sweep():
        pass
    table.check_integrity()
    return {
        "resident_blocks": slots * batch,
        "stored_blocks": stored,
        "worst_work_ms": worst_ns / 1e6,
        "ns_per_block": total_ns / stored,
        "most_bytes_per_resident_block": most_bytes / (slots * batch),
    }


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def markdown(document: dict[str, Any]) -> str:
    names = list(document["hash"])
    lines = [
        "# Kernels",
        "",
        *(f"- {key}: {document[key]}" for key in ("date", "machine", "versions", "command")),
        "",
    ]
    lines += [f"- {remark}" for remark in document["remarks"]]
    lines += ["", f"Hashing {PROMPT_TOKENS:,} tokens, blocks of {BLOCK_SIZE}; µs, p50 / p99:", ""]
    lines += ["| | from a list of int | from `array('I')` |", "|---|---|---|"]
    for name in (name for name in names if name != "headrace-closed"):
        cells = (document["hash"][name][kind] for kind in ("list", "buffer"))
        lines.append("| ".join([f"| {name} ", *(pair(cell) + " " for cell in cells)]) + "|")
    lines += [
        "",
        f"Longest prefix of {PROMPT_BLOCKS} blocks for every replica; µs, p50 / p99. A prompt drawn from all",
    ]
    lines += [
        "resident ones, the same prompt again (its part of the index is in the processor's cache), and with the",
        "counts taken out as a dict. `headrace` looks at every block, `headrace-closed` bisects, which is right",
        "where a replica that holds a block holds all before it:",
        "",
    ]
    lines += ["| replicas | | drawn | again | with counts | bytes/block | store ns/block | remove ns/block |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for num_replicas, figures in document["fleets"].items():
        for name in names:
            own = figures[name]
            lookups = (pair(own["lookup"][kind]) for kind in ("spread", "again", "counts"))
            sizes = (
                f"{own[key]:.0f}" for key in ("bytes_per_block", "store_ns_per_block", "remove_ns_per_block")
            )
            lines.append(f"| {num_replicas} | {name} | " + " | ".join([*lookups, *sizes]) + " |")
        if "dynamo" in names:
            lines += [ratio_row(num_replicas, name, figures) for name in ("headrace", "headrace-closed")]
    lines += ["", "Pauses of our table (one call's wall time; its thread's processor time):", ""]
    for grown in document["growth"]:
        lines.append(
            f"- growing to {document['num_blocks']:,} blocks in batches of {grown['batch']}: worst call "
            f"{grown['worst_wall_ms']:.2f} ms; {grown['worst_work_ms']:.2f} ms"
        )
    churned = document["churn"]
    lines.append(
        f"- {churned['stored_blocks']:,} blocks of churn over {churned['resident_blocks']:,} resident ones, with "
        f"clears: worst call {churned['worst_work_ms']:.2f} ms of processor time, "
        f"{churned['ns_per_block']:.0f} ns per block stored and evicted, never above "
        f"{churned['most_bytes_per_resident_block']:.0f} bytes per resident block; integrity checked"
    )
    start = document["warm"]
    lines.append(
        f"- `warm()` in a new process: {start['seconds']:.2f} s from the cache"
        if start["from_cache"]
        else f"- `warm()`: {start['seconds']:.1f} s, compiled"
    )
    return "\n".join(lines) + "\n"


def ratio_row(num_replicas: str, name: str, figures: dict[str, Any]) -> str:
    """How many times more Dynamo takes; of times the median over the rounds, and the least and the most."""
    ours, theirs = figures[name], figures["dynamo"]
    kinds, keys = (
        ("spread", "again", "counts"),
        ("bytes_per_block", "store_ns_per_block", "remove_ns_per_block"),
    )
    cells = [f"| {num_replicas}", f"dynamo / {name}"]
    for kind in kinds:
        found = spread(ratios(theirs["lookup"][kind]["round_p50_us"], ours["lookup"][kind]["round_p50_us"]))
        cells.append(f"{found.text(1)} x" if found else "")
    return " | ".join([*cells, *(f"{theirs[key] / ours[key]:.1f} x" for key in keys)]) + " |"


def pair(figures: dict[str, Any]) -> str:
    return f"{figures['p50_us']:.1f} / {figures['p99_us']:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="headrace_bench.kernel_bench", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--quick", action="store_true", help="100k blocks, few rounds; writes nothing")
    parser.add_argument("--dynamo-python", type=Path, default=PEERS / "dynamo" / "bin" / "python")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args()
    started = warm()
    num_blocks, lookups, rounds = (100_000, 300, 1) if args.quick else (1_000_000, 3000, 5)
    pythons, remarks = {name: Path(sys.executable) for name in ("headrace", "headrace-closed")}, []
    probe = "import dynamo._core, importlib.metadata as m; print(m.version('ai-dynamo-runtime'))"
    peer = (
        subprocess.run([args.dynamo_python, "-c", probe], capture_output=True, text=True, check=False)
        if args.dynamo_python.exists()
        else None
    )
    if peer is not None and peer.returncode == 0:
        pythons["dynamo"] = args.dynamo_python
        remarks.append(
            "Dynamo is called as its Python users call it: `RadixTree` hands each call to a thread of its own and "
            "takes lists; making the lists and the JSON of events is outside the clock, reading the JSON inside."
        )
    else:
        remarks.append(
            "Dynamo's runtime is not installed; the head of bench/headrace_bench/kernel_bench.py has its two commands."
        )
        progress(remarks[-1])
    document: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": f"numba {version('numba')}, numpy {version('numpy')}"
        + (f", ai-dynamo-runtime {peer.stdout.strip()}" if peer and "dynamo" in pythons else ""),
        "command": "python -m headrace_bench.kernel_bench",
        "remarks": remarks,
        "num_blocks": num_blocks,
        "warm": started._asdict(),
        **compare(pythons, num_blocks, lookups, rounds),
    }
    progress("growing and churning")
    document["growth"] = [growth(num_blocks, batch) for batch in (16, PROMPT_BLOCKS)]
    document["churn"] = churn(1_000_000 if not args.quick else 100_000, 10 * num_blocks)
    table = markdown(document)
    print(table)
    if not args.quick:
        args.results.mkdir(parents=True, exist_ok=True)
        (args.results / "kernels.md").write_text(table)
        (args.results / "kernels.json").write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
