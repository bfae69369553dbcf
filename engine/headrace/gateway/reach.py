"""Reaching a replica: over a kept-alive connection or a new one, in time, and once more where a kept one was stale.

    reach ──── the pool has one ─────────────────> sent ──> head, body, complete
       └─ none: connect, until the deadline ──> sent   └─ lost before the head, on a kept one: connect again
                   └─ refused or too late: lost             otherwise: lost

Both halves of a request go this way. What receives their answers (`Answer`, `FirstHalf`) inherits from `Reach`: an
object in between would be one more for each request to pay for.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from headrace.gateway.upstream import Receiver, Target, UpstreamConnection

if TYPE_CHECKING:
    from headrace.gateway.context import GatewayContext


class Errand(Protocol):
    """The exchange, as it knows it who goes to a replica for it."""

    deadline_s: float  # `Reach.gives_up` is to be asked when it has passed

    def goes_out(self) -> None:
        """A replica gets the request, or its first half."""
        ...

    def fail(self, error: Exception) -> None:
        """The request cannot be sent, and that is no replica's fault."""
        ...


class Reach(Receiver):
    """The part of a receiver that sends. For one replica at a time; for another one after `let_go`."""

    _errand: Errand
    _context: GatewayContext
    _connection: UpstreamConnection | None = None
    _connecting: asyncio.Task[None] | None = None

    def reach(self, target: Target) -> None:
        """Send the request, now or once there is a connection."""
        connection = self._context.pool.take(target)
        if connection is not None:
            self._send(connection, target)
        else:
            self._connect(target)

    def gives_up(self) -> bool:
        """The deadline has passed: True, and the replica lost, where a connection was what did not come."""
        if self._connecting is None:
            return False
        self.let_go()
        self._lost("no connection within the connect timeout", suspend=True)
        return True

    def let_go(self) -> None:
        """Stop at once whatever is under way; nothing more is received. Safe at any time."""
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.abort()

    def pause(self) -> None:
        """Receive nothing more until `resume`."""
        if self._connection is not None:
            self._connection.pause_reading()

    def resume(self) -> None:
        """Undo `pause`."""
        if self._connection is not None:
            self._connection.resume_reading()

    def _connect(self, target: Target) -> None:
        self._errand.deadline_s = monotonic() + self._context.timeouts.connect_s
        self._connecting = self._context.loop.create_task(self._open(target))

    async def _open(self, target: Target) -> None:
        try:
            connection = await self._context.pool.connect(target)
        except OSError as error:
            self._connecting = None
            self._lost(f"cannot connect: {error.strerror or error}", suspend=True)
            return
        self._connecting = None
        try:
            self._send(connection, target)
        except Exception as error:
            self._errand.fail(error)

    def _send(self, connection: UpstreamConnection, target: Target) -> None:
        self._errand.goes_out()
        self._connection = connection
        self._errand.deadline_s = monotonic() + self._context.timeouts.first_byte_s
        connection.send(self, self._request(target))

    def upstream_lost(self, reason: str) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and connection.exchanges > 0 and not self._has_begun:
            # A kept-alive connection that the replica closed as we wrote: the same replica, on a fresh connection.
            target = self._context.targets.get(connection.key[0])
            if target is not None:
                self._connect(target)
                return
        self._lost(reason)

    # --- what each of the two says for itself, besides taking the answer

    @property
    @abstractmethod
    def _has_begun(self) -> bool:
        """Whether the replica has begun to answer: it must not be asked twice."""

    @abstractmethod
    def _request(self, target: Target) -> bytes:
        """The whole HTTP request."""

    @abstractmethod
    def _lost(self, reason: str, *, suspend: bool = False) -> None:
        """The replica has failed, or (`suspend`) takes no connections. Nothing is under way any more."""
