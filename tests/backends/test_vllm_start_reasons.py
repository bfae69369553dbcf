"""vLLM's complaints, with what to do about them."""

import pytest

from headrace.backends.vllm_arguments import EngineSettings
from headrace.backends.vllm_start_reasons import explained, start_reasons
from headrace.errors import FatalStartError, StartError


def settings(**arguments: object) -> EngineSettings:
    return EngineSettings("m", "org/model", arguments)


def test_a_cache_too_small_names_the_key_that_sets_it() -> None:
    text = "ValueError: To serve (2048), 0.04 GiB KV cache is needed. Try increasing `gpu_memory_utilization` when"
    assert "Raise pools[].engine.kv_cache_memory_bytes" in explained(
        text, settings(kv_cache_memory_bytes=1000)
    )
    assert "Try increasing" not in explained(text, settings())


def test_a_model_that_cannot_be_fetched_has_a_next_step() -> None:
    told = explained("We couldn't connect to 'https://huggingface.co' to load the files.", settings())
    assert "offline" in told
    assert "hf download org/model" in told
    assert "HF_TOKEN" in explained("org/model is not a valid model identifier listed on x", settings())


def test_what_vllm_refuses_is_final_and_what_it_suffers_is_not() -> None:
    with pytest.raises(FatalStartError), start_reasons(settings()):
        raise ValueError("no")
    with pytest.raises(StartError) as caught, start_reasons(settings()):
        raise RuntimeError("engine died")
    assert not isinstance(caught.value, FatalStartError)
