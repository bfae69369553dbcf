"""Cores are handed out once."""

import contextlib
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import StartError
from headrace.fleet.placement import ACCELERATOR_LABEL, Node, NoRoom, Placed, Placement, place, split
from headrace.fleet.specs import Device, ReplicaSpec
from headrace_router.types import ReplicaId, Role


def spec(cpus: float = 1.0, name: str = "r") -> ReplicaSpec:
    return ReplicaSpec(ReplicaId(name), "m", "org/m", cpus=cpus)


TWO_CORES = (Node("n1", "10.0.0.1", (0, 1)),)


def fill(nodes: tuple[Node, ...], wanted: list[float]) -> list[Placement]:
    return [placement for _, placement in fill_with(nodes, [spec(cpus) for cpus in wanted])]


def fill_with(nodes: tuple[Node, ...], specs: list[ReplicaSpec]) -> list[Placed]:
    taken: list[Placed] = []
    for one in specs:
        taken.append((one, place(one, nodes, taken)))
    return taken


def hosts(nodes: tuple[Node, ...], specs: list[ReplicaSpec]) -> list[str]:
    return [placement.node_id for _, placement in fill_with(nodes, specs)]


def test_each_replica_gets_a_core_of_its_own() -> None:
    assert [placement.cores for placement in fill(TWO_CORES, [1, 1])] == [(0,), (1,)]


def test_a_full_node_says_what_it_waits_for() -> None:
    with pytest.raises(StartError, match=r"waits for 1 free CPU cores on one node: 0 are free .* 2 in all$"):
        fill(TWO_CORES, [1, 1, 1])


def test_a_freed_core_is_given_again() -> None:
    first, second = fill(TWO_CORES, [1, 1])
    assert place(spec(), TWO_CORES, [(spec(), second)]).cores == first.cores


def test_halves_share_a_core_before_they_take_another() -> None:
    assert [placement.cores for placement in fill(TWO_CORES, [0.5, 0.5, 1])] == [(0,), (0,), (1,)]


def test_replicas_that_ask_for_nothing_spread_over_the_cores() -> None:
    placements = fill(TWO_CORES, [1, 0, 0])
    assert placements[1].cores == (1,)


SMALL_AND_BIG = (Node("small", "10.0.0.1", (0,)), Node("big", "10.0.0.2", (0, 1, 2, 3)))
THREE = tuple(Node(f"n{number}", f"10.0.0.{number}", (0, 1), gpus=4) for number in range(3))


def test_a_pool_spreads_over_the_nodes_and_then_goes_where_most_is_free() -> None:
    assert hosts(SMALL_AND_BIG, [spec()] * 5) == ["big", "small", "big", "big", "big"]


@pytest.mark.parametrize("device", list(Device))
def test_replicas_of_any_device_spread(device: Device) -> None:
    assert sorted(hosts(THREE, [replace(spec(), device=device)] * 6)) == ["n0", "n0", "n1", "n1", "n2", "n2"]


def test_prefill_goes_where_decode_is_but_spreads_first() -> None:
    decode = replace(spec(), role=Role.DECODE, device=Device.NONE)
    other = replace(decode, model="other")
    prefill = replace(decode, role=Role.PREFILL)
    found = hosts(THREE, [other, decode, prefill, prefill])
    assert found[2] == found[1]
    assert found[3] != found[2]


def test_a_group_of_gpus_is_never_divided() -> None:
    wide = replace(spec(), device=Device.CUDA, tensor_parallel=3)
    assert hosts(THREE, [wide] * 3) == ["n0", "n1", "n2"]
    with pytest.raises(NoRoom, match="waits for 3 free GPUs on one node; the biggest node has 4 in all"):
        place(wide, THREE, fill_with(THREE, [wide] * 3))


def test_only_nodes_with_the_labels_count() -> None:
    fast = Node("fast", "10.0.0.9", (0,), {"disk": "fast", ACCELERATOR_LABEL: "H100"}, gpus=1)
    on_fast = replace(spec(), node_labels={"disk": "fast"})
    assert hosts((*THREE, fast), [on_fast]) == ["fast"]
    assert hosts((*THREE, fast), [replace(spec(), device=Device.CUDA, accelerator="H100")]) == ["fast"]
    with pytest.raises(NoRoom, match="waits for a node with label disk=fast; no node of the cluster has"):
        place(on_fast, THREE, [])


@given(st.integers(1, 6), st.integers(0, 20))
def test_what_needs_no_room_is_spread_evenly(num_nodes: int, count: int) -> None:
    nodes = tuple(Node(f"n{i}", f"10.0.0.{i}") for i in range(num_nodes))
    found = Counter(hosts(nodes, [replace(spec(), device=Device.NONE)] * count))
    counts = [found[node.id] for node in nodes]
    assert max(counts) - min(counts) <= 1


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
    taken: list[Placed] = []
    for cpus in wanted:
        with contextlib.suppress(NoRoom):
            taken.append((spec(cpus), place(spec(cpus), nodes, taken)))
    use: dict[tuple[str, int], float] = {}
    for _, placement in taken:
        for core in placement.cores:
            use[placement.node_id, core] = use.get((placement.node_id, core), 0) + placement.share
    assert all(share <= 1.0 + 1e-9 for share in use.values())
