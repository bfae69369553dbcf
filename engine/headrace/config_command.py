"""`headrace config`: check a configuration, print the JSON schema that editors use."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from headrace.backends import vllm_argument_check
from headrace.config import Config, Model, Pool, json_schema, load
from headrace.config_file import ConfigFile
from headrace.config_problems import dotted
from headrace.errors import ConfigError, StartError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command."""
    parser = subparsers.add_parser("config", help="check a configuration, print its JSON schema")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="say what a file configures, or what is wrong with it")
    check.add_argument("files", nargs="+", metavar="FILE", help="a configuration, in YAML")
    actions.add_parser("schema", help="print the JSON schema, which editors use")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError with every problem of the first file that has one."""
    if args.action == "schema":
        print(json.dumps(json_schema(), indent=2))
        return 0
    for path in args.files:
        config = load(path)
        _check_sources(path, config)
        unchecked = _check_engine_arguments(path, config)
        print(f"{path}: ok{unchecked}")
        print("\n".join(f"  {line}" for line in summary(config)), flush=True)
    return 0


def _check_sources(path: str, config: Config) -> None:
    from headrace.fleet import preflight  # brings in what `schema` need not pay for

    try:
        local = preflight.with_absolute_sources(config)
        preflight.check_sources(local)
        preflight.check_caches(local)
    except StartError as error:
        raise ConfigError(f"{path}: {error.message}") from error


def _check_engine_arguments(path: str, config: Config) -> str:
    """Raises ConfigError with the place of each wrong argument. Returns what to add to `ok`."""
    pools = {
        ("models", m, "pools", p): dict(pool.engine)
        for m, model in enumerate(config.models)
        if model.backend == "vllm"
        for p, pool in enumerate(model.pools)
        if pool.engine
    }
    if not pools:
        return ""
    if not vllm_argument_check.can_check():
        return ", but pools[].engine was not checked: vLLM is not installed here"
    print(f"{path}: asking vLLM about pools[].engine (10 to 20 s)", file=sys.stderr, flush=True)
    file = ConfigFile.read(Path(path))
    problems = [
        (file.position((*place, "engine", name)), f"{dotted(place)}.engine: {fault}")
        for place, faults in zip(pools, vllm_argument_check.faults(list(pools.values())), strict=True)
        for name, fault in faults.items()
    ]
    if problems:
        told = (f"{path}:{line}:{column}: {text}" for (line, column), text in sorted(problems))
        raise ConfigError("\n".join(told))
    return ""


def summary(config: Config) -> list[str]:
    """What the configuration asks for, a line per model, per tenant that owns GPUs, and one for the gateway."""
    gateway = config.gateway
    lines = [f"model {model.name}: {_engines(model)}" for model in config.models]
    for tenant in config.tenants:
        gpus = ", ".join(f"{quota.nominal} {kind}" for kind, quota in tenant.gpus.items())
        pools = [model.name for model in config.models for pool in model.pools if pool.tenant == tenant.name]
        if gpus:
            lines.append(f"tenant {tenant.name}: {gpus} for {', '.join(dict.fromkeys(pools)) or 'no model'}")
    return [*lines, f"gateway http://{gateway.host}:{gateway.port}, policy {gateway.policy}"]


def _engines(model: Model) -> str:
    if model.backend == "external":
        return f"external, {', '.join(model.urls)}"
    source = f"vLLM, {model.source}" if model.backend == "vllm" else "simulated"
    return f"{source}; " + ", ".join(map(_replicas, model.pools))


def _replicas(pool: Pool) -> str:
    gpus = pool.tensor_parallel * pool.pipeline_parallel
    each = f" of {gpus} GPUs" if gpus > 1 else ""
    scale = pool.autoscale
    count = str(pool.replicas) if scale is None else f"{scale.min_replicas} to {scale.max_replicas}"
    return f"{count} {pool.role} on {pool.device}{each}"
