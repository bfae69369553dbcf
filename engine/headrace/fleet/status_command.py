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
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--address", help="a Ray cluster, HOST:PORT or auto; default: the fleet on this machine"
    )
    parser.add_argument("--fleet", help="its fleet.name, where several run")
    parser.add_argument("--pid", type=int, help="of its `headrace serve`, where several of one name run")


def run(args: argparse.Namespace) -> int:
    """Print the table. Raises NothingRuns with one line when there is no fleet."""
    out = sys.stdout
    if args.address is None:
        found = _pick(run_file.running(), args.fleet, args.pid)
        status = _ask(found.ray_address, found.fleet, found.auth_token)
        _print(status, found.url, args.json, out)
    else:
        _print(_ask(args.address, args.fleet or "headrace", None), "", args.json, out)
    return 0


def _pick(runs: list[run_file.Run], fleet: str | None, pid: int | None) -> run_file.Run:
    named = [run for run in runs if fleet in (None, run.fleet) and pid in (None, run.pid)]
    if len(named) == 1:
        return named[0]
    if not runs:
        raise NothingRuns(
            "no fleet runs on this machine; start one with `headrace serve CONFIG`, or give --address"
        )
    names = ", ".join(f"{run.fleet} (pid {run.pid}, {run.url})" for run in runs)
    if not named:
        raise NothingRuns(f"no such fleet runs on this machine, but {names}")
    raise NothingRuns(f"several fleets run on this machine: {names}; choose one with --fleet or --pid")


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


def _print(status: FleetStatus, url: str, as_json: bool, out: TextIO) -> None:
    if as_json:
        print(json.dumps(as_data(status, url), indent=2), file=out)
    else:
        # A pipe has no width to fit into: nothing is cut there.
        Console(file=out, width=None if out.isatty() else 200).print(status_table(status, url))


def as_data(status: FleetStatus, url: str) -> dict[str, Any]:
    """What `--json` prints: {fleet, url, epoch, version, replicas: [{id, model, role, state, running, ...}]}."""
    return {"url": url, **asdict(status)}
