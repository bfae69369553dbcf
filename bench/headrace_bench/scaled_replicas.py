"""The replicas of a fleet that is scaled: starting, ready, draining, gone; and the router that knows them.

start ──cold start──> ready ──drain──> draining ──its last request ends──> gone
  └──given up before it was ready──> gone
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum

from headrace.backends.simulated_cache import CacheEvent
from headrace.config import SimulatedEngine
from headrace_bench.scaling_sample import Bounds
from headrace_bench.simulated_gateway import MODEL, told_event
from headrace_bench.simulated_replica import SimulatedReplica
from headrace_router.events import EventBatch
from headrace_router.load_table import Booking, ReplicaLoad
from headrace_router.policies import make_policy
from headrace_router.prefix_index import PrefixIndex
from headrace_router.router import Router
from headrace_router.types import (
    BootId,
    Endpoints,
    Membership,
    Replica,
    ReplicaId,
    ReplicaState,
    Role,
)


class Stage(Enum):
    """Of a replica's life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


class ScaledReplica:
    """One start of one engine. Mutable; only `ScaledReplicas` writes its stage."""

    __slots__ = ("asked_s", "engine", "gone_s", "kv_batches", "on_the_way", "stage")

    def __init__(self, engine: SimulatedReplica, asked_s: float) -> None:
        self.engine = engine
        self.asked_s = asked_s
        self.gone_s: float | None = None
        self.on_the_way = 0  # requests sent, not yet in its queue
        self.kv_batches = 0  # of cache events, told
        self.stage = Stage.STARTING

    @property
    def is_ready(self) -> bool:
        return self.stage is Stage.READY

    @property
    def is_draining(self) -> bool:
        return self.stage is Stage.DRAINING

    @property
    def is_gone(self) -> bool:
        return self.stage is Stage.GONE

    @property
    def is_idle(self) -> bool:
        """Nothing runs there, waits, or is on its way."""
        return not (self.on_the_way or self.engine.engine.running or self.engine.engine.waiting)


class ScaledReplicas:
    """Mutable. `follow` a target; whoever drives it calls `make_ready` and `stop_if_drained` when it is time."""

    model = MODEL

    def __init__(
        self,
        settings: SimulatedEngine,
        policy: str,
        seed: int,
        cold_start_s: float,
        bounds: Bounds,
        *,
        knows_prefixes: bool,
    ) -> None:
        """Raises KeyError on an unknown policy."""
        self.index: PrefixIndex | None = None
        if knows_prefixes:
            num_slots = min(1024, 2 * bounds.max_replicas)  # those that drain have theirs too
            self.index = PrefixIndex(num_slots=num_slots, max_blocks=num_slots * settings.num_blocks)
        self.router = Router(make_policy(policy, seed), index=self.index)
        self.eligible: list[ReplicaLoad] = []  # of the ready ones
        self.present: list[ScaledReplica] = []  # ready and draining, in order of start
        self.busy_s = 0.0  # of replicas that are gone; all, once `lives` was called
        self.seen_cold_start_s: float | None = None
        self.max_context = min(settings.max_model_len, settings.num_blocks * settings.block_size)
        self._settings = settings
        self._cold_start_s = cold_start_s
        self._starting: list[ScaledReplica] = []
        self._all: list[ScaledReplica] = []
        self._by_id: dict[str, ScaledReplica] = {}
        self._version = 0

    @property
    def num_starting(self) -> int:
        return len(self._starting)

    def of(self, booking: Booking) -> ScaledReplica:
        """The replica that a booking is on."""
        return self._by_id[booking.replica.id]

    def load(self, replica: ScaledReplica) -> ReplicaLoad:
        """What the router knows of a ready one."""
        load = self.router.loads.get(replica.engine.replica.id)
        assert load is not None
        return load

    def kv_events(self, replica: ScaledReplica, batch: Sequence[CacheEvent]) -> None:
        """Cache events of a replica have arrived. One that is gone is no longer indexed."""
        if self.index is None or replica.stage is Stage.GONE:
            return
        told = [told_event(event, self._settings.block_size) for event in batch]
        known = replica.engine.replica
        gap = self.index.apply(EventBatch(known.id, known.boot_id, replica.kv_batches, told))
        replica.kv_batches += 1
        assert gap is None, f"batch {gap} of {known.id} is missing"

    # --- stages

    def follow(self, target: int, now_s: float) -> Iterator[tuple[float, ScaledReplica]]:
        """Start what is missing, drain what is beyond. Those started, with the moment at which they are ready."""
        ready = [replica for replica in self.present if replica.is_ready]
        missing = target - len(ready) - len(self._starting)
        if missing > 0:
            return iter([(now_s + self._cold_start_s, one) for one in self.start(missing, now_s)])
        for _ in range(-missing):
            if self._starting:
                self.drain(self._starting[-1], now_s)
                continue
            victim = min(ready, key=lambda one: (self.load(one).requests, -one.asked_s))
            ready.remove(victim)
            self.drain(victim, now_s)
        return iter(())

    def drain(self, replica: ScaledReplica, now_s: float) -> None:
        """Let a ready one finish, a starting one go at once."""
        if replica.stage is Stage.STARTING:
            self._starting.remove(replica)
            self._leave(replica, now_s)
        elif replica.is_ready:
            replica.stage = Stage.DRAINING
            self._publish(now_s)
            self.stop_if_drained(replica, now_s)

    def start(self, num: int, now_s: float, *, is_warm: bool = False) -> list[ScaledReplica]:
        """Ask for `num` replicas; warm ones are ready at once."""
        started = []
        for _ in range(num):
            serial = len(self._all)
            told = _replica(serial, self._settings)
            replica = ScaledReplica(SimulatedReplica(serial, told, self._settings), now_s)
            self._all.append(replica)
            self._by_id[told.id] = replica
            self._starting.append(replica)
            started.append(replica)
        if is_warm:
            for replica in started:
                self._enter(replica)
            self._publish(now_s)
        return started

    def make_ready(self, replica: ScaledReplica, now_s: float) -> bool:
        """Its cold start is over. False where it was given up before."""
        if replica.stage is not Stage.STARTING:
            return False
        self._enter(replica)
        self.seen_cold_start_s = now_s - replica.asked_s
        self._publish(now_s)
        return True

    def stop_if_drained(self, replica: ScaledReplica, now_s: float) -> None:
        """Let a draining one go if nothing runs there any more."""
        if replica.is_draining and replica.is_idle:
            self.present.remove(replica)
            self._leave(replica, now_s)
            self._publish(now_s)

    def _enter(self, replica: ScaledReplica) -> None:
        self._starting.remove(replica)
        replica.stage = Stage.READY
        self.present.append(replica)

    def _leave(self, replica: ScaledReplica, now_s: float) -> None:
        replica.stage = Stage.GONE
        replica.gone_s = now_s

    def _publish(self, now_s: float) -> None:
        self._version += 1
        told = tuple(
            one.engine.replica if one.is_ready else replace(one.engine.replica, state=ReplicaState.DRAINING)
            for one in self.present
        )
        self.router.set_membership(Membership(self._version, told, models=(MODEL,)), now_s)
        self.eligible = self.router.eligible(MODEL)

    # --- afterwards

    def lives(self) -> tuple[tuple[float, float | None], ...]:
        """From when to when each cost GPU time; None: it still does."""
        self.busy_s = sum(replica.engine.busy_s for replica in self._all)
        return tuple((replica.asked_s, replica.gone_s) for replica in self._all)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every booking came back and everybody is in one stage."""
        self.router.check_integrity()
        assert self.router.loads.open_bookings == 0
        for replica in self._all:
            replica.engine.engine.check_integrity()
            assert (replica in self.present) == (replica.stage in (Stage.READY, Stage.DRAINING))
            assert (replica in self._starting) == (replica.stage is Stage.STARTING)
            assert (replica.gone_s is None) == (replica.stage is not Stage.GONE)


def _replica(serial: int, engine: SimulatedEngine) -> Replica:
    name = f"simulated-{serial}"
    return Replica(
        id=ReplicaId(name),
        boot_id=BootId(f"boot-{serial}"),
        model=MODEL,
        role=Role.UNIFIED,
        endpoints=Endpoints(f"http://{name}", load=f"tcp://{name}", kv_events=f"tcp://{name}"),
        block_size=engine.block_size,
        num_blocks=engine.num_blocks,
        max_model_len=min(engine.max_model_len, engine.num_blocks * engine.block_size),
        max_running=engine.max_running,
    )
