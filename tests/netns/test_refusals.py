"""What cannot be started on a cluster is refused in one line that says what to do, and leaves nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from netns_fleet import NAME, Fleet
from served import serving

pytestmark = [pytest.mark.ray, pytest.mark.netns]

SIMULATED = {"name": "sim", "backend": "simulated"}


def refusal(fleet: Fleet, folder: Path, config: dict[str, Any], address: str | None = None) -> str:
    """The last line of a `headrace serve` that fails on a host which is not the head's."""
    file = folder / "config.yaml"
    file.write_text(json.dumps(config))
    cluster, host = fleet.cluster, fleet.hosts[1]
    before = cluster.observer.actors(), host.running("ray::")
    where = {"inside": host.inside, "environment": cluster.environment}
    arguments = ["--address", address or cluster.address, "--port", "0"]
    with serving(file, *arguments, **where) as served:
        code = served.process.wait(120)
        served.end()
        assert code == 1, served.lines
        assert not any("Traceback" in line for line in served.lines), served.lines
        assert served.left_behind() == []
        assert cluster.observer.actors() == before[0]
        return served.lines[-1]


def test_an_address_without_a_cluster(fleet: Fleet, tmp_path: Path) -> None:
    nowhere = f"{fleet.hosts[2].address}:6399"
    reason = refusal(fleet, tmp_path, {"models": [SIMULATED]}, nowhere)
    assert nowhere in reason and "is it running" in reason


def test_too_few_cores(fleet: Fleet, tmp_path: Path) -> None:
    model = {"name": "smollm2", "pools": [{"replicas": 7, "device": "cpu"}]}
    reason = refusal(fleet, tmp_path, {"fleet": {"name": "other"}, "models": [model]})
    assert "need 7 cores, the cluster has 6" in reason and "lower pools[].replicas" in reason


def test_too_few_gpus(fleet: Fleet, tmp_path: Path) -> None:
    model = {**SIMULATED, "pools": [{"device": "cuda"}]}
    reason = refusal(fleet, tmp_path, {"fleet": {"name": "other"}, "models": [model]})
    assert "need 1 GPUs, the cluster has 0" in reason and "set pools[].device to cpu" in reason


def test_a_fleet_of_that_name_runs(fleet: Fleet, tmp_path: Path) -> None:
    reason = refusal(fleet, tmp_path, {"fleet": {"name": NAME}, "models": [SIMULATED]})
    assert f"fleet '{NAME}' runs on this cluster already" in reason and "set another fleet.name" in reason
    assert fleet.is_whole(*fleet.hosts)
