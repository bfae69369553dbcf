"""What no single field can know: the parts of a configuration that contradict each other.

Pure but for one look at the disk: a `source` may name a folder.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from headrace.backends.kv_connectors import HAND_OVER, MULTI, handing_over
from headrace.backends.owned_arguments import EMBEDDED, OWNED, fault_of_value
from headrace.config import Config, Model, Pool
from headrace.config_file import KeyPath
from headrace.config_gpu_rules import contradictions_of_tenants
from headrace.config_problems import Problem, dotted
from headrace.gateway.http_request import OWN_NAMES
from headrace_router.types import Role

ONLY_FOR = {"source": "vllm", "simulated": "simulated", "urls": "external", "api_key": "external"}
"""Keys of a model that mean something to one backend."""


def contradictions(config: Config) -> tuple[Problem, ...]:
    """Every contradiction, in the order of the tree."""
    return tuple(_of_config(config))


def _of_config(config: Config) -> Iterator[Problem]:
    fleet = config.fleet
    if fleet.dead_after_s < 2 * fleet.report_interval_s:
        yield Problem(
            ("fleet", "dead_after_s"),
            f"fleet.dead_after_s is {fleet.dead_after_s}; it must be at least {2 * fleet.report_interval_s}, twice "
            "fleet.report_interval_s, or a healthy replica that is late once would be taken for dead",
        )
    yield from _of_queue(config)
    names = Counter(model.name for model in config.models)
    for index, model in enumerate(config.models):
        path: KeyPath = ("models", index)
        if names[model.name] > 1:
            yield Problem(
                (*path, "name"), f"{dotted(path)}.name {model.name!r} is used by {names[model.name]} models"
            )
        yield from _of_model(model, path)
    yield from contradictions_of_tenants(config)


def _of_queue(config: Config) -> Iterator[Problem]:
    queue, limits = config.gateway.queue, config.gateway.limits
    if queue.max_bytes < limits.body_bytes:
        yield Problem(
            ("gateway", "queue", "max_bytes"),
            f"gateway.queue.max_bytes is {queue.max_bytes}; it must be at least {limits.body_bytes}, "
            "gateway.limits.body_bytes, or a request that is served at light load could never wait",
        )
    tenant, deadline = queue.tenant_header.lower(), queue.deadline_header.lower()
    for key, name in (("tenant_header", tenant), ("deadline_header", deadline)):
        if name in OWN_NAMES:
            yield Problem(
                ("gateway", "queue", key),
                f"gateway.queue.{key} is {name!r}, which has another meaning already",
            )
    if tenant == deadline:
        yield Problem(
            ("gateway", "queue", "deadline_header"),
            f"gateway.queue.deadline_header is {deadline!r}, and so is tenant_header; they must differ",
        )
    names = Counter(tenant.name for tenant in config.tenants)
    for index, one in enumerate(config.tenants):
        if names[one.name] > 1:
            yield Problem(
                ("tenants", index, "name"),
                f"tenants[{index}].name {one.name!r} is used by {names[one.name]} tenants",
            )


def _of_model(model: Model, path: KeyPath) -> Iterator[Problem]:
    here = dotted(path)
    for key, backend in ONLY_FOR.items():
        if key in model.model_fields_set and model.backend != backend:
            yield Problem(
                (*path, key),
                f"{here}.{key} means something only with backend '{backend}'; the backend of {model.name!r} is "
                f"'{model.backend}': remove the key or change the backend",
            )
    if model.backend == "external":
        yield from _of_urls(model, path)
        if "pools" in model.model_fields_set:
            yield Problem(
                (*path, "pools"),
                f"{here}.pools: headrace starts no replicas of an external model; remove the key",
            )
        return
    if model.backend == "simulated":
        yield from _of_simulated(model, path)
    elif fault := _fault_of_source(model.source):
        yield Problem((*path, "source"), f"{here}.source is {model.source!r}; {fault}")
    yield from _of_transfer(model, path)
    roles = Counter(pool.role for pool in model.pools)
    for index, pool in enumerate(model.pools):
        pool_path: KeyPath = (*path, "pools", index)
        if roles[pool.role] > 1:
            yield Problem(
                (*pool_path, "role"),
                f"{dotted(pool_path)}: {model.name!r} has {roles[pool.role]} pools with role '{pool.role}'; it may "
                "have one of each role: raise 'replicas' instead",
            )
        yield from _of_pool(pool, model, pool_path)
    yield from _of_pair(model, path)
    for role, partner in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
        if role in roles and partner not in roles:
            yield Problem(
                (*path, "pools"),
                f"{here}.pools: {model.name!r} has a pool with role '{role}' and none with '{partner}'",
            )


def _of_transfer(model: Model, path: KeyPath) -> Iterator[Problem]:
    transfer = model.transfer
    if transfer is None:
        return
    here = f"{dotted(path)}.kv_transfer"
    for name in ("kv_connector", "kv_role", "engine_id"):
        if name in transfer.options:
            advice = "set 'connector'" if name == "kv_connector" else "headrace sets it: remove the key"
            yield Problem(
                (*path, "kv_transfer", "options", name), f"{here}.options.{name} cannot be set here; {advice}"
            )
    has_halves = any(pool.role is not Role.UNIFIED for pool in model.pools)
    if has_halves and handing_over(transfer.connector, transfer.options) is None:
        yield Problem(
            (*path, "kv_transfer"),
            f"{here}.connector is {transfer.connector!r}, by which nothing is handed over; pools with role 'prefill' "
            f"and 'decode' need one of {', '.join(HAND_OVER)}, or a {MULTI} with one of them",
        )


def _of_pair(model: Model, path: KeyPath) -> Iterator[Problem]:
    """Prefill and decode pool of one model: either alone serves nothing, so neither goes to zero alone."""
    pools = {pool.role: (index, pool) for index, pool in enumerate(model.pools)}
    for role, partner in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
        if role not in pools or partner not in pools:
            continue
        (index, one), (_, other) = pools[role], pools[partner]
        if one.autoscale is None or one.autoscale.min_replicas > 0:
            continue
        if other.autoscale is None or other.autoscale.min_replicas > 0:
            yield Problem(
                (*path, "pools", index, "autoscale"),
                f"{dotted((*path, 'pools', index))}.autoscale.min_replicas is 0, but the pool with role '{partner}' "
                "keeps replicas; prefill and decode go to zero together: give both min_replicas 0, or neither",
            )


def _of_autoscale(pool: Pool, path: KeyPath) -> Iterator[Problem]:
    here, scale = dotted(path), pool.autoscale
    if scale is None:
        if pool.replicas == 0:
            yield Problem(
                (*path, "replicas"),
                f"{here}.replicas is 0; without 'autoscale' it must be at least 1, or the pool never serves",
            )
        return
    at: KeyPath = (*path, "autoscale")
    if scale.min_replicas > scale.max_replicas:
        yield Problem(
            (*at, "min_replicas"),
            f"{here}.autoscale.min_replicas is {scale.min_replicas}; it must be at most max_replicas, "
            f"{scale.max_replicas}",
        )
    for index, hint in enumerate(scale.schedule):
        if hint.min_replicas > scale.max_replicas:
            yield Problem(
                (*at, "schedule", index, "min_replicas"),
                f"{here}.autoscale.schedule[{index}].min_replicas is {hint.min_replicas}; it must be at most "
                f"max_replicas, {scale.max_replicas}",
            )
        if hint.from_ == hint.until:
            yield Problem(
                (*at, "schedule", index),
                f"{here}.autoscale.schedule[{index}] begins and ends at {hint.until}, which is no time at all; for "
                "the whole day raise autoscale.min_replicas",
            )
    if pool.replicas == "per_core":
        yield Problem(
            (*path, "replicas"),
            f"{here}.replicas is 'per_core', which follows the machine, and 'autoscale' follows the load; give a "
            "number, or leave it out to begin with min_replicas",
        )
    elif "replicas" in pool.model_fields_set and not (
        scale.min_replicas <= pool.replicas <= scale.max_replicas
    ):
        yield Problem(
            (*path, "replicas"),
            f"{here}.replicas is {pool.replicas}; with 'autoscale' it is how many there are at first and must be "
            f"within min_replicas and max_replicas, {scale.min_replicas} to {scale.max_replicas}",
        )


def _of_pool(pool: Pool, model: Model, path: KeyPath) -> Iterator[Problem]:
    yield from _of_autoscale(pool, path)
    here = dotted(path)
    workers = pool.tensor_parallel * pool.pipeline_parallel
    if pool.device == "cpu" and pool.pipeline_parallel > 1:
        yield Problem(
            (*path, "pipeline_parallel"),
            f"{here}.pipeline_parallel is {pool.pipeline_parallel}; on device 'cpu' it must be 1, since vLLM's CPU "
            "engine ends as it starts with more: use tensor_parallel",
        )
    elif pool.device == "cpu" and workers > 1 and pool.cpus < workers:
        yield Problem(
            (*path, "cpus"),
            f"{here}.cpus is {pool.cpus:g}; on device 'cpu' it must be at least {workers}, a core for each of "
            "tensor_parallel * pipeline_parallel workers",
        )
    if model.backend == "vllm" and pool.device == "cpu" and pool.host_cache_gib is not None:
        yield Problem(
            (*path, "host_cache_gib"),
            f"{here}.host_cache_gib is {pool.host_cache_gib:g}; on device 'cpu' there is none, the cache itself is "
            "host memory: raise engine.kv_cache_memory_bytes",
        )
    if model.backend == "vllm" and pool.device == "cpu" and pool.autoscale and pool.autoscale.warm:
        yield Problem(
            (*path, "autoscale", "warm"),
            f"{here}.autoscale.warm is {pool.autoscale.warm}; on device 'cpu' it must be 0, since vLLM's sleep mode "
            "needs a GPU: a CPU engine has no other memory to put its weights in",
        )
    if model.backend == "simulated" and pool.host_cache_gib is not None:
        yield Problem(
            (*path, "host_cache_gib"),
            f"{here}.host_cache_gib means something only with backend 'vllm'; remove the key",
        )
    if model.backend == "simulated" and pool.engine:
        yield Problem(
            (*path, "engine"),
            f"{here}.engine holds vLLM's arguments; {model.name!r} has none: use 'simulated'",
        )
        return
    for name, value in pool.engine.items():
        if setting := OWNED.get(name.replace("-", "_")):
            yield Problem((*path, "engine", name), f"{here}.engine.{name} cannot be set here; set {setting}")
        elif fault := fault_of_value(name.replace("-", "_"), value):
            yield Problem((*path, "engine", name), f"{here}.engine.{name} is {value!r}; it must be {fault}")


def _fault_of_source(source: str) -> str | None:
    """`embedded`, a path, or `org/name`. A bare word is a folder here or a mistake."""
    is_path = source.startswith(("/", "./", "../", "~"))
    if source == EMBEDDED or is_path or re.fullmatch(r"[\w.-]+/[\w.-]+", source) or Path(source).is_dir():
        return None
    near = difflib.get_close_matches(source.lower(), (EMBEDDED,), n=1)
    return f"it must be '{EMBEDDED}', an existing folder, or a Hugging Face id of the form org/name" + (
        f"; did you mean '{EMBEDDED}'?" if near else ""
    )


def _of_urls(model: Model, path: KeyPath) -> Iterator[Problem]:
    if not model.urls:
        yield Problem(
            (*path, "urls"), f"{dotted(path)}.urls is empty; an external model needs at least one URL"
        )
    for index, url in enumerate(model.urls):
        url_path = (*path, "urls", index)
        if model.urls.index(url) != index:
            yield Problem(url_path, f"{dotted(url_path)} {url!r} stands twice")
        elif fault := _fault_of_url(url):
            yield Problem(url_path, f"{dotted(url_path)} is {url!r}; {fault}")


def _fault_of_url(url: str) -> str | None:
    form = "it must be of the form http://HOST:PORT"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"{form} ({error})"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return form
    if parts.username or parts.query or parts.fragment or any(letter.isspace() for letter in url):
        return f"{form}, without user, query or fragment"
    if parts.path.rstrip("/").endswith("/v1"):
        return "leave out /v1, clients send it"
    return None


def _of_simulated(model: Model, path: KeyPath) -> Iterator[Problem]:
    engine = model.simulated
    capacity = engine.block_size * engine.num_blocks
    if engine.max_model_len > capacity:
        yield Problem(
            (*path, "simulated", "max_model_len"),
            f"{dotted(path)}.simulated.max_model_len is {engine.max_model_len}; it must be at most {capacity}, what "
            f"num_blocks {engine.num_blocks} of block_size {engine.block_size} hold",
        )
