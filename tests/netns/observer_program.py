"""Looks into a Ray cluster for tests outside it: `python observer_program.py HOST:PORT`, a question a line.

Connected once: each connection costs seconds of CPU.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict
from typing import Any

import ray

from headrace.fleet.replica_host import NAMESPACE, controller_name

_TIMEOUT_S = 15.0


def nodes() -> list[str]:
    return [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]


def actors() -> list[str]:
    return sorted(actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))


def status(fleet: str) -> dict[str, Any]:
    try:
        controller = ray.get_actor(controller_name(fleet), namespace=NAMESPACE)
        return asdict(ray.get(controller.status.remote(), timeout=_TIMEOUT_S))
    except (ValueError, ray.exceptions.RayError):
        return {}


def main(address: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray writes there what is no answer
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.CRITICAL)
    questions = {"nodes": nodes, "actors": actors, "status": status}
    for line in sys.stdin:
        question, *words = json.loads(line)
        print(json.dumps(questions[question](*words)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
