"""A gateway in front of simulated replicas that hand prompts over, and what a test asks of the whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from headrace.backends.simulated import SimulatedBackend
from headrace.config import Gateway, SimulatedEngine, Timeouts
from headrace.gateway.context import GatewayContext
from headrace.gateway.server import GatewayServer
from headrace.gateway.settings import GatewaySettings
from headrace_router.types import Membership, Replica, ReplicaId, Role

MODEL = "m"
ENGINE = {
    "block_size": 16,
    "num_blocks": 2048,
    "step_s": 0.001,
    "prefill_token_s": 1e-5,
    "max_model_len": 4096,
}
TOKEN = "fleet"


class Fleet:
    """Simulated replicas by name, p0, d0, u0, ..., and the gateway before them."""

    def __init__(self) -> None:
        self.backends: dict[str, SimulatedBackend] = {}
        self.replicas: dict[str, Replica] = {}
        self.port = 0
        self.server: GatewayServer | None = None
        self._version = 1
        self._changed = asyncio.Event()
        self._membership = Membership(1, ())

    @property
    def context(self) -> GatewayContext:
        assert self.server is not None and self.server.context is not None
        return self.server.context

    async def add(self, name: str, role: Role, settings: dict[str, Any]) -> None:
        backend = SimulatedBackend(
            SimulatedEngine.model_validate(settings),
            MODEL,
            ReplicaId(name),
            internal_token=TOKEN,
            report_interval_s=0.02,
            kv_connector="NixlConnector",
        )
        started = await backend.start(lambda _phase: None)
        self.backends[name] = backend
        self.replicas[name] = Replica(
            ReplicaId(name),
            started.boot_id,
            MODEL,
            role,
            started.endpoints,
            block_size=started.block_size,
            num_blocks=started.num_blocks,
            max_model_len=started.max_model_len,
            max_running=started.max_running,
            kv_connector=started.kv_connector,
        )
        self.tell()

    def tell(self, *without: str) -> None:
        """A new membership."""
        self._version += 1
        present = (replica for name, replica in self.replicas.items() if name not in without)
        self._membership = Membership(self._version, tuple(present), models=(MODEL,))
        self._changed.set()

    async def watch(self, known: Membership | None) -> Membership:
        while known is self._membership:
            self._changed.clear()
            await self._changed.wait()
        return self._membership

    async def kill(self, name: str) -> None:
        """End a replica as a crash would: connections break, nothing is drained."""
        await self.backends[name].stop()

    def engine(self, name: str) -> Any:
        return self.backends[name]._loop.engine

    def in_flight(self, name: str) -> int:
        """Requests that the replica has not answered in full."""
        return len(self.backends[name]._loop._generations)

    async def settled(self) -> None:
        """Wait until nothing runs and nothing is held, then check that all counts agree."""
        async with asyncio.timeout(20):
            alive = [b for b in self.backends.values() if b._loop.alive]
            while self.context.active or self.context.releasing or any(b._loop.engine.kv_use for b in alive):
                await asyncio.sleep(0)
        self.context.check_integrity()
        assert self.context.router.loads.open_bookings == 0
        assert self.context.metrics.in_flight == 0
        for backend in self.backends.values():
            if backend._loop.alive:
                backend._loop.engine.check_integrity()

    def outcomes(self) -> dict[str, int]:
        """Hand-overs by how they ended."""
        counts: dict[str, int] = {}
        for (_, outcome), count in self.context.metrics.of(MODEL).handovers.items():
            counts[outcome] = counts.get(outcome, 0) + count
        return counts


class Told:
    """A settings source that is told what to tell."""

    def __init__(self) -> None:
        self.now: GatewaySettings | None = None
        self.asked = 0
        self._news = asyncio.Event()

    def tell(self, gateway: Gateway, version: int) -> None:
        self.now = GatewaySettings(version, gateway, 5.0)
        self._news.set()

    async def settings(self, known: GatewaySettings | None) -> GatewaySettings:
        self.asked += 1
        while self.now is None or known is self.now:
            self._news.clear()
            await self._news.wait()
        return self.now


@asynccontextmanager
async def open_fleet(
    prefill: int = 1,
    decode: int = 1,
    unified: int = 0,
    *,
    engine: dict[str, Any] | None = None,
    timeouts: Timeouts | None = None,
    dead_after_s: float = 5,
    **gateway: Any,
) -> AsyncIterator[Fleet]:
    """Replicas p0.., d0.., u0.. and a gateway that hands over whenever it can."""
    fleet = Fleet()
    for prefix, role, count in (
        ("p", Role.PREFILL, prefill),
        ("d", Role.DECODE, decode),
        ("u", Role.UNIFIED, unified),
    ):
        for number in range(count):
            await fleet.add(f"{prefix}{number}", role, {**ENGINE, **(engine or {})})
    config = Gateway.model_validate(
        {
            "port": 0,
            "access_log": False,
            "policy": "least_loaded",
            "disaggregation": "always_remote",
            **gateway,
        }
    )
    if timeouts is not None:
        config = config.model_copy(update={"timeouts": timeouts})
    fleet.server = GatewayServer(GatewaySettings(0, config, dead_after_s), fleet, internal_token=TOKEN)
    _, fleet.port = fleet.server.bind()
    await fleet.server.start()
    try:
        yield fleet
    finally:
        await fleet.server.stop()
        for backend in fleet.backends.values():
            await backend.stop()
