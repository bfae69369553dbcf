"""One implementation of hashing and prefix lookup under measurement, in a process of its own.

    python -m headrace_bench.kernel_subject headrace|headrace-closed|dynamo

reads one JSON command per line and answers with one JSON line. It imports numpy and its subject, nothing else of
ours, so that it also runs under the Python of a peer's environment. The workload depends on its seed alone: both
subjects see the same blocks on the same replicas in the same order.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from ctypes import CDLL
from statistics import median
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

PROMPT_TOKENS = 10_000
BLOCK_SIZE = 16
PROMPT_BLOCKS = PROMPT_TOKENS // BLOCK_SIZE  # 625
SHARED_BLOCKS = 64  # leading blocks, one of SHARED_PROMPTS system prompts
SHARED_PROMPTS = 16
SHARERS = 2  # replicas that hold each prompt


class Subject(Protocol):
    """What is measured. A prompt is prepared by `form` outside the clock, in the form the subject wants."""

    def open(self, num_replicas: int) -> None: ...
    def form(self, hashes: NDArray[np.uint64]) -> Any: ...
    def event(self, kind: str, hashes: NDArray[np.uint64]) -> Any: ...
    def apply(self, replica: int, event: Any) -> None: ...
    def find(self, prompt: Any) -> None: ...
    def find_counts(self, prompt: Any) -> dict[int, int]: ...
    def hash(self, tokens: list[int]) -> None: ...
    def hash_buffer(self, tokens: array[int]) -> None: ...


class Headrace:
    """Ours, looking at every block."""

    closed = False

    def __init__(self) -> None:
        from headrace_kernels.block_hash import hash_blocks
        from headrace_kernels.compilation import warm
        from headrace_kernels.prefix_table import PrefixTable

        warm()
        self._hash_blocks, self._table_of = hash_blocks, PrefixTable

    def open(self, num_replicas: int) -> None:
        self.table = self._table_of(num_replicas)
        self._counts = np.zeros(num_replicas, np.int32)

    def form(self, hashes: NDArray[np.uint64]) -> Any:
        return hashes

    def event(self, kind: str, hashes: NDArray[np.uint64]) -> Any:
        return kind, hashes

    def apply(self, replica: int, event: Any) -> None:
        kind, hashes = event
        if kind == "stored":
            self.table.store(replica, hashes)
        else:
            self.table.remove(replica, hashes)

    def find(self, prompt: Any) -> None:
        self.table.longest_prefix(prompt, self._counts, closed=self.closed)

    def find_counts(self, prompt: Any) -> dict[int, int]:
        counts = self.table.longest_prefix(prompt, closed=self.closed)
        holders = np.flatnonzero(counts)
        return dict(zip(holders.tolist(), counts[holders].tolist(), strict=True))

    def hash(self, tokens: list[int]) -> None:
        self._hash_blocks(tokens, BLOCK_SIZE, 1)

    def hash_buffer(self, tokens: array[int]) -> None:
        self._hash_blocks(tokens, BLOCK_SIZE, 1)


class HeadraceClosed(Headrace):
    """Ours, bisecting: right where a replica that holds a block holds all before it, as in this workload."""

    closed = True


class Dynamo:
    """`RadixTree` and `compute_block_hash_for_seq` of ai-dynamo-runtime; events enter as JSON bytes."""

    def __init__(self) -> None:
        from dynamo._core import RadixTree, compute_block_hash_for_seq  # type: ignore[import-not-found]

        self._tree_of, self._hash = RadixTree, compute_block_hash_for_seq

    def open(self, num_replicas: int) -> None:
        self._tree = self._tree_of()

    def form(self, hashes: NDArray[np.uint64]) -> Any:
        return hashes.tolist()

    def event(self, kind: str, hashes: NDArray[np.uint64]) -> Any:
        names = hashes.tolist()
        data: dict[str, Any] = (
            {"parent_hash": None, "blocks": [{"block_hash": name, "tokens_hash": name} for name in names]}
            if kind == "stored"
            else {"block_hashes": names}
        )
        return json.dumps({"event_id": 0, "data": {kind: data}}).encode()

    def apply(self, replica: int, event: Any) -> None:
        self._tree.apply_event(replica, event)

    def find(self, prompt: Any) -> None:
        self._tree.find_matches(prompt)

    def find_counts(self, prompt: Any) -> dict[int, int]:
        scores = self._tree.find_matches(prompt).scores
        return {int(worker): int(count) for (worker, _), count in scores.items()}

    def hash(self, tokens: list[int]) -> None:
        self._hash(tokens, BLOCK_SIZE)

    def hash_buffer(self, tokens: array[int]) -> None:
        self._hash(tokens, BLOCK_SIZE)  # it accepts any sequence


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "headrace": Headrace,
    "headrace-closed": HeadraceClosed,
    "dynamo": Dynamo,
}


class Workload:
    """`num_prompts` prompts of 625 blocks; the first 64 are one of 16 system prompts; each is on 2 replicas."""

    def __init__(self, num_blocks: int, num_replicas: int, seed: int) -> None:
        self.num_prompts = num_blocks // (PROMPT_BLOCKS - SHARED_BLOCKS)
        self._seed = seed
        generator = np.random.default_rng(seed)
        self._shared = generator.integers(0, 2**64, (SHARED_PROMPTS, SHARED_BLOCKS), dtype=np.uint64)
        self._replicas = generator.integers(0, num_replicas, (self.num_prompts, SHARERS)).tolist()

    def prompt(self, index: int) -> NDArray[np.uint64]:
        # Chained hashes never recur at another place: the streams of two prompts must not overlap.
        generator = np.random.default_rng((index + 1, self._seed))
        hashes = generator.integers(0, 2**64, PROMPT_BLOCKS, dtype=np.uint64)
        hashes[:SHARED_BLOCKS] = self._shared[index % SHARED_PROMPTS]
        return hashes

    def placements(self) -> Iterator[tuple[int, int]]:
        """(prompt, replica), prompt by prompt."""
        for index, replicas in enumerate(self._replicas):
            for replica in replicas:
                yield index, replica


def timed_us(call: Callable[[], object]) -> float:
    started_ns = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started_ns) / 1e3


def resident_bytes() -> int:
    """Of this process, after everything unused went back to the system."""
    gc.collect()
    CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Session:
    """Answers the driver's commands."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def build(self, num_blocks: int, num_replicas: int, seed: int) -> dict[str, float]:
        """Fill an index. Events are made outside the clock; memory is what the process grew by."""
        self._workload = Workload(num_blocks, num_replicas, seed)
        first = self._workload.prompt(0)
        self._subject.event("stored", first)
        before = resident_bytes()
        self._subject.open(num_replicas)
        times_us = []
        for index, replica in self._workload.placements():
            event = self._subject.event("stored", self._workload.prompt(index))
            times_us.append(timed_us(lambda: self._subject.apply(replica, event)))  # noqa: B023
        distinct = (
            self._workload.num_prompts * (PROMPT_BLOCKS - SHARED_BLOCKS) + SHARED_PROMPTS * SHARED_BLOCKS
        )
        return {
            "distinct_blocks": distinct,
            "bytes_per_block": (resident_bytes() - before) / distinct,
            "store_ns_per_block": median(times_us) * 1e3 / PROMPT_BLOCKS,
        }

    def remove(self, num_prompts: int) -> dict[str, float]:
        """Remove prompts from one of their replicas and store them again, so that the index stays as it was."""
        times_us = []
        for index, replica in list(self._workload.placements())[: SHARERS * num_prompts : SHARERS]:
            own = self._workload.prompt(index)[SHARED_BLOCKS:]
            removed = self._subject.event("removed", own)
            times_us.append(timed_us(lambda: self._subject.apply(replica, removed)))  # noqa: B023
            self._subject.apply(replica, self._subject.event("stored", self._workload.prompt(index)))
        return {"remove_ns_per_block": median(times_us) * 1e3 / (PROMPT_BLOCKS - SHARED_BLOCKS)}

    def look_up(self, count: int, seed: int) -> dict[str, list[float]]:
        """Times in µs: of prompts drawn from all resident ones (`spread`), of the same one again (`again`), and
        of taking the counts out as well (`counts`)."""
        drawn = np.random.default_rng(seed).integers(0, self._workload.num_prompts, count).tolist()
        times: dict[str, list[float]] = {"spread": [], "again": [], "counts": []}
        for index in drawn:
            prompt = self._subject.form(self._workload.prompt(index))
            times["spread"].append(timed_us(lambda: self._subject.find(prompt)))  # noqa: B023
            times["again"].append(timed_us(lambda: self._subject.find(prompt)))  # noqa: B023
            times["counts"].append(timed_us(lambda: self._subject.find_counts(prompt)))  # noqa: B023
        return times

    def matches(self, index: int) -> dict[str, int]:
        """Per replica, how many leading blocks of a prompt it holds: for the check that subjects agree."""
        found = self._subject.find_counts(self._subject.form(self._workload.prompt(index)))
        return {str(replica): count for replica, count in sorted(found.items())}

    def hash(self, count: int, seed: int) -> dict[str, list[float]]:
        """Times in µs of hashing 10,000 tokens, from a list of int and from an `array('I')`."""
        tokens = np.random.default_rng(seed).integers(0, 150_000, PROMPT_TOKENS).tolist()
        buffer = array("I", tokens)
        return {
            "list": [timed_us(lambda: self._subject.hash(tokens)) for _ in range(count)],
            "buffer": [timed_us(lambda: self._subject.hash_buffer(buffer)) for _ in range(count)],
        }


def main() -> int:
    session = Session(SUBJECTS[sys.argv[1]]())
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(session, command.pop("do"))(**command)
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
