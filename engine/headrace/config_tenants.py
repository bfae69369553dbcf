"""Nodes of the configuration: who shares the fleet, and what they share."""

from __future__ import annotations

from pydantic import Field

from headrace.config_tree import Tree


class GpuQuota(Tree):
    """What one tenant may have of one kind of accelerator, in GPUs."""

    nominal: int = Field(ge=0, le=2**20, description="Its own; whoever borrows them gives them back.")
    borrowing_limit: int | None = Field(
        None, ge=0, le=2**20, description="Most beyond nominal, of what others do not use; empty: no bound."
    )
    lending_limit: int | None = Field(
        None, ge=0, le=2**20, description="Most of its own that others may use meanwhile; empty: all."
    )


class Tenant(Tree):
    """One of those who share the fleet."""

    name: str = Field(min_length=1, max_length=64, description="As in gateway.queue.tenant_header.")
    weight: float = Field(
        1.0,
        gt=0,
        le=1_000_000,
        description="Its share of what is served, and of GPUs that can be borrowed, relative to others; theirs is 1 by "
        "default.",
    )
    gpus: dict[str, GpuQuota] = Field(
        default_factory=dict, description="By accelerator kind, in Ray's name of it: `H100`."
    )


class QuotaSettings(Tree):
    """How GPUs are shared between tenants."""

    min_run_s: float = Field(
        300.0, ge=0, le=86400, description="A replica that borrows GPUs keeps them for at least this long."
    )


class SimulatedNode(Tree):
    """A machine that is not there, whose GPUs simulated replicas share."""

    accelerator: str = Field(min_length=1, description="Kind of its GPUs.")
    gpus: int = Field(ge=1, le=1024)
