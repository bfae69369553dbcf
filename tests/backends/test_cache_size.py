"""What the smallest KV cache must hold."""

import json
from pathlib import Path

import pytest

from headrace.backends.cache_size import bytes_per_token, complaint, least_bytes

SMOLLM2 = {"num_hidden_layers": 30, "num_key_value_heads": 3, "num_attention_heads": 9, "head_dim": 64}


def test_keys_and_values_of_every_layer_are_counted() -> None:
    assert bytes_per_token(SMOLLM2) == 2 * 30 * 3 * 64 * 2
    without = {**SMOLLM2, "head_dim": None, "hidden_size": 576}
    assert bytes_per_token(without) == bytes_per_token(SMOLLM2)


@pytest.mark.parametrize(
    "other", [{"kv_lora_rank": 512}, {"layer_types": ["mamba"]}, {"sliding_window": 4096}]
)
def test_of_other_attention_nothing_is_said(other: dict[str, object]) -> None:
    assert bytes_per_token({**SMOLLM2, **other}) is None
    assert bytes_per_token({}) is None


def test_the_least_cache_holds_one_longest_request_in_whole_blocks(tmp_path: Path) -> None:
    assert least_bytes(tmp_path, {}) is None
    (tmp_path / "config.json").write_text(json.dumps({**SMOLLM2, "max_position_embeddings": 8192}))
    assert least_bytes(tmp_path, {"max_model_len": 2000}) == (23040 * 2048, 2000)
    assert least_bytes(tmp_path, {}) == (23040 * 8192, 8192)
    assert least_bytes(tmp_path, {"max_model_len": "auto"}) is None
    assert least_bytes(tmp_path, {"kv_cache_dtype": "fp8"}) is None


def test_the_complaint_names_what_was_given_what_is_needed_and_what_to_do() -> None:
    told = complaint(1000, 47185920, 2048)
    for word in ("kv_cache_memory_bytes is 1000", "max_model_len 2048 needs 47185920", "lower max_model_len"):
        assert word in told
