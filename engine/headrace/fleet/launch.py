"""One `headrace serve`, from nothing to a ready fleet and back to nothing.

    port bound -> checks -> Ray -> controller -> replicas ready -> gateway serves ... signal -> drain -> all gone

Whatever ends it, at whatever moment, goes through the same tear-down. The slow steps before `ready` can be left
at any time; only Ray's own start (3 s, blocking) is waited for, since half a Ray cannot be stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.config import Config
from headrace.errors import FatalStartError, StartError
from headrace.fleet import cluster, preflight, run_file, warden
from headrace.fleet.membership import ControllerMembership
from headrace.fleet.screen import Screen
from headrace.fleet.specs import Device, expand
from headrace.fleet.status import FleetStatus
from headrace.gateway.server import GatewayServer

_POLL_S = 0.5
_STAY_POLL_S = 1.0
_MAX_START_FAILURES = 3
"""Failed starts in a row of one replica after which the fleet's start is given up."""
_SHUTDOWN_TIMEOUT_S = 10.0
_CALL_TIMEOUT_S = 10.0


class Launch:
    """Runs once."""

    def __init__(self, config: Config, screen: Screen, address: str | None = None) -> None:
        """`address`: a Ray cluster to join; None starts one on this machine."""
        self._config = preflight.with_absolute_sources(config)
        self._screen = screen
        self._address = address
        self._membership = ControllerMembership()
        self._gateway = GatewayServer(
            self._config.gateway,
            self._membership,
            dead_after_s=self._config.fleet.dead_after_s,
            tokenizers={
                model.name: (model.source, model.pools[0].engine)
                for model in self._config.models
                if model.backend == "vllm"
            },
        )
        self._connecting: asyncio.Task[cluster.Connection] | None = None
        self._controller: Any = None
        self._told_to_stop = asyncio.Event()
        self._announcement = contextlib.ExitStack()
        self._had_failure = False
        self.logs: Path | None = None

    async def run(self) -> None:
        """Return after SIGINT or SIGTERM, with everything gone. Raises StartError when the start fails, likewise.

        Afterwards `logs` is where to look for the cause, None where nothing failed.
        """
        self._take_signals()
        try:
            await self._until_told_to_stop(self._bring_up_and_stay())
        except StartError:
            self._had_failure = True
            raise
        finally:
            self._screen.end_progress()
            self._told_to_stop.clear()
            await self._tear_down()

    def _take_signals(self) -> None:
        """Again after Ray has started: it puts a handler of its own before ours, which prints a stack at SIGTERM and
        sets an alarm that aborts this process 3 s later, in the middle of draining."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(signum)
            loop.add_signal_handler(signum, self._told_to_stop.set)
        signal.alarm(0)  # of a SIGTERM that came before this line

    async def _until_told_to_stop(self, work: Any) -> bool:
        """Do `work`, or leave it when told to stop. Returns whether it was finished; raises what it raises."""
        working = asyncio.ensure_future(work)
        told = asyncio.ensure_future(self._told_to_stop.wait())
        await asyncio.wait((working, told), return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if working.done():
            working.result()
            return True
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        return False

    async def _bring_up_and_stay(self) -> None:
        host, port = self._gateway.bind()
        self._check_machine()
        connection = await self._connect()
        num_cores = await self._check_cluster()
        token = secrets.token_urlsafe(32)
        await self._start_controller(connection, token)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        run = run_file.Run(
            pid=os.getpid(),
            began=run_file.began(os.getpid()),
            fleet=self._config.fleet.name,
            url=url,
            ray_address=connection.address,
            auth_token=connection.auth_token,
            num_cores=num_cores if connection.is_local else 0.0,
        )
        with contextlib.suppress(OSError):  # without the file only `headrace status` is lost
            self._announcement.enter_context(run_file.announced(run))
        status = await self._wait_until_ready()
        await self._gateway.start(internal_token=token)
        with contextlib.suppress(OSError):
            run_file.write(replace(run, is_ready=True))
        self._screen.ready(url, status)
        await self._stay()

    def _check_machine(self) -> None:
        preflight.check_packages(self._config)
        if self._address is None:
            preflight.check_sources(self._config)
            preflight.check_caches(self._config)
            specs = expand(self._config, len(os.sched_getaffinity(0)), num_gpus=0)
            asked_for_gpus = any(spec.num_gpus for spec in specs)
            if not asked_for_gpus and not _has_gpus():
                preflight.check_memory(specs, preflight.available_memory_bytes())

    async def _connect(self) -> cluster.Connection:
        if self._address is None:
            self._screen.say("starting Ray on this machine (about 3 s)")
            connecting = asyncio.to_thread(cluster.start_local)
        else:
            self._screen.say(f"joining the Ray cluster at {self._address}")
            connecting = asyncio.to_thread(cluster.join, self._address)
        self._connecting = asyncio.ensure_future(connecting)
        try:
            return await asyncio.shield(self._connecting)
        finally:
            self._take_signals()

    async def _check_cluster(self) -> float:
        """Returns the cores that CPU replicas will hold."""
        import ray

        resources: dict[str, float] = await asyncio.to_thread(ray.cluster_resources)
        num_cores, num_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        specs = expand(self._config, num_cores, num_gpus)
        preflight.check_devices(specs, num_cores, num_gpus)
        held = sum(spec.cpus for spec in specs if spec.device is Device.CPU)
        if held and self._address is None:
            for other in preflight.holding_cores(run_file.running()):
                self._screen.say(
                    f"warning: fleet {other.fleet!r} (pid {other.pid}, {other.url}) computes on {other.num_cores:g} of "
                    "this machine's cores too; both will be slow"
                )
        return held

    async def _start_controller(self, connection: cluster.Connection, token: str) -> None:
        from headrace.fleet import controller

        # On one machine loopback is enough, and nothing else can reach it.
        host = "127.0.0.1" if connection.is_local else None
        self._controller = controller.create(self._config, token, host)
        await self._controller.begin.remote()
        self._membership.follow(self._controller)

    async def _wait_until_ready(self) -> FleetStatus:
        limit_s = self._config.fleet.start_timeout_s
        deadline_s = time.monotonic() + limit_s
        while True:
            # A controller that dies meanwhile is restarted by Ray, and asked again.
            status: FleetStatus = await self._controller.status.remote()
            self._note_failures(status)
            self._screen.progress(status)
            own = [replica for replica in status.replicas if not replica.is_external]
            for replica in own:
                if replica.failures and (replica.is_fatal or replica.failures >= _MAX_START_FAILURES):
                    family = FatalStartError if replica.is_fatal else StartError
                    raise family(f"{replica.id} did not start: {replica.reason}")
            if status.is_surveyed and all(replica.is_ready for replica in own):
                return status
            if time.monotonic() > deadline_s:
                late = ", ".join(replica.id for replica in own if not replica.is_ready)
                raise StartError(f"not ready after {limit_s:g} s (fleet.start_timeout_s): {late}")
            await asyncio.sleep(_POLL_S)

    async def _stay(self) -> None:
        """Say what becomes of the replicas, for as long as it runs."""
        import ray

        is_away = False
        while True:
            await asyncio.sleep(_STAY_POLL_S)
            try:
                status = await asyncio.wait_for(self._controller.status.remote(), _CALL_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError):
                if not is_away:
                    self._screen.say("the controller does not answer; serving on")
                is_away = True
                continue
            is_away = False
            self._note_failures(status)
            self._screen.changes(status)

    def _note_failures(self, status: FleetStatus) -> None:
        self._had_failure |= any(replica.failures or replica.restarts for replica in status.replicas)

    async def _tear_down(self) -> None:
        drain_s = self._config.fleet.drain_timeout_s
        if self._gateway.context is not None:
            self._screen.say(f"stopping: running requests have {drain_s:g} s; once more to cut them")
        elif self._connecting is not None:
            self._screen.say("stopping what has started (some seconds)")
        if not await self._until_told_to_stop(self._gateway.stop(drain_s)):
            await self._gateway.stop(0.0)
        self._announcement.close()
        if self._connecting is None:
            return
        connection = None
        with contextlib.suppress(StartError):
            connection = await self._connecting
        self._take_signals()
        shared: set[int] = set()
        if connection is not None and connection.mark:
            shared = await asyncio.to_thread(warden.shared_memory, connection.mark)
        if connection is not None and self._controller is not None:
            await self._end_fleet(connection)
        if connection is not None and connection.session is not None and self._had_failure:
            self.logs = connection.session / "logs"
        await asyncio.to_thread(cluster.leave, connection, shared=shared, keep_logs=self._had_failure)

    async def _end_fleet(self, connection: cluster.Connection) -> None:
        """The gateway has drained, so replicas end at once. Our own cluster's end takes care of what this misses."""
        import ray

        ending = self._controller.shutdown.remote(0.0)
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            await asyncio.wait_for(ending, _SHUTDOWN_TIMEOUT_S if not connection.is_local else _POLL_S)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._controller, no_restart=True)


def _has_gpus() -> bool:
    """Whether Ray will find GPUs here; `device: auto` then means them, and host memory is not the limit."""
    return any(os.path.exists(f"/dev/{name}") for name in ("nvidia0", "nvidiactl"))
