"""Settings become vLLM's command line. No vLLM is imported here."""

import json

import pytest

from headrace.backends.kv_connectors import handing_over
from headrace.backends.vllm_argument_check import faults
from headrace.backends.vllm_arguments import OWNED, EngineSettings, command_line, explain
from headrace.errors import FatalStartError


def words(**arguments: object) -> str:
    return " ".join(command_line(EngineSettings("m", "/models/m", arguments)))


def test_values_of_every_kind_are_spelled_as_vllm_wants_them() -> None:
    line = words(
        max_model_len=2048,
        enforce_eager=True,
        enable_chunked_prefill=False,
        compilation_config={"mode": "none"},
        allowed_origins=["a", "b"],
        seed=None,
    )
    assert "--max-model-len 2048" in line
    assert "--enforce-eager" in line
    assert "--no-enable-chunked-prefill" in line
    assert '--compilation-config {"mode": "none"}' in line
    assert "--allowed-origins a b" in line
    assert "--seed" not in line


def test_events_bind_the_nodes_own_address_on_a_free_port() -> None:
    assert '"endpoint": "tcp://*:0", "replay_endpoint": "tcp://*:0"' in words()


def test_without_prefix_caching_there_are_no_events_to_publish() -> None:
    assert "--kv-events-config" not in words(enable_prefix_caching=False)


@pytest.mark.parametrize("name", sorted(OWNED))
def test_what_headrace_sets_cannot_be_set_twice(name: str) -> None:
    with pytest.raises(FatalStartError, match=f"{name!r} cannot be set here; set "):
        words(**{name: 1})


def test_a_typo_is_answered_with_the_nearest_argument_in_python_names() -> None:
    complaint = explain("unrecognized arguments: --max-modl-len 5", ["max_model_len", "max_num_seqs"])
    assert complaint == "vLLM has no engine argument 'max_modl_len'; did you mean 'max_model_len'?"


def test_wrong_values_are_told_in_the_words_of_the_configuration() -> None:
    told = explain("argument --max-model-len: invalid human_readable_int_or_auto value: 'lots'", [])
    assert told == "max_model_len is 'lots'; it must be a whole number, or one such as 32k, or auto"
    told = explain("argument --dtype: invalid choice: 'foat16' (choose from 'auto', 'float16')", [])
    assert told == "dtype is 'foat16'; it must be one of 'auto', 'float16'"


@pytest.mark.vllm
def test_vllm_judges_every_argument_by_itself() -> None:
    right = {"max_model_len": "4k", "block_size": 16, "enforce_eager": True, "enable_prefix_caching": False}
    wrong = {
        "blok_size": 16,
        "max_model_len": "lots",
        "max_num_seqs": -5,
        "enforce_eager": "yes",
        "max_num_seq": 1,
    }
    fine, told = faults([right, wrong])
    assert fine == {}
    assert sorted(told) == sorted(wrong)
    assert "did you mean 'block_size'?" in told["blok_size"]
    assert "at least 1" in told["max_num_seqs"]


def transfer_words(**settings: object) -> tuple[list[str], dict[str, object]]:
    line = command_line(EngineSettings("m", "/models/m", **settings))  # type: ignore[arg-type]
    return line, json.loads(line[line.index("--kv-transfer-config") + 1])


def test_a_connector_is_spelled_with_what_every_replica_needs() -> None:
    line, config = transfer_words(kv_connector="NixlConnector", kv_options={"kv_buffer_device": "cpu"})
    assert config == {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_buffer_device": "cpu",
    }
    assert line[line.index("--worker-extension-cls") + 1] == "headrace.backends.kv_release.KvRelease"


def test_host_memory_alone_tells_what_it_holds() -> None:
    _, config = transfer_words(host_cache_gib=4.0)
    assert config["kv_connector"] == "OffloadingConnector"
    extra = {"cpu_bytes_to_use": 4 * 1024**3, "self_describing_kv_events": True}
    assert config["kv_connector_extra_config"] == extra
    assert "--kv-transfer-config" not in command_line(EngineSettings("m", "/models/m"))


def test_host_memory_beside_a_connector_makes_both_parts_of_one() -> None:
    _, config = transfer_words(kv_connector="NixlConnector", host_cache_gib=0.5)
    assert config["kv_connector"] == "MultiConnector"
    parts = config["kv_connector_extra_config"]["connectors"]  # type: ignore[index]
    assert [part["kv_connector"] for part in parts] == ["NixlConnector", "OffloadingConnector"]
    assert parts[1]["kv_connector_extra_config"]["cpu_bytes_to_use"] == 512 * 1024**2
    assert handing_over("MultiConnector", config) == "NixlConnector"
