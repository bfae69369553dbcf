"""The kernels' micro-benchmark compares like with like."""

from __future__ import annotations

import pytest

from headrace_bench.kernel_bench import agree, churn, growth
from headrace_bench.kernel_subject import (
    PROMPT_BLOCKS,
    SHARED_BLOCKS,
    Headrace,
    HeadraceClosed,
    Session,
    Workload,
)


def test_a_workload_is_a_function_of_its_seed() -> None:
    one, same, other = (Workload(10_000, 16, seed) for seed in (1, 1, 2))
    assert (one.prompt(3) == same.prompt(3)).all()
    assert list(one.placements()) == list(same.placements())
    assert (one.prompt(3) != other.prompt(3)).all()


def test_prompts_share_their_system_prompt_and_nothing_else() -> None:
    workload = Workload(30_000, 16, 5)
    first, second = workload.prompt(0), workload.prompt(16)
    assert (first[:SHARED_BLOCKS] == second[:SHARED_BLOCKS]).all()
    seen = {block for index in range(workload.num_prompts) for block in workload.prompt(index).tolist()}
    own = workload.num_prompts * (PROMPT_BLOCKS - SHARED_BLOCKS)
    assert len(seen) == own + 16 * SHARED_BLOCKS


def test_scan_and_bisection_find_the_same_prefixes() -> None:
    sessions = [Session(Headrace()), Session(HeadraceClosed())]
    for session in sessions:
        session.build(num_blocks=30_000, num_replicas=100, seed=5)
        session.remove(num_prompts=3)
    answers = [[session.matches(index) for index in (0, 1, 40)] for session in sessions]
    assert answers[0] == answers[1]
    assert all(PROMPT_BLOCKS in answer.values() for answer in answers[0])


def test_subjects_that_disagree_stop_the_benchmark() -> None:
    agree({"headrace": [{"1": 5}], "dynamo": [{"1": 5}]})
    with pytest.raises(RuntimeError, match="disagree"):
        agree({"headrace": [{"1": 5}], "dynamo": [{"1": 4}]})


def test_growth_and_churn_end_with_a_sound_table() -> None:
    assert growth(20_000, 100)["batch"] == 100
    assert churn(20_000, 60_000)["resident_blocks"] == 20_000
