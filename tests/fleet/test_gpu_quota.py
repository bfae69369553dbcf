"""Who gets GPUs, who has to give them back, and what the others are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from headrace.fleet.gpu_quota import allocate
from headrace.fleet.gpu_quota_spec import Allocation, Claim, GpuNode, Holding, Quota, Spot, Tenant

NODE = GpuNode("n1", "h100", 8)
A, B = Tenant("a", {"h100": Quota(4)}), Tenant("b", {"h100": Quota(4)})
NOW_S = 10_000.0


def claim(name: str, gpus: int = 1, **more: object) -> Claim:
    """Of the tenant that is the first letter of its name."""
    return Claim(name, name[0], f"m-{name}", "h100", gpus, **more)  # type: ignore[arg-type]


def held(name: str, gpus: int = 1, *, node: str = "n1", since_s: float = 0.0, **more: object) -> Claim:
    flags = {flag: bool(more.pop(flag, False)) for flag in ("is_idle", "is_draining")}
    return claim(name, gpus, holding=Holding((Spot(node, gpus),), since_s, **flags), **more)


def asked(
    claims: Sequence[Claim], tenants: Sequence[Tenant] = (A, B), nodes: Sequence[GpuNode] = (NODE,)
) -> Allocation:
    return allocate(tenants, nodes, claims, NOW_S)


def started(allocation: Allocation) -> list[str]:
    return [admission.claim_id for admission in allocation.admitted]


def drained(allocation: Allocation) -> list[str]:
    return [preemption.claim_id for preemption in allocation.preempted]


# --- what may start


def test_within_its_nominal_a_tenant_gets_gpus_and_beyond_it_borrows_what_is_free() -> None:
    allocation = asked([claim("a1", 4), claim("a2", 2)])
    assert [(one.claim_id, one.reason) for one in allocation.admitted] == [
        ("a1", "within the nominal 4 h100 of tenant 'a'"),
        ("a2", "it borrows"),
    ]
    assert allocation.uses[0] == ("a", "h100", 4, 6, 2, 0)


def test_a_borrowing_limit_holds_however_much_is_free() -> None:
    limited = Tenant("a", {"h100": Quota(4, borrowing_limit=1)})
    allocation = asked([claim("a1", 4), claim("a2", 2)], (limited, B))
    assert started(allocation) == ["a1"]
    assert allocation.pending["a2"] == "tenant 'a' holds 4 h100, 2 more exceed its 4 and 1 borrowed"


def test_what_a_tenant_does_not_lend_stays_free_for_it() -> None:
    miser = Tenant("b", {"h100": Quota(4, lending_limit=1)})
    allocation = asked([claim("a1", 4), claim("a2", 2), claim("a3", 1)], (A, miser))
    assert started(allocation) == ["a1", "a3"]
    assert "it would borrow 2 h100 of 1 left" in allocation.pending["a2"]


def test_gpus_that_are_nobodys_own_can_be_borrowed_by_anyone() -> None:
    allocation = asked([claim("a1", 8)], (Tenant("a", {"h100": Quota(0)}),))
    assert started(allocation) == ["a1"]


def test_who_borrows_least_for_its_weight_is_first() -> None:
    heavy = Tenant("a", {"h100": Quota(0)}, weight=3.0)
    light = Tenant("b", {"h100": Quota(0)})
    claims = [claim(f"{tenant}{number}") for tenant in "ab" for number in range(8)]
    allocation = asked(claims, (heavy, light))
    assert sum(name[0] == "a" for name in started(allocation)) == 6


def test_a_tenant_below_its_nominal_is_served_before_borrowers_however_late_it_asked() -> None:
    allocation = asked([claim("a1", 4), claim("a2", 4, asked_at_s=1.0), claim("b1", 4, asked_at_s=2.0)])
    assert started(allocation) == ["a1", "b1"]


def test_within_a_tenant_the_important_and_then_the_first_to_ask_come_first() -> None:
    claims = [claim("a1", 4, asked_at_s=1.0), claim("a2", 4, asked_at_s=2.0, priority=-1)]
    allocation = asked(claims, (A,), (GpuNode("n1", "h100", 4),))
    assert started(allocation) == ["a2"]


# --- gangs


def test_a_group_is_within_one_node_or_waits_whole() -> None:
    halves = (GpuNode("n1", "h100", 8), GpuNode("n2", "h100", 8))
    rich = Tenant("a", {"h100": Quota(16)})
    own = [held("a1", 6), held("a2", 6, node="n2")]
    allocation = asked([*own, claim("a3", 4)], (rich,), halves)
    assert started(allocation) == []
    assert "no room for 4 in one node: 4 are free, in pieces" in allocation.pending["a3"]


def test_groups_of_one_replica_may_be_on_several_nodes() -> None:
    nodes = (GpuNode("n1", "h100", 8), GpuNode("n2", "h100", 8))
    rich = Tenant("a", {"h100": Quota(16)})
    allocation = asked([claim("a1", 8, groups=2)], (rich,), nodes)
    assert sorted(allocation.admitted[0].spots) == [("n1", 8), ("n2", 8)]


def test_small_replicas_fill_the_fullest_node_so_that_a_large_one_still_fits() -> None:
    nodes = (GpuNode("n1", "h100", 8), GpuNode("n2", "h100", 8))
    rich = Tenant("a", {"h100": Quota(16)})
    allocation = asked([held("a1", 4), claim("a2", 2), claim("a3", 2), claim("a4", 8)], (rich,), nodes)
    assert {one.claim_id: one.spots[0].node_id for one in allocation.admitted} == {
        "a2": "n1", "a3": "n1", "a4": "n2",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (claim("a1", 9), "asks for 9 h100 of one node, the biggest node has 8"),
        (claim("a1", 4, groups=3), "3 groups of 4 h100, more than the nodes have"),
        (claim("c1", 1), "asks for 1 h100, tenant 'c' may have 0 at most"),
        (replace(claim("a1", 1), kind="l4"), "asks for 1 l4 of one node, the biggest node has 0"),
    ],
)
def test_what_can_never_run_says_why_and_displaces_nobody(one: Claim, said: str) -> None:
    allocation = asked([one, held("b1", 8)])
    assert said in allocation.pending[one.id]
    assert drained(allocation) == []


# --- who goes


def test_a_tenant_reaches_its_nominal_by_displacing_who_borrows() -> None:
    allocation = asked([held("a1", 4), held("a2", 4), claim("b1", 4)])
    assert drained(allocation) == ["a2"]
    assert allocation.preempted[0].reason == "for b1, within the nominal 4 h100 of tenant 'b'"
    assert allocation.pending["b1"] == "within the nominal 4 h100 of tenant 'b': it waits for a2 to drain"


def test_nobody_is_displaced_to_borrow() -> None:
    allocation = asked([held("a1", 4), held("a2", 4), claim("b1", 4), claim("b2", 4)], (A, B))
    assert drained(allocation) == ["a2"]
    assert allocation.pending["b2"].startswith("it would borrow 4 h100 of 0 left")


def test_a_tenant_for_which_others_drain_does_not_borrow_meanwhile() -> None:
    """Free GPUs are in pieces too small for what it has a right to, and would do for what it would borrow."""
    nodes = (GpuNode("n1", "h100", 6), GpuNode("n2", "h100", 6), GpuNode("n3", "h100", 1))
    tenants = (Tenant("a", {"h100": Quota(0)}), Tenant("b", {"h100": Quota(7)}))
    own = [held("b1", 3), held("a1", 4, node="n2")]
    wanted = [claim("b2", 4), claim("b3", 2, priority=1)]
    allocation = asked([*own, *wanted], tenants, nodes)
    assert (started(allocation), drained(allocation)) == ([], ["a1"])
    assert allocation.pending["b3"] == "it would borrow while others leave for b2 of its tenant"
    draining = replace(own[1], holding=replace(own[1].holding, is_draining=True))  # type: ignore[type-var]
    assert started(asked([own[0], draining, *wanted], tenants, nodes)) == []
    assert started(asked([own[0], *wanted], tenants, nodes)) == ["b2", "b3"], "then it may"


def test_while_victims_drain_nobody_else_goes_or_takes_their_place() -> None:
    claims = [held("a1", 4), held("a2", 4, is_draining=True), claim("b1", 4), claim("a3", 4)]
    allocation = asked(claims)
    assert (started(allocation), drained(allocation)) == ([], [])
    assert "those that drain to be gone" in allocation.pending["b1"]
    allocation = asked([one for one in claims if one.id != "a2"])
    assert started(allocation) == ["b1"]


def test_gpus_promised_to_a_large_replica_are_not_lent_in_the_meantime() -> None:
    claims = [held("a1", 4), held("a2", 2, is_draining=True), claim("b1", 4), claim("a3", 1)]
    allocation = asked(claims, (A, Tenant("b", {"h100": Quota(8)})))
    assert started(allocation) == []
    assert "0 are free and not promised" in allocation.pending["a3"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (held("a2", 2, is_idle=True), held("a3", 2, since_s=100.0)),
        (held("a2", 2, priority=5), held("a3", 2, since_s=100.0)),
        (held("a2", 2, since_s=100.0), held("a3", 2)),
        (held("a2", 2), held("a3", 2, since_s=NOW_S - 10.0)),
    ],
    ids=["idle", "unimportant", "newest", "not young"],
)
def test_of_two_borrowers_that_goes_first_which_is(first: Claim, second: Claim) -> None:
    allocation = asked([held("a1", 4, priority=-1), first, second, claim("b1", 2)])
    assert drained(allocation) == ["a2"]


def test_the_tenant_that_borrows_most_for_its_weight_gives_back_first() -> None:
    tenants = (Tenant("a", weight=4.0, quotas={"h100": Quota(0)}), Tenant("c", {"h100": Quota(0)}), B)
    allocation = asked([held("a1", 2), held("a2", 2), held("c1", 2), held("c2", 2), claim("b1", 2)], tenants)
    assert drained(allocation)[0][0] == "c"


def test_a_model_keeps_its_last_replica_when_another_can_go() -> None:
    twin = replace(held("a2", 2), model="shared")
    claims = [held("a1", 4, priority=-1), twin, replace(twin, id="a4"), held("a3", 2, since_s=500.0)]
    nominal = (Tenant("a", {"h100": Quota(4)}), Tenant("b", {"h100": Quota(2)}))
    allocation = asked([*claims, claim("b1", 2)], nominal, (GpuNode("n1", "h100", 10),))
    assert drained(allocation) == ["a2"], "not a3, although it is the newest"


def test_a_young_replica_runs_its_minimum_first_and_its_place_is_kept() -> None:
    young = held("a2", 4, since_s=NOW_S - 100.0)
    allocation = asked([held("a1", 4), young, claim("b1", 4)])
    assert drained(allocation) == []
    assert allocation.pending["b1"].endswith("it waits for a2 to drain, in 200 s, after the minimum run time")


def test_a_more_important_replica_displaces_its_own_tenants_only_where_others_need_theirs() -> None:
    low = [held("a1", 4, priority=5), held("b1", 4)]
    assert drained(asked([*low, claim("a2", 4)])) == ["a1"]
    assert drained(asked([low[0], claim("a2", 4)])) == [], "there is room for both"
    assert drained(asked([*low, claim("a2", 4, priority=5)])) == [], "no more important than what runs"


def test_no_more_go_than_are_in_the_way() -> None:
    nodes = (GpuNode("n1", "h100", 4), GpuNode("n2", "h100", 4))
    own = [held("a1", 1), held("a2", 3), held("a3", 4, node="n2", since_s=5.0)]
    allocation = asked([*own, claim("b1", 4)], (Tenant("a", {"h100": Quota(4)}), B), nodes)
    assert drained(allocation) == ["a3"]


# --- when nodes go


def test_replicas_of_a_node_that_is_gone_are_lost_and_start_elsewhere_when_they_may() -> None:
    allocation = asked([held("a1", 4, node="gone"), held("b1", 4)])
    assert allocation.lost == ("a1",)
    assert started(allocation) == ["a1"]
    allocation = asked([held("a1", 4, node="gone"), held("b1", 4), held("b2", 4)])
    assert allocation.lost == ("a1",)
    assert drained(allocation) == ["b2"]


def test_a_node_that_lost_gpus_sheds_borrowers_first_however_young() -> None:
    claims = [held("a1", 4), held("b1", 2), held("a2", 2, since_s=NOW_S)]
    allocation = asked(claims, (A, B), (GpuNode("n1", "h100", 7),))
    assert drained(allocation) == ["a2"]
    assert allocation.preempted[0].reason == "node n1 has 7 h100 left and more are held"


def test_who_holds_more_than_a_lowered_limit_gives_it_back() -> None:
    lowered = Tenant("a", {"h100": Quota(2, borrowing_limit=0)})
    allocation = asked([held("a1", 2), held("a2", 2, since_s=9.0)], (lowered, B))
    assert drained(allocation) == ["a2"]
    assert "more than it may borrow" in allocation.preempted[0].reason


def test_quotas_beyond_what_is_there_make_nobody_displace_anybody() -> None:
    few = (GpuNode("n1", "h100", 4),)
    allocation = asked([held("a1", 4), claim("b1", 4)], (A, B), few)
    assert (started(allocation), drained(allocation)) == ([], [])
    assert "within the nominal 4 h100 of tenant 'b', but no room" in allocation.pending["b1"]


def test_kinds_are_apart() -> None:
    both = Tenant("a", {"h100": Quota(1, 0), "l4": Quota(1, 0)})
    claims = [claim("a1"), replace(claim("a2"), kind="l4"), replace(claim("a3"), kind="l4")]
    allocation = asked(claims, (both,), (NODE, GpuNode("n2", "l4", 4)))
    assert started(allocation) == ["a1", "a2"]


@pytest.mark.parametrize("bad", [{"nominal": -1}, {"borrowing_limit": -1}, {"lending_limit": -2}])
def test_negative_quotas_are_rejected(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must not be negative, got -"):
        Quota(**bad)


def test_a_weight_that_is_none_is_rejected() -> None:
    with pytest.raises(ValueError, match="weight of tenant 'a' must be above 0"):
        Tenant("a", weight=0.0)
