"""The configuration spelled out: one `ReplicaSpec` per replica that should run. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from headrace.backends.ports import PortRange
from headrace.config import Config, Fleet, Model, Pool, SimulatedEngine
from headrace_router.types import ReplicaId, Role

MAX_PER_CORE = 2
"""What `replicas: per_core` stops at: a CPU engine takes 3 GB and a core, and two show all that a fleet does."""


class Device(StrEnum):
    """What a replica computes on."""

    CPU = "cpu"
    CUDA = "cuda"
    NONE = "none"  # a simulated engine


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """One replica as it should be."""

    id: ReplicaId
    model: str
    source: str
    role: Role = Role.UNIFIED
    device: Device = Device.CPU
    cpus: float = 1.0
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    engine: Mapping[str, Any] = field(default_factory=dict)
    kv_connector: str | None = None
    kv_options: Mapping[str, Any] = field(default_factory=dict)
    host_cache_gib: float | None = None
    simulated: SimulatedEngine | None = None  # None: vLLM
    report_interval_s: float = 0.1  # longest silence between load reports
    sleep_level: int | None = None  # of the engine's sleep mode; None: it never sleeps
    accelerator: str | None = None  # kind of its GPUs; None: any
    node_labels: Mapping[str, str] = field(default_factory=dict)  # that its node must have
    ports: PortRange | None = None  # that it listens on; None: any that are free
    generation: int = 0  # a replica of an earlier one is to be replaced, even where nothing else differs

    @property
    def num_workers(self) -> int:
        """Processes that compute, one GPU or one share of the cores each."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def num_gpus(self) -> int:
        return self.num_workers if self.device is Device.CUDA else 0


def expand(config: Config, num_cores: int, num_gpus: int) -> tuple[ReplicaSpec, ...]:
    """Every replica that `config` asks for on a cluster of that size. External models have none."""
    return tuple(
        numbered(template(model, pool, num_gpus, config.fleet), number)
        for model in config.models
        if model.backend != "external"
        for pool in model.pools
        for number in range(initial_count(pool, num_cores))
    )


def initial_count(pool: Pool, num_cores: int) -> int:
    """Replicas that a pool starts with on a cluster of that size."""
    if pool.replicas == "per_core":
        return max(1, min(num_cores, MAX_PER_CORE))
    if pool.autoscale is not None and "replicas" not in pool.model_fields_set:
        return pool.autoscale.min_replicas
    return pool.replicas


def numbered(spec: ReplicaSpec, number: int) -> ReplicaSpec:
    """The same as one of the pool's replicas: number 3 of it is `smollm2-unified-3`."""
    return replace(spec, id=ReplicaId(f"{slug(spec.model)}-{spec.role.value}-{number}"))


def number_of(replica_id: ReplicaId) -> int:
    """The inverse of `numbered`. Raises ValueError for what is no id of ours."""
    return int(replica_id.rpartition("-")[2])


def template(model: Model, pool: Pool, num_gpus: int, fleet: Fleet) -> ReplicaSpec:
    """What every replica of a pool is, but for its number."""
    is_simulated = model.backend == "simulated"
    # One on `cuda` holds GPUs as a real one does, and leaves them alone.
    on_gpus = pool.device == "cuda"
    transfer = model.transfer
    return ReplicaSpec(
        id=ReplicaId(f"{slug(model.name)}-{pool.role.value}"),
        model=model.name,
        source=model.source,
        role=pool.role,
        device=Device.NONE if is_simulated and not on_gpus else _device(pool, num_gpus),
        cpus=0.0 if is_simulated else pool.cpus,
        tensor_parallel=pool.tensor_parallel,
        pipeline_parallel=pool.pipeline_parallel,
        engine=pool.engine,
        kv_connector=None if transfer is None else transfer.connector,
        kv_options={} if transfer is None else transfer.options,
        host_cache_gib=pool.host_cache_gib,
        simulated=model.simulated if is_simulated else None,
        report_interval_s=fleet.report_interval_s,
        sleep_level=pool.autoscale.sleep_level if pool.autoscale and pool.autoscale.warm else None,
        accelerator=pool.accelerator,
        node_labels=pool.node_labels,
        ports=fleet.port_range,
    )


def _device(pool: Pool, num_gpus: int) -> Device:
    if pool.device == "auto":
        return Device.CUDA if num_gpus else Device.CPU
    return Device(pool.device)


def slug(name: str) -> str:
    """A model name as part of an id: `org/Model 1` is `org-Model-1-3f2a`. Names that differ give slugs that differ."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    if plain == name:
        return name
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:4]}"
