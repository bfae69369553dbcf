"""`headrace status`: the replicas of a running fleet."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console

from headrace.errors import StartError
from headrace.fleet import run_file
from headrace.fleet.screen import status_table
from headrace.fleet.status import FleetStatus

_TIMEOUT_S = 15.0


class NothingRuns(StartError):
    """No fleet where one was looked for."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command."""
    parser = subparsers.add_parser("status", help="show the replicas of a running fleet")
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headrace status`."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
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


def run(args: argparse.Namespace) -> int:
    """Print the table. Raises NothingRuns with one line when there is no fleet."""
    out = sys.stdout
    if args.address is None:
        found = pick(run_file.running(), args.fleet, args.url, args.pid)
        status = _ask(found.ray_address, found.fleet, found.auth_token)
        _print(status, found.url, found.is_ready, args.json, out)
    else:
        _print(_ask(args.address, args.fleet or "headrace", None), "", True, args.json, out)
    return 0


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


def _ask(address: str, fleet: str, auth_token: str | None) -> FleetStatus:
    from headrace.fleet import cluster

    cluster.join(address, auth_token, timeout_s=_TIMEOUT_S)
    import ray  # only now: Ray reads its token when it is first imported

    from headrace.fleet.replica_host import NAMESPACE, controller_name

    try:
        controller = ray.get_actor(controller_name(fleet), namespace=NAMESPACE)
        status: FleetStatus = ray.get(controller.status.remote(), timeout=_TIMEOUT_S)
        return status
    except ValueError as error:
        raise NothingRuns(f"no fleet {fleet!r} runs on the Ray cluster at {address}") from error
    except ray.exceptions.RayError as error:
        raise NothingRuns(
            f"the controller of fleet {fleet!r} does not answer: {type(error).__name__}"
        ) from error
    finally:
        ray.shutdown()


def _print(status: FleetStatus, url: str, is_ready: bool, as_json: bool, out: TextIO) -> None:
    if as_json:
        print(json.dumps(as_data(status, url, is_ready), indent=2), file=out)
    else:
        # A pipe has no width to fit into: nothing is cut there.
        Console(file=out, width=None if out.isatty() else 200).print(status_table(status, url, is_ready))


def as_data(status: FleetStatus, url: str, is_ready: bool = True) -> dict[str, Any]:
    """What `--json` prints: {url, state, fleet, epoch, version, replicas: [{id, model, role, state, running, ...}]}.

    `state` is "starting" until the gateway listens, "ready" from then on.
    """
    return {"url": url, "state": "ready" if is_ready else "starting", **asdict(status)}
