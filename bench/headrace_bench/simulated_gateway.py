"""The gateway of a simulation: the production router and index, fed by simulated replicas instead of sockets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.backends.simulated_cache import CacheEvent, Removed, Stored
from headrace.config import SimulatedEngine
from headrace_bench.handing_over import HandingOver
from headrace_bench.simulated_workload import SimulatedRequest
from headrace_router import events
from headrace_router.load_table import Booking
from headrace_router.policies import make_policy
from headrace_router.prefix_index import PrefixIndex
from headrace_router.router import Choice, Router
from headrace_router.types import (
    BootId,
    Endpoints,
    LoadReport,
    Membership,
    Replica,
    ReplicaId,
    Request,
    Role,
)

MODEL = "simulated"


class SimulatedGateway:
    """One gateway before `num_replicas` equal replicas, numbered from 0. Time arrives as an argument.

    As in production, nothing is known of the engines' timing beforehand: the cost model starts from its prior.
    """

    def __init__(
        self,
        policy: str,
        seed: int,
        num_replicas: int,
        engine: SimulatedEngine,
        handing_over: HandingOver | None = None,
    ) -> None:
        """Raises KeyError on an unknown policy."""
        self.index = PrefixIndex(num_slots=num_replicas, max_blocks=num_replicas * engine.num_blocks)
        disaggregation, roles, connector = None, [Role.UNIFIED] * num_replicas, None
        if handing_over is not None:
            disaggregation = handing_over.make(policy, seed)
            roles, connector = handing_over.roles(num_replicas), "simulated"
        self.router = Router(make_policy(policy, seed), index=self.index, disaggregation=disaggregation)
        self.replicas = tuple(_replica(number, engine, role, connector) for number, role in enumerate(roles))
        self._can_hand_over = handing_over is not None
        self._block_size = engine.block_size
        self._numbers = {replica.id: number for number, replica in enumerate(self.replicas)}
        self._batches = [0] * num_replicas
        self.router.set_membership(Membership(1, self.replicas), 0.0)

    def choose(self, request: SimulatedRequest, now_s: float) -> Choice:
        """Who takes the request. Every choice is released by the caller."""
        choice = self.router.choose(self._words(request), now_s)
        assert choice is not None, "every simulated replica is always ready"
        return choice

    def heard(self, request: SimulatedRequest, booking: Booking, now_s: float) -> None:
        """Another gateway has sent the request where `booking` is."""
        replica = booking.replica
        self.router.heard(self._words(request), replica.id, replica.boot_id, booking.uncached_tokens, now_s)

    def _words(self, request: SimulatedRequest) -> Request:
        return Request(
            MODEL,
            prompt_bytes=4 * request.prompt_tokens,
            max_tokens=request.answer_tokens,
            session=request.session,
            prompt_tokens=request.prompt_tokens,
            block_hashes={self._block_size: request.prompt_hashes},
            can_hand_over=self._can_hand_over,
        )

    def number(self, booking: Booking) -> int:
        """Of the replica that a booking is on."""
        return self._numbers[booking.replica.id]

    def answered(self, booking: Booking, now_s: float) -> None:
        """The first token has come."""
        self.router.answered(booking, now_s)

    def release(self, booking: Booking, now_s: float) -> None:
        """The request has ended."""
        self.router.release(booking, now_s)

    def report(self, report: LoadReport, now_s: float) -> None:
        """A load report has arrived."""
        self.router.report(report, now_s)

    def kv_events(self, number: int, batch: Sequence[CacheEvent]) -> None:
        """Cache events of a replica have arrived."""
        replica = self.replicas[number]
        sequence = self._batches[number]
        self._batches[number] += 1
        told = [told_event(event, self._block_size) for event in batch]
        gap = self.index.apply(events.EventBatch(replica.id, replica.boot_id, sequence, told))
        assert gap is None, f"batch {gap} of {replica.id} is missing"

    def check_integrity(self) -> None:
        """Raise AssertionError unless every booking came back and the router's books are sound."""
        self.router.check_integrity()
        assert self.router.loads.open_bookings == 0, f"{self.router.loads.open_bookings} bookings are open"


def told_event(event: CacheEvent, block_size: int) -> events.CacheEvent:
    """A simulated cache's event as the index takes it."""
    if isinstance(event, Stored):
        ours = np.array(event.hashes, np.uint64)
        return events.BlocksKnown(event.hashes, ours, block_size)
    if isinstance(event, Removed):
        return events.BlocksRemoved(event.hashes)
    return events.AllCleared()


def _replica(number: int, engine: SimulatedEngine, role: Role, connector: str | None) -> Replica:
    name = f"simulated-{number}"
    return Replica(
        id=ReplicaId(name),
        boot_id=BootId(f"boot-{number}"),
        model=MODEL,
        role=role,
        endpoints=Endpoints(f"http://{name}", load=f"tcp://{name}", kv_events=f"tcp://{name}"),
        block_size=engine.block_size,
        num_blocks=engine.num_blocks,
        max_model_len=min(engine.max_model_len, engine.num_blocks * engine.block_size),
        max_running=engine.max_running,
        kv_connector=connector,
    )
