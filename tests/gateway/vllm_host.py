"""A process with one vLLM engine: prints where it listens as a line of JSON, ends when its input does."""

import asyncio
import json
import os
import sys
from dataclasses import asdict

from headrace.backends import embedded_model
from headrace.backends.vllm import VllmBackend
from headrace.backends.vllm_arguments import EngineSettings
from headrace_router.types import ReplicaId

ARGUMENTS = {
    "max_model_len": 1024,
    "block_size": 32,
    "kv_cache_memory_bytes": 32 * 1024**2,  # 1,400 tokens: what a test asks for does not all fit
    "enforce_eager": True,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
}


async def main() -> None:
    core = max(os.sched_getaffinity(0))
    settings = EngineSettings("m", embedded_model.SOURCE, ARGUMENTS)
    backend = VllmBackend(settings, ReplicaId("m-0"), "127.0.0.1", cores=((core,),))
    try:
        started = await backend.start(lambda phase: print(phase, file=sys.stderr))
        print(json.dumps({"ready": True, **asdict(started)}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await backend.stop()


if __name__ == "__main__":
    asyncio.run(main())
