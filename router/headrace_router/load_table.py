"""What each replica has to do: its last report and what this gateway has booked on it since.

Write path: `report` (from the engine), `book`, `answered` and `release` (from routing). Read path: `ReplicaLoad`, which
policies see. A booking is released exactly once however its request ends; `check_integrity` states the conservation
law.
"""

from __future__ import annotations

from heapq import heappop, heappush

from headrace_router.cost_model import DEFAULT_PRIOR, TimingPrior
from headrace_router.replica_load import Booking, ReplicaLoad
from headrace_router.types import Iteration, LoadReport, Replica

__all__ = ["Booking", "LoadTable", "ReplicaLoad"]

SETTLE_S = 0.02
"""From booking a request to a report that shows it: the way there, parsing, tokenising. A booking younger than that
when a report arrives counts on until the next one; counting it twice for a moment herds nobody, missing it does."""


class LoadTable:
    """Loads of the present replicas. Not thread-safe: one event loop owns it."""

    def __init__(self, prior: TimingPrior = DEFAULT_PRIOR) -> None:
        self._prior = prior
        self._loads: dict[str, ReplicaLoad] = {}
        self._open_bookings = 0
        self._free_slots: list[int] = []  # heap, all below `_num_slots`
        self._num_slots = 0

    def __len__(self) -> int:
        return len(self._loads)

    def get(self, replica_id: str) -> ReplicaLoad | None:
        """The load of a present replica."""
        return self._loads.get(replica_id)

    def all(self) -> list[ReplicaLoad]:
        """Every present replica, in the order of membership."""
        return list(self._loads.values())

    def replace(self, replicas: tuple[Replica, ...], now_s: float) -> list[ReplicaLoad]:
        """Make `replicas` the present ones and return the loads of those that went.

        A replica that restarted (new boot id) starts from zero; bookings on its predecessor stay valid and are
        released against it, never against the successor. Slots are dense: the lowest free one is given first.
        """
        before = self._loads
        kept = {
            replica.id
            for replica in replicas
            if (load := before.get(replica.id)) is not None and load.replica.boot_id == replica.boot_id
        }
        gone = [load for name, load in before.items() if name not in kept]
        for load in gone:
            load.attach(None, 0)
            heappush(self._free_slots, load.slot)
        self._loads = {}
        for replica in replicas:
            if replica.id in self._loads:
                continue  # named twice: the first stands
            if replica.id in kept:
                load = before[replica.id]
                load.replica = replica
                load.refresh()
            else:
                load = ReplicaLoad(replica, self._take_slot(), self._prior)
                if replica.endpoints.load is not None:
                    load.reported_at_s = now_s  # its silence is counted from here
            self._loads[replica.id] = load
        return gone

    def _take_slot(self) -> int:
        if self._free_slots:
            return heappop(self._free_slots)
        self._num_slots += 1
        return self._num_slots - 1

    def report(self, report: LoadReport, now_s: float) -> bool:
        """Take in a report. Returns False, changing nothing, when it is of another boot or out of order."""
        load = self._loads.get(report.replica_id)
        if load is None or load.replica.boot_id != report.boot_id:
            return False
        last = load.last_report
        if last is not None and report.sequence <= last.sequence:
            return False
        load.take(report, now_s, now_s - SETTLE_S)
        return True

    def book(
        self,
        load: ReplicaLoad,
        prompt_tokens: int = 0,
        uncached_tokens: int = 0,
        output_tokens: int = 0,
        now_s: float = 0.0,
    ) -> Booking:
        """Count a request on a replica until the booking is released."""
        booking = Booking(load, prompt_tokens, uncached_tokens, output_tokens, now_s)
        load.add(booking)
        self._open_bookings += 1
        return booking

    def book_pair(
        self, prefill: Booking, load: ReplicaLoad, moved_tokens: int, output_tokens: int, now_s: float
    ) -> Booking:
        """Count a request also on the replica that goes on with it, which receives `moved_tokens` of its prompt from
        the one that `prefill` is on. The two are released independently."""
        booking = Booking(load, prefill.prompt_tokens, 1, output_tokens, now_s)
        booking.moved_tokens = moved_tokens
        booking.is_sent = False
        prefill.follower = booking
        load.expect(booking)
        self._open_bookings += 1
        return booking

    def booked_elsewhere(self, replica_id: str, boot_id: str, uncached_tokens: int, now_s: float) -> bool:
        """Another gateway has sent a request to a replica. It counts until the next report that can show it.

        False, changing nothing, where the replica is another by now or reports nothing.
        """
        load = self._loads.get(replica_id)
        if load is None or load.replica.boot_id != boot_id or load.last_report is None:
            return False
        load.hear(uncached_tokens, now_s)
        return True

    def answered(self, booking: Booking, now_s: float) -> None:
        """The first token is out, so the prompt is computed. Safe to call again, or never.

        Of a replica that reports nothing this is all there is to learn its pace from: a request that found it idle
        took about one step.
        """
        load = booking.load
        if booking.answered_at_s is None:
            booking.answered_at_s = now_s
            self._send_follower(booking, now_s)
        if booking.released or not load.settle(booking) or load.last_report is not None:
            return
        if booking.alone and booking.uncached_tokens > 0 and now_s > booking.booked_at_s:
            load.cost_model.observe((Iteration(now_s - booking.booked_at_s, booking.uncached_tokens, 0),))
            load.refresh()

    def release(self, booking: Booking, now_s: float = 0.0) -> None:
        """Give a booking back. Safe to call again."""
        if booking.released:
            return
        booking.released = True
        self._send_follower(booking, now_s)
        booking.load.drop(booking, now_s)
        self._open_bookings -= 1

    def _send_follower(self, booking: Booking, now_s: float) -> None:
        """The prompt is computed: from now on the decoding replica's reports may show the request."""
        follower = booking.follower
        if follower is not None and not follower.is_sent:
            follower.is_sent = True
            follower.booked_at_s = now_s

    @property
    def open_bookings(self) -> int:
        """Bookings not yet released, on present and departed replicas together."""
        return self._open_bookings

    def check_integrity(self) -> None:
        """Raise AssertionError unless bookings add up (none negative, present ones at most all open ones) and slots
        are dense and nobody's twice."""
        present = 0
        for load in self._loads.values():
            assert load.booked >= 0, f"{load.replica.id} has {load.booked} bookings"
            load.check_integrity()
            present += load.booked
        assert present <= self._open_bookings, f"{present} booked on replicas, {self._open_bookings} open"
        slots = sorted([load.slot for load in self._loads.values()] + self._free_slots)
        assert slots == list(range(self._num_slots)), f"slots {slots} of {self._num_slots}"
