"""`headrace quota`: who has the GPUs that tenants share, who borrows, who waits, and why."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console, Group
from rich.table import Table

from headrace.errors import NotFound
from headrace.fleet import controller_call
from headrace.fleet.quota_status import HolderRow, QuotaStatus, TenantRow, WaiterRow
from headrace.fleet.screen import duration


class NoQuotas(NotFound):
    """The fleet shares no GPUs."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command."""
    parser = subparsers.add_parser("quota", help="show who holds, borrows and waits for GPUs, and why")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    controller_call.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the tables. Raises NoQuotas, or NothingRuns with one line when there is no fleet."""
    status: QuotaStatus | None = controller_call.ask(args, lambda controller: controller.quota.remote()).value
    if status is None:
        raise NoQuotas("this fleet's tenants share no GPUs; set tenants[].gpus")
    show(status, args.json, sys.stdout)
    return 0


def show(status: QuotaStatus, as_json: bool, out: TextIO) -> None:
    """Print to `out`; a pipe has no width to fit into, so nothing is cut there."""
    if as_json:
        print(json.dumps(as_data(status), indent=2), file=out)
    else:
        Console(file=out, width=None if out.isatty() else 200, highlight=False).print(tables(status))


def as_data(status: QuotaStatus) -> dict[str, Any]:
    """What `--json` prints: {fleet, tenants, replicas, waiting, nodes}, each a list of mappings."""
    data = asdict(status)
    for row in data["replicas"]:
        row["spots"] = [spot._asdict() for spot in row["spots"]]
    return data


def tables(status: QuotaStatus) -> Group:
    """Tenants, replicas with GPUs, replicas that wait."""
    parts: list[Table] = [_tenant_table(status.fleet, status.tenants)]
    if status.replicas:
        parts.append(_holder_table(status.replicas))
    if status.waiting:
        parts.append(_waiter_table(status.waiting))
    return Group(*(part for one in parts for part in (one, "")))


def _table(title: str, words: str, numbers: str, rest: str = "") -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for heading in words.split():
        table.add_column(heading)
    for heading in numbers.split():
        table.add_column(heading, justify="right")
    for heading in rest.split():
        table.add_column(heading)
    return table


def _tenant_table(fleet: str, rows: tuple[TenantRow, ...]) -> Table:
    table = _table(
        f"fleet {fleet}, in GPUs",
        "tenant kind",
        "nominal held borrowed lent draining waiting",
        "may-borrow lends weight",
    )
    for row in rows:
        numbers = (row.nominal, row.held, row.borrowed, row.lent, row.draining, row.waiting)
        table.add_row(
            row.tenant,
            row.kind,
            *map(str, numbers),
            "any" if row.borrowing_limit is None else str(row.borrowing_limit),
            "all" if row.lending_limit is None else str(row.lending_limit),
            f"{row.weight:g}",
        )
    return table


def _holder_table(rows: tuple[HolderRow, ...]) -> Table:
    table = _table("replicas with GPUs", "replica tenant kind", "gpus for", "node state why")
    for row in rows:
        state = "holds"
        if row.is_draining:
            state = f"drains for {row.drains_for}" if row.drains_for else "drains"
        nodes = ", ".join(
            spot.node_id[:12] if len(row.spots) == 1 else f"{spot.node_id[:12]}:{spot.gpus}"
            for spot in row.spots
        )
        table.add_row(
            row.replica, row.tenant, row.kind, str(row.gpus), duration(row.held_s), nodes, state, row.reason
        )
    return table


def _waiter_table(rows: tuple[WaiterRow, ...]) -> Table:
    table = _table("replicas that wait", "replica tenant kind", "gpus for", "why")
    for row in rows:
        table.add_row(row.replica, row.tenant, row.kind, str(row.gpus), duration(row.waited_s), row.reason)
    return table
