"""What replicas take of a cluster, and who is told when that is not there."""

from __future__ import annotations

from headrace.fleet.room import Bundle, NodeRequest, bundles, shortage
from headrace.fleet.specs import Device, ReplicaSpec
from headrace_router.types import ReplicaId


def spec(device: Device = Device.CPU, **changes: object) -> ReplicaSpec:
    return ReplicaSpec(ReplicaId("r"), "m", "org/m", device=device, **changes)  # type: ignore[arg-type]


def test_a_tensor_parallel_group_is_one_bundle_and_a_pipeline_one_for_each_worker() -> None:
    assert bundles(spec()) == [{"CPU": 1.0}]
    assert bundles(spec(Device.CUDA, tensor_parallel=4)) == [{"GPU": 4, "CPU": 1.0}]
    pipeline = bundles(spec(Device.CUDA, tensor_parallel=2, pipeline_parallel=2, cpus=3))
    assert pipeline == [{"GPU": 1, "CPU": 3}, *[{"GPU": 1, "CPU": 1.0}] * 3]
    assert bundles(spec(Device.NONE, cpus=0)) == []


def test_a_kind_of_gpu_is_asked_for_unless_its_node_has_been_chosen() -> None:
    h100 = spec(Device.CUDA, accelerator="H100")
    assert bundles(h100) == [{"GPU": 1, "accelerator_type:H100": 0.001, "CPU": 1.0}]
    assert bundles(h100, is_placed=True) == [{"GPU": 1, "CPU": 1.0}]


def test_a_shortage_names_what_is_asked_for_beside_what_there_is() -> None:
    said = shortage(spec(Device.CUDA, tensor_parallel=4), {"GPU": 8, "CPU": 32}, {"GPU": 2, "CPU": 30})
    assert said == (
        "waits for 4 GPUs and 1 CPUs on one node: 2 of the cluster's 8 GPUs and 30 of 32 CPUs are free"
    )


async def test_the_autoscaler_is_told_of_the_whole_fleet_while_one_waits_and_told_so_once() -> None:
    """Its request says what must fit in all, what runs included."""
    told: list[list[Bundle]] = []
    request = NodeRequest(told.append)
    fleet = [spec(), spec()]
    await request.follow(fleet, ())
    assert told == []
    await request.follow(fleet, ["r"])
    await request.follow(fleet, ["r"])
    assert told == [[{"CPU": 1.0}] * 2]
    await request.follow(fleet, ())
    assert told[-1] == []


async def test_a_cluster_that_cannot_be_told_changes_nothing() -> None:
    def broken(_: list[Bundle]) -> None:
        raise RuntimeError("no autoscaler")

    await NodeRequest(broken).follow([spec()], ["r"])
