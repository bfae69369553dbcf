"""The Ray actor that runs a gateway on a node, as `headrace serve` does in its own process.

    controller ── start() ──> binds, spawns the gateway processes; url    idempotent: a restarted controller asks again
               ── watch() ──> returns when it was stopped; breaks when this process has died
               ── stop(drain_s) ──> nothing new, what runs has so long

The gateway's processes end with this one, and it ends with its node.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from headrace.errors import FatalStartError, HeadraceError
from headrace.fleet.front import url_of
from headrace.fleet.membership import ControllerMembership
from headrace.fleet.replica import StartFailure
from headrace.gateway.group import GatewayGroup
from headrace.gateway.settings import GatewaySettings

_WILDCARDS = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class GatewayOrder:
    """All that a gateway actor needs to know."""

    settings: GatewaySettings  # its gateway's host and port are where it listens
    internal_token: str
    address: str  # of its node, by which others reach it


class GatewayActor:
    """One node's gateway. Async: every method runs on the actor's loop."""

    def __init__(self, order: GatewayOrder, controller: Any) -> None:
        self._order = order
        self._controller = controller
        self._group: GatewayGroup | None = None
        self._starting: asyncio.Task[str | StartFailure] | None = None
        self._stopped = asyncio.Event()

    async def start(self) -> str | StartFailure:
        """Serve, or join the start under way. The URL at which the node's gateway is reached; kept."""
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        return await asyncio.shield(self._starting)

    async def watch(self) -> None:
        """Return once it has been stopped."""
        await self._stopped.wait()

    async def stop(self, drain_s: float) -> None:
        """Accept nothing new, let running requests finish for at most `drain_s`, cut the rest."""
        if self._group is not None:
            await self._group.stop(drain_s)
        self._stopped.set()

    async def _start(self) -> str | StartFailure:
        order = self._order
        source = ControllerMembership(self._controller)
        # Processes of their own, whatever their number: Ray's threads and tokens shall not wait for each other.
        group = self._group = GatewayGroup(
            order.settings, source, internal_token=order.internal_token, changes=source, demand=source
        )
        try:
            host, port = group.bind()
            await group.start()
        except HeadraceError as error:
            return StartFailure(error.message, isinstance(error, FatalStartError))
        except Exception as error:  # supervision boundary: whatever it is, the controller decides
            return StartFailure(f"{type(error).__name__}: {error}".splitlines()[0][:300], is_fatal=False)
        return url_of(order.address if host in _WILDCARDS else host, port)
