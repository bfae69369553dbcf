"""What every exchange of one gateway shares."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING

from headrace.config import Gateway
from headrace.gateway.access_log import AccessLog
from headrace.gateway.decisions import DecisionLog
from headrace.gateway.metrics import GatewayMetrics
from headrace.gateway.upstream import Target, UpstreamPool
from headrace_router.router import Router
from headrace_router.types import Membership, Replica, ReplicaId

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
    ) -> None:
        """`prefixes`: for policies that want to know them. `authorization`: the header value that replicas of our own
        fleet ask for, instead of the client's."""
        self.config = config
        self.timeouts = config.timeouts
        self.idle_s = config.timeouts.idle_s
        self.json_depth = config.limits.json_depth
        self.router = router
        self.loop = loop
        self.pool = UpstreamPool(loop, monotonic)
        self.prefixes = prefixes
        self.metrics = GatewayMetrics(router)
        self.access_log = access_log
        self.decisions = DecisionLog()
        self.active: set[Exchange] = set()
        self.targets: dict[ReplicaId, Target] = {}
        self.membership = Membership(0, ())
        self.draining = False
        self.dead_after_s = dead_after_s
        self._authorization = authorization

    def set_membership(self, membership: Membership) -> None:
        """Take the fleet as it now is. Unanswered requests of replicas that went are tried elsewhere."""
        self.membership = membership
        gone = {
            (replica.id, replica.boot_id) for replica in self.router.set_membership(membership, monotonic())
        }
        self.targets = {
            replica.id: self._target(replica, self.targets.get(replica.id)) for replica in membership.replicas
        }
        if self.prefixes is not None:
            self.prefixes.follow(membership)
        self.pool.expire({target.key for target in self.targets.values()})
        for exchange in list(self.active):
            booking = exchange.booking
            if booking is not None and (booking.replica.id, booking.replica.boot_id) in gone:
                exchange.replica_gone()

    def _target(self, replica: Replica, known: Target | None) -> Target:
        if known is not None and known.key == (replica.id, replica.boot_id):
            return known
        return Target(replica, replica.api_key.encode() if replica.api_key else self._authorization)

    def suspend(self, replica: Replica, reason: str) -> None:
        """Keep new requests away for a moment from a replica that refuses connections."""
        if self.router.suspend(replica, reason, monotonic() + SUSPENDED_S):
            log.warning("replica %s is out of the view for %g s: %s", replica.id, SUSPENDED_S, reason)

    def expire(self) -> None:
        """Called a few times a second: end what has waited too long, notice who has fallen silent."""
        now_s = monotonic()
        for replica in self.router.tick(now_s, self.dead_after_s):
            log.warning(
                "replica %s is out of the view: no load report for %g s", replica.id, self.dead_after_s
            )
        for exchange in list(self.active):
            if exchange.deadline_s < now_s:
                exchange.expire()

    def check_integrity(self) -> None:
        """Raise AssertionError unless counts agree: one in-flight request per active exchange of a known model, one
        open booking per active exchange that holds one."""
        self.router.check_integrity()
        holding = sum(
            1 for exchange in self.active if exchange.booking is not None and not exchange.booking.released
        )
        assert self.router.loads.open_bookings == holding, (
            f"{self.router.loads.open_bookings} bookings open, {holding} exchanges hold one"
        )
        assert self.metrics.in_flight <= len(self.active)
