"""The members of the fleet at their newest version, those who wait for the next one, and who has heard of which."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterable
from dataclasses import replace
from time import monotonic

from headrace_router.types import Membership, Replica

FORGET_AFTER_S = 60.0
"""A reader that has not come back for so long has gone; a long poll takes at most half of it."""


class MembershipBoard:
    """Versions only grow; the epoch is drawn anew with each board. Belongs to one event loop."""

    def __init__(self, models: Iterable[str] = ()) -> None:
        """`models`: those that are configured, told with every version, whether or not they have a replica."""
        self._current = Membership(0, (), secrets.token_hex(8), tuple(models))
        self._next = asyncio.Event()  # set, and replaced, with each version
        self._heard: dict[str, tuple[int, float]] = {}  # reader -> version it has, when it said so
        self._said = asyncio.Event()  # set, and replaced, when a reader comes back

    @property
    def current(self) -> Membership:
        return self._current

    def publish(
        self, replicas: Iterable[Replica], coming: Iterable[str] = (), models: Iterable[str] | None = None
    ) -> None:
        """Make a new version if these are other members, and tell everybody who waits. `models` None: as before."""
        known = self._current
        news = replace(
            known,
            replicas=tuple(replicas),
            coming=tuple(coming),
            models=known.models if models is None else tuple(models),
        )
        if news == known:
            return
        self._current = replace(news, version=known.version + 1)
        self._next.set()
        self._next = asyncio.Event()

    async def watch(self, epoch: str, version: int, timeout_s: float, reader: str = "") -> Membership:
        """The membership as soon as it is not the known one, or after `timeout_s` whatever it is then.

        A `reader` that asks with a version has taken it in; what it takes in, it says by asking again.
        """
        if reader:
            self._heard[reader] = (version if epoch == self._current.epoch else -1, monotonic())
            self._said.set()
            self._said = asyncio.Event()
        if (epoch, version) == (self._current.epoch, self._current.version):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._next.wait()
        return self._current

    async def heard(self, version: int, patience_s: float) -> bool:
        """Wait until every reader has this version. False after `patience_s`; who is late then has likely gone, and is
        not waited for again until it comes back."""
        deadline_s = monotonic() + patience_s
        while late := self._late(version):
            said = self._said
            left_s = deadline_s - monotonic()
            try:
                async with asyncio.timeout(left_s):
                    await said.wait()
            except TimeoutError:
                for reader in late:
                    self._heard.pop(reader, None)
                return False
        return True

    def _late(self, version: int) -> list[str]:
        since_s = monotonic() - FORGET_AFTER_S
        self._heard = {reader: last for reader, last in self._heard.items() if last[1] >= since_s}
        return [reader for reader, (known, _) in self._heard.items() if known < version]
