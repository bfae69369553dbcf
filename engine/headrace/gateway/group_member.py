"""One gateway process of several on a port. Started by `GatewayGroup`: `python -m headrace.gateway.group_member FD`,
FD its end of the line. It ends when it is told to, and when the line does: nobody outlives the supervisor.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from headrace.config import Gateway
from headrace.errors import HeadraceError
from headrace.gateway.following import Latest
from headrace.gateway.group_choices import GroupChoices
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
    ToGateway,
    Work,
)
from headrace.gateway.merged_metrics import collect
from headrace.gateway.server import GatewayServer
from headrace.gateway.settings import GatewaySettings
from headrace_router.demand import Demand
from headrace_router.types import Membership

_decoder: msgspec.msgpack.Decoder[ToGateway] = msgspec.msgpack.Decoder(ToGateway)


class LineMembership(Latest[Membership]):
    """A MembershipSource that the supervisor feeds."""

    async def watch(self, known: Membership | None) -> Membership:
        return await self.after(known)


class LineSettings(Latest[GatewaySettings]):
    """A SettingsSource that the supervisor feeds."""

    async def settings(self, known: GatewaySettings | None) -> GatewaySettings:
        return await self.after(known)


class GroupMember:
    """One process's gateway and its end of the line."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._source = LineMembership()
        self._settings = LineSettings()
        self._number = 0
        self._server: GatewayServer | None = None
        self._choices: GroupChoices | None = None
        self._asked: dict[int, asyncio.Future[Reply]] = {}
        self._numbers = count()
        self._drain_s: float | None = None
        self._told = asyncio.Event()  # to end, or to hurry
        self._starting: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Return when told to end, or when the supervisor has ended."""
        order = await self._line.receive(_decoder)
        if not isinstance(order, Order):
            return
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._end, 0.0)
        reading = asyncio.ensure_future(self._read())
        self._starting = asyncio.ensure_future(self._start(order))
        await self._told.wait()
        self._starting.cancel()
        await asyncio.gather(self._starting, return_exceptions=True)
        if self._server is not None:
            await self._drain(self._server)
        if self._choices is not None:
            self._choices.stop()
        reading.cancel()

    async def _start(self, order: Order) -> None:
        self._number = order.number
        server = self._server = GatewayServer(
            self._settings_of(order.settings),
            self._source,
            internal_token=order.internal_token,
            changes=self._settings,
            demand=self if order.tells_demand else None,
            group=self,
        )
        try:
            server.bind()
            await server.start()
            assert server.context is not None
            self._choices = GroupChoices(
                server.context.router, Path(order.choices), order.number, order.count
            )
            self._choices.start()
        except HeadraceError as error:
            self._line.send(Failed(error.message))
            self._end(0.0)
        else:
            self._line.send(Serving())

    def _settings_of(self, told: Settings) -> GatewaySettings:
        gateway = Gateway.model_validate(told.gateway, strict=False)
        # Lots of their own: gateways that break ties alike would send what comes at once to the same replica.
        gateway = gateway.model_copy(update={"seed": gateway.seed + self._number})
        return GatewaySettings(told.version, gateway, told.dead_after_s, told.tokenizers, told.weights)

    async def _drain(self, server: GatewayServer) -> None:
        while True:
            self._told.clear()
            stopping = asyncio.ensure_future(server.stop(self._drain_s or 0.0))
            hurrying = asyncio.ensure_future(self._told.wait())
            await asyncio.wait((stopping, hurrying), return_when=asyncio.FIRST_COMPLETED)
            hurrying.cancel()
            if stopping.done():
                stopping.result()
                return
            stopping.cancel()
            await asyncio.gather(stopping, return_exceptions=True)

    def _end(self, drain_s: float) -> None:
        self._drain_s = drain_s
        self._told.set()

    async def _read(self) -> None:
        while True:
            match await self._line.receive(_decoder):
                case None:
                    self._end(0.0)
                    return
                case Members(membership):
                    self._source.tell(membership)
                case Settings() as told:
                    self._settings.tell(self._settings_of(told))
                case Collect(number, decisions):
                    self._line.send(self._collected(number, decisions))
                case Reply() as reply:
                    asked = self._asked.pop(reply.number, None)
                    if asked is not None and not asked.done():
                        asked.set_result(reply)
                case Drain(drain_s):
                    self._end(drain_s)
                case Order():
                    pass

    def _collected(self, number: int, decisions: int) -> Collected:
        server = self._server
        if server is None or server.registry is None or server.context is None:
            return Collected(number, [], [])
        return Collected(number, collect(server.registry), server.context.decisions.latest(decisions))

    # --- demand.DemandSink

    async def tell(self, demand: Demand) -> None:
        self._line.send(Work(demand))

    # --- app.Group

    async def metrics(self) -> bytes:
        return (await self._ask(0)).metrics

    async def decisions(self, last: int) -> list[dict[str, Any]]:
        return (await self._ask(last)).decisions

    async def _ask(self, decisions: int) -> Reply:
        number = next(self._numbers)
        asked: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._asked[number] = asked
        self._line.send(Ask(number, decisions))
        return await asked


async def _main(descriptor: int) -> None:
    end = socket.socket(fileno=descriptor)
    end.setblocking(False)
    await GroupMember(await Line.open(end)).run()


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's business
    uvloop.run(_main(int(sys.argv[1])))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # threads that tokenise must not hold it up
