"""A scripted replica (it does what the request's `script` says), a gateway in front of some, and a raw client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import pytest
import uvloop
from uvicorn import Config as UvicornConfig
from uvicorn import Server as UvicornServer

from headrace.config import Gateway, Limits, Tenant, Timeouts
from headrace.gateway.asgi import RelayApp
from headrace.gateway.context import GatewayContext
from headrace.gateway.demand import DemandSink
from headrace.gateway.server import GatewayServer
from headrace.gateway.settings import GatewaySettings
from headrace_router.types import BootId, Endpoints, LoadReport, Membership, Replica, ReplicaId, Role

PATH = "/v1/completions"
NOWHERE = "tcp://127.0.0.1:9"  # where nobody publishes


def pytest_asyncio_loop_factories(config: object, item: object) -> dict[str, Any]:
    """Production runs on uvloop, whose transports differ from asyncio's; so do these tests."""
    return {"uvloop": uvloop.new_event_loop}


def event(number: int) -> bytes:
    return b'data: {"choices":[{"text":"%d"}]}\n\n' % number


USAGE_EVENT = b'data: {"choices":[],"usage":{"prompt_tokens":5,"total_tokens":8,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


class ScriptedReplica:
    """An HTTP server whose answer to each request is told by the request itself: {"script": ...}."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests: list[dict[str, Any]] = []
        self.heads: list[bytes] = []
        self.running = 0
        self.aborted = asyncio.Event()
        self.started = asyncio.Event()
        self.blocked = asyncio.Event()  # a write waits: the gateway has stopped reading
        self.go_on = asyncio.Event()  # what the script "head_first" waits for before its first event
        self.written = 0
        self.port = 0
        self.role = Role.UNIFIED
        self.kv_connector: str | None = None
        self.max_running: int | None = None
        self.boot = "boot"
        self.reports = False  # whether it is one of those that tell their load; a test tells it then
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=2**26)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def replica(self) -> Replica:
        return Replica(
            ReplicaId(self.name),
            BootId(self.boot),
            "m",
            self.role,
            Endpoints(f"http://127.0.0.1:{self.port}", load=NOWHERE if self.reports else None),
            max_running=self.max_running,
            kv_connector=self.kv_connector,
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(line.split(b": ", 1) for line in head.strip().split(b"\r\n")[1:])
                body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
                request = json.loads(body)
                self.heads.append(head)
                self.requests.append(request)
                self.running += 1
                self.started.set()
                try:
                    if not await self._play(request, reader, writer):
                        return
                finally:
                    self.running -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _play(
        self, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request; False to close the connection."""
        script = request.get("script", {}).get(self.name) or request.get("script", {}).get("all", "answer")
        if script == "reset" or (script == "reset_once" and len(self.requests) == 1):
            writer.transport.abort()
            return False
        if script == "hang" or (script == "hang_once" and len(self.requests) == 1):
            await reader.read(1)  # nothing more comes; this ends when the gateway leaves
            self.aborted.set()
            return False
        if script.startswith("status"):
            self._answer(writer, int(script.removeprefix("status")), b'{"error":{"message":"scripted"}}')
            return True
        if script == "half_404" and len(self.requests) == 2:  # the head alone, on a kept connection
            writer.write(b"HTTP/1.1 404 X\r\ncontent-length: 22\r\n\r\n")
            await writer.drain()
            return False
        if script in ("reset_once", "hang_once", "half_404"):
            script = "answer"
        if script == "no_route":
            self._answer(writer, 404, b'{"detail":"Not Found"}')
            return True
        if script == "answer" and (request.get("kv_transfer_params") or {}).get("do_remote_decode"):
            held = {"do_remote_prefill": True, "remote_request_id": self.name}
            self._answer(writer, 200, json.dumps({"kv_transfer_params": held}).encode())
            return True
        if script == "answer" and not request.get("stream"):
            self._answer(writer, 200, json.dumps({"by": self.name, "usage": {"prompt_tokens": 5}}).encode())
            return True
        if script == "answer_and_close":
            self._answer(writer, 200, b'{"ok":true}')
            return False
        return await self._stream(script, request, reader, writer)

    def _answer(self, writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
        writer.write(
            b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (status, len(body), body)
        )

    async def _stream(
        self, script: str, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        if script == "head_first":
            await writer.drain()
            await self.go_on.wait()
        if script == "flood":
            filler = b"data: " + b"x" * 65_530 + b"\n\n"
            writer.transport.set_write_buffer_limits(high=65_536)
            for _ in range(800):  # 52 MB
                self._chunk(writer, filler)
                drain = asyncio.ensure_future(writer.drain())
                done, _ = await asyncio.wait((drain,), timeout=0.3)
                if not done:
                    self.blocked.set()
                    await drain
        for number in range(3):
            self._chunk(writer, event(number))
            await writer.drain()
        if script == "cut":
            self._chunk(writer, b'data: {"half')
            await writer.drain()
            writer.transport.abort()
            return False
        if script == "stream_then_hang":
            await reader.read(1)
            self.aborted.set()
            return False
        if (request.get("stream_options") or {}).get("include_usage"):
            self._chunk(writer, USAGE_EVENT)
        self._chunk(writer, DONE)
        writer.write(b"0\r\n\r\n")
        return True

    def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        self.written += len(data)
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))


class FixedSource:
    """A membership that changes when a test says so."""

    def __init__(self, replicas: list[Replica]) -> None:
        self._membership = Membership(1, tuple(replicas))
        self._changed = asyncio.Event()

    def change(
        self, replicas: list[Replica], models: tuple[str, ...] = (), coming: tuple[str, ...] = ()
    ) -> None:
        version = self._membership.version + 1
        self._membership = Membership(version, tuple(replicas), models=models, coming=coming)
        self._changed.set()

    async def watch(self, known: Membership | None) -> Membership:
        while known is self._membership:
            self._changed.clear()
            await self._changed.wait()
        return self._membership


class Response:
    """A whole response as it came over the wire."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        head, _, rest = raw.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        self.status = int(lines[0].split(b" ")[1]) if lines[0] else 0
        self.headers = {
            k.lower().decode(): v.decode() for k, v in (line.split(b": ", 1) for line in lines[1:])
        }
        self.body = _dechunk(rest) if self.headers.get("transfer-encoding") == "chunked" else rest

    def json(self) -> Any:
        return json.loads(self.body)


def _dechunk(data: bytes) -> bytes:
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        if int(size, 16) == 0:
            return body
        body += data[: int(size, 16)]
        data = data[int(size, 16) + 2 :]
    raise ValueError("the chunked body was cut")


class Front:
    """A gateway under test, with its context and a raw client."""

    def __init__(
        self, context: GatewayContext, port: int, replicas: list[ScriptedReplica], source: FixedSource
    ):
        self.context = context
        self.port = port
        self.replicas = replicas
        self.source = source
        self.server: GatewayServer | None = None
        self._reports = 0

    def tell(self, name: str, *, backlog: int = 0, running: int = 0, kv_use: float = 0.0) -> None:
        """A load report of the replica `name`, as its feed would bring it."""
        self._reports += 1
        load = self.context.router.loads.get(name)
        if load is not None:
            replica = load.replica
            report = LoadReport(replica.id, replica.boot_id, self._reports, running, 0, kv_use, backlog)
            self.context.report(report, monotonic())

    def saturate(self, *names: str) -> None:
        for name in names:
            self.tell(name, backlog=10**7, running=1)

    async def until_held(self, count: int) -> None:
        """Wait until so many requests wait in the gateway."""
        while self.context.admission.num_waiting != count:
            await asyncio.sleep(0)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=2**26)

    async def raw(self, data: bytes) -> bytes:
        """Send bytes, return all that comes until the gateway closes."""
        reader, writer = await self.connect()
        writer.write(data)
        try:
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async def post(self, body: Any, path: str = PATH, headers: str = "") -> Response:
        return Response(await self.raw(request_bytes(body, path, headers)))

    async def settled(self) -> None:
        """Wait until nothing is in flight, then check that all counts agree."""
        while self.context.active:
            await asyncio.sleep(0)
        self.context.check_integrity()
        assert self.context.router.loads.open_bookings == 0
        assert self.context.metrics.in_flight == 0
        assert self.context.admission.lines == {}


def request_bytes(body: Any, path: str = PATH, headers: str = "connection: close\r\n") -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = headers or "connection: close\r\n"
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {len(content)}\r\n\r\n".encode()
        + content
    )


FrontFactory = Callable[..., Awaitable[Front]]

FAST = Timeouts(
    head_s=0.3, body_s=0.3, connect_s=1, first_byte_s=30, idle_s=30, client_stall_s=30, keep_alive_s=30
)


@asynccontextmanager
async def open_front(
    face: str = "protocol",
    num_replicas: int = 2,
    timeouts: Timeouts = FAST,
    roles: tuple[Role, ...] = (),
    reports: bool = False,
    max_running: int | None = None,
    tenants: tuple[Tenant, ...] = (),
    demand: DemandSink | None = None,
    **settings: Any,
) -> AsyncIterator[Front]:
    """A gateway in front of scripted replicas named a, b, c, ...; with `roles` they hand prompts over, with `reports`
    they count as replicas that tell their load (`Front.tell`)."""
    replicas = [ScriptedReplica(chr(ord("a") + index)) for index in range(num_replicas)]
    for replica, role in zip(replicas, roles, strict=False):
        replica.role, replica.kv_connector = role, "NixlConnector"
    for replica in replicas:
        replica.reports, replica.max_running = reports, max_running
    for replica in replicas:
        await replica.open()
    source = FixedSource([replica.replica for replica in replicas])
    config = Gateway(
        port=0,
        access_log=False,
        timeouts=timeouts,
        limits=Limits(head_bytes=8192, body_bytes=settings.pop("body_bytes", 1024 * 1024)),
        **{"policy": "round_robin", **settings},
    )
    weights = {tenant.name: tenant.weight for tenant in tenants}
    settings_now = GatewaySettings(0, config, dead_after_s=1e6, weights=weights)
    server = GatewayServer(settings_now, source, internal_token="secret", demand=demand)
    _, port = server.bind()
    await server.start()
    assert server.context is not None
    try:
        if face == "asgi":
            async with _asgi_server(server.context) as asgi_port:
                yield _front(server, asgi_port, replicas, source)
        else:
            yield _front(server, port, replicas, source)
    finally:
        await server.stop()
        for replica in replicas:
            await replica.close()


def _front(server: GatewayServer, port: int, replicas: list[ScriptedReplica], source: FixedSource) -> Front:
    assert server.context is not None
    front = Front(server.context, port, replicas, source)
    front.server = server
    return front


@asynccontextmanager
async def _asgi_server(context: GatewayContext) -> AsyncIterator[int]:
    """The raw-ASGI face under a plain uvicorn."""
    from headrace.gateway.app import build_app

    config = UvicornConfig(
        RelayApp(build_app(context), context), host="127.0.0.1", port=0, lifespan="off", log_level="error"
    )
    uvicorn = UvicornServer(config)
    uvicorn.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.ensure_future(uvicorn.serve())
    while not uvicorn.started:
        await asyncio.sleep(0.01)
    try:
        yield uvicorn.servers[0].sockets[0].getsockname()[1]
    finally:
        uvicorn.should_exit = True
        await task


@pytest.fixture(params=["protocol", "asgi"])
def face(request: pytest.FixtureRequest) -> str:
    """Both faces of the relay must behave the same."""
    return str(request.param)


@pytest.fixture
def front() -> Callable[..., Any]:
    """`async with front(...) as gateway:`"""
    return open_front
