"""The configuration spelled out: one `ReplicaSpec` per replica that should run. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from headrace.config import Config, Model, Pool, SimulatedEngine
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
    simulated: SimulatedEngine | None = None  # None: vLLM

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
        _spec(model, pool, number, num_gpus)
        for model in config.models
        if model.backend != "external"
        for pool in model.pools
        for number in range(_count(pool, num_cores))
    )


def _count(pool: Pool, num_cores: int) -> int:
    if pool.replicas == "per_core":
        return max(1, min(num_cores, MAX_PER_CORE))
    return pool.replicas


def _spec(model: Model, pool: Pool, number: int, num_gpus: int) -> ReplicaSpec:
    is_simulated = model.backend == "simulated"
    return ReplicaSpec(
        id=ReplicaId(f"{slug(model.name)}-{pool.role.value}-{number}"),
        model=model.name,
        source=model.source,
        role=pool.role,
        device=Device.NONE if is_simulated else _device(pool, num_gpus),
        cpus=0.0 if is_simulated else pool.cpus,
        tensor_parallel=pool.tensor_parallel,
        pipeline_parallel=pool.pipeline_parallel,
        engine=pool.engine,
        simulated=model.simulated if is_simulated else None,
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
