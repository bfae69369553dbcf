"""The gateway of a simulation: the production router and index, fed by simulated replicas instead of sockets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.backends.simulated_cache import CacheEvent, Removed, Stored
from headrace.config import SimulatedEngine
from headrace_bench.simulated_workload import SimulatedRequest
from headrace_router import events
from headrace_router.load_table import Booking
from headrace_router.policies import make_policy
from headrace_router.prefix_index import PrefixIndex
from headrace_router.router import Router
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

    def __init__(self, policy: str, seed: int, num_replicas: int, engine: SimulatedEngine) -> None:
        """Raises KeyError on an unknown policy."""
        self.index = PrefixIndex(num_slots=num_replicas, max_blocks=num_replicas * engine.num_blocks)
        self.router = Router(make_policy(policy, seed), index=self.index)
        self.replicas = tuple(_replica(number, engine) for number in range(num_replicas))
        self._block_size = engine.block_size
        self._numbers = {replica.id: number for number, replica in enumerate(self.replicas)}
        self._batches = [0] * num_replicas
        self.router.set_membership(Membership(1, self.replicas), 0.0)

    def choose(self, request: SimulatedRequest, now_s: float) -> tuple[int, Booking, int]:
        """The replica that takes the request, the booking on it, and the prompt tokens believed to be cached there."""
        choice = self.router.choose(
            Request(
                MODEL,
                prompt_bytes=4 * request.prompt_tokens,
                max_tokens=request.answer_tokens,
                session=request.session,
                prompt_tokens=request.prompt_tokens,
                block_hashes={self._block_size: request.prompt_hashes},
            ),
            now_s,
        )
        assert choice is not None, "every simulated replica is always ready"
        booking = choice.booking
        return self._numbers[booking.replica.id], booking, choice.decision.hit_tokens

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
        told = [_told(event, self._block_size) for event in batch]
        gap = self.index.apply(events.EventBatch(replica.id, replica.boot_id, sequence, told))
        assert gap is None, f"batch {gap} of {replica.id} is missing"

    def check_integrity(self) -> None:
        """Raise AssertionError unless every booking came back and the router's books are sound."""
        self.router.check_integrity()
        assert self.router.loads.open_bookings == 0, f"{self.router.loads.open_bookings} bookings are open"


def _told(event: CacheEvent, block_size: int) -> events.CacheEvent:
    if isinstance(event, Stored):
        ours = np.array(event.hashes, np.uint64)
        return events.BlocksKnown(event.hashes, ours, block_size)
    if isinstance(event, Removed):
        return events.BlocksRemoved(event.hashes)
    return events.AllCleared()


def _replica(number: int, engine: SimulatedEngine) -> Replica:
    name = f"simulated-{number}"
    return Replica(
        id=ReplicaId(name),
        boot_id=BootId(f"boot-{number}"),
        model=MODEL,
        role=Role.UNIFIED,
        endpoints=Endpoints(f"http://{name}", load=f"tcp://{name}", kv_events=f"tcp://{name}"),
        block_size=engine.block_size,
        num_blocks=engine.num_blocks,
        max_model_len=min(engine.max_model_len, engine.num_blocks * engine.block_size),
    )
