"""Running a function on one node of the cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


async def on_node(node_id: str, function: Callable[..., Any], *args: Any, timeout_s: float) -> Any:
    """What `function(*args)` returns there, in a process of its own; it is tried once.

    Raises TimeoutError when it takes longer, starting a process included, and Ray's errors.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=strategy)
    async with asyncio.timeout(timeout_s):
        return await task.remote(*args)
