"""Several gateways before the same replicas: each request comes through one of them, drawn by lot. All hear every load
report and KV event; of the others' choices they hear `TELL_S` later, as processes that share a port do, or never."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from headrace.backends.simulated_cache import CacheEvent
from headrace.config import SimulatedEngine
from headrace_bench.handing_over import HandingOver
from headrace_bench.simulated_gateway import SimulatedGateway
from headrace_bench.simulated_workload import SimulatedRequest
from headrace_router.load_table import Booking
from headrace_router.router import Choice
from headrace_router.types import LoadReport

TELL_S = 0.001
"""From one gateway's choice to the others' load tables and indexes."""

Schedule = Callable[[float, Callable[..., None], Any], None]
"""`schedule(when_s, act, argument)`: call `act(argument)` then."""


class ShardedGateway:
    """Stands where `SimulatedGateway` stands."""

    def __init__(
        self,
        policy: str,
        seed: int,
        num_replicas: int,
        engine: SimulatedEngine,
        handing_over: HandingOver | None,
        *,
        count: int,
        tells: bool,
        schedule: Schedule,
    ) -> None:
        self._gateways = [
            SimulatedGateway(policy, seed + number, num_replicas, engine, handing_over)
            for number in range(count)
        ]
        self.replicas = self._gateways[0].replicas
        self._lot = Random(f"gateways {seed}")
        self._tells = tells
        self._schedule = schedule
        self._owners: dict[Booking, SimulatedGateway] = {}
        self._now_s = 0.0

    def choose(self, request: SimulatedRequest, now_s: float) -> Choice:
        """One of the gateways does."""
        gateway = self._lot.choice(self._gateways)
        choice = gateway.choose(request, now_s)
        first = choice.booking if choice.handover is None else choice.handover.booking
        for booking in {choice.booking, first}:
            self._owners[booking] = gateway
        if self._tells:
            self._schedule(now_s + TELL_S, self._tell, (gateway, request, first, now_s + TELL_S))
        return choice

    def _tell(self, message: tuple[SimulatedGateway, SimulatedRequest, Booking, float]) -> None:
        owner, request, booking, now_s = message
        for gateway in self._gateways:
            if gateway is not owner:
                gateway.heard(request, booking, now_s)

    def number(self, booking: Booking) -> int:
        return self._gateways[0].number(booking)

    def answered(self, booking: Booking, now_s: float) -> None:
        self._owners[booking].answered(booking, now_s)

    def release(self, booking: Booking, now_s: float) -> None:
        self._owners.pop(booking).release(booking, now_s)

    def report(self, report: LoadReport, now_s: float) -> None:
        for gateway in self._gateways:
            gateway.report(report, now_s)

    def kv_events(self, number: int, batch: Sequence[CacheEvent]) -> None:
        for gateway in self._gateways:
            gateway.kv_events(number, batch)

    def check_integrity(self) -> None:
        for gateway in self._gateways:
            gateway.check_integrity()
