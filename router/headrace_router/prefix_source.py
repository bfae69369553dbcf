"""What the router asks of an index of prompts, whether it knows them by token blocks or by text chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from headrace_router.types import Replica, Request
from headrace_router.view import Hits


class PrefixSource(Protocol):
    """Owned by one event loop; no call blocks. Times are the router's."""

    def look_up(self, request: Request, now_s: float) -> Hits | None:
        """How much of the prompt each replica holds, in one call for all. None when nothing is known of it."""
        ...

    def routed(self, request: Request, slot: int, now_s: float) -> None:
        """The request goes to the replica in `slot`, which will hold its prompt soon."""
        ...

    def follow(self, members: Sequence[tuple[Replica, int]]) -> None:
        """Exactly these replicas are present, each in its slot. Whoever left or restarted holds nothing."""
        ...

    def tick(self, now_s: float) -> None:
        """A moment for upkeep, a few times a second."""
        ...

    def check_integrity(self) -> None: ...
