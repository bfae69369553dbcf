"""Settings become vLLM's command line. No vLLM is imported here."""

import pytest

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
        kv_transfer_config={"kv_role": "kv_both"},
        allowed_origins=["a", "b"],
        seed=None,
    )
    assert "--max-model-len 2048" in line
    assert "--enforce-eager" in line
    assert "--no-enable-chunked-prefill" in line
    assert '--kv-transfer-config {"kv_role": "kv_both"}' in line
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
