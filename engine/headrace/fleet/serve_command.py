"""`headrace serve`: bring up the fleet of a configuration and serve it."""

from __future__ import annotations

import argparse
import os

import uvloop

from headrace import config as configuration
from headrace.config import Config, Gateway
from headrace.fleet import run_file
from headrace.fleet.launch import Launch
from headrace.fleet.raw_output import RawOutput
from headrace.fleet.screen import Screen


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command."""
    parser = subparsers.add_parser("serve", help="bring up the fleet of a configuration and serve it")
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `headrace serve`."""
    parser.add_argument("config", metavar="CONFIG", help="the configuration, a YAML file")
    parser.add_argument("--host", help="address to listen on (default: gateway.host of CONFIG)")
    parser.add_argument(
        "--port", type=int, help="port to listen on, 0 takes a free one (default: gateway.port of CONFIG)"
    )
    parser.add_argument(
        "--gateways",
        type=int,
        metavar="N",
        help="gateway processes that share the port (default: gateway.processes of CONFIG)",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="the running Ray cluster to join, or `auto` (default: start one on this machine)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Raises HeadraceError when it cannot start; nothing is left then."""
    config = configuration.load(args.config)
    gateway = with_overrides(config, args.host, args.port, args.gateways).gateway
    raw = RawOutput(run_file.folder() / f"{os.getpid()}.stderr")
    raw.divert()
    screen = Screen()
    # The fleet goes by the file, so that `headrace apply` of that file finds nothing to do.
    launch = Launch(config, screen, args.address, gateway=gateway)
    try:
        uvloop.run(launch.run())
    finally:
        if launch.logs is None:
            raw.remove()
        else:
            raw.keep_in(launch.logs)
            screen.say(f"logs: {launch.logs}")
    screen.say("stopped")
    return 0


def with_overrides(
    config: Config, host: str | None, port: int | None, processes: int | None = None
) -> Config:
    """The configuration with the command line's address. Raises ConfigError for a port that cannot be."""
    given = {
        name: value
        for name, value in (("host", host), ("port", port), ("processes", processes))
        if value is not None
    }
    gateway = configuration.node(Gateway, {**config.gateway.model_dump(), **given}, at="gateway")
    return config.model_copy(update={"gateway": gateway})
