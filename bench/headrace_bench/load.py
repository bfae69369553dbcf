"""Runs a load job in client processes of its own and gathers what they saw.

The parent only draws the progress; the requests run in children (spawned, so that nothing is inherited), each
with its own event loop. Messages on the pipe of a child:

    parent -> child    the `LoadJob`
    child  -> parent   ("ready", None)
    parent -> child    the start on the monotonic clock; after that anything, or a closed pipe, means stop
    child  -> parent   ("counts", Counts) five times a second, ("done", DriverResult) or ("failed", text)
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from typing import Any

import uvloop

from headrace.errors import Bug, CallerError
from headrace_bench.client_health import ClientHealth
from headrace_bench.load_driver import Counts, DriverResult, LoadDriver, LoadJob, split_job
from headrace_bench.outcome import Outcome

COUNTS_S = 0.2
MAX_PROCESSES = 64
STOP_S = 15.0
"""A child that has not ended this long after its job's bound, or after being stopped, is killed."""


@dataclass(frozen=True, slots=True)
class LoadRun:
    """A whole run, over all client processes."""

    outcomes: tuple[Outcome, ...]  # in the order of sending
    clients: tuple[ClientHealth, ...]
    dropped: int
    stopped: bool = False  # by hand, before its end


def run_load(
    job: LoadJob, processes: int, progress: Callable[[Counts], None] = lambda counts: None
) -> LoadRun:
    """Run `job` and return when it ended, which it does within `duration_s + timeout_s` and some seconds.

    Ctrl-C ends it early: what has ended by then is returned. Raises `CallerError` on a number of processes
    out of bounds, `Bug` where a client process failed.
    """
    if not 1 <= processes <= MAX_PROCESSES:
        raise CallerError(f"processes must be 1..{MAX_PROCESSES}, got {processes}")
    useful = max(1, min(processes, job.users or processes, len(job.conversations)))
    context = multiprocessing.get_context("spawn")
    children = []
    pipes = []
    try:
        for part in split_job(job, useful):
            ours, theirs = context.Pipe()
            child = context.Process(target=_child, args=(theirs,), daemon=True)
            child.start()
            theirs.close()
            ours.send(part)
            children.append(child)
            pipes.append(ours)
        return _gather(job, pipes, progress)
    finally:
        for pipe in pipes:
            pipe.close()
        for child in children:
            child.join(STOP_S)
            if child.is_alive():
                child.kill()
                child.join()


def _gather(job: LoadJob, pipes: Sequence[Pipe], progress: Callable[[Counts], None]) -> LoadRun:
    for pipe in pipes:
        _expect_ready(pipe)
    began_s = time.monotonic() + 0.05
    for pipe in pipes:
        pipe.send(began_s)
    counts: dict[Pipe, Counts] = {}
    results: dict[Pipe, DriverResult] = {}
    stopped = False
    give_up_s = began_s + job.duration_s + job.timeout_s + STOP_S
    while len(results) < len(pipes):
        try:
            open_pipes = [pipe for pipe in pipes if pipe not in results]
            spoke = wait(open_pipes, timeout=max(0.0, give_up_s - time.monotonic()))
            for pipe in [pipe for pipe in open_pipes if pipe in spoke]:
                _take(pipe, counts, results)
            progress(_total(list(counts.values())))
        except KeyboardInterrupt:
            # The second Ctrl-C does not wait for the children's reports.
            if stopped:
                raise
            stopped = True
            for pipe in pipes:
                with contextlib.suppress(OSError):
                    pipe.send("stop")
            give_up_s = time.monotonic() + STOP_S
        if time.monotonic() > give_up_s:
            raise Bug(f"{len(pipes) - len(results)} client processes did not end in time")
    outcomes = [outcome for result in results.values() for outcome in result.outcomes]
    outcomes.sort(key=lambda outcome: outcome.sent_s)
    return LoadRun(
        tuple(outcomes),
        tuple(results[pipe].health for pipe in pipes),
        sum(result.dropped for result in results.values()),
        stopped,
    )


def _expect_ready(pipe: Pipe) -> None:
    try:
        kind, value = pipe.recv()
    except (EOFError, OSError):
        kind, value = "failed", "it died while starting"
    if kind != "ready":
        raise Bug(f"a client process failed: {value}")


def _take(pipe: Pipe, counts: dict[Pipe, Counts], results: dict[Pipe, DriverResult]) -> None:
    try:
        kind, value = pipe.recv()
    except (EOFError, OSError):
        raise Bug("a client process died without a report") from None
    if kind == "counts":
        counts[pipe] = value
    elif kind == "done":
        results[pipe] = value
    else:
        raise Bug(f"a client process failed: {value}")


def _total(parts: Sequence[Counts]) -> Counts:
    return Counts(
        ended=sum(part.ended for part in parts),
        failed=sum(part.failed for part in parts),
        in_flight=sum(part.in_flight for part in parts),
        output_tokens=sum(part.output_tokens for part in parts),
    )


def _child(pipe: Pipe) -> None:
    # Ctrl-C reaches the whole process group; the parent tells its children what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        job = pipe.recv()
        uvloop.run(_drive(job, pipe))
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except Exception as error:  # supervision boundary: the parent decides
        with contextlib.suppress(OSError):
            pipe.send(("failed", f"{type(error).__name__}: {error}"))


async def _drive(job: LoadJob, pipe: Pipe) -> None:
    loop = asyncio.get_running_loop()
    driver = LoadDriver(job)
    pipe.send(("ready", None))
    began_s: Any = await loop.run_in_executor(None, pipe.recv)

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            pipe.recv()
        with contextlib.suppress(RuntimeError):  # the loop is closed: everything has ended
            loop.call_soon_threadsafe(driver.stop)

    # A thread, not the loop's add_reader, which would make the pipe non-blocking and cut a large report short.
    threading.Thread(target=listen, daemon=True).start()

    async def tell() -> None:
        while True:
            await asyncio.sleep(COUNTS_S)
            pipe.send(("counts", driver.counts))

    telling = asyncio.create_task(tell())
    try:
        result = await driver.run(float(began_s))
    finally:
        telling.cancel()
    pipe.send(("counts", driver.counts))
    pipe.send(("done", result))
