"""What a routing decision costs, with the production router and a full index.

    python -m headrace_bench.decision_bench [--quick]

A prompt of 10,000 tokens, three quarters of it resident somewhere, 1M blocks resident in all. Token ids are given.
Writes bench/results/decision.md and decision.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from array import array
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from headrace_bench.peers import REPOSITORY
from headrace_bench.relay_report import machine
from headrace_kernels.block_hash import hash_blocks, salt
from headrace_kernels.compilation import warm
from headrace_router.events import BlocksKnown, EventBatch
from headrace_router.policies import POLICIES, make_policy
from headrace_router.prefix_index import PrefixIndex
from headrace_router.router import Choice, Router
from headrace_router.types import BootId, Endpoints, Membership, Replica, ReplicaId, Request, Role

RESULTS = REPOSITORY / "bench" / "results"
FLEETS = (16, 256, 1024)
MODEL = "m"
BOOT = BootId("b")
BLOCK_SIZE = 16
PROMPT_TOKENS = 10_000
SHARED_TOKENS = 7_504
HOLDERS = 3  # replicas that hold each resident prompt
SEED = 20


def fleet(count: int) -> Membership:
    return Membership(
        1,
        tuple(
            Replica(
                ReplicaId(f"r{number}"),
                BOOT,
                MODEL,
                Role.UNIFIED,
                Endpoints("http://127.0.0.1:1"),
                block_size=BLOCK_SIZE,
                num_blocks=1 << 16,
            )
            for number in range(count)
        ),
    )


class Scene:
    """A router over a full index, and prompts that find something in it."""

    def __init__(self, replicas: int, num_blocks: int, policy: str) -> None:
        self.rng = np.random.default_rng(SEED)
        self.index = PrefixIndex(max_blocks=HOLDERS * num_blocks + (1 << 20))
        self.router = Router(make_policy(policy, SEED), index=self.index)
        self.router.set_membership(fleet(replicas), 0.0)
        self.parent = salt(MODEL)
        self.now_s = 0.0
        self.resident = []
        sequences = [0] * replicas
        for _ in range(num_blocks * BLOCK_SIZE // PROMPT_TOKENS):
            tokens = self.rng.integers(0, 128_000, PROMPT_TOKENS, np.uint32)
            self.resident.append(tokens[:SHARED_TOKENS])
            hashes = hash_blocks(tokens, BLOCK_SIZE, self.parent)
            for number in self.rng.choice(replicas, HOLDERS, replace=False).tolist():
                event = BlocksKnown(hashes.tolist(), hashes, BLOCK_SIZE)
                self.index.apply(EventBatch(ReplicaId(f"r{number}"), BOOT, sequences[number], (event,)))
                sequences[number] += 1

    def prompts(self, count: int) -> list[array[int]]:
        """Drawn from all that is resident, each with an end of its own."""
        prompts = []
        for at in self.rng.integers(0, len(self.resident), count).tolist():
            end = self.rng.integers(0, 128_000, PROMPT_TOKENS - SHARED_TOKENS, np.uint32)
            prompts.append(array("I", np.concatenate([self.resident[at], end]).tobytes()))
        return prompts

    def request(self, tokens: array[int]) -> Request:
        hashes = hash_blocks(tokens, BLOCK_SIZE, self.parent)
        return Request(
            MODEL, 4 * len(tokens), 200, prompt_tokens=len(tokens), block_hashes={BLOCK_SIZE: hashes}
        )


def measure(scene: Scene, count: int, clock: Callable[[], int]) -> dict[str, dict[str, float]]:
    """Nanoseconds by `clock` of each part of `count` decisions, as percentiles in µs."""
    router, index, policy = scene.router, scene.index, scene.router.policy
    view = router._views[MODEL]
    samples: dict[str, list[int]] = {
        "hash": [],
        "look up": [],
        "choose": [],
        "all three": [],
        "book": [],
        "release": [],
    }
    open_: list[Choice] = []
    for tokens in scene.prompts(count):
        scene.now_s += 0.001
        at = clock()
        request = scene.request(tokens)
        hashed = clock()
        view.hits = index.look_up(request, scene.now_s)
        found = clock()
        decision = policy.choose(request, view)
        chosen = clock()
        load = decision.load
        booking = router.loads.book(
            load, PROMPT_TOKENS, PROMPT_TOKENS - decision.hit_tokens, 200, scene.now_s
        )
        index.routed(request, load.slot, scene.now_s)
        booked = clock()
        open_.append(Choice(booking, decision))
        released = booked
        if len(open_) > min(4 * len(view.loads), count // 4):
            router.release(open_.pop(0).booking, scene.now_s)
            released = clock()
            samples["release"].append(released - booked)
        samples["hash"].append(hashed - at)
        samples["look up"].append(found - hashed)
        samples["choose"].append(chosen - found)
        samples["all three"].append(chosen - at)
        samples["book"].append(booked - chosen)
    for choice in open_:
        router.release(choice.booking, scene.now_s)
    return {name: percentiles(values) for name, values in samples.items() if values}


def load_only(replicas: int, policy: str, count: int) -> dict[str, float]:
    """`Router.choose` of a prompt that nobody tokenised, booking included."""
    router = Router(make_policy(policy, SEED))
    router.set_membership(fleet(replicas), 0.0)
    request = Request(MODEL, 1024, 200)
    samples = []
    for _ in range(count):
        at = time.perf_counter_ns()
        choice = router.choose(request, 1.0)
        samples.append(time.perf_counter_ns() - at)
        assert choice is not None
        router.release(choice.booking, 2.0)
    return percentiles(samples)


def percentiles(samples: list[int]) -> dict[str, float]:
    p50, p99 = np.percentile(samples, (50, 99)).tolist()
    return {"p50_us": p50 / 1000, "p99_us": p99 / 1000}


def markdown(document: dict[str, Any]) -> str:
    lines = ["# A routing decision", ""]
    lines += [f"- {key}: {document[key]}" for key in ("date", "machine", "versions", "command")]
    lines += [
        "",
        f"A prompt of {PROMPT_TOKENS:,} tokens given as `array('I')`, blocks of {BLOCK_SIZE}, "
        f"{document['resident_blocks']:,} distinct blocks resident, each on {HOLDERS} replicas, policy delay; "
        f"{document['decisions']:,} prompts drawn from all resident ones. µs, p50 / p99, of wall time and of the "
        "thread's processor time. `all three` is what stands between token ids and a decision; `book` then writes the "
        "booking and the blocks that are expected there.",
        "",
        "| replicas | clock | hash | look up | choose | all three | book | release |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["decisions_by_fleet"]:
        cells = [
            pair(row[part]) if part in row else ""
            for part in ("hash", "look up", "choose", "all three", "book", "release")
        ]
        lines.append(f"| {row['replicas']} | {row['clock']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Index: {document['bytes_per_block']:.0f} bytes per resident block, tables, map of engine hashes and expected "
        "blocks together.",
        "",
        "Load alone (no tokens, no text): choose and book; µs, p50 / p99:",
        "",
        "| policy | " + " | ".join(f"{count} replicas" for count in document["small_fleets"]) + " |",
        "|---|" + "---|" * len(document["small_fleets"]),
    ]
    lines += [
        f"| {name} | " + " | ".join(pair(cell) for cell in cells) + " |"
        for name, cells in document["load_only"].items()
    ]
    return "\n".join(lines) + "\n"


def pair(figures: dict[str, float]) -> str:
    return f"{figures['p50_us']:.1f} / {figures['p99_us']:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="headrace_bench.decision_bench")
    parser.add_argument("--quick", action="store_true", help="100k blocks, few decisions; writes nothing")
    args = parser.parse_args()
    num_blocks, count = (100_000, 300) if args.quick else (1_000_000, 4000)
    warm()
    rows, bytes_per_block = [], 0.0
    for replicas in FLEETS:
        scene = Scene(replicas, num_blocks, "delay")
        measure(scene, 50, time.perf_counter_ns)
        gc.collect()
        gc.freeze()  # a server's long-lived objects; what the collector then costs is the requests' own
        for name, clock in (("wall", time.perf_counter_ns), ("processor", time.thread_time_ns)):
            rows.append({"replicas": replicas, "clock": name, **measure(scene, count, clock)})
        bytes_per_block = max(bytes_per_block, scene.index.memory_bytes / scene.index.num_blocks)
        gc.unfreeze()
    small = (2, 4, 16, 64, 256)
    document: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": f"numba {version('numba')}, numpy {version('numpy')}",
        "command": "python -m headrace_bench.decision_bench",
        "resident_blocks": num_blocks,
        "decisions": count,
        "decisions_by_fleet": rows,
        "bytes_per_block": bytes_per_block,
        "small_fleets": small,
        "load_only": {name: [load_only(size, name, count) for size in small] for name in POLICIES},
    }
    table = markdown(document)
    print(table)
    if not args.quick:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "decision.md").write_text(table)
        (RESULTS / "decision.json").write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
