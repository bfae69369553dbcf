"""`headrace apply`: bring a running fleet to another configuration, by the least that the difference needs."""

from __future__ import annotations

import argparse
import sys

from headrace import config as configuration
from headrace.fleet import controller_call, preflight, rollout_watch
from headrace.fleet.config_diff import ConfigDiff, lines
from headrace.fleet.screen import Screen


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command."""
    parser = subparsers.add_parser(
        "apply",
        help="bring a running fleet to another configuration",
        description="Compare CONFIG with what the running fleet goes by, and change no more than the difference needs: "
        "settings are taken over live, counts follow, and only replicas of pools that are made otherwise are replaced, "
        "one after another. The fleet carries it out; this command shows it and may be left at any time.",
    )
    parser.add_argument("config", metavar="CONFIG", help="the configuration, a YAML file")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    rollout_watch.add_arguments(parser)
    controller_call.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Return 0 once the fleet is as CONFIG says. Raises HeadraceError with the reason when it does not get there."""
    config = preflight.with_absolute_sources(configuration.load(args.config))
    pace, id, screen = rollout_watch.pace_of(args), rollout_watch.new_id(), Screen()
    out = sys.stdout
    preflight.check_sources(config)
    preflight.check_caches(config)
    with controller_call.line(args) as line:
        found: ConfigDiff = line.ask(lambda controller: controller.difference.remote(config))
        for text in lines(found):
            print(text, file=out)
        if args.dry_run:
            if found.is_empty:
                print("nothing to do", file=out)
            return 0
        screen.seen(line.ask(lambda controller: controller.status.remote()))
        rollout = line.ask(lambda controller: controller.apply.remote(config, id, pace))
        if rollout is None or rollout.id != id:
            # Nothing differs; a rollout that is on its way to this very configuration is waited for.
            if rollout is None or not rollout.is_rolling:
                print("nothing to do", file=out)
                return 0
            id = rollout.id
        return rollout_watch.see_out(line, id, screen, args, out=out, done="applied")
