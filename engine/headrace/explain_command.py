"""`headrace explain`: a gateway's last routing decisions, each with what the candidates would have cost."""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from typing import Any

from rich.console import Console
from rich.table import Table

from headrace.errors import NotFound, ShortageError
from headrace.fleet import run_file

_URL = "http://127.0.0.1:8000"
_MOST = 256
_TIMEOUT_S = 5.0
_MAX_CANDIDATES = 8


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command."""
    parser = subparsers.add_parser(
        "explain", help="show the gateway's last routing decisions and their reasons"
    )
    parser.add_argument(
        "--url",
        help=f"the gateway, asked from its own machine (default: the fleet on this machine, else {_URL})",
    )
    parser.add_argument(
        "-n", "--last", type=_count, default=10, metavar="N", help="how many, at most 256 (default: 10)"
    )
    parser.add_argument("--request-id", metavar="ID", help="only the request with this x-request-id")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(args: argparse.Namespace) -> int:
    """Print them, newest first."""
    url = args.url or _running_gateway()
    decisions = fetch(url.rstrip("/"), _MOST if args.request_id else args.last)
    if args.request_id:
        decisions = [entry for entry in decisions if entry["request_id"] == args.request_id]
    if args.json:
        print(json.dumps(decisions, indent=2))
    else:
        show(decisions, Console())
    return 0


def _running_gateway() -> str:
    """Of the fleet on this machine; without one it may be `headrace route`, at its default address."""
    runs = run_file.running()
    if len(runs) > 1:
        urls = ", ".join(run.url for run in runs)
        raise NotFound(f"several fleets run on this machine: {urls}; choose one with --url")
    return runs[0].url if runs else _URL


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"it must be a whole number from 1 to {_MOST}, not {text!r}")
    return int(text)


def fetch(url: str, count: int) -> list[dict[str, Any]]:
    """Ask a gateway. Raises ShortageError when it does not answer, NotFound when it is not one of ours."""
    try:
        with urllib.request.urlopen(f"{url}/headrace/decisions?last={count}", timeout=_TIMEOUT_S) as response:
            decisions: list[dict[str, Any]] = json.load(response)["decisions"]
            return decisions
    except urllib.error.HTTPError as error:
        raise NotFound(
            f"{url} has no decisions to show (HTTP {error.code}); is it a Headrace gateway?"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "reason", error)
        raise ShortageError(f"no gateway answers at {url}: {reason}; name it with --url") from None


def show(decisions: list[dict[str, Any]], console: Console) -> None:
    """A row per decision; the cheapest candidates behind it."""
    if not decisions:
        console.print("no decisions yet: the gateway has routed nothing")
        return
    table = Table(
        "request", "model", "replica", "why", "basis", "prompt", "hit", "candidates: cost (hit)", box=None
    )
    for entry in decisions:
        candidates = sorted(entry["candidates"], key=lambda c: (c["cost"] is None, c["cost"]))[
            :_MAX_CANDIDATES
        ]
        costs = ", ".join(
            f"{c['replica']} {c['cost']:g}" + (f" ({c['hit_tokens']:g})" if c["hit_tokens"] else "")
            for c in candidates
            if c["cost"] is not None
        )
        attempt = f" (try {entry['attempt']})" if entry["attempt"] > 1 else ""
        waited = f", after {entry['waited_s']:.2f} s in the queue" if entry.get("waited_s") else ""
        table.add_row(
            entry["request_id"] + attempt,
            entry["model"],
            _where(entry),
            entry["reason"] + waited,
            entry["basis"],
            "" if entry["prompt_tokens"] is None else str(entry["prompt_tokens"]),
            str(entry["predicted_hit_tokens"] or ""),
            costs,
        )
    console.print(table)


def _where(entry: dict[str, Any]) -> str:
    """The replica that answers; before it the one that computes the prompt and what the transfer should take."""
    prefill = entry.get("prefill")
    if not prefill:
        return str(entry["replica"])
    return f"{prefill['replica']} -> {entry['replica']} ({prefill['transfer_s'] * 1000:.0f} ms)"
