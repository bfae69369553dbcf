"""How large a KV cache must be to serve one request, from the model's config.json. Pure but for reading that file.

Only for models whose layers all attend to the whole context, in the plain way; of others nothing is said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BYTES_PER_VALUE = 2
"""bfloat16 or float16. vLLM's `kv_cache_dtype: fp8` halves it: then nothing is said."""


_MOST_BLOCK_TOKENS = 128
"""vLLM takes whole blocks: of 128 tokens on CPU, of 16 on CUDA."""


def least_bytes(folder: Path, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Bytes of KV cache for one request of `max_model_len`, and those tokens; None where it cannot be told."""
    if arguments.get("kv_cache_dtype", "auto") not in ("auto", "bfloat16", "float16"):
        return None
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    each = bytes_per_token(config)
    num_tokens = arguments.get("max_model_len", config.get("max_position_embeddings"))
    if each is None or isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
        return None
    return each * -(-num_tokens // _MOST_BLOCK_TOKENS) * _MOST_BLOCK_TOKENS, num_tokens


def bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """Keys and values of all layers: 2 * layers * KV heads * head size * 2 bytes; None for other attention."""
    if any(config.get(key) for key in ("kv_lora_rank", "layer_types", "sliding_window", "layers_block_type")):
        return None
    try:
        num_heads = config["num_attention_heads"]
        head_size = config.get("head_dim") or config["hidden_size"] // num_heads
        num_kv_heads = config.get("num_key_value_heads") or num_heads
        return int(2 * config["num_hidden_layers"] * num_kv_heads * head_size * _BYTES_PER_VALUE)
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def complaint(given_bytes: int, needed_bytes: int, num_tokens: int) -> str:
    """One line for a cache that is too small."""
    return (
        f"kv_cache_memory_bytes is {given_bytes}; one request of max_model_len {num_tokens} needs {needed_bytes} "
        f"({needed_bytes / 2**20:.0f} MiB): set it to at least that, better to several times that, or lower "
        "max_model_len"
    )
