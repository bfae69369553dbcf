"""From a configuration to a ready fleet, and its end: what every way of running one has in common.

    check_machine ──> (a Ray cluster is connected) ──> check_cluster ──> controller.create ──> wait_until_ready ... end

Nothing here prints, takes signals or owns the cluster: `launch` does that for the command, `headrace.serve` for Ray
Serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from headrace.config import Config
from headrace.errors import FatalStartError, StartError
from headrace.fleet import node_check, preflight
from headrace.fleet.specs import Device, expand
from headrace.fleet.status import FleetStatus

_POLL_S = 0.5
_MAX_START_FAILURES = 3
"""Failed starts in a row of one replica after which the fleet's start is given up."""


def tokenizers(config: Config) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """What the gateway tokenises prompts with: each vLLM model's source and engine arguments, by served name."""
    return {
        model.name: (model.source, model.pools[0].engine)
        for model in config.models
        if model.backend == "vllm"
    }


def check_machine(config: Config, *, is_local: bool) -> None:
    """What can be known before Ray is there. Raises FatalStartError.

    `is_local`: the replicas will run on this machine, whose folders and memory then count too.
    """
    preflight.check_packages(config)
    if not is_local:
        return
    preflight.check_sources(config)
    preflight.check_caches(config)
    specs = expand(config, len(os.sched_getaffinity(0)), num_gpus=0)
    asked_for_gpus = any(spec.num_gpus for spec in specs)
    if not asked_for_gpus and not _has_gpus():
        preflight.check_memory(specs, preflight.available_memory_bytes())


async def check_cluster(config: Config) -> float:
    """Whether the connected cluster has the devices, and its nodes what they need. Returns the cores that CPU replicas
    will hold.

    Raises FatalStartError.
    """
    import ray

    resources: dict[str, float] = await asyncio.to_thread(ray.cluster_resources)
    num_cores, num_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    specs = expand(config, num_cores, num_gpus)
    preflight.check_devices(specs, num_cores, num_gpus, has_gpu_quotas=config.has_gpu_quotas)
    folders = sorted({model.source for model in config.models if preflight.is_folder(model)})
    await node_check.check_nodes(config, folders)
    return sum(spec.cpus for spec in specs if spec.device is Device.CPU)


async def wait_until_ready(
    controller: Any, limit_s: float, told: Callable[[FleetStatus], None] = lambda status: None
) -> FleetStatus:
    """Ask the controller until every replica of our own is ready; `told` hears each answer.

    Raises StartError after `limit_s` or when one replica has failed to start too often, FatalStartError when it always
    will.
    """
    deadline_s = time.monotonic() + limit_s
    while True:
        # A controller that dies meanwhile is restarted by Ray, and asked again.
        status: FleetStatus = await controller.status.remote()
        told(status)
        own = [replica for replica in status.replicas if not replica.is_external]
        for replica in own:
            if replica.failures and (replica.is_fatal or replica.failures >= _MAX_START_FAILURES):
                family = FatalStartError if replica.is_fatal else StartError
                raise family(f"{replica.id} did not start: {replica.reason}")
        for gateway in status.gateways:
            if gateway.is_fatal or gateway.failures >= _MAX_START_FAILURES:
                family = FatalStartError if gateway.is_fatal else StartError
                raise family(f"the gateway on {gateway.address} did not start: {gateway.reason}")
        unready: list[str] = [
            replica.id for replica in own if not (replica.is_ready or replica.waits_for_gpus)
        ]
        unready += [f"the gateway on {one.address}" for one in status.gateways if not one.is_serving]
        if status.is_surveyed and not unready:
            return status
        if time.monotonic() > deadline_s:
            late = ", ".join(unready)
            raise StartError(f"not ready after {limit_s:g} s (fleet.start_timeout_s): {late}")
        await asyncio.sleep(_POLL_S)


async def end(controller: Any, timeout_s: float, drain_s: float = 0.0) -> None:
    """End every replica, waiting at most `timeout_s`, and the controller. The caller has drained its own gateways;
    what came by others has `drain_s` to be answered."""
    import ray

    ending = controller.shutdown.remote(drain_s)
    with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
        async with asyncio.timeout(timeout_s + drain_s):
            await ending
    with contextlib.suppress(ray.exceptions.RayError):
        ray.kill(controller, no_restart=True)


def _has_gpus() -> bool:
    """Whether Ray will find GPUs here; `device: auto` then means them, and host memory is not the limit."""
    return any(os.path.exists(f"/dev/{name}") for name in ("nvidia0", "nvidiactl"))
