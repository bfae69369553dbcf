"""One replica as a candidate: who it is and how much it has to do.

What policies read is kept as plain numbers, brought up to date by every write (a report, a booking, a release), so
that a decision among a few replicas is a loop over attributes.
"""

from __future__ import annotations

from collections import deque
from math import exp

from headrace_router.cost_model import DEFAULT_PRIOR, CostModel, TimingPrior
from headrace_router.load_columns import LoadColumns
from headrace_router.transfer_model import TransferModel
from headrace_router.types import Iteration, LoadReport, Replica

RESIDENCE_S = 5.0  # believed time that a request holds KV cache, before any has ended
RESIDENCE_MEMORY = 0.05
UNKNOWN_TOKENS = 1e18  # of a KV cache whose size nobody told: never an obstacle
UNKNOWN_PLACES = 1 << 60  # of a batch whose size nobody told
PLACES_PER_WAITING = 8
"""For so many places of a batch one request may wait in the engine, so that none idles until it is known here to be
free and taken again. That takes a step, a report and the way there, 10 to 30 ms; an eighth of the places comes free in
that time only where answers last less than 0.25 s. Whoever waits there waits for about an eighth of an answer, in the
order of coming."""
ROLE_MEMORY_S = 10.0  # how long what a replica computed lately tells what it will compute next
LEARNED_PER_REPORT = 4  # steps; the filter needs far fewer than an engine makes


class Booking:
    """A request's claim on a replica. `LoadTable.release` it exactly once; a second release changes nothing."""

    __slots__ = (
        "alone",
        "answered_at_s",
        "booked_at_s",
        "follower",
        "is_sent",
        "load",
        "moved_tokens",
        "output_tokens",
        "prompt_tokens",
        "released",
        "uncached_tokens",
        "wait_s",
    )

    def __init__(
        self,
        load: ReplicaLoad,
        prompt_tokens: int = 0,
        uncached_tokens: int = 0,
        output_tokens: int = 0,
        booked_at_s: float = 0.0,
    ) -> None:
        self.load = load
        self.prompt_tokens = prompt_tokens
        self.uncached_tokens = uncached_tokens  # to be computed, as predicted
        self.output_tokens = output_tokens  # expected
        self.booked_at_s = booked_at_s
        self.released = False
        self.answered_at_s: float | None = None  # its first token came
        self.wait_s = 0.0  # believed, when it was booked
        self.alone = False  # nothing else ran there when it came
        self.moved_tokens = 0  # of the prompt, computed elsewhere and on their way
        self.is_sent = True  # False while its prompt is still computed elsewhere
        self.follower: Booking | None = None  # of the prefilling half: that of the replica that goes on

    @property
    def replica(self) -> Replica:
        return self.load.replica

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens that were expected to be cached."""
        hit = self.prompt_tokens - self.uncached_tokens
        return hit if hit > 0 else 0


class ReplicaLoad:
    """Policies read, only LoadTable writes. `requests`, `wait_s`, ... are as of the last write."""

    __slots__ = (
        "_arriving",
        "_begun",
        "_bookings",
        "_columns",
        "_elsewhere",
        "_may_wait",
        "_others",
        "_row",
        "_shown",
        "arriving_tokens",
        "backlog_tokens",
        "booked",
        "cost_model",
        "free_tokens",
        "held_tokens",
        "kv_use",
        "last_report",
        "memory_token_s",
        "open_places",
        "prefilled_at_s",
        "prefilled_s",
        "queued",
        "replica",
        "reported_at_s",
        "requests",
        "residence_s",
        "room_tokens",
        "running",
        "shown_hit_tokens",
        "shown_tokens",
        "slot",
        "suspended",
        "suspended_until_s",
        "token_s",
        "transfer_model",
        "turn_s",
        "unreported",
        "unreported_tokens",
        "wait_s",
        "waiting",
    )

    def __init__(self, replica: Replica, slot: int = 0, prior: TimingPrior = DEFAULT_PRIOR) -> None:
        self.replica = replica
        self.slot = slot  # dense number among the present replicas: its place in hits
        self.cost_model = CostModel(prior)
        self.booked = 0  # requests this gateway sent and that have not ended
        self.unreported = (
            0  # of those, the ones that no report (and no answer) has shown yet, and other gateways'
        )
        self.unreported_tokens = 0  # their uncached prompt tokens
        self._elsewhere: deque[tuple[float, int]] = deque()  # other gateways': when, and tokens; oldest first
        self._bookings: dict[Booking, None] = {}  # the unreported ones, oldest first
        self._shown: dict[
            Booking, None
        ] = {}  # those that a report has shown and whose first token is not out
        self.shown_tokens = 0  # their uncached prompt tokens
        self.shown_hit_tokens = 0  # and those expected to be cached
        self._arriving: dict[
            Booking, None
        ] = {}  # those whose prompt is computed elsewhere, not yet shown here
        self.arriving_tokens = 0  # room that they will take
        self.transfer_model = TransferModel()
        self.prefilled_s = 0.0  # spent on prompts of late: decays with `ROLE_MEMORY_S`
        self.prefilled_at_s = 0.0
        self.last_report: LoadReport | None = None
        self.reported_at_s: float | None = None  # None where no reports are to be expected
        self.suspended: str | None = None  # why it is out of the view, None while it is in
        self.suspended_until_s = 0.0
        self.residence_s = RESIDENCE_S  # from the start of prefill to the end, learned
        self.running = 0  # as reported
        self.waiting = 0  # as reported
        self.kv_use = 0.0  # as reported, 0..1
        # Derived, brought up to date by `refresh`:
        self.requests = 0  # running or waiting there, as far as is known
        self.queued = 0  # of those, not yet running
        self.backlog_tokens = 0  # uncached prompt tokens that wait or are being prefilled
        self.token_s = self.cost_model.seconds_per_token()  # seconds per token of prefill, now
        self.wait_s = 0.0  # until the backlog is prefilled
        self.free_tokens = UNKNOWN_TOKENS  # that the KV cache can take before somebody must end
        self.room_tokens = UNKNOWN_TOKENS  # of the free ones, what the backlog leaves
        self.held_tokens = 0.0  # in the KV cache by requests that run
        self.memory_token_s = 0.0  # seconds until one more token of KV cache comes free
        self.open_places = UNKNOWN_PLACES  # requests that may still be sent, a few of them to wait there
        self.turn_s = 0.0  # until the next request would begin: the backlog is prefilled and a place is free
        self._begun = 0  # answered since the last report: they run, though it does not show them
        self._others = 0  # of the requests that run or wait there, those that are not ours
        self._may_wait = 0  # in the engine for a place
        self._columns: LoadColumns | None = None
        self._row = 0
        self.refresh()

    # --- read path

    def memory_wait_s(self, prompt_tokens: int) -> float:
        """Seconds until the KV cache has room for the backlog and this prompt: 0 where it has already.

        Requests hold `held_tokens` and stay `residence_s`; in a steady flow they give back held / residence tokens
        per second (Little's law).
        """
        missing = prompt_tokens - self.room_tokens
        return missing * self.memory_token_s if missing > 0 else 0.0

    def prefill_share(self, now_s: float) -> float:
        """Of its time, what it has spent on prompts of late, 0..1."""
        share = self.prefilled_s / ROLE_MEMORY_S * exp((self.prefilled_at_s - now_s) / ROLE_MEMORY_S)
        return share if share < 1.0 else 1.0

    # --- write path, for LoadTable

    def attach(self, columns: LoadColumns | None, row: int) -> None:
        """Keep `row` of `columns` up to date from now on."""
        self._columns, self._row = columns, row
        self.refresh()

    def add(self, booking: Booking) -> None:
        """One more request. A replica that never reports shows it with its first token."""
        booking.alone = self.booked == 0
        booking.wait_s = self.turn_s
        self.booked += 1
        self._bookings[booking] = None
        self.unreported += 1
        self.unreported_tokens += booking.uncached_tokens
        # What `refresh` would do: the pace of prefill does not depend on what only waits.
        backlog = self.backlog_tokens = self.backlog_tokens + booking.uncached_tokens
        self.room_tokens = self.free_tokens - backlog - self.arriving_tokens
        self.wait_s = backlog * self.token_s
        self.open_places -= 1
        self.turn_s = self.wait_s if self.open_places > self._may_wait else self._until_begun_s()
        reported = self.running + self.waiting + self.unreported + len(self._arriving)
        self.requests = self.booked if self.booked > reported else reported
        self.queued += 1
        if self._columns is not None:
            self._write_row()

    def expect(self, booking: Booking) -> None:
        """One more request that comes with `moved_tokens` computed: room is taken for it, the queue is no longer."""
        booking.wait_s = 0.0
        self.booked += 1
        self._arriving[booking] = None
        self.arriving_tokens += booking.moved_tokens
        self.refresh()

    def hear(self, uncached_tokens: int, now_s: float) -> None:
        """Another gateway has sent a request here. It counts until a report shows it: what becomes of it then is in the
        reports, so nobody has to tell its end, and a gateway that dies leaves nothing behind."""
        self._elsewhere.append((now_s, uncached_tokens))
        self.unreported += 1
        self.unreported_tokens += uncached_tokens
        self._others += 1
        self.refresh()

    def drop(self, booking: Booking, now_s: float) -> None:
        """The request has ended. Its time in the queue is no part of its stay: it held no memory there, and counted, a
        replica would look the slower to come free the longer its queue is."""
        self.booked -= 1
        self._forget(booking)
        self._unshow(booking)
        self._arrived(booking)
        if booking.answered_at_s is not None:
            stay_s = now_s - booking.answered_at_s + booking.uncached_tokens * self.token_s
        else:
            stay_s = now_s - booking.booked_at_s - booking.wait_s
        if stay_s > 0:
            self.residence_s += RESIDENCE_MEMORY * (min(stay_s, 10 * self.residence_s) - self.residence_s)
        self.refresh()

    def settle(self, booking: Booking) -> bool:
        """Its prompt is computed: it counts as running, no longer as backlog. False when it already did."""
        settled = self._forget(booking)
        if settled:
            self._begun += 1
        if self._arrived(booking) or self._unshow(booking) or settled:
            self.refresh()
        return settled

    def take(self, report: LoadReport, now_s: float, settled_before_s: float) -> None:
        """A newer report. It shows what was booked before `settled_before_s`."""
        self.last_report = report
        self.reported_at_s = now_s
        self.running, self.waiting = report.running, report.waiting
        self.kv_use = min(1.0, max(0.0, report.kv_use))
        bookings = self._bookings
        while bookings:
            oldest = next(iter(bookings))
            if oldest.booked_at_s > settled_before_s:
                break
            self._forget(oldest)
            self._show(oldest)
        elsewhere = self._elsewhere
        while elsewhere and elsewhere[0][0] <= settled_before_s:
            self.unreported -= 1
            self.unreported_tokens -= elsewhere.popleft()[1]
        self._begun = 0
        self._others = max(report.running + report.waiting - self.booked, len(elsewhere))
        if self._arriving:
            for booking in [b for b in self._arriving if b.is_sent and b.booked_at_s <= settled_before_s]:
                self._arrived(booking)
                self._show(booking)
        if report.transfers:
            self.transfer_model.observe(report.transfers)
        if report.iterations:
            self.cost_model.observe(_telling(report))
            if tokens := sum(step.prefill_tokens for step in report.iterations):
                self.prefilled_s = (
                    self.prefilled_s * exp((self.prefilled_at_s - now_s) / ROLE_MEMORY_S)
                    + tokens * self.cost_model.seconds_per_token()
                )
                self.prefilled_at_s = now_s
        self.refresh()

    def _forget(self, booking: Booking) -> bool:
        if booking not in self._bookings:
            return False
        del self._bookings[booking]
        self.unreported -= 1
        self.unreported_tokens -= booking.uncached_tokens
        return True

    def _arrived(self, booking: Booking) -> bool:
        if booking not in self._arriving:
            return False
        del self._arriving[booking]
        self.arriving_tokens -= booking.moved_tokens
        return True

    def _show(self, booking: Booking) -> None:
        self._shown[booking] = None
        self.shown_tokens += booking.uncached_tokens
        self.shown_hit_tokens += booking.hit_tokens

    def _unshow(self, booking: Booking) -> bool:
        if booking not in self._shown:
            return False
        del self._shown[booking]
        self.shown_tokens -= booking.uncached_tokens
        self.shown_hit_tokens -= booking.hit_tokens
        return True

    def _reported_backlog(self, reported: int) -> int:
        """`reported` less what it counts although it is cached.

        vLLM's frontend counts a waiting prompt in full: what the cache has of it is known to the scheduler alone,
        and at the end of its step. We expected the hits when we sent it. An engine that leaves hits out by itself
        reports no more than our uncached tokens, and is believed.
        """
        expected = reported if reported < self.shown_tokens else self.shown_tokens
        without_hits = reported - self.shown_hit_tokens
        return without_hits if without_hits > expected else expected

    def refresh(self) -> None:
        """Bring the derived numbers up to date."""
        report = self.last_report
        booked, backlog = self.booked, self.unreported_tokens
        # A report also counts other gateways' requests; our own bookings are exact but only ours.
        reported = self.running + self.waiting + self.unreported + len(self._arriving)
        self.requests = booked if booked > reported else reported
        self.queued = self.waiting + self.unreported
        if report is not None:
            backlog += self._reported_backlog(report.backlog_tokens)
        self.backlog_tokens = backlog
        replica = self.replica
        if replica.num_blocks is not None and replica.block_size is not None:
            capacity = replica.num_blocks * replica.block_size
            held = self.held_tokens = self.kv_use * capacity
            self.free_tokens = capacity - held
            self.memory_token_s = self.residence_s / max(held, 1.0)
        self.room_tokens = self.free_tokens - backlog - self.arriving_tokens
        running = self.running if report is not None else booked - self.unreported
        token_s = self.token_s = self.cost_model.seconds_per_token(running, self.held_tokens)
        self.wait_s = backlog * token_s
        places = replica.max_running
        if places is None:
            self.open_places, self._may_wait = UNKNOWN_PLACES, 0
        else:
            # By reports or by bookings, whichever are fewer: a report may show what also counts as unreported, and a
            # client that reads slowly keeps a booking when its place is free again.
            shown, known = reported + self._begun, booked + self._others
            self._may_wait = -(-places // PLACES_PER_WAITING)
            self.open_places = places + self._may_wait - (shown if shown < known else known)
        self.turn_s = self.wait_s if self.open_places > self._may_wait else self._until_begun_s()
        if self._columns is not None:
            self._write_row()

    def _until_begun_s(self) -> float:
        """Where all places are taken: for the next request, until what waits is prefilled and a place has come free.
        One does every residence / places seconds (Little's law)."""
        missing = 1 + self._may_wait - self.open_places
        return max(self.wait_s, missing * self.residence_s / (self.replica.max_running or 1))

    def _write_row(self) -> None:
        assert self._columns is not None
        self._columns.write(
            self._row,
            (
                self.turn_s,
                self.token_s,
                self.requests,
                self.queued,
                self.room_tokens,
                self.memory_token_s,
            ),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless the unreported bookings add up."""
        name = self.replica.id
        unreported = len(self._bookings) + len(self._elsewhere)
        assert self.unreported == unreported, f"{name}: {self.unreported} of {unreported}"
        tokens = sum(booking.uncached_tokens for booking in self._bookings)
        tokens += sum(tokens for _, tokens in self._elsewhere)
        assert self.unreported_tokens == tokens, f"{name}: {self.unreported_tokens} tokens, not {tokens}"
        shown = (
            sum(booking.uncached_tokens for booking in self._shown),
            sum(booking.hit_tokens for booking in self._shown),
        )
        held = (self.shown_tokens, self.shown_hit_tokens)
        assert held == shown, f"{name}: {held} shown tokens, not {shown}"
        if self.replica.max_running is not None:
            reported = self.running + self.waiting + self.unreported + self._begun + len(self._arriving)
            left = self.replica.max_running + self._may_wait - min(reported, self.booked + self._others)
            assert self.open_places == left, f"{name}: {self.open_places} open places, not {left}"
        arriving = sum(booking.moved_tokens for booking in self._arriving)
        assert self.arriving_tokens == arriving, f"{name}: {self.arriving_tokens} arriving, not {arriving}"
        places = (self._bookings, self._shown, self._arriving)
        assert len(self._bookings | self._shown | self._arriving) == sum(map(len, places)), f"{name}: twice"
        assert self.booked >= sum(map(len, places)), f"{name}: more known than booked"
        assert self.booked >= len(self._bookings), (
            f"{name}: {len(self._bookings)} of {self.booked} unreported"
        )
        assert not any(booking.released for place in places for booking in place), (
            f"{name} holds a released booking"
        )


def _telling(report: LoadReport) -> list[Iteration]:
    """The steps worth learning from: the last few that prefilled, filled up with the last that only decoded."""
    iterations = report.iterations
    if len(iterations) <= LEARNED_PER_REPORT:
        return list(iterations)
    prefills = [step for step in iterations if step.prefill_tokens > 0][-LEARNED_PER_REPORT + 1 :]
    decodes = [step for step in iterations if step.prefill_tokens == 0]
    return prefills + decodes[len(prefills) - LEARNED_PER_REPORT :]
