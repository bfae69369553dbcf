"""The simulator: it replays exactly, loses nothing, and tells the truth where the truth can be worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from headrace.config import SimulatedEngine
from headrace.errors import CallerError
from headrace_bench.ceilings import ceilings, speed_at, work_s
from headrace_bench.disaggregation_arms import study_arms
from headrace_bench.disaggregation_study import main as study
from headrace_bench.handing_over import HandingOver
from headrace_bench.scenario import Scenario
from headrace_bench.simulated_workload import clock_step_s, plan_requests
from headrace_bench.simulator import SEND_S, Simulation
from headrace_bench.trace import TraceRecord
from headrace_router.disaggregation import ALWAYS_REMOTE, DISAGGREGATIONS, NEVER_REMOTE
from headrace_router.policies import POLICIES

ENGINE = SimulatedEngine(
    block_size=512,
    num_blocks=64,
    max_batched_tokens=2048,
    max_running=8,
    max_model_len=32_768,
    step_s=0.01,
    prefill_token_s=0.0001,
    decode_sequence_s=0.001,
    context_token_s=0.0,
)


def conversations(count: int, turns: int, gap_s: float = 0.5) -> tuple[TraceRecord, ...]:
    """Conversations side by side whose prompts grow by two blocks a turn; all share the first block."""
    records = []
    for turn in range(turns):
        for talk in range(count):
            blocks = (0, *(1000 * (talk + 1) + block for block in range(2 * turn + 2)))
            records.append(
                TraceRecord((turn * count + talk) * gap_s, 512 * len(blocks) - 100, 20 + talk, blocks)
            )
    return tuple(records)


def scenario(records: tuple[TraceRecord, ...], num_replicas: int = 3, **changes: float) -> Scenario:
    return Scenario(records, ENGINE.model_copy(update=changes), num_replicas, jitter_s=0.0)


def test_one_request_takes_what_the_timing_model_says() -> None:
    summary, run = scenario((TraceRecord(0.0, 3000, 5),), 1).simulate("delay", 0)
    [served] = run.served
    prefill_s = 2 * 0.01 + 3000 * 0.0001  # chunks of 2048 and 952 tokens
    assert served.ttft_s == pytest.approx(SEND_S + prefill_s)
    assert served.e2e_s == pytest.approx(SEND_S + prefill_s + 4 * 0.011)
    assert summary.itl_s is not None
    assert summary.itl_s.count == 4
    assert summary.itl_s.mean == pytest.approx(0.011)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_policy_serves_every_request_once(policy: str) -> None:
    records = conversations(6, 5)
    summary, run = scenario(records).simulate(policy, 1)
    assert [served.number for served in run.served] == list(range(len(records)))
    assert sum(use.requests for use in run.replicas) == len(records)
    assert summary.output_tokens_per_s * summary.window_s == pytest.approx(
        sum(record.output_tokens for record in records)
    )
    gaps = sum(times for _, times in run.gaps_us)
    assert gaps == sum(record.output_tokens - 1 for record in records)
    assert all(0 < served.ttft_s <= served.e2e_s for served in run.served)


def test_equal_seeds_give_equal_runs_and_other_seeds_other_ones() -> None:
    records = conversations(8, 4, gap_s=0.05)
    one = Scenario(records, ENGINE, 3, jitter_s=0.5)
    runs = [one.simulate(policy, seed) for policy in ("delay", "random") for seed in (0, 0, 1)]
    for base in (0, 3):
        assert runs[base] == runs[base + 1]
        assert runs[base] != runs[base + 2]


def test_a_leap_over_decodes_changes_no_time() -> None:
    """With a context constant, answers of a hundred tokens side by side, and arrivals in between."""
    records = tuple(TraceRecord(0.137 * number, 700 + 300 * number, 100, ()) for number in range(12))
    engine = ENGINE.model_copy(update={"context_token_s": 1e-6})
    # Blocks of one token leave nothing to leap over: every token needs a new block.
    narrow = engine.model_copy(update={"block_size": 1, "num_blocks": 64 * 512})
    leaping, stepping = (
        Simulation(plan_requests(records, one.block_size, 0, 0.0), one, 1, policy="round_robin", seed=0).run()
        for one in (engine, narrow)
    )
    for fast, slow in zip(leaping.served, stepping.served, strict=True):
        assert fast.ttft_s == pytest.approx(slow.ttft_s, abs=1e-9)
        assert fast.e2e_s == pytest.approx(slow.e2e_s, abs=1e-9)


def test_delay_keeps_conversations_where_their_past_is() -> None:
    records = conversations(5, 6, gap_s=1.0)
    delay, _ = scenario(records).simulate("delay", 0)
    spread, _ = scenario(records).simulate("random", 0)
    assert delay.hit_rate > 1.3 * spread.hit_rate
    assert delay.ttft_s is not None and spread.ttft_s is not None
    assert delay.ttft_s.mean < spread.ttft_s.mean
    assert delay.predicted_hit_rate == pytest.approx(delay.hit_rate, rel=0.05)
    assert delay.hit_rate <= scenario(records).ceilings(scenario(records).requests(0)).infinite + 1e-9


def test_a_hand_over_takes_a_prefill_a_transfer_and_a_decode() -> None:
    link = HandingOver("1P+1D", ALWAYS_REMOTE, bandwidth=1e9, kv_token_bytes=100_000, latency_s=0.01)
    one = replace(scenario((TraceRecord(0.0, 3000, 5),), 2), handing_over=link)
    summary, run = one.simulate("delay", 0)
    [served] = run.served
    prefill_s = 2 * 0.01 + 3000 * 0.0001  # chunks of 2048 and 952 tokens
    transfer_s = 0.01 + 3000 * 1e-4
    assert served.ttft_s == pytest.approx(2 * SEND_S + prefill_s + transfer_s + 0.0101)
    assert served.e2e_s == pytest.approx(served.ttft_s + 4 * 0.011)
    assert (served.moved_tokens, served.replica, summary.handed_over) == (3000, 1, 1.0)
    assert summary.itl_s is not None
    assert summary.itl_s.count == 4


@pytest.mark.parametrize("policy", ["delay", "round_robin", "kv_blend"])
@pytest.mark.parametrize("mode", DISAGGREGATIONS)
@pytest.mark.parametrize("pools", ["", "1P+2D", "2P+1D", "1P+1D+1U"])
def test_every_way_to_hand_over_serves_every_request_once(policy: str, mode: str, pools: str) -> None:
    records = conversations(8, 5, gap_s=0.1)
    one = replace(scenario(records), handing_over=HandingOver(pools, mode, threshold_tokens=1000))
    summary, run = one.simulate(policy, 1)
    assert [served.number for served in run.served] == list(range(len(records)))
    assert sum(times for _, times in run.gaps_us) == sum(record.output_tokens - 1 for record in records)
    assert all(0 < served.ttft_s <= served.e2e_s for served in run.served)
    if mode == NEVER_REMOTE:
        assert summary.handed_over == 0
    if mode == ALWAYS_REMOTE and "U" not in pools and pools:
        assert summary.handed_over == 1
    assert one.simulate(policy, 1) == (summary, run)


def test_replicas_that_wait_for_each_others_room_go_on() -> None:
    """Every prompt takes two thirds of a cache: held on one side, it may wait for ever on the other."""
    records = tuple(TraceRecord(0.01 * number, 20_000, 30, ()) for number in range(12))
    one = replace(scenario(records, 2), handing_over=HandingOver("", ALWAYS_REMOTE))
    _, run = one.simulate("round_robin", 0)
    assert len(run.served) == 12


@pytest.mark.parametrize(
    ("pools", "said"), [("4P4D", "cannot be read"), ("3P+1X", "cannot be read"), ("1P+1D", "has|have 2")]
)
def test_pools_that_cannot_be_are_refused(pools: str, said: str) -> None:
    with pytest.raises(CallerError, match=said):
        replace(scenario(conversations(2, 2), 3), handing_over=HandingOver(pools))
    with pytest.raises(CallerError, match="unknown disaggregation"):
        HandingOver("", "sometimes")


def test_the_disaggregation_study_writes_what_it_measured_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 300 * number, "input_length": 1000, "output_length": 9, "hash_ids": [0, number]}
        for number in range(30)
    ]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    command = ["--trace", str(trace), "--seeds", "1", "--speeds", "1,2", "--out", str(tmp_path / "study")]
    assert study([*command, "--arms", "flexible"]) in (0, 2)
    assert "8 runs" in capsys.readouterr().out
    assert study(command) in (0, 2)
    assert f"{2 * len(study_arms())} runs" in capsys.readouterr().out
    page = (tmp_path / "study.md").read_text()
    assert all(arm.name in page for arm in study_arms())
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert study([*command, "--arms", "nothing"]) == 1


def test_a_request_longer_than_the_context_is_rejected_not_lost() -> None:
    records = (TraceRecord(0.0, 1000, 5), TraceRecord(1.0, 40_000, 5), TraceRecord(2.0, 1000, 5))
    summary, run = scenario(records).simulate("delay", 0)
    assert (summary.requests, summary.rejected, len(run.served)) == (3, 1, 2)
    assert summary.goodput_share == pytest.approx(2 / 3)


def test_ceilings_of_a_trace_worked_out_by_hand() -> None:
    # a, b, a again: the infinite cache finds 2 of a's 3 blocks (the last token is always computed).
    records = (
        TraceRecord(0.0, 1536, 1, (1, 2, 3)),
        TraceRecord(1.0, 1536, 1, (4, 5, 6)),
        TraceRecord(2.0, 1536, 1, (1, 2, 3)),
    )
    requests = plan_requests(records, 512, 0, 0.0)
    wide = ceilings(requests, ENGINE, 1)
    assert wide.infinite == wide.pooled == pytest.approx(1024 / 4608)
    narrow = ceilings(requests, ENGINE.model_copy(update={"num_blocks": 3}), 1)
    assert (narrow.infinite, narrow.pooled) == (wide.infinite, 0.0)


def test_the_speed_of_a_utilisation_brings_that_much_work() -> None:
    asked = scenario(conversations(8, 5)).at_utilisation(0.6)
    requests = asked.requests(0)
    window_s = requests[-1].arrival_s - requests[0].arrival_s
    pooled = asked.ceilings(requests).pooled
    assert work_s(requests, ENGINE, pooled) / (3 * window_s) == pytest.approx(0.6)
    assert speed_at(requests, ENGINE, 3, 0.6) == pytest.approx(1.0)


def test_a_trace_with_a_coarse_clock_is_spread_over_its_steps() -> None:
    records = tuple(TraceRecord(3.0 * (number // 10), 600, 1, (number,)) for number in range(40))
    assert clock_step_s(records) == 3.0
    arrivals = [request.arrival_s for request in plan_requests(records, 512, 0)]
    assert all(before < after for before, after in pairwise(arrivals))
    assert arrivals[-1] < 12.0
    fine = tuple(TraceRecord(0.1 * number, 600, 1) for number in range(40))
    assert clock_step_s(fine) == 0.0


def test_smaller_engine_blocks_share_what_the_trace_shares() -> None:
    records = (TraceRecord(0.0, 1100, 30, (1, 2, 3)), TraceRecord(1.0, 1100, 1, (1, 2, 9)))
    one, other = plan_requests(records, 16, 0, 0.0)
    assert len(one.prompt_hashes) == 1100 // 16
    assert len(one.hashes) == 1130 // 16
    same = [a == b for a, b in zip(one.prompt_hashes, other.prompt_hashes, strict=True)]
    assert same == [True] * 64 + [False] * 4
    assert one.session == other.session or other.session == "1"


def test_blocks_that_do_not_tile_the_trace_are_refused() -> None:
    with pytest.raises(CallerError, match="do not tile"):
        plan_requests((TraceRecord(0.0, 600, 1, (1, 2)),), 100, 0)
    assert plan_requests((TraceRecord(0.0, 600, 1),), 100, 0)[0].prompt_hashes.size == 6


def test_a_prompt_that_begins_with_another_continues_its_session() -> None:
    first, other, second, third = plan_requests(
        (
            TraceRecord(0.0, 1100, 1, (0, 1, 2)),
            TraceRecord(1.0, 1100, 1, (0, 5, 6)),
            TraceRecord(2.0, 2100, 1, (0, 1, 7, 8, 9)),
            TraceRecord(3.0, 2700, 1, (0, 1, 7, 8, 10, 11)),
        ),
        512, 0, 0.0,
    )  # fmt: skip
    assert first.session == second.session == third.session
    assert other.session != first.session
