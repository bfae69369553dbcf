"""CPU time and memory of process trees, read from /proc (Linux only).

`schedstat` counts nanoseconds on a core; `stat`'s ticks of 10 ms would be too coarse for windows of a second.
Threads that ended before a reading are not in it: the gateways measured here keep theirs.
"""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def parse_schedstat(text: str) -> int:
    """Nanoseconds on a core, the first of the three numbers of a `schedstat` file."""
    return int(text.split(maxsplit=1)[0])


def parse_resident_bytes(statm: str) -> int:
    """Resident bytes from a `statm` file (sizes in pages: total, resident, shared, ...)."""
    return int(statm.split()[1]) * PAGE_BYTES


def parse_busy_ns(stat: str) -> int:
    """Nanoseconds that all cores together have worked, from the first line of `/proc/stat`, in steps of a tick.

    Its columns: user, nice, system, idle, iowait, irq, softirq, steal. Idle and iowait are not work, and steal
    was another machine's.
    """
    ticks = [int(number) for number in stat.split("\n", 1)[0].split()[1:]]
    return (sum(ticks[:3]) + sum(ticks[5:7])) * TICK_NS


def busy_ns(proc: Path = PROC) -> int:
    """Nanoseconds that all cores together have worked since the start of the machine."""
    return parse_busy_ns((proc / "stat").read_text())


def process_tree(pid: int, proc: Path = PROC) -> tuple[int, ...]:
    """The process and all its living descendants; empty when it is gone."""
    if not (proc / str(pid)).exists():
        return ()
    found = [pid]
    for parent in found:  # grows while it is walked
        for children in (proc / str(parent) / "task").glob("*/children"):
            try:
                found.extend(int(child) for child in children.read_text().split())
            except OSError:  # the thread ended between the listing and the reading
                continue
    return tuple(found)


def cpu_ns(pid: int, proc: Path = PROC) -> int:
    """Nanoseconds that all living threads of the process tree have spent on a core so far."""
    total = 0
    for member in process_tree(pid, proc):
        for schedstat in (proc / str(member) / "task").glob("*/schedstat"):
            try:
                total += parse_schedstat(schedstat.read_text())
            except OSError:
                continue
    return total


def resident_bytes(pid: int, proc: Path = PROC) -> int:
    """Resident memory of the process tree. Pages shared within the tree count once per process."""
    total = 0
    for member in process_tree(pid, proc):
        try:
            total += parse_resident_bytes((proc / str(member) / "statm").read_text())
        except OSError:
            continue
    return total
