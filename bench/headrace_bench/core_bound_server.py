"""Ray Serve LLM's server with each replica on a core of its own, which a deployment's environment cannot say."""

from __future__ import annotations

import os

from ray import serve
from ray.serve.llm.deployment import LLMServer


class CoreBoundServer(LLMServer):  # type: ignore[misc]
    """Replica n computes on the n-th core."""

    async def start(self) -> None:
        cores = sorted(os.sched_getaffinity(0))
        rank = serve.get_replica_context().rank.rank
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(cores[rank % len(cores)])
        await super().start()
