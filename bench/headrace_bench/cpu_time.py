"""CPU time and memory of a process tree, read from /proc (Linux only).

`schedstat` counts nanoseconds on a core; `stat`'s ticks of 10 ms would be too coarse for windows of a second.
Threads that ended before a reading are not in it: the gateways measured here keep theirs.
"""

from __future__ import annotations

from pathlib import Path

PROC = Path("/proc")
PAGE_BYTES = 4096


def parse_schedstat(text: str) -> int:
    """Nanoseconds on a core, the first of the three numbers of a `schedstat` file."""
    return int(text.split(maxsplit=1)[0])


def parse_resident_bytes(statm: str) -> int:
    """Resident bytes from a `statm` file (sizes in pages: total, resident, shared, ...)."""
    return int(statm.split()[1]) * PAGE_BYTES


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
