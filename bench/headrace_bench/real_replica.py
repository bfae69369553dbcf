"""A process with one real vLLM replica, without Ray: the backend of production, behind an open door.

    python -m headrace_bench.real_replica --name r0 --core 0 --kv-bytes 150000000

Prints what started as one line of JSON, ends when its input does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from headrace_router.types import ReplicaId

MODEL = "smollm2"
MAX_RUNNING = 32


def arguments(kv_bytes: int) -> dict[str, Any]:
    """vLLM's engine arguments: those of `configs/local.yaml`, with a KV cache of `kv_bytes`."""
    return {
        "max_model_len": 2048,
        "max_num_seqs": MAX_RUNNING,
        "max_num_batched_tokens": 2048,
        "block_size": 32,
        "kv_cache_memory_bytes": kv_bytes,
        "enforce_eager": True,
    }


async def _serve(args: argparse.Namespace) -> None:
    # Imported here: the bench that starts this process imports this module too, and has no use for vLLM.
    from headrace.backends import embedded_model
    from headrace.backends.vllm import VllmBackend
    from headrace.backends.vllm_arguments import EngineSettings

    settings = EngineSettings(
        MODEL,
        embedded_model.SOURCE,
        arguments(args.kv_bytes),
        kv_connector=args.kv_connector,
        kv_options={"kv_buffer_device": "cpu"},
    )
    backend = VllmBackend(settings, ReplicaId(args.name), "127.0.0.1", cores=((args.core,),))
    try:
        started = await backend.start(lambda phase: print(phase, file=sys.stderr, flush=True))
        print(json.dumps({"ready": True, **asdict(started)}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await backend.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="headrace_bench.real_replica")
    parser.add_argument("--name", required=True)
    parser.add_argument("--core", type=int, required=True)
    parser.add_argument("--kv-bytes", type=int, required=True)
    parser.add_argument("--kv-connector", help="through which it hands prompts over")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    asyncio.run(_serve(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
