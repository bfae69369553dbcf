"""256 simulated replicas on four Ray nodes, four gateways, 5,000 concurrent streams: what one big fleet costs.

    python -m headrace_bench.scale_test [--replicas 256] [--streams 5000] [--gateways 4] [--seconds 120]

Writes bench/results/scale_test.md. The nodes are raylets on one machine; the replicas of a node share one actor
(`scale_crowd` says why), each with its own HTTP server, load publisher and KV events, as if alone. An iteration takes
2 s, so that the token rate suits the machine, not the number of streams. Prompts are token ids, known by blocks.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import uvloop

from headrace.backends import embedded_model
from headrace.config import Gateway, SimulatedEngine
from headrace.gateway.group import GatewayGroup
from headrace.gateway.settings import GatewaySettings
from headrace_bench.cpu_time import cpu_ns, resident_bytes
from headrace_bench.fixed_gateway import FixedMembership
from headrace_bench.scale_crowd import MODEL, Crowd
from headrace_bench.scale_report import Index, Measured, Reading, render, value
from headrace_bench.scale_streams import Streams

HOME = Path(__file__).resolve().parent.parent
NODES = 4
PROMPT_TOKENS, SHARED_TOKENS, ANSWER_TOKENS = 384, 256, 24
ENGINE = SimulatedEngine(
    block_size=16,
    num_blocks=4096,
    max_model_len=8192,
    step_s=2.0,
    prefill_token_s=1e-5,
    decode_sequence_s=0.0,
)


def read(group: GatewayGroup, streams: Streams) -> Reading:
    pids = sorted(group.process_ids)
    return Reading(
        monotonic(),
        tuple(map(cpu_ns, pids)),
        tuple(map(resident_bytes, pids)),
        tuple(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        streams.open,
        streams.ended,
        streams.events,
    )


async def measure(args: argparse.Namespace) -> str:
    """The report."""
    import ray

    crowds = []
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    each = args.replicas // len(nodes)
    began_s = monotonic()
    starting = []
    for number, node in enumerate(nodes):
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        crowd = ray.remote(Crowd).options(num_cpus=0, scheduling_strategy=strategy).remote()
        crowds.append(crowd)
        starting.append(crowd.start.remote(number * each, each, ENGINE.model_dump(), node[:8]))
    replicas = [replica for found in await asyncio.gather(*starting) for replica in found]
    started_s = monotonic() - began_s
    group = GatewayGroup(
        GatewaySettings(
            0,
            Gateway(port=0, access_log=False, processes=args.gateways),
            dead_after_s=10.0,
            tokenizers={MODEL: (str(embedded_model.folder()), {})},
        ),
        FixedMembership(replicas, (MODEL,)),
        internal_token="scale",
    )
    _, port = group.bind()
    await group.start()
    streams = Streams(
        port,
        args.streams,
        prompt_tokens=PROMPT_TOKENS,
        shared_tokens=SHARED_TOKENS,
        answer_tokens=ANSWER_TOKENS,
    )
    try:
        readings = [read(group, streams)]
        streams.start()
        await streams.until_open(int(0.98 * args.streams), timeout_s=90)
        before = await group.measured()
        for _ in range(max(2, args.seconds // 15)):
            readings.append(read(group, streams))
            await asyncio.sleep(15)
        readings.append(read(group, streams))
        after = await group.measured()
        await streams.stop()
        silent_s = monotonic()
        caches: list[tuple[int, set[int]]] = await asyncio.gather(
            *(crowd.cached.remote() for crowd in crowds)
        )
        distinct = len(set().union(*(hashes for _, hashes in caches)))
        resident = sum(blocks for blocks, _ in caches)
        known: list[int] = []
        while monotonic() - silent_s < 20:
            known = [int(value(part, "headrace_index_blocks")) for part in await group.measured()]
            if all(count == resident for count in known):
                break
            await asyncio.sleep(0.1)
        converged_s = monotonic() - silent_s
        final = await group.measured()
    finally:
        await group.stop()
        await asyncio.gather(*(crowd.stop.remote() for crowd in crowds))
    command = shlex.join(["python", "-m", "headrace_bench.scale_test", *args.words])
    setting = (
        f"`{command}`, on {os.cpu_count()} cores that replicas, gateways and clients share. Prompts of {PROMPT_TOKENS} "
        f"tokens, {SHARED_TOKENS} of them one of 64 runs that are shared; answers of {ANSWER_TOKENS}."
    )
    index = Index(resident, distinct, tuple(known), converged_s)
    return render(
        Measured(setting, args.replicas, started_s, tuple(readings), before, after, final, index),
        streams.ttft_s,
        streams.errors,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m headrace_bench.scale_test", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--replicas", type=int, default=256)
    parser.add_argument("--streams", type=int, default=5000)
    parser.add_argument("--gateways", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=120, help="with all streams open (default 120)")
    parser.add_argument("--out", type=Path, default=HOME / "results" / "scale_test.md")
    args = parser.parse_args(words)
    args.words = words
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    nodes = _start_nodes()
    try:
        report = uvloop.run(measure(args))
        args.out.write_text(report)
        print(report, flush=True)
    finally:
        import ray

        ray.shutdown()
        for node in nodes:  # not `Cluster.shutdown`: it drains each node for half a minute
            node.kill_all_processes(check_alive=False, allow_graceful=False)
    return 0


def _start_nodes() -> list[Any]:
    """Four Ray nodes on this machine, connected."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
    for _ in range(NODES - 1):
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    cluster.wait_for_nodes()
    return list(cluster.list_all_nodes())


if __name__ == "__main__":
    raise SystemExit(main())
