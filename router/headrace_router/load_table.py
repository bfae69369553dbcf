"""What each replica has to do: its last report and what this gateway has booked on it.

Write path: `report` (from the engine) and `book`/`release` (from routing). Read path: `ReplicaLoad`, which policies
see. A booking is released exactly once however its request ends; `check_integrity` states the conservation law.
"""

from __future__ import annotations

from headrace_router.types import LoadReport, Replica


class ReplicaLoad:
    """One replica as a candidate: who it is and how much it has to do. Policies read, only LoadTable writes."""

    __slots__ = ("booked", "last_report", "replica", "reported_at_s", "suspended", "suspended_until_s")

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.booked = 0  # requests this gateway sent and that have not ended
        self.last_report: LoadReport | None = None
        self.reported_at_s: float | None = None  # None where no reports are to be expected
        self.suspended: str | None = None  # why it is out of the view, None while it is in
        self.suspended_until_s = 0.0

    @property
    def requests(self) -> int:
        """Requests running or waiting there, as far as is known.

        The larger of both views: a report also counts other gateways' requests but is up to 100 ms old; our own
        bookings are exact but only ours.
        """
        report = self.last_report
        if report is None:
            return self.booked
        reported = report.running + report.waiting
        return self.booked if self.booked > reported else reported


class Booking:
    """A request's claim on a replica. `LoadTable.release` it exactly once; a second release changes nothing."""

    __slots__ = ("load", "released")

    def __init__(self, load: ReplicaLoad) -> None:
        self.load = load
        self.released = False

    @property
    def replica(self) -> Replica:
        return self.load.replica


class LoadTable:
    """Loads of the present replicas. Not thread-safe: one event loop owns it."""

    def __init__(self) -> None:
        self._loads: dict[str, ReplicaLoad] = {}
        self._open_bookings = 0

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
        released against it, never against the successor.
        """
        before = self._loads
        self._loads = {}
        for replica in replicas:
            load = before.get(replica.id)
            if load is not None and load.replica.boot_id == replica.boot_id:
                load.replica = replica
                del before[replica.id]
            else:
                load = ReplicaLoad(replica)
                if replica.endpoints.load is not None:
                    load.reported_at_s = now_s  # its silence is counted from here
            self._loads[replica.id] = load
        return list(before.values())

    def report(self, report: LoadReport, now_s: float) -> bool:
        """Take in a report. Returns False, changing nothing, when it is of another boot or out of order."""
        load = self._loads.get(report.replica_id)
        if load is None or load.replica.boot_id != report.boot_id:
            return False
        last = load.last_report
        if last is not None and report.sequence <= last.sequence:
            return False
        load.last_report = report
        load.reported_at_s = now_s
        return True

    def book(self, load: ReplicaLoad) -> Booking:
        """Count a request on a replica until the booking is released."""
        load.booked += 1
        self._open_bookings += 1
        return Booking(load)

    def release(self, booking: Booking) -> None:
        """Give a booking back. Safe to call again."""
        if booking.released:
            return
        booking.released = True
        booking.load.booked -= 1
        self._open_bookings -= 1

    @property
    def open_bookings(self) -> int:
        """Bookings not yet released, on present and departed replicas together."""
        return self._open_bookings

    def check_integrity(self) -> None:
        """Raise AssertionError unless bookings add up: none negative, present ones at most all open ones."""
        present = 0
        for load in self._loads.values():
            assert load.booked >= 0, f"{load.replica.id} has {load.booked} bookings"
            present += load.booked
        assert present <= self._open_bookings, f"{present} booked on replicas, {self._open_bookings} open"
