"""Real vLLM replicas as plain processes, each on a core of its own, and what they report of themselves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from headrace.backends.load_publisher import decode_report
from headrace_bench.real_replica import MODEL
from headrace_router.types import BootId, Endpoints, Iteration, LoadReport, Replica, ReplicaId, Role

START_S = 300.0
STOP_S = 20.0
REPORT_S = 5.0


class FleetFailed(Exception):
    """A replica did not start or ended; the message names it and its log."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Of all replicas together; they only grow."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(
            self.prompt_tokens - earlier.prompt_tokens,
            self.cached_tokens - earlier.cached_tokens,
            self.preemptions - earlier.preemptions,
        )

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that no cache had."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def total(reports: Sequence[LoadReport]) -> Counters:
    """Of one report per replica."""
    return Counters(
        sum(report.prompt_tokens_total for report in reports),
        sum(report.cached_tokens_total for report in reports),
        sum(report.preemptions_total for report in reports),
    )


@dataclass(slots=True)
class RealFleet:
    """Replicas that run, and the newest of their load reports."""

    replicas: tuple[Replica, ...]
    newest: dict[str, LoadReport] = field(default_factory=dict)
    steps: dict[str, list[Iteration]] = field(default_factory=dict)  # since `forget_steps`

    @property
    def urls(self) -> list[str]:
        return [replica.endpoints.url for replica in self.replicas]

    async def counters(self) -> Counters:
        """Once every replica is idle and has said so. Raises `FleetFailed` when one stays silent or busy."""
        self.newest.clear()
        deadline = asyncio.get_running_loop().time() + REPORT_S
        while asyncio.get_running_loop().time() < deadline:
            reports = list(self.newest.values())
            if len(reports) == len(self.replicas) and not any(one.running + one.waiting for one in reports):
                return total(reports)
            await asyncio.sleep(0.02)
        raise FleetFailed(f"{len(self.newest)} of {len(self.replicas)} replicas report, or one is still busy")

    def forget_steps(self) -> None:
        self.steps = {replica.id: [] for replica in self.replicas}

    def all_steps(self) -> list[Iteration]:
        """Of every replica since `forget_steps`."""
        return [step for steps in self.steps.values() for step in steps]

    def busy_s(self) -> list[float]:
        """Seconds that each replica spent in steps since `forget_steps`."""
        return [sum(step.duration_s for step in steps) for steps in self.steps.values()]

    def take(self, report: LoadReport) -> None:
        self.newest[report.replica_id] = report
        self.steps.setdefault(report.replica_id, []).extend(report.iterations)


@asynccontextmanager
async def real_fleet(
    count: int, kv_bytes: int, folder: Path, kv_connector: str | None = None
) -> AsyncIterator[RealFleet]:
    """`count` replicas, on cores 0, 1, ... of those allowed; their logs in `folder`. Raises `FleetFailed`."""
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise FleetFailed(f"{count} replicas need {count} cores, there are {len(cores)}")
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            process = _start(f"r{number}", cores[number], kv_bytes, folder, kv_connector)
            processes.append(
                process
            )  # one by one: those that did start are stopped when a later one does not
        told = await asyncio.gather(*(_ready(number, one) for number, one in enumerate(processes)))
        fleet = RealFleet(tuple(told))
        fleet.forget_steps()
        listening = asyncio.create_task(_listen(fleet))
        try:
            await fleet.counters()
            yield fleet
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
    finally:
        for process in processes:
            await asyncio.to_thread(_stop, process)


def _start(
    name: str, core: int, kv_bytes: int, folder: Path, kv_connector: str | None
) -> subprocess.Popen[bytes]:
    command: tuple[str, ...] = (
        sys.executable, "-m", "headrace_bench.real_replica",
        "--name", name, "--core", str(core), "--kv-bytes", str(kv_bytes),
    )  # fmt: skip
    if kv_connector is not None:
        command += ("--kv-connector", kv_connector)
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, process_group=0
        )


async def _ready(number: int, process: subprocess.Popen[bytes]) -> Replica:
    try:
        async with asyncio.timeout(START_S):
            told = await asyncio.to_thread(_ready_line, process)
    except TimeoutError:
        told = None
    if told is None:
        raise FleetFailed(f"replica r{number} did not start; see r{number}.log")
    return Replica(
        ReplicaId(f"r{number}"),
        BootId(told["boot_id"]),
        MODEL,
        Role.UNIFIED,
        Endpoints(**told["endpoints"]),
        block_size=told["block_size"],
        num_blocks=told["num_blocks"],
        max_model_len=told["max_model_len"],
        max_running=told["max_running"],
        kv_connector=told["kv_connector"],
    )


def _ready_line(process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    assert process.stdout is not None
    for line in process.stdout:
        if b'{"ready"' in line:  # the engine's own processes write there too, and end no lines for us
            told: dict[str, Any] = json.loads(line[line.index(b'{"ready"') :])
            return told
    return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also ends an engine process that outlived its parent
    process.wait()


async def _listen(fleet: RealFleet) -> None:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.SUB)
    try:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        for replica in fleet.replicas:
            assert replica.endpoints.load is not None
            socket.connect(replica.endpoints.load)
        while True:
            fleet.take(decode_report(await socket.recv()))
    finally:
        socket.close(0)
        context.term()
