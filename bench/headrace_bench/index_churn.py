"""The prefix index under churn: ten million blocks come and go, memory and integrity are looked at on the way.

    python -m headrace_bench.index_churn [--blocks 10000000]

16 replicas of 65,536 blocks each, full after the first million; from then on each new prompt evicts the oldest ones of
its replica, as engines do. A third of each prompt is a prefix that prompts on all replicas share. Meanwhile prompts are
looked up and expected, one replica restarts, and one batch is lost and given up. Writes bench/results/index_churn.md.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace_bench.peers import REPOSITORY
from headrace_bench.relay_report import machine
from headrace_kernels.compilation import warm
from headrace_router.events import BlocksKnown, BlocksRemoved, CacheEvent, EventBatch
from headrace_router.prefix_index import PrefixIndex
from headrace_router.types import BootId, Endpoints, Replica, ReplicaId, Request, Role

RESULTS = REPOSITORY / "bench" / "results"
REPLICAS = 16
BLOCKS_EACH = 1 << 16
BLOCK_SIZE = 16
PROMPT_BLOCKS = 192
SHARED_BLOCKS = 64
PREFIXES = 64
SEED = 7
LOOKS = 10
TABLE_BYTES, MAP_BYTES, EXPECTED_BYTES = 37, 45, 37
"""Per distinct block, per block and replica, per expected block: the bounds that router/README.md states."""
EXPECTED_BLOCKS = 2 * (1 << 19)


@dataclass(frozen=True, slots=True)
class Look:
    """The index at one moment."""

    stored: int
    held: int
    memory_bytes: int
    bound_bytes: int
    resident_mb: float


class Engine:
    """A paged cache that knows no more than which blocks it holds, oldest first."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.boot = 0
        self.sequence = 0
        self.cache: dict[int, None] = {}

    @property
    def replica(self) -> Replica:
        return Replica(
            id=ReplicaId(f"replica-{self.number}"),
            boot_id=BootId(f"boot-{self.boot}"),
            model="m",
            role=Role.UNIFIED,
            endpoints=Endpoints("http://127.0.0.1:1"),
            block_size=BLOCK_SIZE,
            num_blocks=BLOCKS_EACH,
        )

    def restart(self) -> None:
        self.boot += 1
        self.sequence = 0
        self.cache.clear()

    def serve(self, prompt: NDArray[np.uint64]) -> EventBatch:
        """Compute what is not held of a prompt, evicting the oldest blocks for it."""
        cache, held = self.cache, 0
        hashes: list[int] = prompt.tolist()
        for block in hashes:
            if block not in cache:
                break
            cache[block] = cache.pop(block)  # used again: the youngest
            held += 1
        fresh = hashes[held:]
        evicted = []
        while len(cache) + len(fresh) > BLOCKS_EACH:
            oldest = next(iter(cache))
            del cache[oldest]
            evicted.append(oldest)
        cache.update(dict.fromkeys(fresh))
        events: list[CacheEvent] = [BlocksRemoved(evicted)] if evicted else []
        events.append(BlocksKnown(fresh, prompt[held:], BLOCK_SIZE))
        batch = EventBatch(self.replica.id, self.replica.boot_id, self.sequence, events)
        self.sequence += 1
        return batch


def churn(num_blocks: int) -> list[Look]:
    """Raises AssertionError where memory leaves its bound or the index its engines."""
    rng = np.random.default_rng(SEED)
    engines = [Engine(number) for number in range(REPLICAS)]
    index = PrefixIndex(num_slots=REPLICAS, max_blocks=2 * REPLICAS * BLOCKS_EACH)
    follow(index, engines)
    prefixes = rng.integers(1, 1 << 63, (PREFIXES, SHARED_BLOCKS), np.uint64)
    recent: deque[NDArray[np.uint64]] = deque(maxlen=256)
    looks: list[Look] = []
    stored = turn = 0
    while stored < num_blocks:
        own = rng.integers(1, 1 << 63, PROMPT_BLOCKS - SHARED_BLOCKS, np.uint64)
        prompt = np.concatenate([prefixes[int(rng.integers(PREFIXES))], own])
        engine = engines[int(rng.integers(REPLICAS))]
        now_s = turn * 0.01
        request = Request(
            "m", prompt_tokens=PROMPT_BLOCKS * BLOCK_SIZE + 1, block_hashes={BLOCK_SIZE: prompt}
        )
        index.look_up(request, now_s)
        index.routed(request, engine.number, now_s)
        index.apply(engine.serve(prompt))
        recent.append(prompt)
        stored += PROMPT_BLOCKS
        turn += 1
        if turn % 16 == 0:
            index.tick(now_s)
        if stored * LOOKS // num_blocks > len(looks):
            looks.append(look(index, engines, stored))
            disturb(index, engines, len(looks))
    index.check_integrity()
    held = sum(len(engine.cache) for engine in engines)
    assert index.num_blocks == held, f"{index.num_blocks} blocks known, {held} held"
    return looks


def disturb(index: PrefixIndex, engines: list[Engine], moment: int) -> None:
    """A restart at every third look, a lost batch that cannot be fetched at every other third."""
    engine = engines[moment % REPLICAS]
    if moment % 3 == 0:
        engine.restart()
        follow(index, engines)
    elif moment % 3 == 1:
        before = engine.replica
        engine.serve(np.arange(1, PROMPT_BLOCKS, dtype=np.uint64))  # this batch is never seen
        index.apply(engine.serve(np.arange(10_000, 10_000 + PROMPT_BLOCKS, dtype=np.uint64)))
        index.give_up_gap(before.id, before.boot_id)
        engine.restart()  # what the engine still holds nobody will tell again: start both from nothing
        follow(index, engines)


def follow(index: PrefixIndex, engines: list[Engine]) -> None:
    index.follow([(engine.replica, engine.number) for engine in engines])


def look(index: PrefixIndex, engines: list[Engine], stored: int) -> Look:
    bound = index.max_blocks * (TABLE_BYTES + MAP_BYTES) + EXPECTED_BLOCKS * EXPECTED_BYTES
    assert index.memory_bytes <= bound, f"{index.memory_bytes} bytes, over the bound of {bound}"
    resident_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Look(stored, index.num_blocks, index.memory_bytes, bound, resident_mb)


def page(looks: list[Look], took_s: float, command: str) -> str:
    lines = [
        "# The prefix index under churn",
        "",
        f"- machine: {machine()}",
        f"- command: {command}",
        f"- {looks[-1].stored:,} blocks stored in {took_s:.0f} s, the engines' own bookkeeping included",
        "- `check_integrity()` held at the end, and as many blocks were known as the engines held",
        "",
        "| blocks stored so far | blocks held | index, MB | bound, MB | process at most, MB |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.stored:,} | {one.held:,} | {one.memory_bytes / 1e6:.1f} | {one.bound_bytes / 1e6:.1f} "
        f"| {one.resident_mb:.0f} |"
        for one in looks
    ]
    return "\n".join(lines) + "\n"


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m headrace_bench.index_churn")
    parser.add_argument("--blocks", type=int, default=10_000_000, metavar="N", help="(default 10,000,000)")
    args = parser.parse_args(words)
    warm()
    begun_s = time.perf_counter()
    looks = churn(args.blocks)
    text = page(
        looks,
        time.perf_counter() - begun_s,
        " ".join(["python -m headrace_bench.index_churn", *words]),
    )
    (RESULTS / "index_churn.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
