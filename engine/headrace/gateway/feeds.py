"""What comes in from the fleet: who its replicas are, and how busy each is.

MembershipSource ── watch ──> FleetFeed ── set_membership ──> context
replicas' ZMQ PUB ── reports ──> LoadFeed ── report ──> router
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import Protocol

import zmq

from headrace.backends.load_publisher import decode_report
from headrace.gateway.context import GatewayContext
from headrace.gateway.following import news
from headrace.gateway.zmq_line import keep_alive
from headrace_router.types import Membership

log = logging.getLogger(__name__)

MEMBERSHIP_FAILED = "membership source failed, serving on from the last view"


class MembershipSource(Protocol):
    """Where the gateway learns of its replicas: the controller, or a fixed list of URLs."""

    async def watch(self, known: Membership | None) -> Membership:
        """Return the membership as soon as it differs from `known` (at once when that is None).

        May return `known` unchanged after a while; raises when the source cannot be reached.
        """
        ...


class FleetFeed:
    """Follows a membership source and a load feed for as long as the gateway runs."""

    def __init__(self, context: GatewayContext, source: MembershipSource) -> None:
        self._context = context
        self._source = source
        self._loads = LoadFeed(context)
        self._task: asyncio.Task[None] | None = None
        self.first = asyncio.Event()  # set once a membership is known

    def start(self) -> None:
        self._loads.start()
        self._task = self._context.loop.create_task(self._follow())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._loads.stop()

    def drain(self) -> None:
        """Take in reports that have already arrived. Called a few times a second, in case an edge was missed."""
        self._loads.drain()

    async def _follow(self) -> None:
        async for membership in news(self._source.watch, MEMBERSHIP_FAILED):
            self._context.set_membership(membership)
            self._loads.follow(membership)
            self.first.set()


class LoadFeed:
    """One ZMQ SUB socket connected to every replica's load publisher.

    Read straight from the loop's selector and drained whole: zmq.asyncio costs a task and a future per message, and
    a fleet sends thousands of messages a second.
    """

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._zmq = zmq.Context()
        self._socket = self._zmq.socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.setsockopt(zmq.RCVHWM, 10_000)
        keep_alive(self._socket)
        self._connected: set[str] = set()

    def start(self) -> None:
        self._context.loop.add_reader(self._socket.fileno(), self.drain)

    def stop(self) -> None:
        self._context.loop.remove_reader(self._socket.fileno())
        self._socket.close(0)
        self._zmq.term()

    def follow(self, membership: Membership) -> None:
        """Listen to exactly the replicas of this membership."""
        wanted = {
            replica.endpoints.load for replica in membership.replicas if replica.endpoints.load is not None
        }
        for endpoint in self._connected - wanted:
            self._socket.disconnect(endpoint)
        for endpoint in wanted - self._connected:
            self._socket.connect(endpoint)
        self._connected = wanted

    def drain(self) -> None:
        """Take in every report that has arrived. The socket's descriptor is edge-triggered: stop only when empty."""
        now_s = monotonic()
        while True:
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                log.warning("load feed: %s", error)
                return
            try:
                self._context.report(decode_report(message), now_s)
            except ValueError as error:
                log.warning("unreadable load report: %s", error)
