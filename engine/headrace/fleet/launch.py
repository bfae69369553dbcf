"""One `headrace serve`, from nothing to a ready fleet and back to nothing.

    port bound -> checks -> Ray -> controller -> replicas ready -> gateway serves ... signal -> drain -> all gone

Whatever ends it, at whatever moment, goes through the same tear-down. `fleet_run` has the fleet's part of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.config import Config, Gateway
from headrace.errors import StartError
from headrace.fleet import run_file
from headrace.fleet.fleet_run import FleetRun
from headrace.fleet.front import make_gateway, url_of
from headrace.fleet.screen import Screen


class Launch:
    """Runs once."""

    def __init__(
        self, config: Config, screen: Screen, address: str | None = None, *, gateway: Gateway | None = None
    ) -> None:
        """`address`: a Ray cluster to join; None starts one on this machine. `gateway`: where to listen, if not where
        the configuration says."""
        self._screen = screen
        self._fleet = FleetRun(config, screen, address, gateway=gateway, ray_started=self._take_signals)
        self._gateway = make_gateway(self._fleet, gateway)
        self._told_to_stop = asyncio.Event()
        self._announcement = contextlib.ExitStack()

    @property
    def logs(self) -> Path | None:
        """Where to look for the cause after `run`, None where nothing failed."""
        return self._fleet.logs

    async def run(self) -> None:
        """Return after SIGINT or SIGTERM, with everything gone. Raises StartError when the start fails, likewise."""
        self._take_signals()
        try:
            await self._until_told_to_stop(self._bring_up_and_stay())
        except StartError:
            self._fleet.had_failure = True
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
        fleet = self._fleet
        url = url_of(*self._gateway.bind())
        connection = await fleet.begin()
        run = run_file.of_this_process(
            fleet.config.fleet.name, url, connection.address, connection.auth_token, fleet.num_cores
        )
        with contextlib.suppress(OSError):  # without the file only `headrace status` is lost
            self._announcement.enter_context(run_file.announced(run))
        status = await fleet.until_ready()
        await self._gateway.start(internal_token=fleet.token)
        with contextlib.suppress(OSError):
            run_file.write(replace(run, is_ready=True))
        self._screen.ready(url, status)
        await fleet.stay()

    async def _tear_down(self) -> None:
        drain_s = self._fleet.drain_timeout_s
        if self._gateway.is_serving:
            self._screen.say(f"stopping: running requests have {drain_s:g} s; once more to cut them")
        elif self._fleet.has_begun:
            self._screen.say("stopping what has started (some seconds)")
        if not await self._until_told_to_stop(self._gateway.stop(drain_s)):
            await self._gateway.stop(0.0)
        self._announcement.close()
        await self._fleet.end()
