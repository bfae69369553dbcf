"""What every exchange of one gateway shares."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING

from headrace.backends.kv_connectors import HAND_OVER
from headrace.config import Gateway
from headrace.gateway.access_log import AccessLog
from headrace.gateway.admission import Admission
from headrace.gateway.decisions import DecisionLog
from headrace.gateway.http_request import meanings
from headrace.gateway.metrics import GatewayMetrics
from headrace.gateway.upstream import Target, UpstreamPool
from headrace_router.load_table import Booking
from headrace_router.router import Router
from headrace_router.types import BootId, LoadReport, Membership, Replica, ReplicaId

if TYPE_CHECKING:
    from headrace.gateway.prefixes import Prefixes
    from headrace.gateway.relay import Exchange


log = logging.getLogger(__name__)

# A replica that refused a connection is left alone this long. Membership usually settles the matter sooner.
SUSPENDED_S = 1.0


class GatewayContext:
    """Router, connections, measures and the exchanges under way. One event loop owns it."""

    def __init__(
        self,
        config: Gateway,
        router: Router,
        loop: asyncio.AbstractEventLoop,
        *,
        prefixes: Prefixes | None = None,
        authorization: bytes | None = None,
        dead_after_s: float = 0.8,
        access_log: AccessLog | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """`prefixes`: for policies that want to know them. `authorization`: the header value that replicas of our own
        fleet ask for, instead of the client's. `weights` of the configured tenants."""
        self.config = config
        self.timeouts = config.timeouts
        self.idle_s = config.timeouts.idle_s
        self.json_depth = config.limits.json_depth
        self.router = router
        self.loop = loop
        self.pool = UpstreamPool(loop, monotonic)
        self.prefixes = prefixes
        self.metrics = GatewayMetrics(router)
        self.admission = Admission(config.queue, router, loop, weights)
        self.header_meanings = meanings(config.queue.tenant_header, config.queue.deadline_header)
        self.access_log = access_log
        self.decisions = DecisionLog()
        self.active: set[Exchange] = set()
        self.targets: dict[ReplicaId, Target] = {}
        self.handing_over: frozenset[str] = (
            frozenset()
        )  # models whose replicas may compute prompts for each other
        self.releasing: set[asyncio.Task[None]] = set()  # replicas being told to free blocks
        self.membership = Membership(0, ())
        self.draining = False
        self._silent: dict[
            tuple[ReplicaId, BootId], float
        ] = {}  # since when, until their requests have moved
        self.dead_after_s = dead_after_s
        self._authorization = authorization

    def go_by(self, config: Gateway, dead_after_s: float, weights: Mapping[str, float]) -> None:
        """Take other settings. What is under way keeps what it has begun with."""
        self.config = config
        self.timeouts = config.timeouts
        self.idle_s = config.timeouts.idle_s
        self.json_depth = config.limits.json_depth
        self.dead_after_s = dead_after_s
        self.admission.go_by(config.queue, weights)
        self.header_meanings = meanings(config.queue.tenant_header, config.queue.deadline_header)

    def know_prefixes(self, prefixes: Prefixes) -> None:
        """From now on prompts are known by more than their size."""
        self.prefixes = prefixes
        self.router.know(prefixes.index, prefixes.texts)
        prefixes.follow(self.membership)

    def set_membership(self, membership: Membership) -> None:
        """Take the fleet as it now is. Unanswered requests of replicas that went are tried elsewhere."""
        self.membership = membership
        gone = {
            (replica.id, replica.boot_id) for replica in self.router.set_membership(membership, monotonic())
        }
        self.targets = {
            replica.id: self._target(replica, self.targets.get(replica.id)) for replica in membership.replicas
        }
        self.handing_over = frozenset(
            replica.model for replica in membership.replicas if replica.kv_connector in HAND_OVER
        )
        if self.prefixes is not None:
            self.prefixes.follow(membership)
        self.admission.follow(membership.coming, {replica_id for replica_id, _ in gone})
        self.pool.expire({target.key for target in self.targets.values()})
        for exchange in list(self.active):
            exchange.replicas_gone(gone)

    def _target(self, replica: Replica, known: Target | None) -> Target:
        if known is not None and known.key == (replica.id, replica.boot_id):
            return known
        return Target(replica, replica.api_key.encode() if replica.api_key else self._authorization)

    def has_boot(self, replica_id: ReplicaId, boot_id: BootId) -> bool:
        """Whether this start of a replica is the one that membership shows."""
        target = self.targets.get(replica_id)
        return target is not None and target.key == (replica_id, boot_id)

    def report(self, report: LoadReport, now_s: float) -> None:
        """A replica says what it has to do."""
        if not self.router.report(report, now_s):
            return
        if report.transfers:
            self.metrics.received(report.replica_id, report.transfers)
        if self.admission.lines and (load := self.router.loads.get(report.replica_id)) is not None:
            self.admission.freed(load)

    def answered(self, booking: Booking, now_s: float) -> None:
        """The booking's first token is out: its replica has less to do."""
        self.router.answered(booking, now_s)
        if self.admission.lines:
            self.admission.freed(booking.load)

    def release(self, booking: Booking, now_s: float) -> None:
        """Whatever held the booking has ended."""
        self.router.release(booking, now_s)
        if self.admission.lines:
            self.admission.freed(booking.load)

    def suspend(self, replica: Replica, reason: str) -> None:
        """Keep new requests away for a moment from a replica that refuses connections."""
        if self.router.suspend(replica, reason, monotonic() + SUSPENDED_S):
            log.warning("replica %s is out of the view for %g s: %s", replica.id, SUSPENDED_S, reason)

    def expire(self) -> None:
        """Called a few times a second: end what has waited too long, notice who has fallen silent."""
        now_s = monotonic()
        for replica in self.router.tick(now_s, self.dead_after_s):
            self._silent[replica.id, replica.boot_id] = now_s
            log.warning(
                "replica %s is out of the view: no load report for %g s", replica.id, self.dead_after_s
            )
        self._leave_silent(now_s)
        for exchange in list(self.active):
            if exchange.deadline_s < now_s:
                exchange.expire()
        self.admission.tick()

    def _leave_silent(self, now_s: float) -> None:
        """Move unanswered requests away from replicas that have stayed silent for as long again.

        Not at once: what they have computed would be lost to a pause of a busy machine.
        """
        for key, since_s in list(self._silent.items()):
            if not self.router.is_suspended(*key):
                del self._silent[key]
            elif now_s - since_s >= self.dead_after_s:
                del self._silent[key]
                for exchange in list(self.active):
                    exchange.replica_silent({key})

    def check_integrity(self) -> None:
        """Raise AssertionError unless counts agree: one in-flight request per active exchange of a known model, open
        bookings are those that active exchanges hold, and whoever waits is an active exchange that holds none."""
        self.router.check_integrity()
        holding = sum(exchange.open_bookings for exchange in self.active)
        assert self.router.loads.open_bookings == holding, (
            f"{self.router.loads.open_bookings} bookings open, {holding} held by exchanges"
        )
        assert self.metrics.in_flight <= len(self.active)
        self.admission.check_integrity()
        waiting = {id(held.waiter) for line in self.admission.lines.values() for held in line}
        known = {id(exchange) for exchange in self.active if exchange.is_held}
        assert waiting == known, f"{len(waiting)} wait in line, {len(known)} exchanges wait"
        assert not any(exchange.open_bookings for exchange in self.active if exchange.is_held)
