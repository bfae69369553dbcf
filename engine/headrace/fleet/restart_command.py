"""`headrace restart`: replace replicas of a running fleet while the others serve."""

from __future__ import annotations

import argparse
import sys

from headrace.fleet import controller_call, rollout_watch
from headrace.fleet.screen import Screen


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command."""
    parser = subparsers.add_parser(
        "restart",
        help="replace replicas of a running fleet while the others serve",
        description="`restart REPLICA` replaces one, `restart --rolling [POOL]` those of a pool, or all, one after "
        "another: a successor starts first where there is room, else the old one drains first. Nothing that runs is "
        "cut. The fleet carries it out; this command shows it and may be left at any time.",
    )
    parser.add_argument(
        "name", nargs="?", metavar="REPLICA|POOL", help="which; with --rolling none means all"
    )
    parser.add_argument("--rolling", action="store_true", help="every replica of the pool, or of the fleet")
    rollout_watch.add_arguments(parser)
    controller_call.add_arguments(parser)
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Return 0 once all are replaced. Raises HeadraceError with the reason when that does not happen."""
    if args.name is None and not args.rolling:
        args.usage_error("name a replica, or say --rolling")
    pace, id, screen = rollout_watch.pace_of(args), rollout_watch.new_id(), Screen()
    out = sys.stdout
    with controller_call.line(args) as line:
        screen.seen(line.ask(lambda controller: controller.status.remote()))
        line.ask(lambda controller: controller.restart.remote(args.name, args.rolling, id, pace))
        return rollout_watch.see_out(line, id, screen, args, out=out, done="restarted")
