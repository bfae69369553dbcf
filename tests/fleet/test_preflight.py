"""Starts that would fail are told so in one line, before anything runs."""

from pathlib import Path

import pytest

from headrace.config import Config, parse
from headrace.errors import FatalStartError
from headrace.fleet.preflight import (
    GIB,
    check_devices,
    check_memory,
    check_sources,
    memory_bytes,
    with_absolute_sources,
)
from headrace.fleet.specs import expand


def config(source: str = "embedded", **pool: object) -> Config:
    return parse({"models": [{"name": "m", "source": source, "pools": [pool]}]})


def test_a_missing_model_folder_is_named_with_what_to_set() -> None:
    with pytest.raises(FatalStartError, match=r"no folder /no/such/model; set models\[\].source to a folder"):
        check_sources(config("/no/such/model"))


def test_a_folder_without_a_model_is_not_taken_for_one(tmp_path: Path) -> None:
    with pytest.raises(FatalStartError, match=r"holds no config\.json"):
        check_sources(config(str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    check_sources(config(str(tmp_path)))


def test_relative_folders_are_made_absolute_and_ids_are_left_alone() -> None:
    (model,) = with_absolute_sources(config("./weights")).models
    assert model.source == str(Path("weights").absolute())
    (model,) = with_absolute_sources(config("Qwen/Qwen3-0.6B")).models
    assert model.source == "Qwen/Qwen3-0.6B"


def test_too_little_memory_names_need_and_supply() -> None:
    specs = expand(config(replicas=2, engine={"kv_cache_memory_bytes": 10 * GIB}), 2, 0)
    with pytest.raises(
        FatalStartError, match=r"2 replicas need about 25\.\d GiB, 8\.0 GiB are available; lower"
    ):
        check_memory(specs, 8 * GIB)
    check_memory(specs, 64 * GIB)


def test_the_estimate_of_the_embedded_model_is_what_it_was_measured_to_take() -> None:
    (spec,) = expand(config(engine={"kv_cache_memory_bytes": 256 * 1024**2}), 2, 0)
    assert 2.5 * GIB < memory_bytes(spec) < 3.2 * GIB


def test_simulated_replicas_need_no_memory_worth_checking() -> None:
    simulated = parse({"models": [{"name": "s", "backend": "simulated", "pools": [{"replicas": 16}]}]})
    check_memory(expand(simulated, 2, 0), available_bytes=0)


def test_missing_gpus_and_cores_are_counted() -> None:
    wants_gpus = expand(config(tensor_parallel=4, device="cuda"), 2, 1)
    with pytest.raises(FatalStartError, match="the replicas need 4 GPUs, the cluster has 1"):
        check_devices(wants_gpus, 2, 1)
    check_devices(wants_gpus, 2, 1, has_gpu_quotas=True)  # they wait instead
    wants_cores = expand(config(replicas=3, device="cpu"), 2, 0)
    with pytest.raises(FatalStartError, match="the replicas need 3 cores, the cluster has 2"):
        check_devices(wants_cores, 2, 0)
