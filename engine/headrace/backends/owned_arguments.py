"""What can be said of a vLLM configuration without vLLM: the gateway may import this file.

`config check` asks vLLM itself as well, where it is installed.
"""

from __future__ import annotations

EMBEDDED = "embedded"
"""What a model's `source` says when it means the model that comes with the installation."""

OWNED = {
    "api_key": "nothing: replicas take the fleet's internal token only",
    "distributed_executor_backend": "nothing: it follows from the devices",
    "enable_sleep_mode": "pools[].autoscale.warm",
    "host": "gateway.host",
    "kv_offloading_size": "pools[].host_cache_gib",
    "kv_transfer_config": "models[].kv_transfer",
    "kv_events_config": "nothing: the router needs the events as they are",
    "model": "models[].source",
    "pipeline_parallel_size": "pools[].pipeline_parallel",
    "port": "gateway.port",
    "served_model_name": "models[].name",
    "tensor_parallel_size": "pools[].tensor_parallel",
}
"""Engine arguments that Headrace sets itself, and where the user says what they should be."""

LEAST = {
    "block_size": 1,
    "kv_cache_memory_bytes": 1,
    "max_model_len": -1,  # vLLM: as much as fits
    "max_num_batched_tokens": 1,
    "max_num_seqs": 1,
}
"""Engine arguments that are whole numbers, with their least value. vLLM's parser takes any."""


def fault_of_value(name: str, value: object) -> str | None:
    """What the number given for an engine argument must be; None when nothing is wrong with it.

    Words (`32k`, `auto`) are left to vLLM.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if name in LEAST and (isinstance(value, float) or value < LEAST[name]):
        return f"a whole number of at least {LEAST[name]}"
    if name == "gpu_memory_utilization" and not 0 < value <= 1:
        return "more than 0 and at most 1"
    return None
