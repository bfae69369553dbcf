"""Which nodes get a gateway."""

from typing import Any

from headrace.fleet.node_gateways import wanted


def node(number: int, *, alive: bool = True, **labels: str) -> dict[str, Any]:
    return {
        "NodeID": f"n{number}",
        "NodeManagerAddress": f"10.0.0.{number}",
        "Alive": alive,
        "Labels": labels,
    }


NODES = [node(1), node(2, tier="edge"), node(3, tier="edge", alive=False), node(4)]


def test_none_by_default() -> None:
    assert wanted("here", NODES, "n1") == {}


def test_every_living_node_but_that_of_the_serving_process() -> None:
    assert wanted("every", NODES, "n1") == {"n2": "10.0.0.2", "n4": "10.0.0.4"}
    assert wanted("every", NODES, None).keys() == {"n1", "n2", "n4"}


def test_a_chosen_few_by_their_labels() -> None:
    assert wanted({"tier": "edge"}, NODES, "n1") == {"n2": "10.0.0.2"}
    assert wanted({"tier": "edge"}, NODES, "n2") == {}
    assert wanted({"tier": "other"}, NODES, "n1") == {}
