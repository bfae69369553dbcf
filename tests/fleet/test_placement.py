"""Cores are handed out once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import StartError
from headrace.fleet.placement import Node, Placement, place, split
from headrace.fleet.specs import ReplicaSpec
from headrace_router.types import ReplicaId


def spec(cpus: float = 1.0, name: str = "r") -> ReplicaSpec:
    return ReplicaSpec(ReplicaId(name), "m", "org/m", cpus=cpus)


TWO_CORES = (Node("n1", "10.0.0.1", (0, 1)),)


def fill(nodes: tuple[Node, ...], wanted: list[float]) -> list[Placement]:
    taken: list[Placement] = []
    for cpus in wanted:
        taken.append(place(spec(cpus), nodes, taken))
    return taken


def test_each_replica_gets_a_core_of_its_own() -> None:
    assert [placement.cores for placement in fill(TWO_CORES, [1, 1])] == [(0,), (1,)]


def test_a_full_node_says_what_it_waits_for() -> None:
    with pytest.raises(StartError, match=r"waits for 1 free CPU cores on one node: 0 are free .* 2 in all$"):
        fill(TWO_CORES, [1, 1, 1])


def test_a_freed_core_is_given_again() -> None:
    first, second = fill(TWO_CORES, [1, 1])
    assert place(spec(), TWO_CORES, [second]).cores == first.cores


def test_halves_share_a_core_before_they_take_another() -> None:
    assert [placement.cores for placement in fill(TWO_CORES, [0.5, 0.5, 1])] == [(0,), (0,), (1,)]


def test_replicas_that_ask_for_nothing_spread_over_the_cores() -> None:
    placements = fill(TWO_CORES, [1, 0, 0])
    assert placements[1].cores == (1,)


def test_the_emptier_node_is_taken_first() -> None:
    nodes = (Node("small", "10.0.0.1", (0,)), Node("big", "10.0.0.2", (0, 1, 2, 3)))
    assert [placement.node_id for placement in fill(nodes, [2, 1, 1])] == ["big", "big", "small"]


def test_the_cores_of_a_replica_are_split_among_its_workers() -> None:
    assert split((0, 1, 2, 3), 2) == ((0, 1), (2, 3))
    assert split((5,), 2) == ((5,), (5,))
    assert split((), 2) == ()


@given(
    sizes=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    wanted=st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0]), max_size=20),
)
def test_no_core_is_ever_given_more_than_once_in_all(sizes: list[int], wanted: list[float]) -> None:
    nodes = tuple(Node(f"n{i}", "", tuple(range(size))) for i, size in enumerate(sizes))
    taken: list[Placement] = []
    for cpus in wanted:
        try:
            taken.append(place(spec(cpus), nodes, taken))
        except StartError:
            continue
    use: dict[tuple[str, int], float] = {}
    for placement in taken:
        for core in placement.cores:
            use[placement.node_id, core] = use.get((placement.node_id, core), 0) + placement.share
    assert all(share <= 1.0 + 1e-9 for share in use.values())
