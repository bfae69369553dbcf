"""Nothing outlives its owner: finding and ending every process that carries a mark.

A mark is an environment variable with a random value. Children inherit it whatever they do with process groups,
sessions and parents, so a look through /proc finds all that a killed owner left behind.

As a program (`python warden.py PID NAME=VALUE`) it waits for process PID to end and then ends all that carry the
mark. PR_SET_PDEATHSIG was rejected: it must be set in each child, which vLLM spawns itself, and fires when the
*thread* that spawned the child ends. Imports nothing but the standard library, so that it costs 10 MB and 20 ms.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable

KEEPS_ENVIRONMENT = "SPT_NOENV"
"""Set beside a mark. vLLM's processes rename themselves, and setproctitle, where it is installed, writes the new name
over the environment that /proc shows, the mark with it, unless this variable is set."""

_PAUSE_S = 0.02
_FIRST_LOOK_S = 1.0
_RARE_LOOK_S = 60.0

_SHARED_MEMORY = "/dev/shm/"
_SHARED_PREFIXES = ("psm_", "sem.mp-", "vllm_dist_")
"""Names that Python's multiprocessing and vLLM give to shared memory and semaphores, with a random part."""


def post(mark: str) -> subprocess.Popen[bytes]:
    """Start a warden over this process, outside its session: no signal to our process group reaches it. It must not
    carry `mark` itself, so call this before the mark is set. Kill it where it is no longer needed."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def marked(mark: str) -> list[int]:
    """Processes of this user whose initial environment holds `mark` ("NAME=VALUE"), without this one."""
    wanted = mark.encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as environ:
                variables = environ.read().split(b"\0")
        except OSError:  # gone, or another user's
            continue
        if wanted in variables:
            found.append(int(name))
    return found


def end_all(mark: str, grace_s: float, shared: Collection[int] = ()) -> int:
    """Wait up to `grace_s` for the marked processes to end by themselves, then kill the rest.

    Returns how many had to be killed. Looks again until none is left: a dying process may still spawn. Shared
    memory that the killed had mapped, and so cannot unlink any more, is removed, and so is `shared`, what
    `shared_memory` found earlier.
    """
    deadline = time.monotonic() + grace_s
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
    killed: set[int] = set()
    inodes = set(shared)
    give_up = time.monotonic() + 5.0
    while (left := marked(mark)) and time.monotonic() < give_up:
        inodes |= _mapped(left)
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed.update(left)
        time.sleep(_PAUSE_S)
    _remove(inodes)
    return len(killed)


def shared_memory(mark: str) -> set[int]:
    """Inodes of the shared memory and semaphores that the marked processes have in their address spaces.

    Only one family shares them. Not their names: of a semaphore the maps show a passing one, from before glibc gave
    it its own.
    """
    return _mapped(marked(mark))


def _mapped(pids: Iterable[int]) -> set[int]:
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as maps:
            inodes |= {int(line.split(maxsplit=5)[4]) for line in maps if _SHARED_MEMORY in line}
    return inodes


def _remove(inodes: set[int]) -> None:
    for entry in os.scandir(_SHARED_MEMORY) if inodes else ():
        if entry.name.startswith(_SHARED_PREFIXES) and entry.inode() in inodes:
            with contextlib.suppress(OSError):  # its owner was quicker
                os.unlink(entry.path)


def main(pid: int, mark: str) -> None:
    """Wait for `pid` to end, however it ends, then kill what carries `mark`."""
    # Only the owner ends the warden: a terminal's Ctrl-C and a group-wide SIGTERM must not end it first.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    shared: set[int] = set()
    if os.getppid() == pid:  # else it has ended before this line
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            # A child may notice the owner's end and die before the last look; engines share memory from their
            # start on, so looks can become rare.
            pause_s = _FIRST_LOOK_S
            while not poll.poll(pause_s * 1000):
                shared |= shared_memory(mark)
                pause_s = min(2 * pause_s, _RARE_LOOK_S)
    end_all(mark, 0.0, shared)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
