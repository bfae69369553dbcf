"""`headrace status`: the pools and replicas of a running fleet."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from headrace.fleet import controller_call
from headrace.fleet.screen import pool_table, status_table
from headrace.fleet.status import FleetStatus
from headrace.fleet.status_words import notes


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command."""
    parser = subparsers.add_parser("status", help="show the replicas of a running fleet")
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headrace status`."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    controller_call.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the tables. Raises NothingRuns with one line when there is no fleet."""
    status, found = controller_call.ask(args, lambda controller: controller.status.remote())
    url, is_ready = ("", True) if found is None else (found.url, found.is_ready)
    _print(status, url, is_ready, args.json, sys.stdout)
    return 0


def _print(status: FleetStatus, url: str, is_ready: bool, as_json: bool, out: TextIO) -> None:
    if as_json:
        print(json.dumps(as_data(status, url, is_ready), indent=2), file=out)
        return
    # A pipe has no width to fit into: nothing is cut there.
    console = Console(file=out, width=None if out.isatty() else 200)
    console.print(status_table(status, url, is_ready))
    if status.pools:
        console.print()
        console.print(pool_table(status.pools))
    for note in notes(status):
        console.print(Text(note), soft_wrap=True)


def as_data(status: FleetStatus, url: str, is_ready: bool = True) -> dict[str, Any]:
    """What `--json` prints: {url, state, fleet, epoch, version, replicas: [{id, model, role, state, running, ...}],
    pools: [{pool, ready, target, pin, least, most, reason, ...}]}.

    `state` is "starting" until the gateway listens, "ready" from then on.
    """
    return {"url": url, "state": "ready" if is_ready else "starting", **asdict(status)}
