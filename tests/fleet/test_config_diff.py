"""What a changed configuration needs: everything that differs is named, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.config import Config, parse
from headrace.fleet.config_diff import Change, ConfigDiff, diff, made_as, pools
from headrace.fleet.pools import PoolKey
from headrace_router.types import Role


def config(*models: dict[str, Any], **keys: Any) -> Config:
    return parse({"models": list(models) or [vllm()], **keys})


def vllm(name: str = "m", **pool: Any) -> dict[str, Any]:
    return {"name": name, "source": "org/weights", "pools": [{"device": "cpu", **pool}]}


def between(old: Config, new: Config) -> ConfigDiff:
    return diff(old, new, num_gpus=0)


def keys(changes: tuple[Change, ...]) -> list[str]:
    return [change.key for change in changes]


def test_a_changed_count_replaces_nobody() -> None:
    told = between(config(vllm(replicas=2)), config(vllm(replicas=3)))
    assert told.resized == ((PoolKey("m", Role.UNIFIED), told.resized[0][1]),)
    assert str(told.resized[0][1][0]) == "models.m.pools.unified.replicas: 2 -> 3"
    assert told.rolls == frozenset()


@pytest.mark.parametrize(
    "changed",
    [
        {"engine": {"max_model_len": 4096}},
        {"tensor_parallel": 2, "cpus": 2.0},
        {"cpus": 2.0},
    ],
)
def test_what_replicas_are_made_of_replaces_them(changed: dict[str, Any]) -> None:
    told = between(config(vllm()), config(vllm(**changed)))
    assert [key for key, _ in told.replaced] == [PoolKey("m", Role.UNIFIED)]
    assert told.live == told.resized == ()


def test_only_the_pool_that_changed_is_replaced() -> None:
    def halves(**decode: Any) -> dict[str, Any]:
        pool = {"device": "cpu"}
        return {
            "name": "m",
            "source": "org/weights",
            "pools": [{"role": "prefill", **pool}, {"role": "decode", **pool, **decode}],
        }

    told = between(config(halves(), vllm("other")), config(halves(engine={"seed": 1}), vllm("other")))
    assert told.rolls == {PoolKey("m", Role.DECODE)}
    assert [str(change) for change in told.replaced[0][1]] == ["models.m.pools.decode.engine.seed: - -> 1"]


def test_a_source_is_of_all_pools_of_its_model() -> None:
    other = {**vllm(), "source": "org/others"}
    told = between(config(vllm(), vllm("n")), config(other, vllm("n")))
    assert told.rolls == {PoolKey("m", Role.UNIFIED)}
    assert keys(told.replaced[0][1]) == ["models.m.source"]


def test_gateway_settings_are_taken_over_live_but_not_its_address() -> None:
    told = between(config(), config(gateway={"retries": 5, "port": 9000, "timeouts": {"idle_s": 5}}))
    assert keys(told.live) == ["gateway.timeouts.idle_s", "gateway.retries"]
    assert keys(told.refused) == ["gateway.port"]


def test_a_fleet_cannot_be_renamed() -> None:
    assert keys(between(config(), config(fleet={"name": "other"})).refused) == ["fleet.name"]


def test_what_every_replica_is_made_with_replaces_all_and_is_named_there() -> None:
    told = between(config(vllm(), vllm("n")), config(vllm(), vllm("n"), fleet={"report_interval_s": 0.2}))
    assert told.rolls == {PoolKey("m", Role.UNIFIED), PoolKey("n", Role.UNIFIED)}
    assert all(keys(changes) == ["fleet.report_interval_s"] for _, changes in told.replaced)
    assert told.live == ()


def test_models_come_and_go() -> None:
    told = between(config(vllm(), vllm("old")), config(vllm(), vllm("new")))
    assert (told.added, told.removed) == (
        (PoolKey("new", Role.UNIFIED),),
        (PoolKey("old", Role.UNIFIED),),
    )
    assert told.replaced == ()


def test_order_means_nothing() -> None:
    assert between(config(vllm(), vllm("n")), config(vllm("n"), vllm())).is_empty


def test_a_name_that_begins_like_another_is_another() -> None:
    told = between(config(vllm("a"), vllm("a.pools")), config(vllm("a"), vllm("a.pools", replicas=2)))
    assert [key for key, _ in told.resized] == [PoolKey("a.pools", Role.UNIFIED)]


def test_secrets_are_not_printed() -> None:
    def external(api_key: str) -> dict[str, Any]:
        return {"name": "x", "backend": "external", "urls": ["http://a:1"], "api_key": api_key}

    told = between(config(vllm(), external("one")), config(vllm(), external("two")))
    assert [str(change) for change in told.external] == ["models.x.api_key: (secret) -> (secret)"]


def test_auto_devices_follow_the_cluster() -> None:
    auto, cuda = config(vllm(device="auto")), config(vllm(device="cuda"))
    assert diff(auto, cuda, num_gpus=1).rolls == frozenset()
    assert diff(auto, cuda, num_gpus=0).rolls == {PoolKey("m", Role.UNIFIED)}


some_pools = st.lists(
    st.builds(
        dict,
        role=st.just("unified"),
        device=st.just("cpu"),
        replicas=st.integers(1, 3),
        cpus=st.sampled_from([1.0, 2.0]),
        engine=st.dictionaries(st.sampled_from(["seed", "max_model_len"]), st.integers(1, 2)),
    ),
    min_size=1,
    max_size=1,
)
some_models = st.lists(
    st.one_of(
        st.builds(
            dict,
            name=st.sampled_from("abc"),
            source=st.sampled_from(["org/a", "org/b"]),
            pools=some_pools,
        ),
        st.builds(
            dict,
            name=st.sampled_from("abc"),
            backend=st.just("simulated"),
            simulated=st.builds(dict, step_s=st.sampled_from([0.1, 0.2])),
        ),
        st.builds(
            dict, name=st.sampled_from("abc"), backend=st.just("external"), urls=st.just(["http://a:1"])
        ),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda model: model["name"],
)
some_configs = st.builds(
    lambda models, name, interval, retries, port: parse(
        {
            "models": models,
            "fleet": {"name": name, "report_interval_s": interval},
            "gateway": {"retries": retries, "port": port},
        }
    ),
    some_models,
    st.sampled_from(["f", "g"]),
    st.sampled_from([0.1, 0.2]),
    st.integers(0, 1),
    st.integers(1, 2),
)


@given(some_configs)
def test_nothing_differs_from_itself(one: Config) -> None:
    assert between(one, one).is_empty


@given(some_configs, some_configs)
def test_carrying_out_the_difference_reaches_the_new_configuration(old: Config, new: Config) -> None:
    told = between(old, new)
    fleet = {key: made_as(old, key, 0) for key in pools(old)}
    for key in told.removed:
        del fleet[key]
    for key in (*told.added, *(key for key, _ in told.replaced)):
        fleet[key] = made_as(new, key, 0)
    assert fleet == {key: made_as(new, key, 0) for key in pools(new)}


@given(some_configs, some_configs)
def test_only_pools_that_are_made_otherwise_are_touched(old: Config, new: Config) -> None:
    told = between(old, new)
    for key in pools(old).keys() & pools(new).keys():
        assert (key in told.rolls) == (made_as(old, key, 0) != made_as(new, key, 0))
    assert not {key for key, _ in told.resized} & told.rolls


@given(some_configs, some_configs)
def test_every_key_that_differs_is_named_once_per_pool_that_it_concerns(old: Config, new: Config) -> None:
    told = between(old, new)
    of_pools = [change for _, changes in (*told.resized, *told.replaced) for change in changes]
    named = {change.path for change in (*told.refused, *told.live, *told.external, *of_pools)}
    came_or_went = {key.model for key in (*told.added, *told.removed)}
    for path in _differing(_flat(old), _flat(new)):
        assert path in named or path[1] in came_or_went or path[:2] in named, path
    for _, changes in told.replaced:
        assert changes, "a replacement says why"


def _flat(config: Config) -> dict[tuple[str, ...], object]:
    leaves: dict[tuple[str, ...], object] = {}

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                walk(part, (*path, name))
        else:
            leaves[path] = value

    tree = config.model_dump(mode="json")
    for model in tree.pop("models"):
        for pool in model.pop("pools"):
            walk(pool, ("models", model["name"], "pools", pool["role"]))
        walk(model, ("models", model["name"]))
    walk(tree, ())
    return leaves


def _differing(
    old: dict[tuple[str, ...], object], new: dict[tuple[str, ...], object]
) -> list[tuple[str, ...]]:
    return [path for path in old.keys() | new.keys() if old.get(path) != new.get(path)]
