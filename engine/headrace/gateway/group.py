"""Several gateway processes on one port (SO_REUSEPORT), and who looks after them.

    membership source ──> GatewayGroup ──line──> gateway process 0..n-1 ── each its own feeds, index, connections
                              <── metrics, decisions, demand ──

The kernel gives each new connection to one of them. One that dies takes its clients' connections with it and nothing
else: the others serve on, another takes its place. They share no load tables; where each sends what, before reports and
events show it, they tell each other (`group_choices`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from time import monotonic

import msgspec
from prometheus_client.registry import Collector

from headrace.errors import StartError
from headrace.gateway.demand import PATIENCE_S, DemandSink
from headrace.gateway.feeds import MEMBERSHIP_FAILED, MembershipSource
from headrace.gateway.following import news
from headrace.gateway.group_counts import GroupCounts
from headrace.gateway.group_line import (
    Ask,
    Collected,
    Drain,
    Failed,
    Line,
    Members,
    Order,
    Serving,
    Settings,
    ToSupervisor,
    Work,
)
from headrace.gateway.group_process import Member, reap, start_process
from headrace.gateway.listening import bind
from headrace.gateway.merged_metrics import Family
from headrace.gateway.settings import SETTINGS_FAILED, GatewaySettings, SettingsSource
from headrace_router.demand import Demand
from headrace_router.types import Membership

log = logging.getLogger(__name__)

END_TIMEOUT_S = 5.0  # beyond the drain
YOUNG_S = 10.0
"""One that dies younger is replaced after a pause that doubles, up to MAX_PAUSE_S."""
MAX_PAUSE_S = 30.0

_decoder: msgspec.msgpack.Decoder[ToSupervisor] = msgspec.msgpack.Decoder(ToSupervisor)


class GatewayGroup:
    """As `GatewayServer`: `bind`, `start`, `stop`, in that order; `stop` is safe at any time and twice."""

    def __init__(
        self,
        settings: GatewaySettings,
        source: MembershipSource,
        *,
        internal_token: str | None = None,
        changes: SettingsSource | None = None,
        demand: DemandSink | None = None,
        collectors: Iterable[Collector] = (),
    ) -> None:
        """As a server's. `demand` hears of each process by itself, and each has a queue of its own. `collectors`: what
        /metrics shows once, besides what the processes measure."""
        self._settings = settings
        self._source = source
        self._changes = changes
        self._count = settings.gateway.processes
        self._token = internal_token
        self._demand = demand
        self._telling: dict[int, asyncio.Task[None]] = {}  # demand on its way, by process
        self._socket: socket.socket | None = None
        self._membership: Membership | None = None
        self._members: dict[int, Member] = {}
        self._counts = GroupCounts(self._members, collectors)
        self._lives: list[asyncio.Task[None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._news = asyncio.Event()
        self._failure: str | None = None
        self._is_stopping = False

    @property
    def is_serving(self) -> bool:
        """From the beginning of `start` to the end of `stop`."""
        return bool(self._tasks)

    @property
    def process_ids(self) -> list[int]:
        """Of those that serve."""
        return [member.process.pid for member in self._members.values() if member.is_serving]

    def bind(self) -> tuple[str, int]:
        """Take the port for all of them, before anything slow starts. Returns host and port.

        Raises FatalStartError when the address is taken or not ours.
        """
        # A socket that shares its port is refused where somebody else's listens, but not where that one shares too.
        host, port = self._settings.gateway.host, self._settings.gateway.port
        bind(host, port).close()
        self._socket = bind(host, port, shared=True)
        self._folder = tempfile.TemporaryDirectory(prefix="headrace-")
        self._port = int(self._socket.getsockname()[1])
        return host, self._port

    async def start(self, *, internal_token: str | None = None) -> None:
        """Serve. Returns once every process accepts connections. Raises StartError when one cannot."""
        assert self._socket is not None, "bind() comes first"
        self._token = internal_token or self._token
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._follow()), loop.create_task(self._counts.keep())]
        if self._changes is not None:
            self._tasks.append(loop.create_task(self._follow_settings(self._changes)))
        self._lives = [loop.create_task(self._live(number)) for number in range(self._count)]
        while not (len(self._members) == self._count and all(m.is_serving for m in self._members.values())):
            self._news.clear()
            await self._news.wait()
            if self._failure is not None:
                reason = self._failure
                await self.stop()
                raise StartError(f"a gateway process did not start: {reason}")

    async def _follow(self) -> None:
        async for membership in news(self._source.watch, MEMBERSHIP_FAILED):
            self._membership = membership
            for member in self._members.values():
                member.line.send(Members(membership))

    async def _follow_settings(self, source: SettingsSource) -> None:
        async for settings in news(source.settings, SETTINGS_FAILED):
            fixed = {"host": self._settings.gateway.host, "processes": self._count}
            self._settings = replace(settings, gateway=settings.gateway.model_copy(update=fixed))
            for member in self._members.values():
                member.line.send(self._told())

    def _told(self) -> Settings:
        now = self._settings
        return Settings(
            version=now.version,
            gateway={**now.gateway.model_dump(mode="json"), "port": self._port},
            dead_after_s=now.dead_after_s,
            tokenizers={name: (path, dict(engine)) for name, (path, engine) in now.tokenizers.items()},
            weights=dict(now.weights),
        )

    # --- processes

    async def _live(self, number: int) -> None:
        """One place among them: a process, its successor, ..."""
        pause_s = 0.0
        while not self._is_stopping:
            member = await self._spawn(number)
            await self._hear(member)
            self._members.pop(number, None)
            self._counts.ended(member)
            self._news.set()
            member.line.close()
            if self._is_stopping:
                await reap(member.process, END_TIMEOUT_S)
                return
            member.process.kill()
            code = await reap(member.process, END_TIMEOUT_S)
            if not member.is_serving and self._failure is None and monotonic() - member.began_s < YOUNG_S:
                self._failure = f"it ended with code {code}"
                self._news.set()
            is_young = monotonic() - member.began_s < YOUNG_S
            log.warning("gateway process %d ended with code %s; starting another", member.process.pid, code)
            pause_s = min(MAX_PAUSE_S, max(0.5, 2 * pause_s)) if is_young else 0.0
            if is_young and pause_s > 0.5:
                await asyncio.sleep(pause_s)

    async def _spawn(self, number: int) -> Member:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            process = start_process(theirs)
        line = await Line.open(ours)
        member = self._members[number] = Member(number, process, line)
        line.send(
            Order(
                settings=self._told(),
                internal_token=self._token,
                tells_demand=self._demand is not None,
                number=number,
                count=self._count,
                choices=self._folder.name,
            )
        )
        if self._membership is not None:
            line.send(Members(self._membership))
        return member

    async def _hear(self, member: Member) -> None:
        """Until its line ends."""
        while True:
            match await member.line.receive(_decoder):
                case None:
                    return
                case Serving():
                    member.is_serving = True
                    self._news.set()
                case Failed(reason):
                    self._failure = reason
                    self._news.set()
                case Ask(number, decisions):
                    self._counts.ask(member, number, decisions)
                case Collected() as collected:
                    self._counts.take(member, collected)
                case Work(demand):
                    self._pass_on(member, demand)

    def _pass_on(self, member: Member, demand: Demand) -> None:
        """A report that finds its predecessor still on its way is left out: the next one says it all again."""
        under_way = self._telling.get(member.number)
        if self._demand is not None and (under_way is None or under_way.done()):
            self._telling[member.number] = asyncio.ensure_future(self._tell(self._demand, demand))

    async def _tell(self, sink: DemandSink, demand: Demand) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await sink.tell(demand)
        except Exception as error:  # supervision boundary: gateways serve whether or not anybody scales
            log.info("demand could not be told: %s", str(error) or type(error).__name__)

    async def measured(self) -> list[list[Family]]:
        """What each process that serves has measured, one list for each."""
        return [found.families for found in await self._counts.collect()]

    # --- end

    async def stop(self, drain_s: float = 0.0) -> None:
        """Accept nothing new, let running requests finish for at most `drain_s`, end every process. Called again while
        it runs, the shorter time counts."""
        self._is_stopping = True
        for member in self._members.values():
            member.line.send(Drain(drain_s))
        for life in self._lives:
            if not any(member.process.poll() is None for member in self._members.values()):
                life.cancel()
        if self._lives:
            _, late = await asyncio.wait(self._lives, timeout=drain_s + END_TIMEOUT_S)
            for member in list(self._members.values()) if late else ():
                member.process.kill()
            await asyncio.gather(*self._lives, return_exceptions=True)
        self._counts.stop()
        for task in (*self._tasks, *self._telling.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self._lives = []
        if self._socket is not None:
            self._socket.close()
            self._folder.cleanup()
