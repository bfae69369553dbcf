"""`headrace scale`: how many replicas each pool has, why, and by hand how many."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from headrace.errors import BadRequest
from headrace.fleet import controller_call
from headrace.fleet.screen import pool_table
from headrace.fleet.status import FleetStatus, PoolStatus

_LAST = 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command."""
    parser = subparsers.add_parser(
        "scale",
        help="show or set how many replicas a pool has",
        description="Without arguments: each pool, how many replicas it should have, and why.",
    )
    parser.add_argument(
        "pool", nargs="?", metavar="POOL", help="`model`, or `model/role` where it has several"
    )
    parser.add_argument(
        "count", nargs="?", type=int, metavar="N", help="give it N replicas, whatever its load"
    )
    parser.add_argument("--auto", action="store_true", help="leave POOL to its configuration again")
    parser.add_argument("--why", action="store_true", help="the last decisions, with what each was made of")
    parser.add_argument("--last", type=int, default=_LAST, help=f"how many of them (default: {_LAST})")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    controller_call.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Raises BadRequest for arguments that do not go together, NotFound for a pool that there is not, NothingRuns."""
    if (args.count is not None or args.auto) and (args.pool is None or args.why):
        raise BadRequest("name one pool: `headrace scale POOL N`, `headrace scale POOL --auto`")
    if args.count is not None and args.auto:
        raise BadRequest("either a number of replicas or --auto, not both")
    if args.why:
        _print_why(args)
    elif args.count is not None or args.auto:
        count = None if args.auto else args.count
        row: PoolStatus = controller_call.ask(args, lambda c: c.scale.remote(args.pool, count)).value
        _print_pools([row], args.json)
    else:
        status: FleetStatus = controller_call.ask(args, lambda c: c.status.remote()).value
        _print_pools([row for row in status.pools if args.pool in (None, row.pool, row.model)], args.json)
    return 0


def _console() -> Console:
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 240, highlight=False)


def _print_pools(rows: Iterable[PoolStatus], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _console().print(pool_table(rows))


def _print_why(args: argparse.Namespace) -> None:
    told: dict[str, Any] = controller_call.ask(args, lambda c: c.decisions.remote(args.pool, args.last)).value
    if args.json:
        print(json.dumps(told, indent=2))
        return
    console = _console()
    if told["changes"]:
        console.print(decision_table(told["changes"], "changes"))
        console.print()
    console.print(decision_table(told["latest"], "now"))
    console.print(f"\nall of them: {told['log']}", soft_wrap=True)


def decision_table(decisions: Iterable[Mapping[str, Any]], title: str) -> Table:
    """Decisions with their inputs, one a row, the newest last."""
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for heading in ("when", "pool", "replicas", "effect", "reason", "asked for by", "seen"):
        table.add_column(heading, overflow="fold")
    for one in decisions:
        reason = "; ".join([one["reason"], *one["doubts"][1:]])
        table.add_row(
            time.strftime("%m-%d %H:%M:%S", time.localtime(one["at"])),
            one["pool"],
            f"{one['current']} -> {one['target']}",
            one["effect"],
            reason,
            _numbers(one["needs"]),
            _numbers(one["inputs"]),
        )
    return table


def _numbers(values: Mapping[str, Any]) -> str:
    """`waiting 1.5, kv 0.25`; what nobody could tell is left out."""
    told = {name: value for name, value in values.items() if value is not None}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in told.items()
    )
