"""`headrace config`: check a configuration, print the JSON schema that editors use."""

from __future__ import annotations

import argparse
import json

from headrace.config import Config, Model, Pool, json_schema, load


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command."""
    parser = subparsers.add_parser("config", help="check a configuration, print its JSON schema")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser("check", help="say what a file configures, or what is wrong with it")
    check.add_argument("files", nargs="+", metavar="FILE")
    actions.add_parser("schema", help="print the JSON schema")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError with every problem of the first file that has one."""
    if args.action == "schema":
        print(json.dumps(json_schema(), indent=2))
        return 0
    for path in args.files:
        config = load(path)
        print(f"{path}: ok")
        print("\n".join(f"  {line}" for line in summary(config)))
    return 0


def summary(config: Config) -> list[str]:
    """What the configuration asks for, a line per model and one for the gateway."""
    gateway = config.gateway
    lines = [f"model {model.name}: {_engines(model)}" for model in config.models]
    return [*lines, f"gateway http://{gateway.host}:{gateway.port}, policy {gateway.policy}"]


def _engines(model: Model) -> str:
    if model.backend == "external":
        return f"external, {', '.join(model.urls)}"
    source = f"vLLM, {model.source}" if model.backend == "vllm" else "simulated"
    return f"{source}; " + ", ".join(map(_replicas, model.pools))


def _replicas(pool: Pool) -> str:
    gpus = pool.tensor_parallel * pool.pipeline_parallel
    each = f" of {gpus} GPUs" if gpus > 1 else ""
    return f"{pool.replicas} {pool.role} on {pool.device}{each}"
