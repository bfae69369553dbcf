"""A gateway process as its supervisor sees it: started, and seen out."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from time import monotonic

from headrace.gateway.group_line import Line
from headrace.gateway.merged_metrics import Family


class Member:
    """One of several on a port."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], line: Line) -> None:
        self.number = number
        self.process = process
        self.line = line
        self.began_s = monotonic()
        self.is_serving = False
        self.counted: list[Family] = []  # when it last told


def start_process(line: socket.socket) -> subprocess.Popen[bytes]:
    """`line`: its end of it."""
    # Not asyncio's: that needs the main thread's loop, and the Python API's is in another.
    return subprocess.Popen(
        [sys.executable, "-m", "headrace.gateway.group_member", str(line.fileno())],
        pass_fds=(line.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=_stderr(),
        start_new_session=True,  # a terminal's Ctrl-C is the supervisor's business
    )


def _stderr() -> int | None:
    """Where their access logs go: with ours. None: the descriptor that this process has (a notebook's has none)."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return None


async def reap(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    """Its exit code, once it has ended; killed when it does not in time."""
    deadline_s = monotonic() + timeout_s
    while process.poll() is None and monotonic() < deadline_s:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    if process.poll() is None:
        process.kill()
        process.wait()
    return process.returncode
