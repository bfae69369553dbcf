"""One gateway process: its socket, its feeds, its clockwork, its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import sys
from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from uvicorn.config import Config as UvicornConfig
from uvicorn.server import ServerState

from headrace.config import Gateway
from headrace.errors import FatalStartError
from headrace.gateway.access_log import AccessLog
from headrace.gateway.app import build_app
from headrace.gateway.context import GatewayContext
from headrace.gateway.feeds import FleetFeed, MembershipSource
from headrace.gateway.protocol import GatewayProtocol, protocol_factory
from headrace_router.policies import make_policy
from headrace_router.router import Router

if TYPE_CHECKING:
    from headrace.gateway.prefixes import Prefixes

log = logging.getLogger(__name__)

TICK_S = 0.1
BACKLOG = 4096


class GatewayServer:
    """`bind`, `start`, `stop`, in that order; `stop` is safe at any time and twice."""

    def __init__(
        self,
        config: Gateway,
        source: MembershipSource,
        *,
        internal_token: str | None = None,
        dead_after_s: float = 0.8,
        tokenizers: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None,
    ) -> None:
        """`internal_token`: what the fleet's own replicas ask for. `dead_after_s`: silence that ends a replica's
        place in the view. `tokenizers`: by served name ("*": any other), a model's source and engine arguments;
        without one a model's prompts are known by their text."""
        self._config = config
        self._source = source
        self._token = internal_token
        self._dead_after_s = dead_after_s
        self._tokenizers = tokenizers or {}
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._feed: FleetFeed | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._connections: set[GatewayProtocol] = set()
        self.context: GatewayContext | None = None

    def bind(self) -> tuple[str, int]:
        """Take the port, before anything slow starts. Returns host and port.

        Raises FatalStartError when the address is taken or not ours.
        """
        host, port = self._config.host, self._config.port
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            bound = socket.socket(family, socket.SOCK_STREAM)
            try:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                bound.bind(address)
            except OSError:
                bound.close()
                raise
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                advice = (
                    "stop the program that holds the port or choose another with --port (0 takes a free one)"
                )
            elif error.errno == errno.EACCES:
                advice = "ports below 1024 need root; choose another with --port"
            else:
                advice = "--host must be an address of this machine: 127.0.0.1, or 0.0.0.0 for all of them"
            raise FatalStartError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; {advice}"
            ) from None
        self._socket = bound
        name = bound.getsockname()
        return host, int(name[1])

    async def start(self, *, internal_token: str | None = None) -> None:
        """Serve. Returns once connections are accepted and the first membership is known."""
        assert self._socket is not None, "bind() comes first"
        loop = asyncio.get_running_loop()
        token = internal_token or self._token
        policy = make_policy(self._config.policy, self._config.seed)
        prefixes = await self._prefixes(loop) if policy.reads_prefixes else None
        router = Router(
            policy,
            index=None if prefixes is None else prefixes.index,
            texts=None if prefixes is None else prefixes.texts,
        )
        context = GatewayContext(
            self._config,
            router,
            loop,
            prefixes=prefixes,
            authorization=None if token is None else f"Bearer {token}".encode(),
            dead_after_s=self._dead_after_s,
            access_log=AccessLog(sys.stderr.buffer) if self._config.access_log else None,
        )
        self.context = context
        uvicorn_config = UvicornConfig(
            build_app(context),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
        )
        uvicorn_config.load()
        factory, self._connections = protocol_factory(context, uvicorn_config, ServerState())
        self._feed = FleetFeed(context, self._source)
        self._feed.start()
        await self._feed.first.wait()
        if prefixes is not None:
            await prefixes.loaded()
        self._tasks.append(loop.create_task(self._tick()))
        if context.access_log is not None:
            self._tasks.append(loop.create_task(self._write_log(context.access_log)))
        self._server = await loop.create_server(factory, sock=self._socket, backlog=BACKLOG)

    async def _prefixes(self, loop: asyncio.AbstractEventLoop) -> Prefixes:
        # Imported here: it brings numba, and a gateway that only balances load starts without.
        from headrace.gateway.prefixes import Prefixes, TokenizerSource

        sources = {name: TokenizerSource(*source) for name, source in self._tokenizers.items()}
        return Prefixes(loop, sources)

    async def _tick(self) -> None:
        context, feed = self.context, self._feed
        assert context is not None and feed is not None
        while True:
            await asyncio.sleep(TICK_S)
            try:
                feed.drain()
                context.expire()
                if context.prefixes is not None:
                    context.prefixes.tick()
                now_s = monotonic()
                for connection in list(self._connections):
                    if connection.deadline_s < now_s:
                        connection.expire()
            except Exception:  # supervision boundary: one bad tick must not end all timeouts
                log.exception("the gateway's tick failed")

    async def _write_log(self, access_log: AccessLog) -> None:
        """A reader of the log that stalls holds up this task and its thread, nothing else."""
        while True:
            await asyncio.sleep(TICK_S)
            text = access_log.take()
            if text:
                await asyncio.to_thread(access_log.put, text)

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
        for exchange in list(context.active):
            exchange.cut()
        for connection in list(self._connections):
            connection.transport.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._feed is not None:
            await self._feed.stop()
        if context.prefixes is not None:
            context.prefixes.stop()
        context.pool.close()
        if context.access_log is not None:
            context.access_log.put(context.access_log.take())
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.close()
        self.context = None
