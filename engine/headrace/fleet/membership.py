"""The gateway's line to the controller: members and settings by long poll, and what it tells of demand."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from headrace.gateway.settings import GatewaySettings
from headrace_router.demand import Demand
from headrace_router.types import Membership

_POLL_S = 20.0
_LATE_S = 5.0
"""An answer that is so late will not come: it was lost in a cut of the network."""


class ControllerMembership:
    """`watch` raises while the controller is away; the gateway then serves on from its last view."""

    def __init__(self, controller: Any = None) -> None:
        self._controller = controller
        self._reader = secrets.token_hex(8)

    def follow(self, controller: Any) -> None:
        """The controller's actor handle, where it was not known at first."""
        self._controller = controller

    async def watch(self, known: Membership | None) -> Membership:
        """The membership once it differs from `known`, or `known` itself after 20 s."""
        if self._controller is None:
            raise RuntimeError("the controller has not started")
        epoch, version = ("", -1) if known is None else (known.epoch, known.version)
        async with asyncio.timeout(_POLL_S + _LATE_S):
            current: Membership = await self._controller.watch.remote(epoch, version, _POLL_S, self._reader)
        is_same = known is not None and (current.epoch, current.version) == (epoch, version)
        return known if is_same and known is not None else current

    async def settings(self, known: GatewaySettings | None) -> GatewaySettings:
        """The gateway's settings once their version differs from `known`, or `known` itself after 20 s."""
        if self._controller is None:
            raise RuntimeError("the controller has not started")
        version = -1 if known is None else known.version
        async with asyncio.timeout(_POLL_S + _LATE_S):
            current: GatewaySettings = await self._controller.settings.remote(version, _POLL_S)
        return known if known is not None and current.version == version else current

    async def tell(self, demand: Demand) -> None:
        """Report the work that comes. Raises while the controller is away; the next report says it all again."""
        if self._controller is None:
            raise RuntimeError("the controller has not started")
        await self._controller.demand.remote(demand)
