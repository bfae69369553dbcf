"""One fleet of this process, from checks to replicas that serve, and its end: without signals, screen and gateway.

    begin -> until_ready -> (stay) ... end

`headrace serve` puts signals, a screen and a gateway around it (`launch`), the Python API a thread and a gateway
(`api/running`). The slow steps can be cancelled at any moment and `end` called at any moment, twice too; only Ray's
own start (3 s, blocking) is waited for, since half a Ray cannot be stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from headrace.config import Config, Gateway
from headrace.errors import StartError
from headrace.fleet import bring_up, cluster, preflight, run_file, warden
from headrace.fleet.call_thread import CallThread
from headrace.fleet.fleet_metrics import FleetMetrics
from headrace.fleet.membership import ControllerMembership
from headrace.fleet.status import FleetStatus

_STAY_POLL_S = 1.0
_SHUTDOWN_TIMEOUT_S = 10.0
_LOCAL_SHUTDOWN_TIMEOUT_S = 0.5
"""Of a fleet on a cluster of our own, whose end takes care of what this misses."""
_CALL_TIMEOUT_S = 10.0


class Told(Protocol):
    """Who hears what happens: `Screen`, or a log."""

    def say(self, line: str) -> None:
        """One line about what happens."""

    def progress(self, status: FleetStatus) -> None:
        """The fleet while it starts, twice a second."""

    def changes(self, status: FleetStatus) -> None:
        """The fleet while it serves, once a second."""


class FleetRun:
    """Of one configuration, once."""

    def __init__(
        self,
        config: Config,
        told: Told,
        address: str | None = None,
        *,
        gateway: Gateway | None = None,
        takes_stdout: bool = True,
        ray_started: Callable[[], None] = lambda: None,
    ) -> None:
        """`address`: a Ray cluster to join; None stays with the one that this process is connected to, or starts one
        on this machine. `gateway`: where to listen, if not where the configuration says. `takes_stdout`: see
        `cluster.join`. `ray_started` is called on the event loop when Ray's start has ended, however it ended: it puts
        a handler of its own before those that others have set for SIGTERM."""
        self.config = preflight.with_absolute_sources(config)
        self._gateway = gateway or config.gateway
        self.membership = ControllerMembership()
        self.metrics = FleetMetrics()  # for the gateway to show
        self.token = secrets.token_urlsafe(32)
        self.controller: Any = None
        self.drain_timeout_s = config.fleet.drain_timeout_s  # as `headrace apply` has left it
        self.num_cores = 0.0  # of this machine that CPU replicas hold, where its cluster is ours
        self.had_failure = False
        self.logs: Path | None = None  # after `end`: where to look for the cause, None where nothing failed
        self._told = told
        self._address = address
        self._takes_stdout = takes_stdout
        self._ray_started = ray_started
        self._calls = CallThread("headrace-ray")
        self._connecting: asyncio.Task[cluster.Connection] | None = None

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to end."""
        return self._connecting is not None

    async def begin(self) -> cluster.Connection:
        """Check, start or join Ray, start the controller: replicas begin to start. Raises StartError."""
        bring_up.check_machine(self.config, is_local=self._address is None)
        connection = await self._connect()
        held = await self._check_cluster()
        self.num_cores = held if connection.is_local else 0.0
        from headrace.fleet import controller, owner

        # On one machine loopback is enough, and nothing else can reach it.
        host = "127.0.0.1" if connection.is_local else None
        belongs_to = owner.connected(self._gateway, is_local=connection.is_local)
        self.controller = controller.create(self.config, self.token, host, belongs_to)
        await self.controller.begin.remote()
        self.membership.follow(self.controller)
        return connection

    async def _connect(self) -> cluster.Connection:
        calls = self._calls
        adopted = cluster.connected() if self._address is None else None
        if adopted is not None:
            self._told.say(f"staying with the Ray cluster at {adopted.address}")
            connecting = calls.call(lambda: adopted)
        elif self._address is None:
            self._told.say("starting Ray on this machine (about 3 s)")
            connecting = calls.call(cluster.start_local, takes_stdout=self._takes_stdout)
        else:
            self._told.say(f"joining the Ray cluster at {self._address}")
            connecting = calls.call(cluster.join, self._address, takes_stdout=self._takes_stdout)
        self._connecting = asyncio.ensure_future(connecting)
        try:
            return await asyncio.shield(self._connecting)
        finally:
            self._ray_started()

    async def _check_cluster(self) -> float:
        """Returns the cores that CPU replicas will hold."""
        held = await bring_up.check_cluster(self.config)
        if held and self._address is None:
            for other in preflight.holding_cores(run_file.running()):
                self._told.say(
                    f"warning: fleet {other.fleet!r} (pid {other.pid}, {other.url}) computes on {other.num_cores:g} of "
                    "this machine's cores too; both will be slow"
                )
        return held

    async def until_ready(self) -> FleetStatus:
        """Return once every replica is ready. Raises StartError when one has failed for good, or time is up."""

        def told(status: FleetStatus) -> None:
            self._note_failures(status)
            self._told.progress(status)

        return await bring_up.wait_until_ready(self.controller, self.config.fleet.start_timeout_s, told)

    async def stay(self) -> None:
        """Tell what becomes of the replicas, until cancelled."""
        import ray

        is_away = False
        while True:
            await asyncio.sleep(_STAY_POLL_S)
            try:
                async with asyncio.timeout(_CALL_TIMEOUT_S):
                    status: FleetStatus = await self.controller.status.remote()
            except (ray.exceptions.RayError, TimeoutError):
                if not is_away:
                    self._told.say("the controller does not answer; serving on")
                is_away = True
                continue
            is_away = False
            self.metrics.status = status
            self.drain_timeout_s = status.drain_timeout_s
            self._note_failures(status)
            self._told.changes(status)

    def _note_failures(self, status: FleetStatus) -> None:
        self.had_failure |= any(replica.failures or replica.restarts for replica in status.replicas)

    async def end(self) -> None:
        """End every replica, the controller, and Ray where it is ours. The gateway of this process has drained by now;
        what others have sent to replicas on somebody else's cluster is waited for."""
        connecting, self._connecting = self._connecting, None
        if connecting is None:
            self._calls.close()
            return
        connection = None
        with contextlib.suppress(StartError):
            connection = await connecting
        self._ray_started()
        shared: set[int] = set()
        if connection is not None and connection.mark:
            shared = await self._calls.call(warden.shared_memory, connection.mark)
        if connection is not None and self.controller is not None:
            await self._end_fleet(connection)
        if connection is not None and connection.session is not None and self.had_failure:
            self.logs = connection.session / "logs"
        await self._calls.call(cluster.leave, connection, shared=shared, keep_logs=self.had_failure)
        self._calls.close()

    async def _end_fleet(self, connection: cluster.Connection) -> None:
        if not connection.is_local:
            await bring_up.end(self.controller, _SHUTDOWN_TIMEOUT_S, self.drain_timeout_s)
            return
        # The controller ends with its cluster. Killed by us, Ray would tell everybody of its unfinished calls.
        import ray

        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            async with asyncio.timeout(_LOCAL_SHUTDOWN_TIMEOUT_S):
                await self.controller.shutdown.remote(0.0)
