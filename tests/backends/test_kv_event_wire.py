"""Our KV events are vLLM's, byte for byte."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from headrace.backends import kv_event_wire as ours
from headrace.backends.kv_event_wire import decode_batch, encode_batch

BATCHES = {
    "stored": [
        ("BlockStored", {
            "block_hashes": [1, 2**64 - 1], "parent_block_hash": None, "token_ids": [5, 6, 7, 8], "block_size": 2,
            "lora_id": None, "medium": "GPU", "lora_name": None, "extra_keys": [["salt"], None], "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }),
        ("BlockStored", {
            "block_hashes": [3], "parent_block_hash": 2, "token_ids": [9], "block_size": 1, "lora_id": 4,
            "medium": "CPU", "lora_name": "l", "kv_cache_spec_sliding_window": 128, "locality": "LOCAL",
            "ownership": "o", "session_id": "s",
        }),
    ],
    "removed": [("BlockRemoved", {"block_hashes": [1], "medium": "GPU", "group_idx": 0}),
                ("BlockRemoved", {"block_hashes": [2], "medium": None, "locality": "REMOTE", "ownership": "o"})],
    "cleared": [("AllBlocksCleared", {})],
}  # fmt: skip

# vLLM is imported in a process of its own: it brings torch, seconds of start-up and global state.
ENCODE_WITH_VLLM = """
import json, sys
import msgspec
from vllm.distributed import kv_events
encoded = {}
for name, events in json.load(sys.stdin).items():
    made = [getattr(kv_events, kind)(**fields) for kind, fields in events]
    encoded[name] = msgspec.msgpack.encode(kv_events.KVEventBatch(1.5, made, data_parallel_rank=0)).hex()
print("encoded:" + json.dumps(encoded))
"""


def make(name: str) -> ours.KVEventBatch:
    events = [getattr(ours, kind)(**fields) for kind, fields in BATCHES[name]]
    return ours.KVEventBatch(1.5, events, data_parallel_rank=0)


@pytest.mark.parametrize("name", BATCHES)
def test_batches_survive_the_wire(name: str) -> None:
    decoded = decode_batch(encode_batch(make(name)))
    assert [type(event).__name__ for event in decoded.events] == [kind for kind, _ in BATCHES[name]]
    assert encode_batch(decoded) == encode_batch(make(name))


def test_foreign_bytes_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="not a KV event batch"):
        decode_batch(b"\x01\x02")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_bytes_equal_those_of_vllm() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENCODE_WITH_VLLM],
        input=json.dumps(BATCHES), capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    encoded = json.loads(done.stdout.split("encoded:")[1])
    assert encoded == {name: encode_batch(make(name)).hex() for name in BATCHES}
