"""Reading /proc, from files made by hand and from this very process."""

import os
from pathlib import Path

from headrace_bench import cpu_time


def test_schedstat_gives_nanoseconds_on_a_core() -> None:
    assert cpu_time.parse_schedstat("587695074 971806412 186\n") == 587695074


def test_statm_gives_resident_pages_in_bytes() -> None:
    assert cpu_time.parse_resident_bytes("183058 153816 5241 1 0 160000 0\n") == 153816 * cpu_time.PAGE_BYTES


def test_only_work_counts_as_busy_not_idling_waiting_or_what_was_stolen() -> None:
    stat = "cpu  10 1 5 1000 300 2 3 70 0 0\ncpu0 9 9 9 9 9 9 9 9 0 0\n"
    assert cpu_time.parse_busy_ns(stat) == 21 * cpu_time.TICK_NS


def process(proc: Path, pid: int, threads: dict[int, int], children: str = "") -> None:
    """A process in a made-up /proc: thread id → nanoseconds; the children belong to its first thread."""
    for number, (thread, nanoseconds) in enumerate(threads.items()):
        folder = proc / str(pid) / "task" / str(thread)
        folder.mkdir(parents=True)
        (folder / "schedstat").write_text(f"{nanoseconds} 5 1\n")
        (folder / "children").write_text(children if number == 0 else "")
    (proc / str(pid) / "statm").write_text("100 10 3 1 0 50 0\n")


def test_a_tree_counts_all_threads_of_all_descendants(tmp_path: Path) -> None:
    process(tmp_path, 1, {1: 100, 2: 20}, children="7 ")
    process(tmp_path, 7, {7: 3}, children="9 ")
    process(tmp_path, 9, {9: 4000})
    process(tmp_path, 8, {8: 999999})
    assert cpu_time.process_tree(1, tmp_path) == (1, 7, 9)
    assert cpu_time.cpu_ns(1, tmp_path) == 4123
    assert cpu_time.resident_bytes(1, tmp_path) == 3 * 10 * cpu_time.PAGE_BYTES


def test_a_process_that_is_gone_counts_nothing(tmp_path: Path) -> None:
    assert cpu_time.process_tree(12, tmp_path) == ()
    assert cpu_time.cpu_ns(12, tmp_path) == 0


def test_this_process_has_used_a_core_and_some_memory() -> None:
    assert cpu_time.cpu_ns(os.getpid()) > 0
    assert cpu_time.resident_bytes(os.getpid()) > 1_000_000
