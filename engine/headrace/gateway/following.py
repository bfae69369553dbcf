"""Following a source that is away at times: the controller restarts, and gateways serve on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

RETRY_S = 0.5
"""A source that fails is asked again after this long."""

T = TypeVar("T")


async def news(ask: Callable[[T | None], Awaitable[T]], failed: str) -> AsyncIterator[T]:
    """What `ask`, told what is known, answers whenever that is something else; for ever. `failed` is said in the log
    each time that it raises."""
    known: T | None = None
    while True:
        try:
            current = await ask(known)
        except Exception as error:  # supervision boundary: whoever follows goes on with what he knows
            log.warning("%s: %s", failed, error)
            await asyncio.sleep(RETRY_S)
            continue
        if current is not known:
            known = current
            yield current


class Latest(Generic[T]):
    """A source in the same process: what it was last told."""

    def __init__(self) -> None:
        self._current: T | None = None
        self._told = asyncio.Event()

    def tell(self, current: T) -> None:
        """Something newer."""
        self._current = current
        self._told.set()

    async def after(self, known: T | None) -> T:
        """The latest, once that is not the known one."""
        while self._current is None or self._current is known:
            self._told.clear()
            await self._told.wait()
        return self._current
