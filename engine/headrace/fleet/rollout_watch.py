"""What a command shows of a rollout while the controller carries it out. It can leave at any time."""

from __future__ import annotations

import argparse
import secrets
import time
from typing import TextIO

from headrace.errors import StartError
from headrace.fleet.controller_call import Line, NothingRuns
from headrace.fleet.rollout import Pace, RolloutState
from headrace.fleet.screen import Screen
from headrace.fleet.status import FleetStatus, RolloutStatus

_POLL_S = 0.5


class RolloutStopped(StartError):
    """A rollout came to its end before its time, or not in time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of commands that replace replicas."""
    parser.add_argument(
        "--max-unavailable",
        type=int,
        default=1,
        metavar="N",
        help="replicas of a pool that may be missing at a time, where there is no room for successors (default: 1)",
    )
    parser.add_argument(
        "--surge",
        type=int,
        default=1,
        metavar="N",
        help="successors of a pool that may start at a time before their predecessors go, where there is room "
        "(default: 1)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="how long to wait for its end (default: until it ends)",
    )
    parser.add_argument(
        "--no-wait", action="store_true", help="return at once; `headrace status` shows how far it is"
    )


def pace_of(args: argparse.Namespace) -> Pace:
    """As the options say. Raises StartError for numbers with which nothing could ever be replaced."""
    if args.max_unavailable < 1 or args.surge < 0:
        raise StartError(
            f"--max-unavailable is {args.max_unavailable} and --surge {args.surge}; they must be at least 1 and 0"
        )
    return Pace(args.max_unavailable, args.surge)


def new_id() -> str:
    """Of a rollout that is asked for now."""
    return secrets.token_hex(4)


def see_out(line: Line, id: str, screen: Screen, args: argparse.Namespace, *, out: TextIO, done: str) -> int:
    """Wait for the end of the rollout of that id, where the options say so, and say `done`; returns the exit code.

    `out`: the command's own stdout, which joining Ray has taken. Raises RolloutStopped when it did not end well.
    """
    if args.no_wait:
        print("the fleet carries it out; `headrace status` shows how far it is", file=out)
        return 0
    try:
        watch(line, id, screen, args.timeout)
    except KeyboardInterrupt:
        screen.say("left; the fleet goes on with it, see `headrace status`")
        return 130
    print(done, file=out)
    return 0


def watch(line: Line, id: str, screen: Screen, timeout_s: float | None) -> None:
    """Show what happens until the rollout of that id has ended. Raises RolloutStopped when it did not end well."""
    deadline_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    shown, is_away = "", False
    while True:
        try:
            status: FleetStatus = line.ask(lambda controller: controller.status.remote())
        except NothingRuns as error:  # Ray restarts it, and it goes on
            if not is_away:
                screen.say(f"{error.message}; waiting for it")
            is_away = True
        else:
            is_away = False
            # A controller that has just been restarted knows of nothing yet.
            if status.is_surveyed:
                screen.changes(status)
                rollout = _own(status, id)
                progress = f"{rollout.what}: {rollout.replaced} of {rollout.total} replaced"
                if rollout.total and progress != shown:
                    screen.say(progress)
                shown = progress
                if rollout.state == RolloutState.DONE:
                    return
        if time.monotonic() > deadline_s:
            raise RolloutStopped(
                f"not done after {timeout_s:g} s; the fleet goes on with it, see `headrace status`"
            )
        time.sleep(_POLL_S)


def _own(status: FleetStatus, id: str) -> RolloutStatus:
    rollout = status.rollout
    if rollout is None or rollout.id != id:
        raise RolloutStopped("another change was asked for meanwhile and has taken this one over")
    if rollout.state == RolloutState.STOPPED:
        raise RolloutStopped(
            f"{rollout.what} stopped: {rollout.reason}; the others serve on as before. To go back, apply the earlier "
            "configuration"
        )
    return rollout
