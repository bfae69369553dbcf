"""The gateway's line to the controller: a MembershipSource over its long poll."""

from __future__ import annotations

from typing import Any

from headrace_router.types import Membership

_POLL_S = 20.0


class ControllerMembership:
    """`watch` raises while the controller is away; the gateway then serves on from its last view."""

    def __init__(self, controller: Any = None) -> None:
        self._controller = controller

    def follow(self, controller: Any) -> None:
        """The controller's actor handle, where it was not known at first."""
        self._controller = controller

    async def watch(self, known: Membership | None) -> Membership:
        """The membership once it differs from `known`, or `known` itself after 20 s."""
        if self._controller is None:
            raise RuntimeError("the controller has not started")
        epoch, version = ("", -1) if known is None else (known.epoch, known.version)
        current: Membership = await self._controller.watch.remote(epoch, version, _POLL_S)
        is_same = known is not None and (current.epoch, current.version) == (epoch, version)
        return known if is_same and known is not None else current
