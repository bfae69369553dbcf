"""Many simulated replicas in one Ray actor: 256 actors of one each would need 30 GB and ten minutes to start."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from headrace.backends.simulated import SimulatedBackend
from headrace.config import SimulatedEngine
from headrace_router.types import Replica, ReplicaId, Role

MODEL = "scale"


class Crowd:
    """The simulated replicas of one node. A Ray actor's class."""

    def __init__(self) -> None:
        self._backends: list[SimulatedBackend] = []

    async def start(self, first: int, count: int, settings: dict[str, Any], node: str) -> list[Replica]:
        """Start replicas `first`, `first` + 1, ..., each with its own sockets, as one of an actor of its own has."""
        engine = SimulatedEngine.model_validate(settings)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        replicas = []
        for number in range(first, first + count):
            name = ReplicaId(f"{MODEL}-unified-{number}")
            backend = SimulatedBackend(engine, MODEL, name, internal_token="scale")
            started = await backend.start(lambda _phase: None)
            self._backends.append(backend)
            replicas.append(
                Replica(
                    name,
                    started.boot_id,
                    MODEL,
                    Role.UNIFIED,
                    started.endpoints,
                    block_size=started.block_size,
                    num_blocks=started.num_blocks,
                    max_model_len=started.max_model_len,
                    max_running=started.max_running,
                    node=node,
                )
            )
        return replicas

    async def cached(self) -> tuple[int, set[int]]:
        """Blocks in all caches of this node, and their hashes."""
        hashes: set[int] = set()
        blocks = 0
        for backend in self._backends:
            resident = backend.resident_hashes()
            blocks += len(resident)
            hashes.update(resident)
        return blocks, hashes

    async def stop(self) -> None:
        await asyncio.gather(*(backend.stop() for backend in self._backends))
