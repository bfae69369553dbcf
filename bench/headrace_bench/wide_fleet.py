"""What grows in one gateway with the number of replicas: load reports, choices, memberships, ticks; KV events.

    python -m headrace_bench.wide_fleet

Writes bench/results/wide_fleet.md. A few seconds of one core; no sockets, no engines.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import median
from time import process_time

import msgspec

from headrace.backends.kv_event_wire import BlockRemoved, BlockStored, KVEventBatch, encode_batch
from headrace.backends.load_publisher import decode_report
from headrace.gateway.kv_event_reader import KvEventReader
from headrace_router.policies import make_policy
from headrace_router.prefix_index import PrefixIndex
from headrace_router.router import Router
from headrace_router.types import (
    BootId,
    Endpoints,
    Iteration,
    LoadReport,
    Membership,
    Replica,
    ReplicaId,
    Request,
    Role,
)

HOME = Path(__file__).resolve().parent.parent
SIZES = (256, 1024, 2500, 10_000)
ROUNDS = 5
MOST_INDEXED = 1024


def replica(number: int) -> Replica:
    return Replica(
        ReplicaId(f"model-unified-{number}"),
        BootId("0123456789abcdef"),
        "model",
        Role.UNIFIED,
        Endpoints(
            "http://10.0.0.1:40000", "tcp://10.0.0.1:40001", "tcp://10.0.0.1:40002", "tcp://10.0.0.1:40003"
        ),
        block_size=16,
        num_blocks=4096,
    )


def report(number: int, sequence: int) -> bytes:
    """Of one step since the last report, as an engine under load sends it."""
    step = Iteration(0.02, prefill_tokens=100, decode_sequences=5, context_tokens=900)
    known = replica(number)
    return msgspec.msgpack.encode(
        LoadReport(known.id, known.boot_id, sequence, 5, 1, 0.4, backlog_tokens=500, iterations=(step,))
    )


def cost_us(work: Callable[[], object], times: int) -> float:
    """Of one call; the median of some rounds of `times`."""
    rounds = []
    for _ in range(ROUNDS):
        began_s = process_time()
        for _ in range(times):
            work()
        rounds.append((process_time() - began_s) / times * 1e6)
    return median(rounds)


def events_us(size: int) -> str:
    """Reading a batch of 64 new blocks and the removal of 64 old ones, as a full cache sends, by the block stored."""
    if size > MOST_INDEXED:
        return "-"
    index = PrefixIndex(num_slots=size)
    known = replica(0)
    index.follow([(replica(number), number) for number in range(size)])
    reader = KvEventReader(known.id, known.boot_id)
    draw = Random(size)
    payloads = []
    for number in range(ROUNDS * 40):
        hashes: list[int | bytes] = [number * 64 + one for one in range(1, 65)]
        old: list[int | bytes] = [(number - 1) * 64 + one for one in range(1, 65)]
        tokens = [draw.randrange(40_000) for _ in range(64 * 16)]
        stored = BlockStored(hashes, None, tokens, 16, None, "GPU", None)
        payloads.append(
            encode_batch(KVEventBatch(0.0, [stored, BlockRemoved(old, "GPU")] if number else [stored]))
        )
    sequences = iter(range(len(payloads)))

    def take() -> None:
        number = next(sequences)
        index.apply(reader.read(number, payloads[number])[0])

    return f"{cost_us(take, 40) / 64:.2f}"


def measure(size: int) -> list[str]:
    """One row of the table."""
    replicas = tuple(replica(number) for number in range(size))
    membership = Membership(1, replicas)
    wire = msgspec.msgpack.encode(membership)
    read = cost_us(lambda: msgspec.msgpack.decode(wire, type=Membership), 1)
    router = Router(make_policy("delay", 0))
    began_s = process_time()
    router.set_membership(membership, 0.0)
    first_us = (process_time() - began_s) * 1e6
    sequences = iter(range(1, 1_000_000))
    messages = [report(number % size, next(sequences)) for number in range(ROUNDS * 2000)]
    waiting = iter(messages)

    def take() -> None:
        router.report(decode_report(next(waiting)), 1.0)

    return [
        f"{size:,}",
        f"{cost_us(take, 2000):.1f}",
        f"{cost_us(lambda: router.choose(Request('model', prompt_tokens=500), 2.0), 50):.0f}",
        f"{cost_us(lambda: router.tick(2.0, 5.0), 20) / 1000:.2f}",
        f"{len(wire) / 1e6:.2f}",
        f"{read / 1000:.0f}",
        f"{first_us / 1000:.0f}",
        events_us(size),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """0."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m headrace_bench.wide_fleet", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=HOME / "results" / "wide_fleet.md")
    args = parser.parse_args(words)
    rows = "\n".join(f"| {' | '.join(measure(size))} |" for size in SIZES)
    page = (
        f"# One gateway and a wide fleet\n\n`{shlex.join(['python', '-m', 'headrace_bench.wide_fleet', *words])}`: CPU "
        f"time of one core, medians of {ROUNDS} rounds; policy delay, no prefixes.\n\n"
        "| replicas | a load report, µs | choose, µs | tick (ten a second), ms | membership, MB | ... to decode, ms "
        "| ... to take the first, ms | a KV block stored and one removed, µs |\n|---|---|---|---|---|---|---|---|\n"
        f"{rows}\n"
    )
    args.out.write_text(page)
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
