"""What the processes of a group have measured, as one: collected when somebody asks any of them, and now and then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count

from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from headrace.gateway.group_line import Collect, Collected, Reply
from headrace.gateway.group_process import Member
from headrace.gateway.merged_metrics import Family, collect, merge, render

log = logging.getLogger(__name__)

COLLECT_EVERY_S = 2.0
"""What a process that dies has counted since is lost to the metrics."""
COLLECT_TIMEOUT_S = 1.0


@dataclass(slots=True)
class _Collection:
    """One round of asking."""

    waiting: set[int]  # numbers of those that have not told
    found: list[Collected] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def wait_no_more(self, number: int) -> None:
        self.waiting.discard(number)
        if not self.waiting:
            self.done.set()


class GroupCounts:
    """Of processes that come and go. What one that has ended had counted when it last told stays in."""

    def __init__(self, members: Mapping[int, Member], collectors: Iterable[Collector]) -> None:
        """`members` by number, as they are at any time. `collectors`: what is told once for all of them."""
        self._members = members
        self._registry = CollectorRegistry()
        for collector in collectors:
            self._registry.register(collector)
        self._ended: list[Family] = []
        self._numbers = count()
        self._under_way: dict[int, _Collection] = {}
        self._answering: set[asyncio.Task[None]] = set()

    def ask(self, member: Member, number: int, decisions: int) -> None:
        """Somebody has asked this process: it is answered for all, under this number."""
        task = asyncio.ensure_future(self._answer(member, number, decisions))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, member: Member, number: int, decisions: int) -> None:
        found = await self.collect(decisions)
        families = [*merge([one.families for one in found], self._ended), *collect(self._registry)]
        newest = sorted((entry for one in found for entry in one.decisions), key=lambda e: -e["time"])
        member.line.send(Reply(number, render(families), newest[:decisions]))

    async def collect(self, decisions: int = 0) -> list[Collected]:
        """Of every process that serves; of one that does not answer in time, what it last told."""
        number = next(self._numbers)
        serving = [member for member in self._members.values() if member.is_serving]
        collection = self._under_way[number] = _Collection({member.number for member in serving})
        for member in serving:
            member.line.send(Collect(number, decisions))
        waiting, found = collection.waiting, collection.found
        try:
            if waiting:
                async with asyncio.timeout(COLLECT_TIMEOUT_S):
                    await collection.done.wait()
        except TimeoutError:
            log.warning("gateway processes that do not tell what they measured: %s", sorted(waiting))
            found += [Collected(number, self._members[n].counted, []) for n in waiting if n in self._members]
        finally:
            del self._under_way[number]
        return found

    def take(self, member: Member, collected: Collected) -> None:
        """A process tells."""
        member.counted = collected.families
        collection = self._under_way.get(collected.number)
        if collection is not None:
            collection.found.append(collected)
            collection.wait_no_more(member.number)

    def ended(self, member: Member) -> None:
        """It will tell nothing more."""
        self._ended = merge([self._ended], member.counted)
        for collection in self._under_way.values():
            collection.wait_no_more(member.number)

    async def keep(self) -> None:
        """For ever: have them tell, so that little is lost when one dies."""
        while True:
            await asyncio.sleep(COLLECT_EVERY_S)
            await self.collect()

    def stop(self) -> None:
        """Whoever is being answered is not."""
        for task in self._answering:
            task.cancel()
