"""vLLM engine arguments that a configuration cannot set, in a file that the gateway may import: no vLLM here."""

from __future__ import annotations

OWNED = {
    "api_key": "nothing: replicas take the fleet's internal token only",
    "distributed_executor_backend": "nothing: it follows from the devices",
    "host": "gateway.host",
    "kv_events_config": "nothing: the router needs the events as they are",
    "model": "models[].source",
    "pipeline_parallel_size": "pools[].pipeline_parallel",
    "port": "gateway.port",
    "served_model_name": "models[].name",
    "tensor_parallel_size": "pools[].tensor_parallel",
}
"""Engine arguments that Headrace sets itself, and where the user says what they should be."""
