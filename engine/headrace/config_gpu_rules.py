"""What no single field can know of tenants and their GPUs. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from headrace.config import Config, Model, Pool
from headrace.config_file import KeyPath
from headrace.config_problems import Problem, dotted
from headrace.config_tenants import Tenant


def takes_gpus(pool: Pool, model: Model, config: Config) -> bool:
    """Whether its replicas may take GPUs, as far as the configuration tells."""
    if model.backend == "simulated":
        return bool(config.fleet.simulated_nodes) or pool.device == "cuda"
    return model.backend == "vllm" and pool.device != "cpu"


def contradictions_of_tenants(config: Config) -> Iterator[Problem]:
    """Every contradiction, in the order of the tree."""
    if not config.has_gpu_quotas:
        for key in ("quota", "simulated_nodes"):
            if key in config.fleet.model_fields_set:
                yield Problem(
                    ("fleet", key),
                    f"fleet.{key} means something only where tenants share GPUs; set tenants[].gpus or remove the key",
                )
    for m, model in enumerate(config.models):
        for p, pool in enumerate(model.pools):
            yield from _of_pool(pool, model, config, ("models", m, "pools", p))


def _of_pool(pool: Pool, model: Model, config: Config, path: KeyPath) -> Iterator[Problem]:
    here = dotted(path)
    tenants = {tenant.name: tenant for tenant in config.tenants}
    may_take = takes_gpus(pool, model, config)
    if pool.accelerator is not None and not may_take:
        yield Problem(
            (*path, "accelerator"),
            f"{here}.accelerator is {pool.accelerator!r}, and its replicas take no GPUs; remove the key"
            + (
                ", or set fleet.simulated_nodes"
                if model.backend == "simulated"
                else ", or set device to cuda"
            ),
        )
    if pool.tenant is not None and pool.tenant not in tenants:
        near = difflib.get_close_matches(pool.tenant, tenants, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"tenants are {', '.join(tenants) or 'none'}"
        yield Problem((*path, "tenant"), f"{here}.tenant is {pool.tenant!r}, which is no tenant; {known}")
    elif config.has_gpu_quotas and may_take:
        yield from _of_quota(config.accelerator_of(pool), tenants.get(pool.tenant or ""), path)
    is_real = model.backend == "vllm" or pool.device == "cuda"
    if config.fleet.simulated_nodes and may_take and is_real:
        yield Problem(
            (*path, "device"),
            f"{here} would take GPUs of fleet.simulated_nodes, which are not there; set device to cpu, or remove "
            "fleet.simulated_nodes",
        )


def _of_quota(kind: str | None, tenant: Tenant | None, path: KeyPath) -> Iterator[Problem]:
    here = dotted(path)
    if tenant is None:
        yield Problem(
            (*path, "tenant"),
            f"{here}.tenant is missing; where tenants share GPUs every pool that takes some names its tenant, or has "
            "device 'cpu'",
        )
        return
    if kind is None and tenant.gpus:
        yield Problem(
            (*path, "accelerator"),
            f"{here}.accelerator is missing; tenant {tenant.name!r} has {', '.join(tenant.gpus)}: say which",
        )
    elif kind is None or kind not in tenant.gpus:
        what = "GPUs" if kind is None else kind
        yield Problem(
            (*path, "tenant"),
            f"{here} takes {what}, of which tenant {tenant.name!r} may have none; set tenants[].gpus for it",
        )
