"""One gateway before real replicas, under one load: what clients saw, what engines computed, what was predicted."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from headrace_bench import peers
from headrace_bench.fixed_gateway import write_replicas
from headrace_bench.gateway_process import DidNotStart, Process
from headrace_bench.load import run_load
from headrace_bench.load_client import LoadClient, Target
from headrace_bench.load_driver import LoadJob
from headrace_bench.load_probe import probe
from headrace_bench.load_summary import Distribution
from headrace_bench.outcome import Outcome
from headrace_bench.prompt_text import Calibration
from headrace_bench.real_fleet import Counters, RealFleet
from headrace_bench.real_replica import MODEL
from headrace_bench.workload import Conversation, Span, Synthetic, plan_synthetic, start_when_free

ANSWERS_S = 60.0
MOST_CONVERSATIONS = 400


@dataclass(frozen=True, slots=True)
class Workload:
    """Users who talk at the same time. Each goes through one conversation after another.

    With 4 system prompts of 256 tokens and conversations that grow from 390 tokens to some 1,130, 16 users hold about
    9,000 different tokens at a time, and leave behind what they will never ask again.
    """

    users: int = 16
    turns: int = 6
    turn_tokens: tuple[int, int] = (90, 150)
    answer_tokens: int = 16
    system_prompts: int = 4
    system_tokens: int = 256
    think_s: float = 8.0  # mean pause between turns, exponential
    duration_s: float = 45.0  # nothing is sent later
    settle_s: float = 12.0  # what is sent earlier is left out: all users begin at once, on empty caches
    seed: int = 0  # of lengths and pauses, the same in every run

    def conversations(self, calibration: Calibration) -> tuple[Conversation, ...]:
        """More than can be held within the duration."""
        spec = Synthetic(
            requests=MOST_CONVERSATIONS * self.turns,
            prompt_tokens=Span(*self.turn_tokens),
            output_tokens=Span(self.answer_tokens, self.answer_tokens),
            turns=self.turns,
            system_prompts=self.system_prompts,
            system_tokens=self.system_tokens,
            think_s=self.think_s,
        )
        return start_when_free(plan_synthetic(spec, calibration, self.seed))


@dataclass(frozen=True, slots=True)
class Contender:
    """A gateway with a policy."""

    gateway: str
    policy: str

    @property
    def name(self) -> str:
        return f"{self.gateway} {self.policy}"

    @property
    def is_ours(self) -> bool:
        return self.gateway == "headrace"

    def launch(self, fleet: RealFleet, folder: Path) -> peers.Launch:
        """Raises `PeerMissing`."""
        if not self.is_ours:
            return peers.launch(self.gateway, fleet.urls, self.policy, folder)
        listed = folder / "replicas.json"
        write_replicas(fleet.replicas, listed)
        command = (
            sys.executable, "-m", "headrace_bench.fixed_gateway",
            "--replicas", str(listed), "--policy", self.policy,
        )  # fmt: skip
        return peers.Launch(self.gateway, peers.own_version(), command, None)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it was sent and answered; enough to simulate it."""

    sent_s: float
    conversation: int
    turn: int
    prompt_tokens: int
    answer_tokens: int
    cached_tokens: int
    ttft_s: float
    e2e_s: float
    measured: bool


@dataclass(frozen=True, slots=True)
class RealRun:
    """One contender, one round. Engine counters are of the whole run; latencies of what was sent after the settling."""

    contender: str
    version: str
    round: int
    requests: int
    failed: int
    errors: tuple[str, ...]
    ttft_s: Distribution
    e2e_s: Distribution
    prompt_tokens: int  # by the engines' counters
    cached_tokens: int
    preemptions: int
    predicted_tokens: int | None  # prefix hits that our gateway expected; None where it did not ask
    reported_tokens: int | None  # of the same requests, as the engines reported
    busy: tuple[float, ...]  # share of the run that each replica spent in steps
    asked: tuple[Asked, ...]

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    @property
    def computed_per_request(self) -> float:
        return self.computed_tokens / max(1, len(self.asked))

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def prediction_error(self) -> float | None:
        """Of the predicted hit tokens, relative to the reported."""
        if self.predicted_tokens is None or not self.reported_tokens:
            return None
        return self.predicted_tokens / self.reported_tokens - 1


@dataclass(frozen=True, slots=True)
class Stage:
    """What every contender meets."""

    fleet: RealFleet
    workload: Workload
    calibration: Calibration


async def run_contender(contender: Contender, stage: Stage, number: int, seed: int) -> RealRun:
    """Start its gateway, load it, stop it. `seed` makes the text: another one shares no prompt with this.

    Raises `PeerMissing`, `DidNotStart`, `FleetFailed`.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-real-") as name:
        folder = Path(name)
        launch = contender.launch(stage.fleet, folder)
        process = Process(launch.command, frozenset(os.sched_getaffinity(0)), folder, contender.gateway)
        try:
            url = launch.url or await process.ready_line(ANSWERS_S)
            await answers(process, url)
            seen = await _measure(stage, url, seed, has_metrics=contender.is_ours)
        finally:
            await asyncio.to_thread(process.stop)
    return _summarised(contender, launch.version, number, stage.workload, seen)


async def calibrate_text(fleet: RealFleet) -> Calibration:
    """What a word costs. Raises `ProbeError`, `Unreachable`."""
    client = LoadClient(Target.parse(fleet.urls[0]))
    try:
        return (await probe(client, MODEL, "chat")).calibration
    finally:
        client.close()


@dataclass(frozen=True, slots=True)
class _Seen:
    outcomes: tuple[Outcome, ...]
    counters: Counters
    busy: tuple[float, ...]
    hits: tuple[int, int] | None  # predicted, reported


async def _measure(stage: Stage, url: str, seed: int, *, has_metrics: bool) -> _Seen:
    fleet, workload = stage.fleet, stage.workload
    job = LoadJob(
        target=Target.parse(url),
        model=MODEL,
        conversations=workload.conversations(stage.calibration),
        users=workload.users,
        ignore_eos=True,
        body={"temperature": 0},
        seed=seed,
        duration_s=workload.duration_s,
        timeout_s=60.0,
    )
    hits_before = await _prefix_hits(url) if has_metrics else None
    before = await fleet.counters()
    fleet.forget_steps()
    run = await asyncio.to_thread(run_load, job, 1)
    done = await fleet.counters() - before
    span_s = max(outcome.end_s for outcome in run.outcomes)
    hits = await _prefix_hits(url) if has_metrics else None
    if hits is not None and hits_before is not None:
        hits = (hits[0] - hits_before[0], hits[1] - hits_before[1])
    return _Seen(run.outcomes, done, tuple(round(busy_s / span_s, 3) for busy_s in fleet.busy_s()), hits)


def _summarised(contender: Contender, version: str, number: int, workload: Workload, seen: _Seen) -> RealRun:
    asked = asked_of(seen.outcomes, workload.settle_s)
    measured = [one for one in asked if one.measured]
    ttft_s = Distribution.of(one.ttft_s for one in measured)
    e2e_s = Distribution.of(one.e2e_s for one in measured)
    failures = [outcome for outcome in seen.outcomes if outcome.error is not None]
    if ttft_s is None or e2e_s is None:
        raise DidNotStart(f"{contender.name} answered nothing: {failures[0].detail if failures else ''}")
    return RealRun(
        contender=contender.name,
        version=version,
        round=number,
        requests=len(measured),
        failed=len(failures),
        errors=tuple(sorted({f"{one.error}: {one.detail}" for one in failures}))[:5],
        ttft_s=ttft_s,
        e2e_s=e2e_s,
        prompt_tokens=seen.counters.prompt_tokens,
        cached_tokens=seen.counters.cached_tokens,
        preemptions=seen.counters.preemptions,
        predicted_tokens=None if seen.hits is None else seen.hits[0],
        reported_tokens=None if seen.hits is None else seen.hits[1],
        busy=seen.busy,
        asked=asked,
    )


def asked_of(outcomes: Sequence[Outcome], settle_s: float) -> tuple[Asked, ...]:
    """Those that were answered."""
    return tuple(
        Asked(
            sent_s=round(one.sent_s, 4),
            conversation=one.conversation,
            turn=one.turn,
            prompt_tokens=one.prompt_tokens or one.planned_tokens,
            answer_tokens=one.output_tokens,
            cached_tokens=one.cached_tokens or 0,
            ttft_s=round(one.ttft_s, 4),
            e2e_s=round(one.e2e_s, 4),
            measured=one.sent_s >= settle_s,
        )
        for one in outcomes
        if one.error is None and one.ttft_s is not None
    )


async def answers(process: Process, url: str) -> None:
    """Return once a whole answer comes through. Raises `DidNotStart`."""
    body: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "ready?"}],
    }
    client = LoadClient(Target.parse(url))
    deadline = asyncio.get_running_loop().time() + ANSWERS_S
    try:
        while True:
            process.check_alive()
            answer = await client.exchange("POST", "/v1/chat/completions", msgspec.json.encode(body))
            if answer.error is None and answer.status == 200:
                return
            if asyncio.get_running_loop().time() > deadline:
                raise DidNotStart(f"{process.name} does not answer: {answer.error} {answer.detail}")
            await asyncio.sleep(0.2)
    finally:
        client.close()


_HITS = re.compile(
    r'^headrace_prefix_hit_tokens_total\{[^}]*kind="(predicted|actual)"[^}]*\} (\S+)', re.MULTILINE
)


def prefix_hits(metrics: str) -> tuple[int, int] | None:
    """Predicted and reported prefix hit tokens in a scrape of our gateway; None where it does not ask for prefixes."""
    found = _HITS.findall(metrics)
    if "headrace_index_blocks" not in metrics:
        return None
    return (
        round(sum(float(value) for kind, value in found if kind == "predicted")),
        round(sum(float(value) for kind, value in found if kind == "actual")),
    )


async def _prefix_hits(url: str) -> tuple[int, int] | None:
    client = LoadClient(Target.parse(url))
    try:
        answer = await client.exchange("GET", "/metrics")
        return prefix_hits(bytes(answer.body).decode())
    finally:
        client.close()
