"""The comparison on real replicas, its pure parts: counting, planning, reporting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from headrace.config import SimulatedEngine
from headrace_bench.fixed_gateway import read_replicas, write_replicas
from headrace_bench.load_summary import Distribution
from headrace_bench.outcome import Outcome
from headrace_bench.prompt_text import Calibration
from headrace_bench.real_fleet import total
from headrace_bench.real_policies_report import Results, by_round, load_results, write
from headrace_bench.real_run import Asked, RealRun, Workload, asked_of, prefix_hits
from headrace_bench.simulator_check import compare, plan
from headrace_router.types import BootId, Endpoints, LoadReport, Replica, ReplicaId, Role

CALIBRATION = Calibration(1.0, 30.0, -16.0, 11.0, "tokenize")
WORKLOAD = Workload(users=2, system_prompts=2, duration_s=10.0, settle_s=2.0)
ENGINE = SimulatedEngine(
    block_size=32, num_blocks=200, max_running=8, step_s=0.03, prefill_token_s=0.001, decode_sequence_s=0.001
)


def asked(conversation: int, turn: int, sent_s: float, **fields: int) -> Asked:
    prompt_tokens = 390 + 147 * turn
    cached_tokens = fields.get("cached_tokens", 0)
    return Asked(sent_s, conversation, turn, prompt_tokens, 16, cached_tokens, 0.5, 1.0, sent_s >= 2.0)


def run_of(name: str, number: int, ttft_s: float, **fields: object) -> RealRun:
    taken_s = Distribution.of([ttft_s])
    assert taken_s is not None
    talked = tuple(asked(talk, turn, 5.0 * turn + talk) for turn in range(3) for talk in range(2))
    run = RealRun(
        name, "1", number, 4, 0, (), taken_s, taken_s, 4000, 1000, 0, None, None, (0.5, 0.7), talked
    )
    return replace(run, **fields)  # type: ignore[arg-type]


def results_of(*runs: RealRun) -> Results:
    return Results(
        "today",
        "a machine",
        "a command",
        "normal",
        WORKLOAD,
        {"block_size": 32},
        6400,
        CALIBRATION,
        list(runs),
    )


def test_counters_are_of_all_replicas_and_of_one_run() -> None:
    def report(name: str, prompt: int, cached: int) -> LoadReport:
        return LoadReport(ReplicaId(name), BootId("b"), 1, 0, 0, 0.0, 0, prompt, cached)

    before, after = (
        total([report("a", 10, 5), report("b", 20, 0)]),
        total([report("a", 110, 45), report("b", 20, 0)]),
    )
    done = after - before
    assert (done.prompt_tokens, done.cached_tokens, done.computed_tokens, done.hit_rate) == (100, 40, 60, 0.4)


def test_predicted_and_reported_hits_are_summed_over_what_prompts_were_known_by() -> None:
    scrape = (
        "headrace_index_blocks 3.0\n"
        'headrace_prefix_hit_tokens_total{basis="tokens",kind="predicted",model="m"} 96.0\n'
        'headrace_prefix_hit_tokens_total{basis="tokens",kind="actual",model="m"} 64.0\n'
        'headrace_prefix_hit_tokens_total{basis="text",kind="predicted",model="m"} 1e+03\n'
    )
    assert prefix_hits(scrape) == (1096, 64)
    assert prefix_hits("headrace_index_blocks 0.0\n") == (0, 0)
    assert prefix_hits("headrace_requests_total 1.0\n") is None, (
        "a policy that asks for no prefixes predicts nothing"
    )


def test_what_failed_is_not_simulated_and_settling_is_not_measured() -> None:
    good = Outcome(3, 1, True, 1.5, 0.0, 1.0, 0.4, prompt_tokens=500, cached_tokens=320, output_tokens=16)
    taken = asked_of([good, replace(good, sent_s=2.5), replace(good, error="timeout")], 2.0)
    assert [(one.conversation, one.cached_tokens, one.measured) for one in taken] == [
        (3, 320, False),
        (3, 320, True),
    ]


def test_conversations_are_the_same_in_every_run() -> None:
    talks = WORKLOAD.conversations(CALIBRATION)
    assert talks == WORKLOAD.conversations(CALIBRATION)
    assert {talk.system.key for talk in talks if talk.system} == {"system/0", "system/1"}


def test_simulated_prompts_share_what_the_real_ones_shared() -> None:
    first, other, later = plan([asked(0, 0, 0.0), asked(1, 0, 1.0), asked(0, 1, 2.0)], [0, 0], 259, 32)
    assert first.hashes[:8] == other.hashes[:8], "one system prompt: 259 tokens, 8 whole blocks"
    assert not set(first.hashes[8:]) & set(other.hashes)
    assert later.hashes[: len(first.hashes)] == first.hashes, (
        "a turn begins with the turn before and its answer"
    )
    different = plan([asked(0, 0, 0.0), asked(1, 0, 1.0)], [0, 1], 259, 32)
    assert not set(different[0].hashes) & set(different[1].hashes)
    assert len(first.prompt_hashes) == 390 // 32


def test_a_real_run_is_simulated_request_by_request() -> None:
    row = compare(run_of("headrace delay", 0, 0.5), WORKLOAD, CALIBRATION, ENGINE)
    assert (row.policy, row.requests) == ("delay", 4)
    assert row.real_ttft_s == pytest.approx(0.5)
    assert 0.03 < row.ttft_s < 0.5
    assert 0.3 < row.hit_rate < 0.9
    assert row == compare(run_of("headrace delay", 0, 0.5), WORKLOAD, CALIBRATION, ENGINE)


def test_the_report_compares_within_rounds_and_reads_back(tmp_path: Path) -> None:
    results = results_of(
        run_of("headrace delay", 0, 0.4, predicted_tokens=103, reported_tokens=100),
        run_of("headrace round_robin", 0, 0.8),
        run_of("sglang-router cache_aware", 0, 0.5, version="0.3.2"),
        run_of("headrace round_robin", 1, 1.0),
        run_of("headrace delay", 1, 0.5, predicted_tokens=99, reported_tokens=100),
    )
    assert by_round(results, "headrace delay", "headrace round_robin", lambda run: run.ttft_s.mean) == [
        2.0,
        2.0,
    ]
    assert results.contenders == ["headrace delay", "sglang-router cache_aware", "headrace round_robin"]
    write(results, tmp_path / "r")
    text = (tmp_path / "r.md").read_text()
    assert "round_robin over headrace delay: 2.00" in text
    assert "differ by at most 3.0%" in text
    assert "the best peer is sglang-router cache_aware: its mean TTFT over ours 1.25" in text
    assert load_results(tmp_path / "r.json") == results


def test_replicas_reach_the_gateway_whole(tmp_path: Path) -> None:
    replica = Replica(
        ReplicaId("r0"), BootId("b"), "m", Role.UNIFIED, Endpoints("http://127.0.0.1:1", "tcp://127.0.0.1:2"),
        block_size=32,
    )  # fmt: skip
    write_replicas([replica], tmp_path / "replicas.json")
    assert read_replicas(tmp_path / "replicas.json") == [replica]
