"""Nothing outlives its owner."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from headrace.fleet import warden

SLEEPER = "import signal; print('up', flush=True); signal.pause()"


@pytest.fixture
def mark() -> Iterator[str]:
    mark = f"HEADRACE_TEST={secrets.token_hex(8)}"
    yield mark
    warden.end_all(mark, grace_s=0)


def marked_environment(mark: str) -> dict[str, str]:
    name, _, value = mark.partition("=")
    return {**os.environ, name: value}


def test_marked_processes_are_found_and_ended_and_others_left_alone(mark: str) -> None:
    ours = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], env=marked_environment(mark), stdout=subprocess.PIPE
    )
    other = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE)
    try:
        for process in (ours, other):
            assert process.stdout is not None
            process.stdout.readline()
        assert warden.marked(mark) == [ours.pid]
        assert warden.end_all(mark, grace_s=0) == 1
        assert ours.wait(5) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.communicate()


def test_a_process_that_renames_itself_is_still_found(mark: str) -> None:
    """As vLLM's do where setproctitle is installed."""
    pytest.importorskip("setproctitle")
    renaming = "import setproctitle; setproctitle.setproctitle('VLLM::EngineCore')\n" + SLEEPER
    ours = subprocess.Popen(
        [sys.executable, "-c", renaming],
        env={**marked_environment(mark), warden.KEEPS_ENVIRONMENT: "1"},
        stdout=subprocess.PIPE,
    )
    try:
        assert ours.stdout is not None
        ours.stdout.readline()
        assert warden.marked(mark) == [ours.pid]
    finally:
        ours.kill()
        ours.communicate()


OWNER = """
import os, subprocess, sys
mark, warden = sys.argv[1:]
name, _, value = mark.partition("=")
subprocess.Popen([sys.executable, "-I", "-S", warden, str(os.getpid()), mark], start_new_session=True)
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"],
                         env={**os.environ, name: value}, start_new_session=True)
print(child.pid, flush=True)
import signal; signal.pause()
"""


def test_a_killed_owner_takes_its_marked_children_along(mark: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, mark, warden.__file__], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    descriptor = os.pidfd_open(child)
    owner.kill()
    owner.communicate()
    # Readable when the child has ended: no polling, no sleeping.
    import select

    assert select.select([descriptor], [], [], 10)[0]
    os.close(descriptor)
    assert warden.marked(mark) == []


HOLDER = """
from multiprocessing import get_context, resource_tracker, shared_memory
import signal
memory = shared_memory.SharedMemory(create=True, size=64)
lock = get_context("spawn").Lock()
print(memory.name, lock._semlock.name, flush=True)
signal.pause()
"""


def test_shared_memory_of_the_killed_goes_with_them_and_that_of_others_stays(mark: str) -> None:
    ours, other = (
        subprocess.Popen(
            [sys.executable, "-c", HOLDER], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for environment in (marked_environment(mark), os.environ)
    )
    try:
        assert ours.stdout is not None and other.stdout is not None
        names, others = ours.stdout.readline().decode().split(), other.stdout.readline().decode().split()
        paths, kept = (f"/dev/shm/{names[0]}", f"/dev/shm/sem.{names[1][1:]}"), f"/dev/shm/{others[0]}"
        assert all(map(os.path.exists, (*paths, kept)))
        warden.end_all(mark, grace_s=0)
        assert not any(map(os.path.exists, paths))
        assert os.path.exists(kept)
    finally:
        for process in (ours, other):
            process.terminate()
            process.communicate()
