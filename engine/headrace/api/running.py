"""The fleet behind a `Fleet`: one that this process brings up, or one that runs already. Lives on the fleet's loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace
from typing import Any, Protocol

from headrace.config import Config
from headrace.errors import CallerError, ShortageError, StartError
from headrace.fleet import cluster, run_file
from headrace.fleet.call_thread import CallThread
from headrace.fleet.fleet_run import FleetRun
from headrace.fleet.front import make_gateway, url_of
from headrace.fleet.screen import describe
from headrace.fleet.status import FleetStatus

log = logging.getLogger("headrace")

_CALL_TIMEOUT_S = 15.0


class Running(Protocol):
    """What `Fleet` asks of either."""

    url: str

    async def open(self) -> None:
        """Return when requests can be sent to `url`. Raises StartError, with nothing left behind."""

    async def close(self, drain_s: float) -> None:
        """Let requests finish for at most `drain_s`, then leave nothing behind. Safe at any time and twice."""

    def hurry(self) -> None:
        """Cut what `close` lets finish. From any thread."""

    async def controller(self) -> Any:
        """The controller's actor handle. Raises CallerError where it cannot be reached."""


class OwnFleet:
    """Brought up by this process, with a gateway in it."""

    def __init__(self, config: Config, address: str | None) -> None:
        self.url = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._run = FleetRun(config, _Log(), address, takes_stdout=False)
        self._gateway = make_gateway(self._run)
        self._announcement = contextlib.ExitStack()
        self._staying: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    async def open(self) -> None:
        try:
            await self._bring_up()
        except BaseException as error:
            self._run.had_failure |= isinstance(error, StartError)
            await self.close(0.0)
            raise

    async def _bring_up(self) -> None:
        self._loop = asyncio.get_running_loop()
        fleet = self._run
        self.url = url_of(*self._gateway.bind())
        connection = await fleet.begin()
        run = run_file.of_this_process(
            fleet.config.fleet.name, self.url, connection.address, connection.auth_token, fleet.num_cores
        )
        with contextlib.suppress(OSError):  # without the file only `headrace status` is lost
            self._announcement.enter_context(run_file.announced(run))
        await fleet.until_ready()
        await self._gateway.start(internal_token=fleet.token)
        with contextlib.suppress(OSError):
            run_file.write(replace(run, is_ready=True))
        self._staying = asyncio.ensure_future(fleet.stay())

    async def close(self, drain_s: float) -> None:
        if self._staying is not None:
            self._staying.cancel()
            await asyncio.gather(self._staying, return_exceptions=True)
            self._staying = None
        stopping = asyncio.ensure_future(self._gateway.stop(drain_s))
        hurrying = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((stopping, hurrying), return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not stopping.done():
            stopping.cancel()
            await asyncio.gather(stopping, return_exceptions=True)
            await self._gateway.stop(0.0)
        self._announcement.close()
        await self._run.end()
        if self._run.logs is not None:
            log.warning("logs: %s", self._run.logs)

    def hurry(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._hurry.set)

    async def controller(self) -> Any:
        return self._run.controller


class RunningElsewhere:
    """Serves already. Its Ray cluster is joined when somebody asks for more than answers."""

    def __init__(self, url: str, run: run_file.Run | None) -> None:
        """`run`: how this machine knows it; None where nothing but its URL is known."""
        self.url = url
        self._run = run
        self._calls: CallThread | None = None
        self._controller: Any = None
        self._connection: cluster.Connection | None = None

    async def open(self) -> None:
        pass

    async def close(self, drain_s: float) -> None:
        calls, self._calls = self._calls, None
        if calls is not None:
            await calls.call(cluster.leave, self._connection)
            calls.close()

    def hurry(self) -> None:
        pass

    async def controller(self) -> Any:
        run = self._run
        if run is None:
            raise CallerError(
                f"of the fleet at {self.url} only its address is known: connect by name, on the machine where it was "
                "started"
            )
        if self._controller is None:
            self._connection = cluster.connected()
            if self._connection is None:
                self._calls = CallThread("headrace-ray")
                self._connection = await self._calls.call(
                    cluster.join, run.ray_address, run.auth_token, _CALL_TIMEOUT_S, takes_stdout=False
                )
            import ray  # only now: Ray reads its token when it is first imported

            from headrace.fleet.replica_host import NAMESPACE, controller_name

            try:
                self._controller = ray.get_actor(controller_name(run.fleet), namespace=NAMESPACE)
            except ValueError:
                raise ShortageError(
                    f"fleet {run.fleet!r} does not run on the Ray cluster at {self._connection.address}"
                ) from None
        return self._controller


class _Log:
    """Tells the log `headrace` what a screen would show."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}

    def say(self, line: str) -> None:
        log.info("%s", line)

    def progress(self, status: FleetStatus) -> None:
        self.changes(status)

    def changes(self, status: FleetStatus) -> None:
        for replica in status.replicas:
            if self._told.get(replica.id) != replica.state.value:
                self._told[replica.id] = replica.state.value
                log.info("%s", describe(replica))
