"""Two tenants share GPUs in simulation: borrow, reclaim by draining, give back, and nobody's request is lost."""

from __future__ import annotations

from headrace_bench.scaling_quota import GPUS, PHASE_S, TENANTS, Sharing, render


def test_a_tenant_borrows_what_the_other_leaves_and_gives_it_back_when_it_is_wanted() -> None:
    sharing = Sharing()
    sharing.run()
    by_moment = {(one.at_s, one.tenant): one for one in sharing.moments}
    early = by_moment[480.0, "batch"]
    assert early.borrowed > 0, "batch uses what chat leaves"
    busy = by_moment[PHASE_S + 240.0, "chat"]
    assert busy.held - busy.draining >= min(busy.wanted, 5), "chat has its own back"
    assert by_moment[PHASE_S + 240.0, "batch"].held >= 3
    assert sharing.reclaimed and all("nominal" in why for _, _, why in sharing.reclaimed)
    late = by_moment[2 * PHASE_S + 480.0, "batch"]
    assert late.held <= 3
    for at_s in {one.at_s for one in sharing.moments}:
        assert sum(one.held for one in sharing.moments if one.at_s == at_s) <= GPUS
    for load in TENANTS:
        run = sharing.runs[load.name]
        assert len(run.answered) + run.refused == len(load.records(0))
    assert not sharing.runs["chat"].refused, "whoever stays within its own waits for nobody"
    assert "Reclaimed by draining" in render(sharing, "test")


def test_equal_seeds_share_equally() -> None:
    first, second = Sharing(seed=4), Sharing(seed=4)
    first.run()
    second.run()
    assert first.moments == second.moments
    assert first.runs == second.runs
