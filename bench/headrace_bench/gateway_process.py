"""Starting servers on chosen cores, waiting until they answer, and ending them again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from headrace_bench.http_wire import address, post
from headrace_bench.peers import REPOSITORY, Launch
from headrace_bench.prompt_bodies import chat_body
from headrace_bench.relay_client import Timed

POLL_S = 0.05


class DidNotStart(Exception):
    """The process ended or did not answer in time; the message holds its last lines."""


def cores() -> tuple[frozenset[int], frozenset[int]]:
    """One core for the gateway, the others for everything else. With a single core both share it."""
    allowed = sorted(os.sched_getaffinity(0))
    return frozenset(allowed[:1]), frozenset(allowed[1:] or allowed)


class Process:
    """A child process in a group of its own, pinned to cores, whose output goes to a file."""

    def __init__(self, command: Sequence[str], pinned: Collection[int], folder: Path, name: str) -> None:
        self.name = name
        self.log = Path(tempfile.mkstemp(prefix=f"{name}-", suffix=".log", dir=folder)[1])
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, pinned)  # inherited by the child: no `taskset`, no code between fork and exec
        try:
            with self.log.open("wb") as output:
                self.child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
        finally:
            os.sched_setaffinity(0, own)
        self.pid = self.child.pid

    def check_alive(self) -> None:
        if self.child.poll() is not None:
            raise DidNotStart(f"{self.name} ended with code {self.child.returncode}: {self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").replace(f"{REPOSITORY}/", "").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-3:]) or "no output"

    async def ready_line(self, timeout_s: float = 30) -> str:
        """The URL of the `ready: URL` line that our own servers print. Raises `DidNotStart`."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while asyncio.get_running_loop().time() < deadline:
            for line in self.log.read_text(errors="replace").splitlines():
                if line.startswith("ready: "):
                    return line.removeprefix("ready: ").strip()
            self.check_alive()
            await asyncio.sleep(POLL_S)
        raise DidNotStart(f"{self.name} was not ready after {timeout_s:.0f} s: {self._last_lines()}")

    async def answers(self, url: str, timeout_s: float = 60) -> None:
        """Return once a streamed chat completion comes back whole. Raises `DidNotStart`."""
        request = post(chat_body("ready?", stream=True, max_tokens=2))
        deadline = asyncio.get_running_loop().time() + timeout_s
        reason = "no connection"
        while asyncio.get_running_loop().time() < deadline:
            self.check_alive()
            try:
                transport, probe = await asyncio.get_running_loop().create_connection(Timed, *address(url))
                try:
                    await probe.ttft_ns(request)
                    return
                finally:
                    transport.abort()
            except (OSError, ValueError, TimeoutError) as error:
                reason = str(error)
            await asyncio.sleep(POLL_S)
        raise DidNotStart(
            f"{self.name} did not answer within {timeout_s:.0f} s ({reason}): {self._last_lines()}"
        )

    def stop(self) -> None:
        """End the process and its group: politely, then by force. Safe twice."""
        for number, patience_s in ((signal.SIGTERM, 3), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(patience_s)
        # The second signal above also ends descendants that outlived the first.


async def start(gateway: Launch, pinned: Collection[int], folder: Path) -> tuple[Process, str]:
    """Start a gateway; return it with its URL once it answers. Raises `DidNotStart`; then nothing is left."""
    process = Process(gateway.command, pinned, folder, gateway.name)
    try:
        url = gateway.url or await process.ready_line()
        await process.answers(url)
    except BaseException:
        process.stop()
        raise
    return process, url
