"""Parts of a configuration that contradict each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.config import parse
from headrace.errors import ConfigError
from headrace.fleet.specs import expand


def problems(*models: dict[str, Any], **branches: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse({"models": [{"name": "m", **model} for model in models], **branches})
    return str(caught.value)


def test_model_names_are_unique() -> None:
    assert "models[1].name 'm' is used by 2 models" in problems({}, {})


def test_an_external_model_needs_urls() -> None:
    assert "models[0].urls is empty" in problems({"backend": "external"})


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("localhost:8000", "of the form http://HOST:PORT"),
        ("http://", "of the form http://HOST:PORT"),
        ("http://a:0", "of the form http://HOST:PORT"),
        ("http://a:99999", "Port out of range"),
        ("http://[::1", "of the form http://HOST:PORT"),
        ("http://a?x=1", "without user, query or fragment"),
        ("http://user:pass@a", "without user, query or fragment"),
        ("http://a/v1", "leave out /v1"),
    ],
)
def test_a_url_of_another_form_is_rejected(url: str, fault: str) -> None:
    assert fault in problems({"backend": "external", "urls": [url]})


def test_a_url_stands_once() -> None:
    assert "stands twice" in problems({"backend": "external", "urls": ["http://a:1", "http://a:1"]})


def test_good_urls_pass() -> None:
    urls = ["http://127.0.0.1:8001", "https://a.example", "http://[::1]:8000", "http://a/prefix"]
    assert len(parse({"models": [{"name": "m", "backend": "external", "urls": urls}]}).models[0].urls) == 4


@pytest.mark.parametrize(
    ("key", "value", "backend"),
    [
        ("urls", ["http://a"], "vllm"),
        ("api_key", "k", "vllm"),
        ("simulated", {}, "vllm"),
        ("source", "x", "simulated"),
    ],
)
def test_a_key_of_another_backend_is_rejected(key: str, value: object, backend: str) -> None:
    assert f"models[0].{key} means something only with backend" in problems({"backend": backend, key: value})


def test_an_external_model_has_no_pools() -> None:
    assert "models[0].pools" in problems({"backend": "external", "urls": ["http://a"], "pools": [{}]})


def test_a_model_has_one_pool_of_each_role() -> None:
    assert "it may have one of each role" in problems({"pools": [{}, {}]})


def test_prefill_and_decode_come_together() -> None:
    assert "a pool with role 'prefill' and none with 'decode'" in problems({"pools": [{"role": "prefill"}]})
    parse({"models": [{"name": "m", "pools": [{"role": "prefill"}, {"role": "decode"}]}]})


def test_parallel_workers_on_cpu_need_a_core_each() -> None:
    assert "models[0].pools[0].cpus is 1; on device 'cpu' it must be at least 2" in problems(
        {"pools": [{"device": "cpu", "tensor_parallel": 2}]}
    )
    parse({"models": [{"name": "m", "pools": [{"device": "cpu", "tensor_parallel": 2, "cpus": 2}]}]})


@pytest.mark.parametrize("name", ["served_model_name", "served-model-name"])
def test_an_engine_argument_that_has_a_key_of_its_own_is_sent_there(name: str) -> None:
    assert f"engine.{name} cannot be set here; set models[].name" in problems(
        {"pools": [{"engine": {name: "x"}}]}
    )


def test_a_simulated_model_takes_no_engine_arguments() -> None:
    said = problems({"backend": "simulated", "pools": [{"engine": {"max_model_len": 1}}]})
    assert "models[0].pools[0].engine holds vLLM's arguments" in said


def test_a_simulated_prompt_of_full_length_must_fit_the_cache() -> None:
    simulated = {"block_size": 16, "num_blocks": 4, "max_model_len": 65}
    said = problems({"backend": "simulated", "simulated": simulated})
    assert "models[0].simulated.max_model_len is 65; it must be at most 64" in said


def test_a_late_report_is_not_a_death() -> None:
    assert "fleet.dead_after_s is 0.1; it must be at least 0.2" in problems({}, fleet={"dead_after_s": 0.1})


def test_a_source_that_is_no_folder_and_no_id_is_answered_with_the_nearest_word(tmp_path: Path) -> None:
    told = problems({"source": "embeded"})
    assert "models[0].source is 'embeded'" in told
    assert "did you mean 'embedded'?" in told
    assert "org/name" in problems({"source": "what is this?"})
    for source in ("embedded", "Qwen/Qwen3-0.6B", "./weights", str(tmp_path)):
        parse({"models": [{"name": "m", "source": source}]})


def test_pipelines_on_cpu_are_refused_with_the_reason() -> None:
    told = problems({"pools": [{"device": "cpu", "pipeline_parallel": 2, "cpus": 2}]})
    assert "pipeline_parallel is 2; on device 'cpu' it must be 1" in told


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("max_num_seqs", -5, "a whole number of at least 1"),
        ("max_num_seqs", 1.5, "a whole number of at least 1"),
        ("block-size", 0, "a whole number of at least 1"),
        ("max_model_len", -2, "a whole number of at least -1"),
        ("gpu_memory_utilization", 3, "more than 0 and at most 1"),
    ],
)
def test_numbers_that_no_engine_takes_are_found_without_vllm(name: str, value: float, bound: str) -> None:
    told = problems({"pools": [{"engine": {name: value}}]})
    assert f"models[0].pools[0].engine.{name} is {value}; it must be {bound}" in told


@pytest.mark.parametrize(
    "host", ["http://x", "127.0.0.1:80", "127.0.0.256", "1.2.3", "a b", "", "-x", "a..b"]
)
def test_a_host_that_is_neither_address_nor_name_is_refused(host: str) -> None:
    assert "it must be an IP address or a host name" in problems({}, gateway={"host": host})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::1", "localhost", "node-1.example.org", "my_host"])
def test_addresses_and_names_are_hosts(host: str) -> None:
    parse({"models": [{"name": "m"}], "gateway": {"host": host}})


def test_bounds_of_whole_numbers_are_whole() -> None:
    assert "it must be at least 0" in problems({"pools": [{"replicas": -1}]})
    assert "0.0" not in problems({"pools": [{"replicas": -1}]})


def test_roles_need_a_connector_that_hands_over() -> None:
    pools = [{"role": "prefill"}, {"role": "decode"}]
    told = problems({"pools": pools, "kv_transfer": {"connector": "OffloadingConnector"}})
    assert "'OffloadingConnector', by which nothing is handed over" in told
    assert "NixlConnector" in told


def test_roles_bring_a_connector_along() -> None:
    pools = [{"role": "prefill"}, {"role": "decode"}]
    model = parse({"models": [{"name": "m", "pools": pools}]}).models[0]
    assert model.transfer is not None
    assert model.transfer.connector == "NixlConnector"
    assert parse({"models": [{"name": "m"}]}).models[0].transfer is None


def test_what_headrace_sets_of_a_transfer_cannot_be_set_twice() -> None:
    told = problems({"kv_transfer": {"options": {"kv_role": "kv_producer"}}})
    assert "kv_transfer.options.kv_role cannot be set here" in told


def test_a_simulated_replica_has_no_host_memory() -> None:
    told = problems({"backend": "simulated", "pools": [{"host_cache_gib": 1.0}]})
    assert "host_cache_gib means something only with backend 'vllm'" in told


def test_on_cpu_the_cache_is_host_memory_already() -> None:
    assert "raise engine.kv_cache_memory_bytes" in problems(
        {"pools": [{"device": "cpu", "host_cache_gib": 1.0}]}
    )


def autoscaled(**keys: Any) -> dict[str, Any]:
    return {"autoscale": {"max_replicas": 4, **keys}}


@pytest.mark.parametrize(
    ("pool", "fault"),
    [
        ({"replicas": 0}, "replicas is 0; without 'autoscale' it must be at least 1"),
        (autoscaled(min_replicas=5), "autoscale.min_replicas is 5; it must be at most max_replicas, 4"),
        ({"replicas": "per_core", **autoscaled()}, "replicas is 'per_core', which follows the machine"),
        ({"replicas": 9, **autoscaled()}, "must be within min_replicas and max_replicas, 1 to 4"),
        (
            autoscaled(schedule=[{"from": "08:00", "until": "18:00", "min_replicas": 9}]),
            "autoscale.schedule[0].min_replicas is 9; it must be at most max_replicas, 4",
        ),
        (
            autoscaled(schedule=[{"from": "08:00", "until": "08:00", "min_replicas": 2}]),
            "begins and ends at 08:00, which is no time at all",
        ),
        (
            autoscaled(schedule=[{"from": "8 o'clock", "until": "18:00", "min_replicas": 2}]),
            'schedule[0].from is "8 o\'clock"; it must be of the form',
        ),
        (autoscaled(time_zone="Mars/Base"), "it must be the name of a time zone"),
        (autoscaled(schedule=[{"form": "08:00"}]), "did you mean 'from'?"),
    ],
)
def test_autoscaling_that_cannot_be_is_rejected(pool: dict[str, Any], fault: str) -> None:
    assert fault in problems({"pools": [pool]})


def test_prefill_and_decode_go_to_zero_together() -> None:
    pools = [{"role": "prefill", **autoscaled(min_replicas=0)}, {"role": "decode", **autoscaled()}]
    assert "prefill and decode go to zero together" in problems({"pools": pools})


def test_an_external_model_is_not_scaled() -> None:
    external = {"backend": "external", "urls": ["http://a:1"], "pools": [autoscaled()]}
    assert "headrace starts no replicas of an external model" in problems(external)


def test_an_autoscaled_pool_begins_with_its_minimum_unless_told_otherwise() -> None:
    for pool, count in (
        (autoscaled(min_replicas=0), 0),
        (autoscaled(), 1),
        ({"replicas": 3, **autoscaled()}, 3),
    ):
        config = parse({"models": [{"name": "m", "backend": "simulated", "pools": [pool]}]})
        assert len(expand(config, 2, 0)) == count


def test_times_of_the_day_may_stand_without_quotes() -> None:
    """YAML reads 18:00 as a number to base 60."""
    hint = {"from": "08:00", "until": 18 * 60, "min_replicas": 2}
    pool = parse({"models": [{"name": "m", "pools": [autoscaled(schedule=[hint])]}]}).models[0].pools[0]
    assert pool.autoscale is not None
    assert (pool.autoscale.schedule[0].from_, pool.autoscale.schedule[0].until) == ("08:00", "18:00")
