"""Calls to the controller of a running fleet, for commands: which fleet is meant, and what can be wrong with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from headrace.errors import HeadraceError, StartError
from headrace.fleet import run_file

TIMEOUT_S = 15.0
JOIN_TIMEOUT_S = 60.0
"""Importing Ray and connecting take 3 s alone, and more than 15 where replicas compute on every core of a machine."""


class NothingRuns(StartError):
    """No fleet where one was looked for."""


class Answer(NamedTuple):
    value: Any
    run: run_file.Run | None  # of the fleet that was asked, where it is known on this machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which fleet is meant."""
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="the Ray cluster to ask, or `auto` (default: that of the fleet on this machine)",
    )
    parser.add_argument(
        "--fleet",
        metavar="NAME",
        help="fleet.name of the one meant, where several run (default: the one that runs; with --address: headrace)",
    )
    parser.add_argument("--url", help="its gateway, where several of one name run on this machine")
    parser.add_argument("--pid", type=int, help="its `headrace serve`, likewise")


class Line:
    """To the controller of one fleet. Calls block."""

    def __init__(self, controller: Any, fleet: str, run: run_file.Run | None) -> None:
        """`run` of that fleet, where it is known on this machine."""
        self._controller = controller
        self._fleet = fleet
        self.run = run

    def ask(self, call: Callable[[Any], Any], timeout_s: float = TIMEOUT_S) -> Any:
        """What `call(controller)` refers to: `line.ask(lambda controller: controller.status.remote())`.

        Raises NothingRuns with one line when it does not answer, and what the controller raises of ours.
        """
        import ray

        try:
            return ray.get(call(self._controller), timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, HeadraceError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise NothingRuns(
                f"the controller of fleet {self._fleet!r} does not answer: {type(error).__name__}"
            ) from error


@contextmanager
def line(args: argparse.Namespace) -> Iterator[Line]:
    """To the fleet that the options mean, for as long as the context lasts. Raises NothingRuns when there is none.

    Within it `sys.stdout` leads nowhere: what is to be printed goes to the stream that was there before.
    """
    run = None if args.address is not None else pick(run_file.running(), args.fleet, args.url, args.pid)
    if run is not None:
        address, fleet, auth_token = run.ray_address, run.fleet, run.auth_token
    else:
        address, fleet, auth_token = args.address, args.fleet or "headrace", None
    from headrace.fleet import cluster

    stdout = sys.stdout  # joining takes it: what Ray prints shall not get among what the command says
    try:
        cluster.join(address, auth_token, timeout_s=JOIN_TIMEOUT_S)
        import ray  # only now: Ray reads its token when it is first imported

        # After a join that failed there is nothing to leave, and Ray may still be importing in the thread that tried.
        try:
            yield _line(address, fleet, run)
        finally:
            ray.shutdown()
    finally:
        sys.stdout = stdout


def _line(address: str, fleet: str, run: run_file.Run | None) -> Line:
    import ray

    from headrace.fleet.replica_host import NAMESPACE, controller_name

    try:
        return Line(ray.get_actor(controller_name(fleet), namespace=NAMESPACE), fleet, run)
    except ValueError as error:
        raise NothingRuns(f"no fleet {fleet!r} runs on the Ray cluster at {address}") from error


def ask(args: argparse.Namespace, call: Callable[[Any], Any], timeout_s: float = TIMEOUT_S) -> Answer:
    """One call, as `Line.ask` does it."""
    with line(args) as one:
        return Answer(one.ask(call, timeout_s), one.run)


def pick(runs: list[run_file.Run], fleet: str | None, url: str | None, pid: int | None) -> run_file.Run:
    """The one run that is meant; what is None does not matter. Raises NothingRuns, naming those that there are."""
    named = [
        run
        for run in runs
        if fleet in (None, run.fleet)
        and pid in (None, run.pid)
        and (url is None or url.rstrip("/").removeprefix("http://") == run.url.removeprefix("http://"))
    ]
    if len(named) == 1:
        return named[0]
    if not runs:
        raise NothingRuns(
            "no fleet runs on this machine; start one with `headrace serve CONFIG`, or give --address"
        )
    names = ", ".join(f"{run.fleet} (pid {run.pid}, {run.url})" for run in runs)
    if not named:
        raise NothingRuns(f"no such fleet runs on this machine, but {names}")
    raise NothingRuns(f"several fleets run on this machine: {names}; choose one with --url or --pid")
