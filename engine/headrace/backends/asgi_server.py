"""An ASGI application on a free port, as a task of the running event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from headrace.backends import ports
from headrace.backends.front_door import App
from headrace.backends.ports import PortRange

GRACE_S = 2
"""How long closing waits for connections that do not end by themselves."""


class _HostedServer(uvicorn.Server):
    """uvicorn without its signal handlers: the process belongs to the host, which decides what SIGTERM means."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class AsgiServer:
    """Serves one application between `start` and `stop`."""

    def __init__(self, app: App, host: str, port_range: PortRange | None = None) -> None:
        self._app = app
        self._host = host
        self._ports = port_range
        self._server: _HostedServer | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether it is serving."""
        return self._task is not None and not self._task.done()

    async def start(self) -> str:
        """Bind a free port of `host`, serve, and return `http://host:port`. Raises StartError."""
        listener = ports.bind(self._host, self._ports)
        config = uvicorn.Config(
            self._app, http="httptools", ws="none", lifespan="off", access_log=False, log_config=None,
            server_header=False, timeout_keep_alive=75, timeout_graceful_shutdown=GRACE_S,
        )  # fmt: skip
        self._server = _HostedServer(config)
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listener]))
        await self._server.listening.wait()
        port = listener.getsockname()[1]
        return f"http://[{self._host}]:{port}" if ":" in self._host else f"http://{self._host}:{port}"

    async def stop(self) -> None:
        """Close the port and every connection. Safe twice and before `start`."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await asyncio.gather(self._task, return_exceptions=True)
