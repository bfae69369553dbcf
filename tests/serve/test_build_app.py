"""What `build_app` takes and what it refuses, without a cluster."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from headrace.config import parse
from headrace.errors import ConfigError
from headrace.serve import build_app

TREE: dict[str, Any] = {
    "models": [{"name": "sim", "backend": "simulated"}],
    "fleet": {"drain_timeout_s": 7.0},
}


def deployment(config: Any) -> Any:
    return build_app(config)._bound_deployment


def test_takes_a_path_a_mapping_a_config_and_serves_arguments(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("models: [{name: sim, backend: simulated}]\nfleet: {drain_timeout_s: 7.0}\n")
    for config in (file, str(file), TREE, parse(TREE), {"config": str(file)}, {"config": TREE}):
        assert deployment(config).init_args[0] == parse(TREE)


def test_the_ingress_takes_no_core_and_drains_as_long_as_the_fleet() -> None:
    ingress = deployment(TREE)
    assert ingress.name == "HeadraceIngress"
    assert ingress.ray_actor_options["num_cpus"] == 0
    assert ingress._deployment_config.graceful_shutdown_timeout_s > 7.0
    assert ingress.max_ongoing_requests >= 1000


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"config": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ({"config": TREE, "replicas": 2}, "unknown argument 'replicas'; build_app takes `config`"),
        ({}, "models"),
        ({"modles": []}, "models"),
        (3, "build_app takes a path, a mapping or a Config, not int"),
    ],
)
def test_refuses_with_one_line(config: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("(", "\\(").replace("{", "\\{")):
        build_app(config)
