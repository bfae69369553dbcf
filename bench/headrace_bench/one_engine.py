"""The hit rate of one engine as large and as quick as the whole fleet: what no routing beats while prompts take time.

    python -m headrace_bench.one_engine

The pooled LRU cache of `ceilings` knows of a prompt the moment it arrives and gives its memory back at once. An engine
shares a prompt only once it is computed, and what runs holds memory that no prefix can use. So a single simulated
engine with the fleet's blocks, pace and batch, to which everything goes, says how much of the pooled rate is within
reach. Writes bench/results/one_engine.md for the knee cells of the policy study.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from headrace.config import SimulatedEngine
from headrace_bench.peers import REPOSITORY
from headrace_bench.policy_study import TRACES
from headrace_bench.scenario import Scenario
from headrace_bench.simulator import Simulation
from headrace_bench.study_cells import SHARING, Traces, cell_scenario, study_cells


def as_one(engine: SimulatedEngine, num_replicas: int) -> SimulatedEngine:
    """The fleet as one engine. `step_s` stays: a step is no shorter for being a larger one."""
    times = num_replicas
    return engine.model_copy(
        update={
            "num_blocks": engine.num_blocks * times,
            "max_batched_tokens": engine.max_batched_tokens * times,
            "max_running": engine.max_running * times,
            "prefill_token_s": engine.prefill_token_s / times,
            "decode_sequence_s": engine.decode_sequence_s / times,
            "context_token_s": engine.context_token_s / times,
        }
    )


def hit_rate(scenario: Scenario, policy: str, seed: int, *, pooled: bool) -> float:
    """Share of prompt tokens found cached: of the fleet, or of the one engine of its size."""
    engine = as_one(scenario.engine, scenario.num_replicas) if pooled else scenario.engine
    count = 1 if pooled else scenario.num_replicas
    served = Simulation(scenario.requests(seed), engine, count, policy=policy, seed=seed).run().served
    return sum(one.cached_tokens for one in served) / sum(one.prompt_tokens for one in served)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m headrace_bench.one_engine")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    traces = Traces(TRACES / "mooncake_conversation.jsonl.gz", TRACES / "AzureLLMInferenceTrace_conv.csv")
    rows = [
        "# The fleet's hit rate beside one engine of its size",
        "",
        f"- command: {' '.join(['python -m headrace_bench.one_engine', *words])}",
        "- Mooncake's conversations, whole, at the knee (utilisation 0.8), policy delay",
        "",
        "| cell | pooled LRU | one engine | delay | of pooled | of one engine |",
        "|---|---|---|---|---|---|",
    ]
    for cell in study_cells():
        if cell.workload != SHARING or cell.load != "knee":
            continue
        scenario = cell_scenario(cell, traces)
        lru = scenario.ceilings(scenario.requests(args.seed)).pooled
        one = hit_rate(scenario, "delay", args.seed, pooled=True)
        ours = hit_rate(scenario, "delay", args.seed, pooled=False)
        rows.append(
            f"| {cell.name} | {lru:.1%} | {one:.1%} | {ours:.1%} | {ours / lru:.1%} | {ours / one:.1%} |"
        )
        print(rows[-1], flush=True)
    out: Path = REPOSITORY / "bench" / "results" / "one_engine.md"
    out.write_text("\n".join(rows) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
