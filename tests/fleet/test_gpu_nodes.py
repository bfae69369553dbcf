"""What Ray lists, as machines with GPUs. The form is that of `ray.nodes()` of Ray 2.60."""

from __future__ import annotations

from typing import Any

from headrace.fleet.gpu_nodes import gpu_nodes


def node(name: str, gpus: float, alive: bool = True, label: str = "", **resources: float) -> dict[str, Any]:
    labels = {"ray.io/node-id": name} | ({"ray.io/accelerator-type": label} if label else {})
    return {
        "NodeID": name,
        "Alive": alive,
        "Labels": labels,
        "Resources": {"CPU": 8.0, "GPU": gpus, **resources},
    }


def test_nodes_with_gpus_are_told_with_their_kind() -> None:
    listed = [
        node("a", 8.0, **{"accelerator_type:H100": 1.0}),
        node("b", 4.0, label="L4"),
        node("c", 2.0),
        node("d", 0.0, **{"accelerator_type:H100": 1.0}),
        node("e", 8.0, alive=False),
        {"NodeID": "f", "Alive": True, "Resources": {"CPU": 1.0}, "Labels": {}},
    ]
    assert gpu_nodes(listed) == (("a", "H100", 8), ("b", "L4", 4), ("c", "GPU", 2))


def test_a_dead_node_has_no_resources() -> None:
    assert gpu_nodes([{"NodeID": "x", "Alive": False, "Resources": {}, "Labels": {}}]) == ()
