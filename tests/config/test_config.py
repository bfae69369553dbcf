"""The configuration: what it accepts, and what it says of what it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from headrace.config import Config, Gateway, json_schema, load, node, parse
from headrace.errors import ConfigError
from headrace_router.types import Role

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = {"name": "m", "backend": "simulated"}


def problems(mapping: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(mapping)
    return str(caught.value).splitlines()


def of_model(**keys: Any) -> list[str]:
    return problems({"models": [{"name": "m", **keys}]})


def test_a_model_name_is_all_that_must_be_said() -> None:
    config = parse({"models": [{"name": "m"}]})
    assert config.models[0].backend == "vllm"
    assert config.models[0].pools[0].role is Role.UNIFIED
    assert config.gateway.port == 8000


def test_the_tree_is_frozen() -> None:
    config = parse({"models": [MODEL]})
    with pytest.raises(ValidationError):
        config.gateway.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "path", sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "serve.yaml"}), ids=lambda path: path.name
)
def test_every_configuration_that_we_ship_is_good_and_names_the_schema(path: Path) -> None:
    assert load(path).models
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")


def test_the_configuration_within_that_of_ray_serve_is_good() -> None:
    (application,) = yaml.safe_load((CONFIGS / "serve.yaml").read_text())["applications"]
    assert parse(application["args"]).models


def test_the_committed_schema_is_current() -> None:
    assert json.loads((CONFIGS / "schema.json").read_text()) == json_schema(), "run `make schema`"


def test_an_unknown_key_is_rejected_with_the_nearest_known_one() -> None:
    assert problems({"models": [MODEL], "gateway": {"polcy": "random"}}) == [
        "unknown key 'polcy' in gateway; did you mean 'policy'?"
    ]


def test_an_unknown_key_like_none_is_rejected_with_the_known_ones() -> None:
    assert problems({"models": [MODEL], "wat": 1}) == [
        "unknown key 'wat' in the configuration; known are fleet, gateway, models, tenants"
    ]


def test_an_unknown_key_deep_in_a_list_is_found() -> None:
    assert of_model(pools=[{}, {"role": "decode", "replica": 2}])[0] == (
        "unknown key 'replica' in models[0].pools[1]; did you mean 'replicas'?"
    )


@pytest.mark.parametrize(
    ("gateway", "said"),
    [
        ({"port": 99999}, "gateway.port is 99999; it must be at most 65535"),
        ({"port": -1}, "gateway.port is -1; it must be at least 0"),
        ({"port": True}, "gateway.port is true; it must be a whole number"),
        ({"port": None}, "gateway.port is empty; it must be a whole number"),
        ({"timeouts": {"head_s": 0}}, "gateway.timeouts.head_s is 0; it must be more than 0"),
        (
            {"timeouts": {"head_s": float("nan")}},
            "gateway.timeouts.head_s is nan; it must be a finite number",
        ),
        (
            {"timeouts": {"idle_s": float("inf")}},
            "gateway.timeouts.idle_s is inf; it must be a finite number",
        ),
        ({"limits": 3}, "gateway.limits is 3; it must be a mapping of keys to values"),
        ({"host": 1.5}, "gateway.host is 1.5; it must be a string (put quotes around it)"),
        ({"access_log": "no"}, "gateway.access_log is 'no'; it must be true or false"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_key_and_bound(gateway: dict[str, Any], said: str) -> None:
    assert problems({"models": [MODEL], "gateway": gateway}) == [said]


def test_a_misspelt_choice_is_answered_with_the_choices_and_the_nearest() -> None:
    said = problems({"models": [MODEL], "gateway": {"policy": "least_load"}})
    assert said == [
        "gateway.policy is 'least_load'; it must be 'delay', 'round_robin', 'random', 'least_loaded', "
        "'power_of_two', 'session_affinity', 'prefix_affinity', 'sticky_until_saturated', 'kv_blend' or "
        "'block_cost' (did you mean 'least_loaded'?)"
    ]


@pytest.mark.parametrize(
    ("replicas", "demand"),
    [("many", "a whole number or 'per_core'"), (-1, "at least 0"), (5000, "at most 4096")],
)
def test_an_either_or_field_gives_one_problem(replicas: object, demand: str) -> None:
    said = of_model(pools=[{"replicas": replicas}])
    assert said == [f"models[0].pools[0].replicas is {replicas!r}; it must be {demand}"]


def test_what_is_missing_is_named() -> None:
    assert problems({}) == ["models is missing"]
    assert problems({"models": [{}]}) == ["models[0].name is missing"]


def test_an_empty_list_of_models_is_short() -> None:
    assert problems({"models": []}) == ["models is []; it must be a list of at least 1"]


def test_every_problem_is_told_at_once() -> None:
    said = problems({"models": [{"name": ""}], "gateway": {"port": -1}, "fleet": {"name": "My Fleet"}})
    assert [line.split()[0] for line in said] == ["fleet.name", "models[0].name", "gateway.port"]


def test_a_key_is_never_printed() -> None:
    assert of_model(backend="external", urls=["http://a"], api_key=12345) == [
        "models[0].api_key is (not shown); it must be a string (put quotes around it)"
    ]


def test_one_branch_can_be_checked_alone() -> None:
    assert node(Gateway, {"port": 0}, at="gateway").port == 0
    with pytest.raises(ConfigError, match=r"^gateway\.port is 70000; it must be at most 65535$"):
        node(Gateway, {"port": 70000}, at="gateway")


KEYS = sorted({*Config.model_fields, *Gateway.model_fields, "name", "backend", "pools", "urls", "replicas"})
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=4))
def test_whatever_is_given_is_accepted_or_a_config_error_of_one_line_each(mapping: dict[str, Any]) -> None:
    try:
        parse(mapping)
    except ConfigError as error:
        assert all(line.strip() for line in str(error).split("\n"))
