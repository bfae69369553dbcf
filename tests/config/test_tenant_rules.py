"""Tenants, their GPUs, and whose GPUs a pool takes."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.config import Config, parse
from headrace.errors import ConfigError

A = {"name": "a", "gpus": {"H100": {"nominal": 4}}}
NODES = {"simulated_nodes": [{"accelerator": "H100", "gpus": 8}]}


def config(
    *pools: dict[str, Any], tenants: Any = (A,), fleet: dict[str, Any] | None = None, backend: str = "vllm"
) -> Config:
    source = {"source": "org/m"} if backend == "vllm" else {}
    models = [
        {"name": f"m{n}", "backend": backend, **source, "pools": [pool]}
        for n, pool in enumerate(pools or ({},))
    ]
    return parse({"models": models, "tenants": list(tenants), "fleet": fleet or {}})


def problems(*pools: dict[str, Any], **rest: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config(*pools, **rest)
    return str(caught.value)


def test_without_gpus_tenants_ask_nothing_of_pools() -> None:
    assert not config({}, tenants=[{"name": "a", "weight": 2.5}]).has_gpu_quotas


def test_where_gpus_are_shared_every_pool_that_may_take_some_names_its_tenant() -> None:
    assert "models[0].pools[0].tenant is missing; where tenants share GPUs" in problems({})
    assert config({"device": "cpu"}).has_gpu_quotas
    assert config({}, backend="simulated").has_gpu_quotas, "it takes none"
    assert "tenant is missing" in problems({}, backend="simulated", fleet=NODES)


def test_a_tenant_that_is_none_is_answered_with_the_nearest() -> None:
    assert "tenant is 'serch', which is no tenant; did you mean 'search'?" in problems(
        {"tenant": "serch"}, tenants=[{"name": "search", "gpus": A["gpus"]}]
    )
    assert "which is no tenant; tenants are none" in problems({"tenant": "x"}, tenants=[])


def test_tenant_names_are_unique() -> None:
    assert "tenants[0].name 'a' is used by 2 tenants" in problems({"tenant": "a"}, tenants=[A, A])


def test_the_only_kind_of_a_tenant_is_that_of_its_pools() -> None:
    both = {"name": "b", "gpus": {"H100": {"nominal": 1}, "L4": {"nominal": 1}}}
    one = config({"tenant": "a"}, {"tenant": "b", "accelerator": "L4"}, tenants=[A, both])
    assert [one.accelerator_of(model.pools[0]) for model in one.models] == ["H100", "L4"]
    assert "accelerator is missing; tenant 'b' has H100, L4: say which" in problems(
        {"tenant": "b"}, tenants=[both]
    )


def test_a_pool_whose_tenant_may_have_none_of_its_kind_could_never_run() -> None:
    assert "takes L4, of which tenant 'a' may have none" in problems({"tenant": "a", "accelerator": "L4"})
    assert "takes GPUs, of which tenant 'b' may have none" in problems(
        {"tenant": "b"}, tenants=[A, {"name": "b"}]
    )


def test_a_replica_without_gpus_has_no_kind_of_them() -> None:
    assert "its replicas take no GPUs" in problems({"device": "cpu", "accelerator": "H100"})
    assert "set fleet.simulated_nodes" in problems({"accelerator": "H100"}, backend="simulated")
    assert config({"accelerator": "H100"}, tenants=[]).models[0].pools[0].accelerator == "H100"


@pytest.mark.parametrize("key", ["simulated_nodes", "quota"])
def test_what_is_shared_needs_somebody_who_shares(key: str) -> None:
    fleet = {"simulated_nodes": NODES["simulated_nodes"], "quota": {"min_run_s": 1.0}}
    assert f"fleet.{key} means something only where tenants share GPUs" in problems(
        {"device": "cpu"}, tenants=[], fleet={key: fleet[key]}
    )


def test_a_real_replica_cannot_take_a_simulated_gpu() -> None:
    assert "would take GPUs of fleet.simulated_nodes, which are not there" in problems(
        {"tenant": "a"}, fleet=NODES
    )


@pytest.mark.parametrize(
    ("gpus", "told"),
    [
        ({"H100": {"nominl": 4}}, "did you mean 'nominal'?"),
        ({"H100": {"nominal": -1}}, "tenants[0].gpus.H100.nominal is -1; it must be at least 0"),
        ({"H100": 4}, "tenants[0].gpus.H100 is 4; it must be a mapping"),
        ({"H100": {}}, "tenants[0].gpus.H100.nominal is missing"),
    ],
)
def test_what_is_wrong_with_a_quota_is_told_with_its_place(gpus: dict[str, Any], told: str) -> None:
    assert told in problems({"tenant": "a"}, tenants=[{"name": "a", "gpus": gpus}])
