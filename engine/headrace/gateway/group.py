"""Several gateway processes on one port (SO_REUSEPORT), and who looks after them.

    membership source ──> GatewayGroup ──line──> gateway process 0..n-1 ── each its own feeds, index, connections
                              <── metrics, decisions, demand ──

The kernel gives each new connection to one of them. One that dies takes its clients' connections with it and nothing
else: the others serve on, another takes its place. They share no load tables; where each sends what, before reports and
events show it, they tell each other (`group_choices`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from itertools import count as numbers
from time import monotonic
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from headrace.config import Gateway
from headrace.config_tenants import Tenant
from headrace.errors import StartError
from headrace.gateway.demand import PATIENCE_S, DemandSink
from headrace.gateway.feeds import RETRY_S, MembershipSource
from headrace.gateway.group_line import (
    Ask,
    Collect,
    Collected,
    Drain,
    Failed,
    Line,
    Members,
    Order,
    Reply,
    Serving,
    Settings,
    ToSupervisor,
    Work,
)
from headrace.gateway.listening import bind
from headrace.gateway.merged_metrics import Family, collect, merge, render
from headrace.gateway.settings import GatewaySettings, SettingsSource
from headrace_router.demand import Demand
from headrace_router.types import Membership

log = logging.getLogger(__name__)

COLLECT_EVERY_S = 2.0
"""What a process that dies has counted since is lost to the metrics."""
COLLECT_TIMEOUT_S = 1.0
END_TIMEOUT_S = 5.0  # beyond the drain
YOUNG_S = 10.0
"""One that dies younger is replaced after a pause that doubles, up to MAX_PAUSE_S."""
MAX_PAUSE_S = 30.0

_decoder: msgspec.msgpack.Decoder[ToSupervisor] = msgspec.msgpack.Decoder(ToSupervisor)


class Member:
    """One process as the supervisor sees it."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], line: Line) -> None:
        self.number = number
        self.process = process
        self.line = line
        self.began_s = monotonic()
        self.is_serving = False
        self.counted: list[Family] = []  # when it last told


class GatewayGroup:
    """As `GatewayServer`: `bind`, `start`, `stop`, in that order; `stop` is safe at any time and twice."""

    def __init__(
        self,
        config: Gateway,
        source: MembershipSource,
        *,
        internal_token: str | None = None,
        dead_after_s: float = 0.8,
        tokenizers: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None,
        settings: SettingsSource | None = None,
        collectors: Iterable[Collector] = (),
        tenants: Iterable[Tenant] = (),
        demand: DemandSink | None = None,
    ) -> None:
        """`settings` tells when what they go by changes. `collectors`: what /metrics shows once, besides what the
        processes measure. `demand`: who wants to know of the work that comes; it hears of each process by itself. Each
        process has a queue of its own."""
        self._settings = settings
        self._config = config
        self._source = source
        self._count = config.processes
        self._token = internal_token
        self._dead_after_s = dead_after_s
        self._tokenizers = tokenizers or {}
        self._weights = {tenant.name: tenant.weight for tenant in tenants}
        self._demand = demand
        self._telling: dict[int, asyncio.Task[None]] = {}  # demand on its way, by process
        self._registry = CollectorRegistry()
        for collector in collectors:
            self._registry.register(collector)
        self._socket: socket.socket | None = None
        self._membership: Membership | None = None
        self._members: dict[int, Member] = {}
        self._lives: list[asyncio.Task[None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._ended: list[Family] = []
        self._numbers = numbers()
        self._collecting: dict[int, tuple[set[int], list[Collected], asyncio.Event]] = {}
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
        bind(self._config.host, self._config.port).close()
        self._socket = bind(self._config.host, self._config.port, shared=True)
        self._folder = tempfile.TemporaryDirectory(prefix="headrace-")
        self._port = int(self._socket.getsockname()[1])
        return self._config.host, self._port

    async def start(self, *, internal_token: str | None = None) -> None:
        """Serve. Returns once every process accepts connections. Raises StartError when one cannot."""
        assert self._socket is not None, "bind() comes first"
        self._token = internal_token or self._token
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._follow()), loop.create_task(self._keep_counts())]
        if self._settings is not None:
            self._tasks.append(loop.create_task(self._follow_settings(self._settings)))
        self._lives = [loop.create_task(self._live(number)) for number in range(self._count)]
        while not (len(self._members) == self._count and all(m.is_serving for m in self._members.values())):
            self._news.clear()
            await self._news.wait()
            if self._failure is not None:
                reason = self._failure
                await self.stop()
                raise StartError(f"a gateway process did not start: {reason}")

    async def _follow(self) -> None:
        while True:
            try:
                membership = await self._source.watch(self._membership)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # supervision boundary: gateways serve on from their last view
                log.warning("membership source failed, serving on from the last view: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            if membership is self._membership:
                continue
            self._membership = membership
            for member in self._members.values():
                member.line.send(Members(membership))

    async def _follow_settings(self, source: SettingsSource) -> None:
        known: GatewaySettings | None = None
        while True:
            try:
                settings = await source.settings(known)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # supervision boundary: they serve on as they are
                log.warning("settings could not be read, serving on by the last ones: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            if settings is known:
                continue
            known = settings
            fixed = {"host": self._config.host, "processes": self._count}
            self._config = settings.gateway.model_copy(update=fixed)
            self._dead_after_s, self._tokenizers = settings.dead_after_s, settings.tokenizers
            self._weights = dict(settings.weights)
            told = Settings(
                settings.version, self._told(), self._dead_after_s, self._told_tokenizers(), self._weights
            )
            for member in self._members.values():
                member.line.send(told)

    def _told(self) -> dict[str, Any]:
        return {**self._config.model_dump(mode="json"), "port": self._port}

    def _told_tokenizers(self) -> dict[str, tuple[str, dict[str, Any]]]:
        return {name: (path, dict(engine)) for name, (path, engine) in self._tokenizers.items()}

    # --- processes

    async def _live(self, number: int) -> None:
        """One place among them: a process, its successor, ..."""
        pause_s = 0.0
        while not self._is_stopping:
            member = await self._spawn(number)
            await self._hear(member)
            self._members.pop(number, None)
            self._ended = merge([self._ended], member.counted)
            self._forget_in_collections(number)
            self._news.set()
            member.line.close()
            if self._is_stopping:
                await _reap(member.process, END_TIMEOUT_S)
                return
            member.process.kill()
            code = await _reap(member.process, END_TIMEOUT_S)
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
            process = _start_process(theirs)
        line = await Line.open(ours)
        member = self._members[number] = Member(number, process, line)
        line.send(
            Order(
                gateway=self._told(),
                internal_token=self._token,
                dead_after_s=self._dead_after_s,
                tokenizers=self._told_tokenizers(),
                tenants=self._weights,
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
                    self._tasks.append(asyncio.ensure_future(self._answer(member, number, decisions)))
                case Collected() as collected:
                    self._take(member, collected)
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

    # --- what they have measured

    async def _answer(self, member: Member, number: int, decisions: int) -> None:
        found = await self._collect(decisions)
        families = [*merge([one.families for one in found], self._ended), *collect(self._registry)]
        newest = sorted((entry for one in found for entry in one.decisions), key=lambda e: -e["time"])
        member.line.send(Reply(number, render(families), newest[:decisions]))
        with contextlib.suppress(ValueError):
            self._tasks.remove(asyncio.current_task())  # type: ignore[arg-type]

    async def _collect(self, decisions: int = 0) -> list[Collected]:
        """Of every process that answers in time."""
        number = next(self._numbers)
        waiting = {member.number for member in self._members.values() if member.is_serving}
        found: list[Collected] = []
        done = asyncio.Event()
        self._collecting[number] = (waiting, found, done)
        for member in self._members.values():
            if member.is_serving:
                member.line.send(Collect(number, decisions))
        try:
            if waiting:
                async with asyncio.timeout(COLLECT_TIMEOUT_S):
                    await done.wait()
        except TimeoutError:
            log.warning("gateway processes that do not tell what they measured: %s", sorted(waiting))
            found += [Collected(number, self._members[n].counted, []) for n in waiting if n in self._members]
        finally:
            del self._collecting[number]
        return found

    def _take(self, member: Member, collected: Collected) -> None:
        member.counted = collected.families
        waiting, found, done = self._collecting.get(collected.number, (set(), [], asyncio.Event()))
        found.append(collected)
        waiting.discard(member.number)
        if not waiting:
            done.set()

    def _forget_in_collections(self, number: int) -> None:
        for waiting, _, done in self._collecting.values():
            waiting.discard(number)
            if not waiting:
                done.set()

    async def measured(self) -> list[list[Family]]:
        """What each process that serves has measured, one list for each."""
        return [found.families for found in await self._collect()]

    async def _keep_counts(self) -> None:
        while True:
            await asyncio.sleep(COLLECT_EVERY_S)
            await self._collect()

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
        for task in (*self._tasks, *self._telling.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self._lives = []
        if self._socket is not None:
            self._socket.close()
            self._folder.cleanup()


def _start_process(line: socket.socket) -> subprocess.Popen[bytes]:
    # Not asyncio's: that needs the main thread's loop, and the Python API's is in another.
    return subprocess.Popen(
        [sys.executable, "-m", "headrace.gateway.group_member", str(line.fileno())],
        pass_fds=(line.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=_stderr(),
        start_new_session=True,  # a terminal's Ctrl-C is the supervisor's business
    )


def _stderr() -> int | None:
    """Where their access logs go: with ours. None: the descriptor that this process has (a notebook's has none)."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return None


async def _reap(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    """Its exit code, once it has ended; killed when it does not in time."""
    deadline_s = monotonic() + timeout_s
    while process.poll() is None and monotonic() < deadline_s:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    if process.poll() is None:
        process.kill()
        process.wait()
    return process.returncode
