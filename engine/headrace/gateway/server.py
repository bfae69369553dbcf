"""One gateway process: a gateway behind its own socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterable
from time import monotonic

from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector
from uvicorn.config import Config as UvicornConfig
from uvicorn.server import ServerState

from headrace.gateway.app import Group, build_app, make_registry
from headrace.gateway.context import GatewayContext
from headrace.gateway.core import TICK_S, GatewayCore
from headrace.gateway.demand import DemandSink
from headrace.gateway.feeds import MembershipSource
from headrace.gateway.listening import bind
from headrace.gateway.protocol import GatewayProtocol, protocol_factory
from headrace.gateway.settings import GatewaySettings, SettingsSource

log = logging.getLogger(__name__)

BACKLOG = 4096


class GatewayServer:
    """`bind`, `start`, `stop`, in that order; `stop` is safe at any time and twice."""

    def __init__(
        self,
        settings: GatewaySettings,
        source: MembershipSource,
        *,
        internal_token: str | None = None,
        changes: SettingsSource | None = None,
        demand: DemandSink | None = None,
        collectors: Iterable[Collector] = (),
        group: Group | None = None,
    ) -> None:
        """`internal_token`: what the fleet's own replicas ask for. `changes` tells of other settings. `demand`: who
        wants to know of the work that comes. `collectors`: what /metrics shows besides our own. `group`: the processes
        that share the port."""
        self._config = settings.gateway
        self._group = group
        self._core = GatewayCore(
            settings, source, changes=changes, demand=demand, changed=self._limits_changed
        )
        self._token = internal_token
        self.registry: CollectorRegistry | None = None  # of a gateway that has started
        self._collectors = tuple(collectors)
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._expiring: asyncio.Task[None] | None = None
        self._connections: set[GatewayProtocol] = set()

    @property
    def context(self) -> GatewayContext | None:
        """Of a gateway that has started."""
        return self._core.context

    @property
    def is_serving(self) -> bool:
        """From the beginning of `start` to the end of `stop`."""
        return self.context is not None

    def bind(self) -> tuple[str, int]:
        """Take the port, before anything slow starts. Returns host and port.

        Raises FatalStartError when the address is taken or not ours.
        """
        bound = bind(self._config.host, self._config.port, shared=self._group is not None)
        self._socket = bound
        return self._config.host, int(bound.getsockname()[1])

    async def start(self, *, internal_token: str | None = None) -> None:
        """Serve. Returns once connections are accepted and the first membership is known."""
        assert self._socket is not None, "bind() comes first"
        context = await self._core.prepare(internal_token or self._token)
        self.registry = make_registry(context, self._collectors)
        uvicorn_config = UvicornConfig(
            build_app(context, self.registry, self._group),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
        )
        uvicorn_config.load()
        factory, self._connections = protocol_factory(context, uvicorn_config, ServerState())
        await self._core.start()
        self._expiring = context.loop.create_task(self._expire_connections())
        self._server = await context.loop.create_server(factory, sock=self._socket, backlog=BACKLOG)

    def _limits_changed(self) -> None:
        for connection in self._connections:
            connection.take_limits()

    async def _expire_connections(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now_s = monotonic()
            for connection in list(self._connections):
                if connection.deadline_s < now_s:
                    try:
                        connection.expire()
                    except Exception:  # supervision boundary: one bad connection must not end all timeouts
                        log.exception("a connection's timeout failed")

    async def stop(self, drain_s: float = 0.0) -> None:
        """Accept nothing new, let running requests finish for at most `drain_s`, cut the rest, release everything."""
        context = self.context
        if context is None:
            if self._socket is not None:
                self._socket.close()
            return
        context.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.shutdown()
        deadline_s = monotonic() + drain_s
        while (context.active or self._connections) and monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        self._core.cut()
        for connection in list(self._connections):
            connection.transport.close()
        if self._expiring is not None:
            self._expiring.cancel()
            await asyncio.gather(self._expiring, return_exceptions=True)
        await self._core.stop()
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.close()
