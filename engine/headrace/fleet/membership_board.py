"""The members of the fleet at their newest version, and those who wait for the next one."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterable
from dataclasses import replace

from headrace_router.types import Membership, Replica


class MembershipBoard:
    """Versions only grow; the epoch is drawn anew with each board. Belongs to one event loop."""

    def __init__(self, models: Iterable[str] = ()) -> None:
        """`models`: those that are configured, told with every version, whether or not they have a replica."""
        self._current = Membership(0, (), secrets.token_hex(8), tuple(models))
        self._next = asyncio.Event()  # set, and replaced, with each version

    @property
    def current(self) -> Membership:
        return self._current

    def publish(self, replicas: Iterable[Replica]) -> None:
        """Make a new version if these are other members, and tell everybody who waits."""
        members = tuple(replicas)
        if members == self._current.replicas:
            return
        self._current = replace(self._current, version=self._current.version + 1, replicas=members)
        self._next.set()
        self._next = asyncio.Event()

    async def watch(self, epoch: str, version: int, timeout_s: float) -> Membership:
        """The membership as soon as it is not the known one, or after `timeout_s` whatever it is then."""
        if (epoch, version) == (self._current.epoch, self._current.version):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._next.wait(), timeout_s)
        return self._current
